"""Datasets from the Hub, files and folders: which rows to read, with their values as they are, and in what format."""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import REPO, Row, SettingsError, UserError, atomic_write, find_path
from helpers.data.formats import INSTRUCTION_FORMATS, PAIR_FORMATS, PROBED_ROWS, Format
from helpers.data.messages import ROLE_KEYS, DropRow, is_list_as_text, parse_hh, parse_text
from helpers.models.adapters import check_hub, describe_error

if TYPE_CHECKING:
    from datasets import Dataset


FILE_TYPES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv",
              ".parquet": "parquet", ".arrow": "arrow"}  # fmt: skip
TEXT_TYPES = {"json", "jsonl", "csv"}
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
MAX_NESTED = 200  # brackets of a line; with more, it is parsed before pyarrow reads it
LIST_COLUMNS = ("completions", "responses", "answers", "scores", "rating", "history")
FORMAT_ALIASES = {"triplet": "pairs", "transcript": "hh"}


# ---- Files ----


def file_type(name: Path | str) -> str:
    """The type of a file of rows by its ending: json, jsonl, csv, parquet or arrow; "" for any other."""
    path = Path(str(name).lower())
    if path.suffix not in COMPRESSIONS:
        return FILE_TYPES.get(path.suffix, "")
    kind = FILE_TYPES.get(path.with_suffix("").suffix, "")
    return kind if kind in TEXT_TYPES else ""


def as_json_lines(file: Path, split: str, cache: Path) -> Path:
    """A JSON Lines file with the rows of `file`, which has type json, jsonl or csv. datasets reads it, compressed too.
    A file of one object per line is returned as it is; others are converted once, into `cache`. `split` chooses the
    rows of a JSON object that has several lists of rows. Raises UserError with the line of what cannot be read."""
    if (kind := file_type(file)) == "jsonl":
        return check_lines(file)
    if not (content := read_bytes(file)).strip():
        raise UserError(f"{file.name} is empty")
    target = cache / f"rows-{hashlib.sha256(content + f'{kind} {split}'.encode()).hexdigest()[:32]}.jsonl"
    if not target.exists():
        rows = read_csv(content, file) if kind == "csv" else read_json(content, file, split)
        if rows is None:
            return check_lines(file)
        cache.mkdir(parents=True, exist_ok=True)
        atomic_write(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return target


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed. Raises UserError if it cannot be read."""
    try:
        with COMPRESSIONS.get(file.suffix.lower(), open)(file, "rb") as stream:
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file.name} cannot be read: {error}") from None


def read_bytes(file: Path) -> bytes:
    """The content of a file, decompressed."""
    with _open(file) as stream:
        return bytes(stream.read())


def decode(content: bytes, file: Path, line: int = 0) -> str:
    """UTF-8 text without a byte-order mark; `line` is where `content` is in the file, 0 for all of it."""
    try:
        text = content.decode("utf-8-sig")
        fault, at = "it contains NUL bytes, so it is binary or truncated", content.find(b"\0")
    except UnicodeDecodeError as error:
        hint = ". It looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        fault, at = error.reason + hint, error.start
    if at < 0:
        return text
    line = line or content.count(b"\n", 0, at) + 1
    raise UserError(f"{file.name}, line {line}, is not UTF-8: {fault}. Save it as UTF-8.")


def _parse_json(text: str, file: Path, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file.name}, line {line or error.lineno}"
        raise UserError(f"{place}, is not JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{file.name}{f', line {line},' if line else ''} is nested too deeply.") from None


def check_lines(file: Path, parse: bool = False) -> Path:
    """The file, read by line. Raises UserError for a line that is no object or not UTF-8, or if `parse`, no JSON."""
    is_empty = True
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            text = decode(line, file, number).strip()
            is_empty = is_empty and not text
            if number == 1 and text.startswith("["):
                raise UserError(f"{file.name} is a JSON array, not one object per line. Rename it to end in .json.")
            if text and not text.startswith("{"):
                raise UserError(f"{file.name}, line {number}, is not a JSON object: {text[:40]!r}")
            if text and (parse or text.count("[") + text.count("{") > MAX_NESTED):  # pyarrow 25 crashes on deep ones
                _parse_json(text, file, number)
    if is_empty:
        raise UserError(f"{file.name} is empty")
    return file


def read_json(content: bytes, file: Path, split: str) -> list[Row] | None:
    """The rows of a JSON array, or of an object that holds one: {"data": [...]}, or a list per split. None if there is
    one object per line."""
    text = decode(content, file).strip()
    first, _, more = text.partition("\n")
    with contextlib.suppress(ValueError, RecursionError):
        if more and isinstance(json.loads(first), dict):
            return None
    document = _parse_json(text, file)
    if isinstance(document, dict):
        lists = {k: v for k, v in document.items() if isinstance(v, list) and v}
        objects = {k: v for k, v in lists.items() if isinstance(v[0], dict)}
        tables = {k: v for k, v in objects.items() if not {*ROLE_KEYS} & v[0].keys()}
        if len(tables) > 1 and split not in tables:
            raise UserError(f"{file.name} has rows under {', '.join(tables)}. Set `--dataset_split` to one of them.")
        if not objects and lists.keys() == document.keys() and len(set(map(len, lists.values()))) == 1:  # by column
            return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        document = tables.get(split) or next(iter(tables.values()), [document])
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file.name}, row {number}, is not a JSON object: {json.dumps(row)[:40]}")
    return rows


def read_csv(content: bytes, file: Path) -> list[Row]:
    """The rows of a CSV file, every field as text. Commas, semicolons, tabs or bars separate the fields. Raises
    UserError with the line of a row that has more or fewer fields than the header."""
    csv.field_size_limit(2**31 - 1)
    # newline="" of open(): only \n and \r end lines, not the other line separators that a text may hold
    lines = decode(content, file).replace("\r\n", "\n").split("\n")
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(DELIMITERS, key=lambda d: (len(next(csv.reader([first], delimiter=d))), d == ","))
    delimiter = "\t" if ".tsv" in file.name.lower() else delimiter
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter)
    header = [name.strip() for name in next(filter(None, reader))]
    if repeated := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{file.name} has two columns named {repeated[0]!r}. Rename one.")
    rows, begin = list[Row](), reader.line_num + 1
    for fields in reader:
        if fields and len(fields) != len(header):
            fix = f"Put texts with {DELIMITERS[delimiter]} in double quotes, and write a quote inside them twice."
            if begin < reader.line_num == len(lines):
                fix = "A double quote that opens in this line is never closed."
            counts = f"{len(fields)} field{'s' * (len(fields) > 1)}; the header has {len(header)}"
            raise UserError(f"{file.name}, line {begin}, has {counts}. {fix}")
        named = list(zip(header, fields, strict=False))
        if unnamed := [field for name, field in named if field and not name]:
            raise UserError(f"{file.name}, line {begin}, has {unnamed[0][:40]!r} in a column without a name.")
        if fields:
            rows.append({name: field for name, field in named if name})
        begin = reader.line_num + 1
    return rows


# ---- Datasets ----


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A dataset to read: a Hub id, a file or glob of files, or a folder.

    `fraction` is the share of its rows to use, `eval_split` a split that is only evaluated on. `format` is "auto" or
    the name of a format. If there is no `split`, `any_split` allows the only one, or the only one for training.
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
        if path := find_path(self.id):
            return [path] if path.is_file() else []
        names = glob.glob(self.id, recursive=True) or glob.glob(str(REPO / self.id), recursive=True)
        return [Path(name) for name in sorted(names)]


def parse_dataset_specs(settings: Any) -> list[DatasetSpec]:
    """The datasets of `settings.dataset_id`. Each entry is an id or a JSON object with fields of DatasetSpec. Fields
    that an object lacks come from dataset_config, dataset_split, dataset_revision, data_format and eval_split. Raises
    SettingsError."""
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
            raise SettingsError(
                f"--dataset_id {text!r}: {key} must be a {'number' if key == 'fraction' else 'string'}."
            )
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

    rows, split = None, split or spec.split
    try:
        with contextlib.suppress(StopIteration, IndexError):  # there are none
            rows = _load(spec, split).with_format(None)
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, DatasetsError) as error:
        for file in spec.files:
            if file_type(file) == "jsonl":
                check_lines(file, parse=True)  # names the line
        if (rows := _load_file_of_script(spec, split)) is None:
            local = " ".join(str(error.__cause__ or error).split())[:300]
            reason = local if spec.files else describe_error(error)
            raise UserError(f"dataset {spec.id!r}, split {split!r}, cannot be loaded: {reason}") from None
    if not rows:
        raise UserError(f"dataset {spec.id!r}, split {split!r}, has no rows")
    return rows


def _load(spec: DatasetSpec, split: str) -> Dataset:
    from datasets import Dataset, config, load_dataset, load_from_disk

    path, files = find_path(spec.id), spec.files
    if files:
        types = {file_type(file) for file in files}
        if "" in types or not (len(types) == 1 or types <= TEXT_TYPES):
            raise UserError(f"dataset {spec.id!r} must be files of one type. Use one of {', '.join(FILE_TYPES)}.")
        options: dict[str, Any] = {}
        if types <= TEXT_TYPES:
            cache = Path(config.HF_DATASETS_CACHE) / "dpo-notebooks"
            files, types = [as_json_lines(file, split, cache) for file in files], {"json"}
            options["parse_agent_traces"] = False
        return load_dataset(types.pop(), data_files=[glob.escape(str(f)) for f in files], split="train", **options)
    if path is None and spec.is_file_name:
        raise UserError(f"dataset {spec.id!r} does not exist. Check its path, which is relative to the current folder.")
    any_split = spec.any_split and split == spec.split
    if path and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        found = load_from_disk(str(path))
    else:
        if path is None:
            check_hub()
        revision, wanted = None if path else spec.revision or None, None if any_split else split
        found = load_dataset(str(path or spec.id), spec.config or None, split=wanted, revision=revision)
    if isinstance(found, Dataset):
        return found
    names = list(map(str, found))
    others = [name for name in names if len(names) == 1 or name.startswith("train")]
    if any_split and split not in names and len(others) == 1:
        print(f"{spec.id} has no split {split!r}; using {others[0]!r}.")
        return found[others[0]]
    if split not in names:
        raise LookupError(f"it has {', '.join(names)}")
    return found[split]


def _load_file_of_script(spec: DatasetSpec, split: str) -> Dataset | None:
    """The data file next to a loader script, which datasets no longer runs: CONFIG.json or CONFIG/SPLIT.json, as
    tatsu-lab/alpaca_farm has them. None if there is no such file."""
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    is_remote = spec.config and find_path(spec.id) is None
    for name in (f"{spec.config}.json", f"{spec.config}/{split}.json") if is_remote else ():
        with contextlib.suppress(OSError, ValueError):  # no such file, or no such repository
            file = hf_hub_download(spec.id, name, repo_type="dataset", revision=spec.revision or None)
            return load_dataset("json", data_files=file, split="train")
    return None


def subsample(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, list[int]]:
    """A seeded share of `rows` in their order, and their indices."""
    if fraction == 1:
        return rows, list(range(len(rows)))
    indices = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return rows.select(indices), indices


# ---- Formats ----


def choose_format(rows: Dataset, data_format: str, use_pairs: bool) -> Format:
    """How to read a dataset: as `data_format`, or with "auto" as its columns suggest. Raises SettingsError for an
    unknown format, UserError for columns that do not fit."""
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
    fitting = next((each for each in candidates if not each.missing(columns)), None)
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
    parsed = 0
    for text in lists:
        with contextlib.suppress(DropRow):
            parsed += isinstance(parse_text(text), list | dict)
    is_most = 2 * len(lists) > len(texts)
    if is_most and 2 * parsed <= len(lists) and column not in LIST_COLUMNS:
        raise UserError(f"column {column} holds lists as text that cannot be parsed: {lists[0][:60]!r}. Write JSON.")
    return is_most and 2 * parsed > len(lists)
