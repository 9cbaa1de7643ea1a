"""Datasets from the Hub, files and folders: which rows to read, and in what format they are."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import glob
import json
import random
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import REPO, SettingsError, UserError, describe_error, find_path, read_jsonl
from helpers.data.formats import FORMAT_READERS, INSTRUCTION_READERS, RowFormat

if TYPE_CHECKING:
    from datasets import Dataset


FILE_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
FORMAT_ALIASES = {"triplet": "pairs", "transcript": "hh"}
PROBED_ROWS = 100  # rows that show whether a column holds lists
REQUIRED_COLUMNS = {  # "a or b": one of the two
    "messages": ("chosen", "rejected"),
    "pairs": ("prompt", "chosen", "rejected"),
    "orca": ("question or input", "chosen", "rejected"),
    "ranked": ("prompt", "answers"),
    "hh": ("chosen", "rejected"),
    "alpaca_farm": ("instruction", "output_1", "output_2", "preference"),
    "scored": ("prompt or instruction or question", "completions or responses"),
}
INSTRUCTION_COLUMNS = {"messages": {"messages"}, "completion": {"prompt", "completion"},
                       "alpaca": {"instruction", "output"}}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A dataset to read: a Hub id, a file or glob of files, or a folder.

    `fraction` is the share of its rows to use, `eval_split` a split that is only evaluated on. `format` is "auto" or a
    name of FORMAT_READERS or INSTRUCTION_READERS. `any_split` allows another split for training if `split` is missing.
    """

    id: str
    config: str = ""
    split: str = "train"
    revision: str = ""
    format: str = "auto"
    eval_split: str = ""
    fraction: float = 1.0
    any_split: bool = False

    @property
    def is_file_name(self) -> bool:
        """Whether the id can only mean files: it is a glob, or ends like a file of rows."""
        return glob.has_magic(self.id) or Path(self.id).suffix in FILE_READERS

    @property
    def files(self) -> list[str]:
        """The files that a path or a glob means, from the working directory or else from the repository."""
        path = find_path(self.id)
        if path is not None:
            return [str(path)] if path.is_file() else []
        return sorted(glob.glob(self.id, recursive=True) or glob.glob(str(REPO / self.id), recursive=True))

    @property
    def name(self) -> str:
        """The last part of the id, for row numbers such as "pairs.jsonl train 7"."""
        return self.id.rstrip("/").rpartition("/")[2]


def parse_dataset_specs(settings: Any) -> list[DatasetSpec]:
    """The datasets of `settings.dataset_id`. Each entry is an id or a JSON object with fields of DatasetSpec.

    Fields that an object lacks come from dataset_config, dataset_split, dataset_revision, data_format and eval_split.
    Raises SettingsError.
    """
    common = {key: getattr(settings, f"dataset_{key}") for key in ("config", "split", "revision")}
    common |= {"format": settings.data_format, "eval_split": settings.eval_split}
    is_default_split = settings.sources.get("dataset_split") == "default"
    specs = [_parse_spec(text, common, is_default_split) for text in settings.dataset_id]
    if not specs:
        raise SettingsError("--dataset_id is empty. Give a Hub id, a file or a folder.")
    return specs


def _parse_spec(text: str, common: dict[str, str], is_default_split: bool) -> DatasetSpec:
    try:
        entry = json.loads(text) if text.startswith("{") else {"id": text}
    except json.JSONDecodeError as error:
        raise SettingsError(f"--dataset_id {text!r} is not JSON: {error}.") from None
    fields = [f.name for f in dataclasses.fields(DatasetSpec) if f.name != "any_split"]
    for key, value in entry.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Use {', '.join(fields)}."
            raise SettingsError(f"--dataset_id {text!r} has an unknown key {key!r}. {hint}")
        if not isinstance(value, (int, float) if key == "fraction" else str):
            raise SettingsError(f"--dataset_id {text!r}: {key} must be a {'number' if key == 'fraction' else 'text'}.")
    spec = DatasetSpec(**{"id": "", **common, **entry, "any_split": is_default_split and "split" not in entry})
    if not spec.id or not 0 < spec.fraction <= 1:
        raise SettingsError(f"--dataset_id {text!r} needs an id, and a fraction above 0 and at most 1.")
    if spec.eval_split and (spec.eval_split == spec.split or spec.files):
        problem = "also the training split" if spec.eval_split == spec.split else "not available: a file has no splits"
        raise SettingsError(f"--eval_split {spec.eval_split} is {problem}. Use `--eval_rows` instead.")
    if spec.format in FORMAT_ALIASES:
        spec = dataclasses.replace(spec, format=FORMAT_ALIASES[spec.format])
        print(f"note: the data format {entry.get('format', common['format'])} is now {spec.format}", file=sys.stderr)
    return spec


def load_rows(spec: DatasetSpec, split: str = "") -> Dataset:
    """One split of a dataset, `spec.split` by default. Raises UserError."""
    from datasets.exceptions import DatasetsError

    split, files = split or spec.split, [Path(file) for file in spec.files]
    try:
        _check_text_files(files)
        rows = _load(spec, split).with_format(None)
    except (OSError, ValueError, LookupError, RuntimeError, StopIteration, DatasetsError) as error:  # and the Hub's
        if spec.any_split and split == spec.split and (other := _training_split(spec)):
            print(f"{spec.id} has no split {split!r}; using {other!r}.")
            return load_rows(dataclasses.replace(spec, split=other, any_split=False))
        for file in files:
            if file.suffix == ".jsonl":
                read_jsonl(file)  # names the line
        rows = _load_file_of_script(spec, split)
        if rows is None:
            is_empty = isinstance(error, StopIteration | IndexError)
            local = " ".join(str(error.__cause__ or error).split())[:300]
            reason = "it has no rows" if is_empty else local if files else describe_error(error)
            raise UserError(f"dataset {spec.id!r}, split {split!r}, cannot be loaded: {reason}") from None
    if not len(rows):
        raise UserError(f"dataset {spec.id!r}, split {split!r}, has no rows")
    return rows


def _check_text_files(files: list[Path]) -> None:
    """Name what datasets does not: an empty file, a line that is not UTF-8 or not an object."""
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file.name} is empty")
        if file.suffix not in (".json", ".jsonl", ".csv"):
            continue
        with file.open("rb") as content:
            for number, line in enumerate(content, 1):
                try:
                    text = line.decode("utf-8-sig").lstrip()
                except UnicodeDecodeError as error:
                    raise UserError(f"{file.name}, line {number}, is not UTF-8: {error.reason}") from None
                if file.suffix == ".jsonl" and text and not text.startswith("{"):
                    raise UserError(f"{file.name}, line {number}, is not a JSON object")


def _load(spec: DatasetSpec, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk

    path, files = find_path(spec.id), spec.files
    if files:
        readers = {FILE_READERS.get(Path(file).suffix, "") for file in files}
        if len(readers) > 1 or "" in readers:
            raise UserError(f"dataset {spec.id!r} must be files of one type. Use one of {', '.join(FILE_READERS)}.")
        as_text: dict[str, Any] = {}
        if readers == {"csv"}:  # every cell is text: an answer may be "None", or a number
            with open(files[0], encoding="utf-8-sig", newline="") as lines:
                names = next(csv.reader(lines))
            as_text = {"features": Features(dict.fromkeys(names, Value("string"))), "keep_default_na": False}
        return load_dataset(readers.pop(), data_files=[glob.escape(file) for file in files], split="train", **as_text)
    if path is None and spec.is_file_name:
        raise UserError(f"dataset {spec.id!r} does not exist: there is no such file")
    if path and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = load_from_disk(str(path))
        if isinstance(saved, Dataset):
            return saved
        if split not in saved:
            raise LookupError(f"it has {', '.join(map(str, saved))}")
        return DatasetDict(saved)[split]
    revision = None if path else spec.revision or None
    return load_dataset(str(path or spec.id), spec.config or None, split=split, revision=revision)


def _training_split(spec: DatasetSpec) -> str:
    """The only split, or the only one whose name begins with train; "" if neither exists."""
    from datasets import DatasetDict, get_dataset_split_names, load_from_disk

    path = find_path(spec.id)
    try:
        if path and (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            names = [str(name) for name in saved] if isinstance(saved, DatasetDict) else []
        else:
            names = get_dataset_split_names(str(path or spec.id), spec.config or None)
    except Exception:  # the error of the first attempt says more
        return ""
    train = [name for name in names if name.startswith("train")]
    return next((choice[0] for choice in (names, train) if len(choice) == 1), "")


def _load_file_of_script(spec: DatasetSpec, split: str) -> Dataset | None:
    """The data file next to a loader script, which datasets no longer runs: tatsu-lab/alpaca_farm has
    alpaca_human_preference.json for the configuration of that name. None if there is no such file."""
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    stems = (spec.config, f"{spec.config}/{split}") if spec.config and find_path(spec.id) is None else ()
    for name in [stem + suffix for stem in stems for suffix in (".json", ".jsonl", ".parquet", ".csv")]:
        try:
            file = hf_hub_download(spec.id, name, repo_type="dataset", revision=spec.revision or None)
        except (OSError, ValueError):  # no such file, or no such repository
            continue
        return load_dataset(FILE_READERS[Path(name).suffix], data_files=file, split="train")
    return None


def subsample(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, list[int]]:
    """A seeded share of `rows` in their order, and their indices."""
    if fraction == 1:
        return rows, list(range(len(rows)))
    indices = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return rows.select(indices), indices


def choose_format(rows: Dataset, data_format: str, use_pairs: bool) -> RowFormat:
    """How to read a dataset: as `data_format`, or with "auto" as its columns suggest.

    Raises SettingsError for an unknown format, UserError for columns that do not fit.
    """
    columns, needs = rows.column_names, "prompt, chosen and rejected"
    known, fitting = list(FORMAT_READERS), list[str]()
    if not use_pairs:
        needs = "messages, prompt and completion, or instruction and output"
        known = list(INSTRUCTION_READERS | FORMAT_READERS)
        fitting = [name for name, required in INSTRUCTION_COLUMNS.items() if required <= set(columns)]
    name = data_format
    if data_format == "auto":
        name = fitting[0] if fitting else detect_format(list_columns(rows))
    if name and name not in known:
        raise SettingsError(f"--data_format {name!r} is unknown. Use auto, {', '.join(known)}.")
    if name in fitting:
        return RowFormat(name, "conversations")
    if name not in FORMAT_READERS:
        raise UserError(
            f"the dataset has columns {', '.join(columns)}, which match no known format. Rename them to {needs}, or "
            f"set `--data_format` to one of {', '.join(known)}."
        )
    check_columns(name, columns)
    return RowFormat(name, "pairs" if use_pairs else "chosen")


def list_columns(rows: Dataset) -> dict[str, bool]:
    """Columns of a dataset, and whether most of their first values are lists."""
    first = {name: [v for v in values if v is not None] for name, values in rows[:PROBED_ROWS].items()}
    return {name: 2 * sum(isinstance(v, list) for v in values) > len(values) for name, values in first.items()}


def detect_format(columns: dict[str, bool]) -> str:
    """The preference format of a dataset with these columns (True: the column holds lists), or ""."""
    names = set(columns)
    if {"chosen", "rejected"} <= names:
        if columns["chosen"]:
            return "messages"
        if "question" in names or ("input" in names and "prompt" not in names):
            return "orca"
        return "pairs" if "prompt" in names else "hh"
    if {"instruction", "output_1", "output_2", "preference"} <= names:
        return "alpaca_farm"
    if {"prompt", "answers"} <= names and columns["answers"]:
        return "ranked"
    has_answers = columns.get("completions") or {"responses", "scores"} <= names
    return "scored" if {"prompt", "instruction", "question"} & names and has_answers else ""


def check_columns(name: str, columns: Collection[str]) -> None:
    """Raise UserError if a column that the preference format `name` needs is missing."""
    if missing := [need for need in REQUIRED_COLUMNS[name] if not set(need.split(" or ")) & set(columns)]:
        raise UserError(
            f"the dataset has columns {', '.join(columns)}, and no {', no '.join(missing)}, which the format {name} "
            "needs. Rename them, or use another `--data_format`."
        )
