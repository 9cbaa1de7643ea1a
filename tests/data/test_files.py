"""Files of rows as people have them: read as they are meant, or refused with the line and the reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from helpers.core import UserError
from helpers.data import loading
from helpers.data.loading import DatasetSpec, load_rows

ROW = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
LINE = json.dumps(ROW) + "\n"
CSV = "prompt,chosen,rejected\nWhy?,Because.,No.\n"


def read(tmp_path: Path, name: str, content: str | bytes, split: str = "train") -> list[dict[str, Any]]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(load_rows(DatasetSpec(str(file), split=split)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("A.CSV", CSV),
        ("a.csv", "\ufeff" + CSV),
        ("a.csv", CSV.replace("\n", "\r\n")),
        ("a.csv", CSV.replace(",", ";")),
        ("a.csv", CSV.replace(",", "\t")),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.csv", "prompt,chosen,rejected,\nWhy?,Because.,No.,\n"),
        ("a.csv", CSV + "\n\n"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.jsonl", LINE),
        ("a.JSONL", LINE),
        ("a.ndjson", LINE + "\n"),
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINE.encode())),
        ("a.json.xz", lzma.compress(LINE.encode())),
        ("a.json", LINE),
        ("a.json", json.dumps([ROW])),
        ("a.json", json.dumps([ROW], indent=1)),
        ("a.json", json.dumps({"data": [ROW]})),
        ("a.json", json.dumps({"version": 2, "data": [ROW]}, indent=1)),
        ("a.json", json.dumps({"train": [ROW], "test": [ROW, ROW]})),
        ("a.json", json.dumps({name: [value] for name, value in ROW.items()})),
    ],
)
def test_one_row_is_read_from_every_kind_of_file(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read(tmp_path, name, content) == [ROW]


def test_the_split_names_the_rows_of_a_json_file_with_several_lists(tmp_path: Path) -> None:
    content = json.dumps({"train": [ROW], "test": [ROW, ROW]})
    assert len(read(tmp_path, "a.json", content, "test")) == 2


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_line(mark: str, tmp_path: Path) -> None:
    row = ROW | {"prompt": f"one{mark}two"}
    assert read(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n") == [row]
    assert read(tmp_path, "a.csv", CSV.replace("Why?", f"one{mark}two")) == [row]
    assert read(tmp_path, "a.json", json.dumps([row], ensure_ascii=False)) == [row]


def test_cells_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    content = 'prompt,chosen,rejected\n1,None,007\n"a ""b"", c\nd",nan,\n'
    assert read(tmp_path, "a.csv", content) == [
        {"prompt": "1", "chosen": "None", "rejected": "007"},
        {"prompt": 'a "b", c\nd', "chosen": "nan", "rejected": ""},
    ]
    rows = [ROW | {"chosen": "12"}, ROW | {"chosen": "2020-01-01"}]
    assert read(tmp_path, "a.json", json.dumps(rows)) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CSV + "Who, me?,Yes.,No.\n", "a.csv, line 3, has 4 fields; the header has 3. Put texts with a comma"),
        ("a.csv", CSV + "Why?,Because.,No.,\n", "a.csv, line 3, has 4 fields; the header has 3"),
        ("a.csv", CSV + "Why?,Because.\n", "a.csv, line 3, has 2 fields; the header has 3"),
        (
            "a.csv",
            CSV + '"Why?,Because.,No.\nx,y,z\n',
            "line 3, has 1 field; the header has 3. A double quote",
        ),
        ("a.csv", CSV.replace(",", ";") + "a;b;c;d\n", "Put texts with a semicolon in double quotes"),
        ("a.csv", "prompt,chosen,chosen\na,b,c\n", "a.csv has two columns named 'chosen'"),
        ("a.csv", "prompt,chosen,\na,b,c\n", "line 2, has 'c' in a column without a name"),
        ("a.csv", CSV.encode("utf-16"), "a.csv, line 1, is not UTF-8: invalid start byte. It looks like UTF-16"),
        ("a.csv", b"prompt,chosen,rejected\na,\xe9,c\n", "a.csv, line 2, is not UTF-8"),
        ("a.csv", "", "a.csv is empty"),
        ("a.jsonl", LINE + "oops\n", "a.jsonl, line 2, is not a JSON object: 'oops'"),
        ("a.jsonl", LINE + '{"prompt": \n', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", json.dumps([ROW]), "a.jsonl is a JSON array, not one object per line. Rename it to end in .json"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.json", '[{"a": 1}, 3]', "a.json, row 2, is not a JSON object: 3"),
        ("a.json", '{"one": [{"a": 1}], "two": [{"a": 2}]}', "a.json has rows under one, two. Set `--dataset_split`"),
        ("a.json", "[{]", "a.json, line 1, is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_as_meant_names_the_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content)
    assert message in str(caught.value)


def test_a_plain_file_of_lines_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(file: Path) -> bytes:
        raise AssertionError(f"all of {file} was read")

    monkeypatch.setattr(loading, "read_bytes", never)
    assert read(tmp_path, "a.jsonl", LINE * 3) == [ROW] * 3
    with pytest.raises(UserError, match=r"b\.jsonl is empty"):
        read(tmp_path, "b.jsonl", "\n\n")
