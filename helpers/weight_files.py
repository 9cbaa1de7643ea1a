"""Model weights as safetensors files: read one tensor at a time, and written so that a stop leaves nothing half done.

The format (https://github.com/huggingface/safetensors, "Format"): the length of a JSON header in 8 bytes, the header
with each tensor's dtype, shape and place, and then the tensors. Knowing shapes beforehand is enough to write a file
tensor by tensor, without holding all of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from helpers.errors import SettingsError, UserError

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of the safetensors files in a folder, read when they are asked for.

    Raises UserError where there is none: other formats are not read.
    """

    def __init__(self, folder: Path, names: str = "*.safetensors") -> None:
        self.files = sorted(folder.glob(names))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = [folder / n for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if not self.files:
            raise UserError(f"{folder} has no weights as safetensors")
        self._open: dict[Path, Any] = {}
        self._where = {name: file for file in self.files for name in self._in(file).keys()}  # noqa: SIM118 (no iterator)

    def _in(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor; its pages are the file's until they are written to."""
        found: torch.Tensor = self._in(self._where[name]).get_tensor(name)
        return found

    def entry(self, name: str) -> Entry:
        part = self._in(self._where[name]).get_slice(name)
        return Entry(name, tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def stamp(self) -> list[list[Any]]:
        """What tells these files from others: names, sizes and times."""
        return [[f.name, (s := f.stat()).st_size, s.st_mtime_ns] for f in self.files]


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500 MB" or "1GiB". Raises SettingsError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", text.upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match and (match[2] or "") in UNITS else 0
    if size < 1:
        raise SettingsError(f"--max_shard_size takes a size such as 2GB or 500MB, not {text!r}")
    return size


def plan_shards(entries: list[Entry], largest: int) -> dict[str, list[Entry]]:
    """File names, and what each holds, in order; a file is above `largest` bytes where a single tensor is."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > largest:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _header(entries: list[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        place = (end, end := end + entry.size)
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_whole(file: Path, entries: list[Entry]) -> bool:
    """Whether a file that should hold `entries` is there with all of its bytes."""
    size = len(_header(entries)) + sum(entry.size for entry in entries)
    return file.is_file() and file.stat().st_size == size


def write_shard(file: Path, entries: list[Entry], tensor: Callable[[str], torch.Tensor], told: Any = None) -> None:
    """Write a file beside its name, one tensor at a time, and give it its name when it is whole.

    One tensor is made while the one before it is written. `told` is called with the bytes of each that is.
    """
    draft = file.with_name(file.name + ".part")
    with draft.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as writer:
        before: Future[Any] = writer.submit(_write, out, memoryview(_header(entries)))
        for entry in entries:
            value = tensor(entry.name).detach()
            if tuple(value.shape) != entry.shape:
                raise ValueError(f"{entry.name} is {tuple(value.shape)}, not {entry.shape}")
            content = value.to(entry.dtype).contiguous().view(-1).view(torch.uint8).numpy()
            before.result()
            before = writer.submit(_write, out, content.data, told)
        before.result()
    draft.replace(file)


def _write(out: Any, content: memoryview, told: Any = None) -> None:
    whole = len(content)
    while len(content):  # a raw file may take less than it is given
        content = content[out.write(content) :]
    if told:
        told(whole)


def write_index(folder: Path, shards: dict[str, list[Entry]]) -> None:
    """The index that a model in several files has."""
    if len(shards) > 1:
        total = sum(entry.size for entries in shards.values() for entry in entries)
        places = {entry.name: file for file, entries in shards.items() for entry in entries}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
