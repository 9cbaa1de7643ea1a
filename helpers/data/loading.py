"""Datasets from the Hub, files and folders: which rows to read, and in what format they are."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import REPO, SettingsError, UserError, find_path, read_jsonl
from helpers.data.files import FILE_TYPES, as_json_lines, file_type
from helpers.data.formats import INSTRUCTION_FORMATS, PAIR_FORMATS, Format, PairingConfig, TrackedRow
from helpers.data.messages import MESSAGE_KEYS, ROLE_KEYS, DropRow, is_list_as_text, parse_hh, parse_text
from helpers.models.adapters import check_hub, describe_error

if TYPE_CHECKING:
    from datasets import Dataset


TEXT_TYPES = {"json", "jsonl", "csv"}
LIST_COLUMNS = ("completions", "responses", "answers", "scores", "rating", "history")
FORMAT_ALIASES = {"triplet": "pairs", "transcript": "hh"}
PROBED_ROWS = 100  # rows that show whether a column holds lists


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A dataset to read: a Hub id, a file or glob of files, or a folder.

    `fraction` is the share of its rows to use, `eval_split` a split that is only evaluated on. `format` is "auto" or
    the name of a format. `any_split` allows another split for training if `split` is missing.
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
        return glob.has_magic(self.id) or bool(file_type(self.id))

    @property
    def files(self) -> list[Path]:
        """The files that a path or a glob means, from the working directory or else from the repository."""
        path = find_path(self.id)
        if path is not None:
            return [path] if path.is_file() else []
        names = glob.glob(self.id, recursive=True) or glob.glob(str(REPO / self.id), recursive=True)
        return [Path(name) for name in sorted(names)]


def parse_dataset_specs(settings: Any) -> list[DatasetSpec]:
    """The datasets of `settings.dataset_id`. Each entry is an id or a JSON object with fields of DatasetSpec.

    Fields that an object lacks come from dataset_config, dataset_split, dataset_revision, data_format and eval_split.
    Raises SettingsError.
    """
    common = {key: getattr(settings, f"dataset_{key}") for key in ("config", "split", "revision")}
    common |= {"format": settings.data_format, "eval_split": settings.eval_split}
    common["any_split"] = settings.sources.get("dataset_split") == "default"
    if not settings.dataset_id:
        raise SettingsError("--dataset_id is empty. Give a Hub id, a file or a folder.")
    return [_parse_spec(text, common) for text in settings.dataset_id]


def _parse_spec(text: str, common: dict[str, Any]) -> DatasetSpec:
    try:
        entry = json.loads(text) if text.startswith("{") else {"id": text}
    except json.JSONDecodeError as error:
        raise SettingsError(f"--dataset_id {text!r} is not JSON: {error}.") from None
    fields = [field.name for field in dataclasses.fields(DatasetSpec) if field.name != "any_split"]
    for key, value in entry.items():
        if key not in fields:
            raise SettingsError(f"--dataset_id {text!r} has an unknown key {key!r}. Use {', '.join(fields)}.")
        if not isinstance(value, (int, float) if key == "fraction" else str):
            raise SettingsError(f"--dataset_id {text!r}: {key} must be a {'number' if key == 'fraction' else 'text'}.")
    spec = DatasetSpec(**{"id": "", **common, **entry, "any_split": common["any_split"] and "split" not in entry})
    if not spec.id or not 0 < spec.fraction <= 1:
        raise SettingsError(f"--dataset_id {text!r} needs an id, and a fraction above 0 and at most 1.")
    if spec.eval_split and (spec.eval_split == spec.split or spec.files):
        problem = "not available: a file has no splits" if spec.files else "also the training split"
        raise SettingsError(f"--eval_split {spec.eval_split} is {problem}. Use `--eval_rows` instead.")
    if new := FORMAT_ALIASES.get(spec.format):
        print(f"note: the data format {spec.format} is now {new}", file=sys.stderr)
        spec = dataclasses.replace(spec, format=new)
    return spec


def load_rows(spec: DatasetSpec, split: str = "") -> Dataset:
    """One split of a dataset, `spec.split` by default. Raises UserError."""
    from datasets.exceptions import DatasetsError

    split, what = split or spec.split, f"dataset {spec.id!r}, split {split or spec.split!r},"
    try:
        rows = _load(spec, split).with_format(None)
    except (StopIteration, IndexError):
        raise UserError(f"{what} has no rows") from None
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, DatasetsError) as error:
        if spec.any_split and split == spec.split and (other := _training_split(spec)):
            print(f"{spec.id} has no split {split!r}; using {other!r}.")
            return load_rows(dataclasses.replace(spec, split=other, any_split=False))
        for file in spec.files:
            if file_type(file) == "jsonl":
                read_jsonl(file)  # names the line
        if rows := _load_file_of_script(spec, split):
            return rows
        local = " ".join(str(error.__cause__ or error).split())[:300]
        reason = local if spec.files else describe_error(error)
        raise UserError(f"dataset {spec.id!r}, split {split!r}, cannot be loaded: {reason}") from None
    if not len(rows):
        raise UserError(f"{what} has no rows")
    return rows


def _load(spec: DatasetSpec, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, config, load_dataset, load_from_disk

    path, files = find_path(spec.id), spec.files
    if files:
        types = {file_type(file) for file in files}
        if len({"lines" if each in TEXT_TYPES else each for each in types}) > 1 or "" in types:
            raise UserError(f"dataset {spec.id!r} must be files of one type. Use one of {', '.join(FILE_TYPES)}.")
        if types <= TEXT_TYPES:
            cache = Path(config.HF_DATASETS_CACHE) / "dpo-notebooks"
            files = [as_json_lines(file, split, cache) for file in files]
            return load_dataset(
                "json", data_files=[glob.escape(str(f)) for f in files], split="train", parse_agent_traces=False
            )
        return load_dataset(types.pop(), data_files=[glob.escape(str(file)) for file in files], split="train")
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
    if path is None:
        check_hub()
    return load_dataset(str(path or spec.id), spec.config or None, split=split, revision=revision)


def _training_split(spec: DatasetSpec) -> str:
    """The only split, or the only one whose name begins with train; "" if neither exists."""
    from datasets import get_dataset_split_names

    path = find_path(spec.id)
    try:
        if path and (path / "dataset_dict.json").is_file():
            names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        else:
            names = get_dataset_split_names(str(path or spec.id), spec.config or None)
    except Exception:  # the error of the first attempt says more
        return ""
    train = [name for name in names if name.startswith("train")]
    return next((choice[0] for choice in (names, train) if len(choice) == 1), "")


def _load_file_of_script(spec: DatasetSpec, split: str) -> Dataset | None:
    """The data file next to a loader script, which datasets no longer runs; None if there is no such file.

    tatsu-lab/alpaca_farm has alpaca_human_preference.json and alpaca_instructions/sft.json, by configuration and split.
    """
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    is_remote = spec.config and find_path(spec.id) is None
    for name in (f"{spec.config}.json", f"{spec.config}/{split}.json") if is_remote else ():
        try:
            file = hf_hub_download(spec.id, name, repo_type="dataset", revision=spec.revision or None)
        except (OSError, ValueError):  # no such file, or no such repository
            continue
        return load_dataset("json", data_files=file, split="train")
    return None


def subsample(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, list[int]]:
    """A seeded share of `rows` in their order, and their indices."""
    if fraction == 1:
        return rows, list(range(len(rows)))
    indices = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return rows.select(indices), indices


def choose_format(rows: Dataset, data_format: str, use_pairs: bool) -> Format:
    """How to read a dataset: as `data_format`, or with "auto" as its columns suggest.

    Raises SettingsError for an unknown format, UserError for columns that do not fit.
    """
    known, columns = PAIR_FORMATS if use_pairs else INSTRUCTION_FORMATS, dict.fromkeys(rows.column_names, True)
    names = ", ".join(dict.fromkeys(each.name for each in known))
    candidates = known if data_format == "auto" else [each for each in known if each.name == data_format]
    if not candidates:
        raise SettingsError(f"--data_format {data_format!r} is unknown. Use auto, {names}.")
    first = rows[:PROBED_ROWS]
    as_text = tuple(name for name, values in first.items() if _holds_lists_as_text(name, values))
    if data_format == "auto":  # a format that is named is taken at its word
        for name, values in first.items():
            lists = sum(isinstance(v, list | dict) for v in values)
            columns[name] = name in as_text or 2 * lists > sum(v is not None for v in values)
    fitting = detect_format(columns, candidates)
    if fitting and fitting.name == "hh" and data_format == "auto":  # known by the marks of its transcripts
        transcripts = sum(bool(parse_hh(text)) for text in first["chosen"])
        fitting = fitting if 2 * transcripts >= len(first["chosen"]) else None
    if fitting:
        return dataclasses.replace(fitting, as_text=as_text)
    have = f"the dataset has columns {', '.join(columns)}"
    if data_format != "auto":
        lacking = ", no ".join(candidates[-1].missing(columns))
        raise UserError(
            f"{have}, and no {lacking}, which the format {data_format} needs. Rename them, or use another "
            "`--data_format`."
        )
    needs = "prompt, chosen and rejected" if use_pairs else "messages, prompt and completion, or instruction and output"
    raise UserError(
        f"{have}, which match no known format. Rename them to {needs}, or set `--data_format` to one of {names}."
    )


def _holds_lists_as_text(column: str, values: list[Any]) -> bool:
    """Whether most values of a column are lists that a CSV or JSON file holds as text. Raises UserError if they begin
    as lists and most cannot be parsed."""
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    lists = [t for t in texts if is_list_as_text(t) or (column in LIST_COLUMNS and t.lstrip().startswith("["))]
    if 2 * len(lists) <= len(texts):
        return False
    parsed = 0
    for text in lists:
        with contextlib.suppress(DropRow):
            parsed += isinstance(parse_text(text), list | dict)
    if 2 * parsed <= len(lists) and column in LIST_COLUMNS:
        return False
    if 2 * parsed <= len(lists):
        raise UserError(f"column {column} holds lists as text that cannot be parsed: {lists[0][:60]!r}. Write JSON.")
    return True


def unused_columns(rows: Dataset, row_format: Format, pairing: PairingConfig) -> tuple[str, ...]:
    """Columns of a dataset that reading its first rows does not touch, and such keys of their messages."""
    read, keys, columns = set[str](), dict[str, None](), rows.column_names
    for i in range(min(PROBED_ROWS, len(rows))):
        row = TrackedRow(rows[i])
        row_format.read(row, pairing)
        read |= row.read
        for name in row.read & set(columns):
            value = dict.get(row, name)
            for message in value if isinstance(value, list) else [value]:
                if isinstance(message, dict) and {*ROLE_KEYS} & message.keys():
                    unread = [k for k, v in message.items() if k not in MESSAGE_KEYS and v not in (None, "", [])]
                    keys |= {f"{name}.{key}": None for key in unread}
    return (*(name for name in columns if name not in read), *keys)


def detect_format(columns: Mapping[str, bool], known: Sequence[Format] = PAIR_FORMATS) -> Format | None:
    """The first format whose columns a dataset has (True: the column holds lists), or None."""
    return next((each for each in known if not each.missing(columns)), None)
