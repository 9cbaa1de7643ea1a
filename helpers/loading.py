"""Rows from anywhere: the Hub, files, folders; one set, or several with a share of each."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import SettingsError, UserError
from helpers.paths import REPO, find_path
from helpers.rows import read_lines

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset to read: a Hub id, a file or glob of files, or a folder; `fraction` is the share of its rows taken.

    `eval_split` is a split that is only evaluated on; `format` is one of `formats.ADAPTERS` or
    `instructions.READERS`, or "auto".
    """

    id: str
    config: str = ""
    split: str = "train"
    revision: str = ""
    format: str = "auto"
    eval_split: str = ""
    fraction: float = 1.0

    @property
    def name(self) -> str:
        """Short, to tell its rows from another's."""
        return self.id.rstrip("/").rpartition("/")[2]


def read_sources(settings: Any) -> list[Source]:
    """What `settings.dataset_id` names: each is an id, or an object (in a recipe, a mapping) with Source's fields.

    dataset_config, dataset_split, dataset_revision, data_format and eval_split hold where an object says nothing.
    Raises SettingsError.
    """
    common = {
        "config": settings.dataset_config,
        "split": settings.dataset_split,
        "revision": settings.dataset_revision,
        "format": settings.data_format,
        "eval_split": settings.eval_split,
    }
    sources = []
    for text in settings.dataset_id:
        try:
            entry = json.loads(text) if text.startswith("{") else {"id": text}
        except json.JSONDecodeError as error:
            raise SettingsError(f"--dataset_id {text!r} is not JSON: {error}") from None
        fields = {f.name: f.type for f in dataclasses.fields(Source)}
        for key, value in entry.items():
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
                raise SettingsError(f"--dataset_id {text!r} has an unknown key {key!r}: {hint}")
            if not isinstance(value, (int, float) if key == "fraction" else str):
                raise SettingsError(f"--dataset_id {text!r}: {key} is a {'number' if key == 'fraction' else 'text'}")
        source = Source(**{"id": "", **common, **entry})
        if not source.id or not 0 < source.fraction <= 1:
            raise SettingsError(f"--dataset_id {text!r} needs an id, and a fraction above 0, at most 1")
        sources.append(source)
    if not sources:
        raise SettingsError("--dataset_id is empty: name a Hub id, a file or a folder")
    return sources


def load_rows(source: Source, split: str = "") -> Dataset:
    """One split of a source, `source.split` unless told otherwise. Raises UserError."""
    from datasets.exceptions import DatasetsError

    split = split or source.split
    try:
        return _load(source, split)
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:  # the Hub client's are of these
        rows = _file_beside_script(source, split)
        if rows is not None:
            return rows
        reason = _broken_line(source.id) or " ".join(str(error).split())[:300]
        raise UserError(f"dataset {source.id!r}, split {split!r}, cannot be loaded: {reason}") from None


def _load(source: Source, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    files = _files(source.id)
    if files:
        kinds = {READERS.get(Path(file).suffix) for file in files}
        if len(kinds) > 1 or None in kinds:
            raise UserError(f"dataset {source.id!r}: files are of one kind, one of {', '.join(READERS)}")
        return load_dataset(str(kinds.pop()), data_files=files, split="train")
    path = find_path(source.id)
    if path is None:
        if glob.has_magic(source.id) or Path(source.id).suffix in READERS:
            raise UserError(f"dataset {source.id!r}: there is no such file")
        return load_dataset(source.id, source.config or None, split=split, revision=source.revision or None)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, Dataset) else DatasetDict(saved)[split]
    return load_dataset(str(path), source.config or None, split=split)


def _files(name: str) -> list[str]:
    """The files that a path or a glob names: from where one is, else from the repository."""
    path = find_path(name)
    if path is not None:
        return [str(path)] if path.is_file() else []
    return sorted(glob.glob(name, recursive=True) or glob.glob(str(REPO / name), recursive=True))


def _file_beside_script(source: Source, split: str) -> Dataset | None:
    """The data file of a repository that has a loader script, which datasets no longer runs: tatsu-lab/alpaca_farm has
    alpaca_human_preference.json for the configuration alpaca_human_preference. None where there is no such file."""
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    if not source.config or find_path(source.id) is not None:
        return None
    for stem in (source.config, f"{source.config}/{split}"):
        for suffix in (".json", ".jsonl", ".parquet", ".csv"):
            try:
                file = hf_hub_download(source.id, stem + suffix, repo_type="dataset", revision=source.revision or None)
            except (OSError, ValueError):  # no such file there, or a repository that cannot be read at all
                continue
            return load_dataset(READERS[suffix], data_files=file, split="train")
    return None


def _broken_line(name: str) -> str:
    """Where a local JSONL file is not JSON, for datasets does not say; "" where that is not the fault."""
    for file in _files(name):
        if not file.endswith(".jsonl"):
            continue
        try:
            read_lines(Path(file))
        except UserError as error:
            return str(error)
    return ""


def sample(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, list[int]]:
    """A seeded share of `rows`, in their order, and the number that each has among all."""
    if fraction == 1:
        return rows, list(range(len(rows)))
    numbers = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return rows.select(numbers), numbers
