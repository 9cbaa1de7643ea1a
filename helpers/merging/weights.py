"""Model weights as safetensors files: read one tensor at a time, and written so that a stop leaves nothing half done.

The format (https://github.com/huggingface/safetensors, "Format"): the length of a JSON header in 8 bytes, the header
with each tensor's dtype, shape and place, and then the tensors. Knowing shapes beforehand is enough to write a file
tensor by tensor, without holding all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from helpers.core import SettingsError, UserError, describe_error, find_path
from helpers.models.chat import eos_token_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.merging.merge import StreamingMerger
    from helpers.runs.run import Run


NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
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

    def entry(self, name: str) -> TensorSpec:
        part = self._in(self._where[name]).get_slice(name)
        return TensorSpec(name, tuple(part.get_shape()), DTYPES[part.get_dtype()])

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


def plan_shards(entries: list[TensorSpec], largest: int) -> dict[str, list[TensorSpec]]:
    """File names, and what each holds, in order; a file is above `largest` bytes where a single tensor is."""
    shards: list[list[TensorSpec]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > largest:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _header(entries: list[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        place = (end, end := end + entry.size)
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_complete(file: Path, entries: list[TensorSpec]) -> bool:
    """Whether a file that should hold `entries` is there with all of its bytes."""
    size = len(_header(entries)) + sum(entry.size for entry in entries)
    return file.is_file() and file.stat().st_size == size


def write_shard(file: Path, entries: list[TensorSpec], tensor: Callable[[str], torch.Tensor], told: Any = None) -> None:
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


def write_index(folder: Path, shards: dict[str, list[TensorSpec]]) -> None:
    """The index that a model in several files has."""
    if len(shards) > 1:
        total = sum(entry.size for entries in shards.values() for entry in entries)
        places = {entry.name: file for file, entries in shards.items() for entry in entries}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


ALL_OF_A_MODEL = ["*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "LICENSE*"]


def local_folder(model: str, revision: str = "") -> Path:
    """A model's or adapter's folder here: its own, or that in the Hub's cache once it is fetched. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if path := find_path(model):
        return path
    try:
        where: Any = {"revision": revision or None, "ignore_patterns": ["*/*", "consolidated*"]}
        found = Path(snapshot_download(model, allow_patterns=ALL_OF_A_MODEL, **where))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, allow_patterns=[*ALL_OF_A_MODEL, "*.bin"], **where))
        return found
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{model!r} cannot be fetched: {describe_error(error)}") from None


def adapter_as_run(folder: Path) -> Run:
    """An adapter from elsewhere as what a merge starts from: another file in the same place makes another merge."""
    from helpers.runs.run import Run

    content = hashlib.sha256()
    for file in sorted([*folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")]):
        with file.open("rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    return Run(folder.resolve(), {"fingerprint": content.hexdigest()[:16]})


def staging_dir(run: Run) -> Path:
    """Where a run's merged weights are written until they are whole, beside its folder and hidden."""
    return run.folder.with_name(f".{run.folder.name}.part")


def write_merged(
    folder: Path, merge: StreamingMerger, identity: dict[str, Any], largest: int, dtype: torch.dtype | None
) -> None:
    """Write the merged weights into `folder`, which need not exist; one that a stopped merge left is gone on with.

    Each file is written beside its name and renamed when it is whole, so what stands there is not written again.
    `identity` tells one merge from another: a folder of another is emptied first. Raises UserError where the disk has
    no room for what is missing.
    """
    from tqdm import tqdm

    shards = plan_shards(merge.entries(dtype), largest)
    plan = identity | {"base": merge.base.stamp(), "adapter": merge.added.stamp()}
    plan |= {"shards": {file: [[e.name, e.shape, str(e.dtype)] for e in entries] for file, entries in shards.items()}}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
    mark = folder / "merge.digest"
    if folder.exists() and not (mark.is_file() and mark.read_text() == digest):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    for draft in folder.glob("*.part"):
        draft.unlink()
    sizes = {file: sum(entry.size for entry in entries) for file, entries in shards.items()}
    missing = {file: size for file, size in sizes.items() if not is_complete(folder / file, shards[file])}
    if (free := shutil.disk_usage(folder).free) < (need := sum(missing.values()) + 2**20):
        raise UserError(f"the merged weights need {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free")
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="merging", mininterval=1) as bar:
        bar.update(sum(sizes.values()) - sum(missing.values()))
        for file, entries in shards.items():
            try:
                if file in missing:
                    write_shard(folder / file, entries, merge.tensor, bar.update)
            except OSError as error:
                raise UserError(f"writing the merged weights failed: {error}; the same command goes on") from None
    write_index(folder, shards)


def merge_with_peft(
    folder: Path,
    base: Path,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
    largest: int,
    trust_remote_code: bool = False,
) -> None:
    """What `Merge` does not know, in the memory that PEFT needs: that of the whole model. Raises UserError."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from helpers.models.plan import resize_embeddings

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", trust_remote_code=trust_remote_code
        )
        resize_embeddings(model, tokenizer)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        shutil.rmtree(folder, ignore_errors=True)
        (merged.to(dtype) if dtype else merged).save_pretrained(folder, max_shard_size=largest)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"PEFT does not merge this adapter: {' '.join(str(error).split())[:300]}") from None


def save_config(
    draft: Path, merge: StreamingMerger, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: Any
) -> None:
    """All that stands beside the weights: configuration, tokenizer with its template, code of the base's own."""
    from transformers import GenerationConfig

    config = merge.config
    if dtype is not None:
        config.dtype = config.get_text_config().dtype = dtype
    config.save_pretrained(draft)
    for name in ("generation_config.json", *(file.name for file in base.glob("*.py"))):
        if (base / name).is_file():
            shutil.copyfile(base / name, draft / name)
    tokenizer.save_pretrained(draft)
    file = draft / "generation_config.json"
    known = GenerationConfig.from_pretrained(draft) if file.is_file() else GenerationConfig.from_model_config(config)
    ends = known.eos_token_id if isinstance(known.eos_token_id, list) else [known.eos_token_id]
    if tokenizer.eos_token_id not in ends:  # a chat format may end its answers with another token than the base
        known.eos_token_id = eos_token_ids(tokenizer, known)
        known.save_pretrained(draft)


def finalize(run: Run, draft: Path, **fields: Any) -> None:
    """Finish the run in its draft, `fields` going into run.json, and give that the run's name in one step.

    An older merge of that name is whole until then.
    """
    folder, run.folder, run.overwrite = run.folder, draft, False
    curves = Path(run.record.get("parent_folder") or "") / "curves.png"  # of the training, for the card
    if curves.is_file():
        shutil.copyfile(curves, draft / "curves.png")
    run.finish(**fields)
    (draft / "merge.digest").unlink(missing_ok=True)  # last: until here a stopped run goes on with what is there
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    run.folder = folder
