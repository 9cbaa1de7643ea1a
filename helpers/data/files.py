"""Files of rows: their types, and how each becomes JSON Lines, which datasets reads without changing a value."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.core import Row, UserError, atomic_write

FILE_TYPES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv",
              ".parquet": "parquet", ".arrow": "arrow"}  # fmt: skip
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NAMES_OF_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
MAX_NESTED = 200  # brackets of a line; with more, it is parsed before pyarrow reads it
UNICODE_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def file_type(name: Path | str) -> str:
    """The type of a file of rows by its ending: json, jsonl, csv, parquet or arrow; "" for any other."""
    path = Path(str(name).lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
        return FILE_TYPES.get(path.suffix, "") if path.suffix not in (".parquet", ".arrow") else ""
    return FILE_TYPES.get(path.suffix, "")


def as_json_lines(file: Path, split: str, cache: Path) -> Path:
    """A JSON Lines file with the rows of `file`, which has type json, jsonl or csv.

    A plain JSONL file is returned as it is; others are converted once, into `cache`. `split` chooses the rows of a JSON
    object that has several lists of rows. Raises UserError with the line for content that cannot be read.
    """
    kind, is_plain = file_type(file), Path(file.name.lower()).suffix not in COMPRESSIONS
    if kind == "jsonl" and is_plain:
        with file.open("rb") as lines:
            _check_lines(lines, file)
        return file
    content = read_bytes(file)
    if kind == "json" and not _is_one_document(content, file):
        kind = "jsonl"
    if kind == "jsonl":
        _check_lines(content.split(b"\n"), file)
        if is_plain:
            return file
    elif not content.strip():
        raise UserError(f"{file.name} is empty")
    target = cache / f"rows-{hashlib.sha256(content + f'{kind} {split}'.encode()).hexdigest()[:32]}.jsonl"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if kind != "jsonl":
            rows = read_csv(content, file) if kind == "csv" else read_json(content, file, split)
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        atomic_write(target, content)
    return target


def read_bytes(file: Path) -> bytes:
    """The content of a file, decompressed."""
    opener = COMPRESSIONS.get(Path(file.name.lower()).suffix, open)
    try:
        with opener(file, "rb") as stream:
            return bytes(stream.read())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file.name} cannot be read: {error}") from None


def decode(content: bytes, file: Path, line: int = 0) -> str:
    """UTF-8 text without a byte-order mark; `line` is where `content` is in the file, 0 for all of it."""
    try:
        if b"\0" in content and content[:2] not in UNICODE_MARKS:
            at = line or content.count(b"\n", 0, content.index(b"\0")) + 1
            raise UserError(f"{file.name}, line {at}, has zeros: it is no text, or cut short. Save it as UTF-8.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or content.count(b"\n", 0, error.start) + 1
        found = UNICODE_MARKS.get(content[:2], "")
        hint = f"It looks like {found}. " if found else ""
        raise UserError(f"{file.name}, line {line}, is not UTF-8: {error.reason}. {hint}Save it as UTF-8.") from None


def _is_one_document(content: bytes, file: Path) -> bool:
    """Whether a .json file is one JSON value; if not, it should be one object per line."""
    text = decode(content, file).strip()
    if text.startswith("["):
        return True
    first, _, rest = text.partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _check_lines(lines: Iterable[bytes], file: Path) -> None:
    """Raise UserError for lines that are not UTF-8 or no object. The lines are read one by one: a file may be large."""
    is_empty = True
    for number, line in enumerate(lines, 1):
        text = decode(line, file, number).strip()
        is_empty = is_empty and not text
        if number == 1 and text.startswith("["):
            raise UserError(f"{file.name} is a JSON array, not one object per line. Rename it to end in .json.")
        if text and not text.startswith("{"):
            raise UserError(f"{file.name}, line {number}, is not a JSON object: {text[:40]!r}")
        if text.count("[") + text.count("{") > MAX_NESTED:
            try:
                json.loads(text)
            except RecursionError:  # pyarrow 25 would crash
                raise UserError(f"{file.name}, line {number}, is nested too deeply. Remove that row.") from None
            except ValueError:  # the one who reads it says why
                pass
    if is_empty:
        raise UserError(f"{file.name} is empty")


def read_json(content: bytes, file: Path, split: str) -> list[Row]:
    """The rows of a JSON array, or of an object that holds one: {"data": [...]}, or a list per split."""
    try:
        document = json.loads(decode(content, file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file.name}, line {error.lineno}, is not JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{file.name} is nested too deeply for rows of a dataset.") from None
    if isinstance(document, dict):
        lists = {k: v for k, v in document.items() if isinstance(v, list) and v and not _is_message(v[0])}
        tables = {k: v for k, v in lists.items() if isinstance(v[0], dict)}
        if len(tables) > 1 and split not in tables:
            raise UserError(f"{file.name} has rows under {', '.join(tables)}. Set `--dataset_split` to one of them.")
        if not tables and lists.keys() == document.keys() and len(set(map(len, lists.values()))) == 1:  # by column
            return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        document = tables.get(split) or next(iter(tables.values()), [document])
    for number, row in enumerate(document if isinstance(document, list) else [document], 1):
        if not isinstance(row, dict):
            raise UserError(f"{file.name}, row {number}, is not a JSON object: {json.dumps(row)[:40]}")
    return list(document)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def read_csv(content: bytes, file: Path) -> Iterator[Row]:
    """The rows of a CSV file, every field as text. Commas, semicolons, tabs or bars separate the fields.

    Raises UserError with the line of a row that has more or fewer fields than the header.
    """
    csv.field_size_limit(2**31 - 1)
    # newline="" of open(): only \n and \r end lines, not the other line separators that a text may hold
    lines = decode(content, file).replace("\r\n", "\n").split("\n")
    header_line = next((line for line in lines if line.strip()), "")
    delimiter = max(NAMES_OF_DELIMITERS, key=lambda d: (len(next(csv.reader([header_line], delimiter=d))), d == ","))
    delimiter = "\t" if ".tsv" in file.name.lower() else delimiter
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter)
    header: list[str] = []
    begin = 1
    for fields in reader:
        if fields and not header:
            header = [name.strip() for name in fields]
            repeated = [name for name in header if name and header.count(name) > 1]
            if repeated:
                raise UserError(f"{file.name} has two columns named {repeated[0]!r}. Rename one.")
        elif fields:
            if len(fields) != len(header):
                name = NAMES_OF_DELIMITERS[delimiter]
                fix = f"Put texts with {name} in double quotes, and write a quote inside them twice."
                if begin < reader.line_num == len(lines):
                    fix = "A double quote that opens in this line is never closed."
                raise UserError(
                    f"{file.name}, line {begin}, has {len(fields)} field{'s' * (len(fields) > 1)}; the header has "
                    f"{len(header)}. {fix}"
                )
            if unnamed := [field for name, field in zip(header, fields, strict=True) if field and not name]:
                raise UserError(f"{file.name}, line {begin}, has {unnamed[0][:40]!r} in a column without a name.")
            yield {name: field for name, field in zip(header, fields, strict=True) if name}
        begin = reader.line_num + 1
