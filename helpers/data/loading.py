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
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import REPO, Row, SettingsError, UserError, atomic_write, find_path, process_lock
from helpers.data.messages import ROLE_KEYS
from helpers.models.adapters import check_hub, describe_error

if TYPE_CHECKING:
    from datasets import Dataset


FILE_TYPES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv",
              ".parquet": "parquet", ".arrow": "arrow"}  # fmt: skip
TEXT_TYPES = {"json", "jsonl", "csv"}
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # of UTF-16, as JSON escapes it
# Of a builder's options, those that do not change how files are read here
FILE_OPTIONS = ("name", "version", "description", "data_dir", "data_files", "sep", "delimiter")
FORMAT_ALIASES = {"triplet": "pairs", "transcript": "hh"}


# ---- Files ----


def file_type(name: Path | str) -> str:
    """The type of a file of rows by its ending: json, jsonl, csv, parquet or arrow; "" for any other."""
    path = Path(str(name).lower())
    if path.suffix not in COMPRESSIONS:
        return FILE_TYPES.get(path.suffix, "")
    kind = FILE_TYPES.get(path.with_suffix("").suffix, "")
    return kind if kind in TEXT_TYPES else ""


def read_text_files(files: list[Path], split: str, any_split: bool = False) -> Dataset:
    """The rows of JSON and CSV files, with all their columns and with texts as they are. They are converted once, into
    the cache of datasets. `split` chooses the rows of a JSON object that has several lists of rows. Raises UserError
    with the line of what cannot be read."""
    import pyarrow as pa
    from datasets import Dataset, config

    digest = hashlib.sha256(Path(__file__).read_bytes() + f"{split} {any_split}".encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    target = Path(config.HF_DATASETS_CACHE) / "dpo-notebooks" / f"rows-{digest.hexdigest()[:32]}.arrow"
    with process_lock(target.stem):
        if not target.exists():
            rows = [row for file in files for row in read_rows(file, split, any_split)]
            names = dict.fromkeys(name for row in rows for name in row)
            table = pa.table({name: to_column([row.pop(name, None) for row in rows]) for name in names})
            buffer = pa.BufferOutputStream()
            with pa.ipc.new_stream(buffer, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, buffer.getvalue())
    dataset = Dataset.from_file(str(target))
    dataset._fingerprint = target.stem  # by content
    return dataset


def to_column(values: list[Any]) -> Any:
    """Values as an Arrow array. Lists and objects that it would change, and values of several types, are JSON in it,
    which datasets parses."""
    import pyarrow as pa

    is_plain = not any(isinstance(value, list | dict) for value in values)
    with contextlib.suppress(pa.ArrowException, OverflowError):
        array = pa.array(values)
        if is_plain or all(json.dumps(a.as_py()) == json.dumps(v) for a, v in zip(array, values, strict=True)):
            return array
    return pa.array([v if v is None else json.dumps(v, ensure_ascii=False) for v in values], "string").cast(pa.json_())


def read_rows(file: Path, split: str, any_split: bool) -> list[Row]:
    """The rows of a file of type json, jsonl or csv. Raises UserError, also for a split that it does not have."""
    kind = file_type(file)
    if kind != "jsonl" and not (content := read_bytes(file)).strip():
        raise UserError(f"{file.name} is empty")
    tables = read_json(content, file) if kind == "json" else {"train": read_csv(content, file)} if kind == "csv" else {}
    tables = tables or {"train": read_lines(file)}
    if split not in tables and (len(tables) > 1 or (split != "train" and not any_split)):
        has = f"{file.name} has rows under {', '.join(tables)}"
        raise SettingsError(f"{has}. Set `--dataset_split`, or the split of this dataset, to one of them.")
    return tables.get(split) or next(iter(tables.values()))


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
    """Parse JSON; half an emoji, which is no character, becomes a question mark."""
    try:
        value = json.loads(text, parse_int=lambda digits: (int if len(digits) < 20 else float)(digits))  # of 64 bits
        if HALF_CHARACTER.search(text):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except json.JSONDecodeError as error:
        place = f"{file.name}, line {line or error.lineno}"
        raise UserError(f"{place}, is not JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{file.name}{f', line {line},' if line else ''} is nested too deeply.") from None


def read_lines(file: Path) -> list[Row]:
    """The rows of a file of one JSON object per line."""
    rows = list[Row]()
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            text = decode(line, file, number).strip()
            if number == 1 and text.startswith("["):
                raise UserError(f"{file.name} is a JSON array, not one object per line. Rename it to end in .json.")
            if text and not text.startswith("{"):
                raise UserError(f"{file.name}, line {number}, is not a JSON object: {text[:40]!r}")
            if text:
                rows.append(_parse_json(text, file, number))
    if not rows:
        raise UserError(f"{file.name} is empty")
    return rows


def read_json(content: bytes, file: Path) -> dict[str, list[Row]]:
    """The rows of a JSON array, under train, or of an object that holds one: {"data": [...]}, or a list per split. {}
    if there is one object per line."""
    text = decode(content, file).strip()
    first, _, more = text.partition("\n")
    with contextlib.suppress(ValueError, RecursionError):
        if more and isinstance(json.loads(first), dict):
            return {}
    document = _parse_json(text, file)
    if isinstance(document, dict):
        lists = {k: v for k, v in document.items() if isinstance(v, list) and v}
        objects = {k: v for k, v in lists.items() if isinstance(v[0], dict)}
        tables = {k: v for k, v in objects.items() if not {*ROLE_KEYS} & v[0].keys()}
        if not objects and lists.keys() == document.keys() and len(set(map(len, lists.values()))) == 1:  # by column
            tables = {"train": [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]}
    else:
        tables = {"train": document} if isinstance(document, list) else {}
    tables = tables or {"train": [document]}
    for number, row in ((n, row) for rows in tables.values() for n, row in enumerate(rows, 1)):
        if not isinstance(row, dict):
            raise UserError(f"{file.name}, row {number}, is not a JSON object: {json.dumps(row)[:40]}")
    return tables


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
    split_from, id_from = (settings.sources.get(f"dataset_{key}", "default") for key in ("split", "id"))
    common["any_split"] = split_from == "default" or split_from == "recipe" != id_from  # not meant for this dataset
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
            kind = "number" if key == "fraction" else "string"
            raise SettingsError(f"--dataset_id {text!r}: {key} must be a {kind}.")
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
        if (rows := _load_file_of_script(spec, split)) is None:
            local = " ".join(str(error.__cause__ or error).split())[:300]
            reason = local if spec.files else describe_error(error)
            raise UserError(f"dataset {spec.id!r}, split {split!r}, cannot be loaded: {reason}") from None
    if not rows:
        raise UserError(f"dataset {spec.id!r}, split {split!r}, has no rows")
    return rows


def _load(spec: DatasetSpec, split: str) -> Dataset:
    from datasets import ReadInstruction, concatenate_datasets, load_dataset, load_dataset_builder, load_from_disk

    found: Any = None
    path, files, any_split = find_path(spec.id), spec.files, spec.any_split and split == spec.split
    types = {file_type(file) for file in files}
    if "" in types or not (len(types) <= 1 or types <= TEXT_TYPES):
        raise UserError(f"dataset {spec.id!r} must be files of one type. Use one of {', '.join(FILE_TYPES)}.")
    if path is None and not files and spec.is_file_name:
        raise UserError(f"dataset {spec.id!r} does not exist. Check its path, which is relative to the current folder.")
    if files and not types <= TEXT_TYPES:
        found = load_dataset(types.pop(), data_files=[glob.escape(str(file)) for file in files])
    elif path is None and not files:
        check_hub()
        which, revision = None if any_split else split, spec.revision or None
        found = load_dataset(spec.id, spec.config or None, split=which, revision=revision)
        if not any_split:
            return found  # datasets has read the split
    elif path and any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        found = load_from_disk(str(path))
    elif path and not files:
        config = load_dataset_builder(str(path), spec.config or None).config
        found = {str(each): list(map(Path, own)) for each, own in (config.data_files or {}).items()}
        every: list[Path] = [file for each in found.values() for file in each]
        plain = vars(type(config)())
        options = [name for name in plain if name not in FILE_OPTIONS and plain[name] != getattr(config, name)]
        if options or not every or not all(file.is_file() and file_type(file) in TEXT_TYPES for file in every):
            found = load_dataset(str(path), spec.config or None)
    names = list(map(str, found)) if isinstance(found, dict) else []
    if names:
        others = [other for other in names if len(names) == 1 or other.startswith("train")]
        split = "+".join(names) if split == "all" else split
        if any_split and split not in names and len(others) == 1:
            print(f"{spec.id} has no split {split!r}; using {others[0]!r}.")
            split = others[0]
    wanted = re.findall(r"(?:^|\+)([^\[+]+)", split)
    if names and not {*wanted} <= {*names}:
        raise LookupError(f"it has {', '.join(names)}")

    def read(name: str) -> Dataset:
        own = found[name] if isinstance(found, dict) else found
        if own is None:
            return read_text_files(files, name, any_split)
        return read_text_files(own, name, any_split=True) if isinstance(own, list) else own

    tables = {name: read(name) for name in wanted}
    if split in tables:
        return tables[split]
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(table) for name, table in tables.items()})
    return concatenate_datasets([tables[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _load_file_of_script(spec: DatasetSpec, split: str) -> Dataset | None:
    """The data file next to a loader script, which datasets no longer runs: CONFIG.json or CONFIG/SPLIT.json, as
    tatsu-lab/alpaca_farm has them. None if there is no such file."""
    from huggingface_hub import hf_hub_download

    is_remote = spec.config and find_path(spec.id) is None
    for name in (f"{spec.config}.json", f"{spec.config}/{split}.json") if is_remote else ():
        with contextlib.suppress(OSError, ValueError):  # no such file, or no such repository
            file = hf_hub_download(spec.id, name, repo_type="dataset", revision=spec.revision or None)
            return read_text_files([Path(file)], split, any_split=True)
    return None
