"""Rows from anywhere: the Hub, files, folders; one set, or several with a share of each."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import glob
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import REPO, SettingsError, UserError, describe_error, find_path, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset


FILE_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
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
    any_split: bool = False  # the split was not asked for: where it is not there, another for training will do

    @property
    def is_file_name(self) -> bool:
        """Whether the id can only mean files: it is a glob, or ends like a file of rows."""
        return glob.has_magic(self.id) or Path(self.id).suffix in FILE_READERS

    @property
    def name(self) -> str:
        """Short, to tell its rows from another's."""
        return self.id.rstrip("/").rpartition("/")[2]


def parse_dataset_specs(settings: Any) -> list[DatasetSpec]:
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
    guessed = settings.sources.get("dataset_split") == "default"
    sources = []
    for text in settings.dataset_id:
        try:
            entry = json.loads(text) if text.startswith("{") else {"id": text}
        except json.JSONDecodeError as error:
            raise SettingsError(f"--dataset_id {text!r} is not JSON: {error}") from None
        fields = [f.name for f in dataclasses.fields(DatasetSpec) if f.name != "any_split"]
        for key, value in entry.items():
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
                raise SettingsError(f"--dataset_id {text!r} has an unknown key {key!r}: {hint}")
            if not isinstance(value, (int, float) if key == "fraction" else str):
                raise SettingsError(f"--dataset_id {text!r}: {key} is a {'number' if key == 'fraction' else 'text'}")
        source = DatasetSpec(**{"id": "", **common, **entry, "any_split": guessed and "split" not in entry})
        if source.eval_split and (source.eval_split == source.split or _files(source.id)):
            why = (
                "is the split that is trained on"
                if source.eval_split == source.split
                else "is of a file, which has none"
            )
            raise SettingsError(f"--eval_split {source.eval_split} {why}: leave it out, and --eval_rows are held out")
        if not source.id or not 0 < source.fraction <= 1:
            raise SettingsError(f"--dataset_id {text!r} needs an id, and a fraction above 0, at most 1")
        sources.append(source)
    if not sources:
        raise SettingsError("--dataset_id is empty: name a Hub id, a file or a folder")
    return sources


def load_rows(source: DatasetSpec, split: str = "") -> Dataset:
    """One split of a source, `source.split` unless told otherwise. Raises UserError."""
    from datasets.exceptions import DatasetsError

    split = split or source.split
    try:
        files = [Path(file) for file in _files(source.id)]
        _refuse_unreadable(files)
        rows = _load(source, split).with_format(None)
    except (OSError, ValueError, LookupError, RuntimeError, StopIteration, DatasetsError) as error:  # and the Hub's
        if source.any_split and split == source.split and (other := _other_split(source)):
            print(f"{source.id}: there is no split {split!r}, so {other!r} is read.")
            return load_rows(dataclasses.replace(source, split=other, any_split=False))
        for file in files:
            if file.suffix == ".jsonl":
                read_jsonl(file)  # says which line it is
        beside = _file_beside_script(source, split)
        if beside is None:
            no_rows = isinstance(error, StopIteration | IndexError)
            why = "it has no rows" if no_rows else describe_error(error) if not files else _own_words(error)
            raise UserError(f"dataset {source.id!r}, split {split!r}, cannot be loaded: {why}") from None
        rows = beside
    if not len(rows):
        raise UserError(f"dataset {source.id!r}, split {split!r}, has no rows")
    return rows


def _own_words(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]


def _load(source: DatasetSpec, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk

    files = _files(source.id)
    if files:
        kinds = {FILE_READERS.get(Path(file).suffix) for file in files}
        if len(kinds) > 1 or None in kinds:
            raise UserError(f"dataset {source.id!r}: files are of one kind, one of {', '.join(FILE_READERS)}")
        kind = str(kinds.pop())
        as_text: dict[str, Any] = {}
        if kind == "csv":  # every cell is text: an answer may be "None", or a number
            with open(files[0], encoding="utf-8-sig", newline="") as lines:
                names = next(csv.reader(lines))
            as_text = {"features": Features(dict.fromkeys(names, Value("string"))), "keep_default_na": False}
        return load_dataset(kind, data_files=[glob.escape(file) for file in files], split="train", **as_text)
    path = find_path(source.id)
    if path is None:
        if source.is_file_name:
            raise UserError(f"dataset {source.id!r}: there is no such file")
        return load_dataset(source.id, source.config or None, split=split, revision=source.revision or None)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, Dataset):
            return saved
        if split not in saved:
            raise LookupError(f"it has {', '.join(map(str, saved))}")
        return DatasetDict(saved)[split]
    return load_dataset(str(path), source.config or None, split=split)


def _other_split(source: DatasetSpec) -> str:
    """The one split that there is, or the one that is named for training; "" where none stands out."""
    from datasets import DatasetDict, get_dataset_split_names, load_from_disk

    path = find_path(source.id)
    try:
        if path and (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            names = [str(name) for name in saved] if isinstance(saved, DatasetDict) else []
        else:
            names = get_dataset_split_names(str(path or source.id), source.config or None)
    except Exception:  # whatever it is, the first error says it better
        return ""
    named = [name for name in names if name.startswith("train")]
    return next((found[0] for found in (names, named) if len(found) == 1), "")


def _files(name: str) -> list[str]:
    """The files that a path or a glob names: from where one is, else from the repository."""
    path = find_path(name)
    if path is not None:
        return [str(path)] if path.is_file() else []
    return sorted(glob.glob(name, recursive=True) or glob.glob(str(REPO / name), recursive=True))


def _file_beside_script(source: DatasetSpec, split: str) -> Dataset | None:
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
            return load_dataset(FILE_READERS[suffix], data_files=file, split="train")
    return None


def _refuse_unreadable(files: list[Path]) -> None:
    """What datasets does not say of local files: which is empty, which line is not UTF-8, or not an object."""
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file.name} is empty")
        if file.suffix in (".json", ".jsonl", ".csv"):
            with file.open("rb") as content:
                for number, line in enumerate(content, 1):
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8").lstrip()
                    except UnicodeDecodeError as error:
                        raise UserError(f"{file.name}, line {number}, is not UTF-8: {error.reason}") from None
                    if file.suffix == ".jsonl" and text and not text.startswith("{"):
                        raise UserError(f"{file.name}, line {number}, is not a JSON object")


def subsample(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, list[int]]:
    """A seeded share of `rows`, in their order, and the number that each has among all."""
    if fraction == 1:
        return rows, list(range(len(rows)))
    numbers = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return rows.select(numbers), numbers
