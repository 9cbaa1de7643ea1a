"""Files of rows as people have them: read as they are meant, or refused with the line and the reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from helpers.core import SettingsError, UserError
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'prompt,chosen,rejected\nWhy?,None,4\n"a, b",007,nan\n'),
        ("d.csv", "prompt;chosen;rejected\nWhy?;None;4\na, b;007;nan\n"),
        ("d.tsv", "prompt\tchosen\trejected\nWhy?\tNone\t4\na, b\t007\tnan\n"),
        ("d.json", {"data": [{"prompt": "Why?", "chosen": "None", "rejected": "4"},
                             {"prompt": "a, b", "chosen": "007", "rejected": "nan"}]}),
    ],
)  # fmt: skip
def test_a_folder_of_files_is_read_as_the_files_are(name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    rows = [tuple(row.values()) for row in load_rows(DatasetSpec(str(tmp_path / "set")))]
    assert rows == [("Why?", "None", "4"), ("a, b", "007", "nan")]


def test_a_folder_has_splits_and_its_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "test.csv").write_text(CSV + "How?,So.,No.\n")
    spec = DatasetSpec(str(tmp_path))
    assert (len(load_rows(spec)), len(load_rows(spec, "test")), len(load_rows(spec, "test[1:]"))) == (1, 2, 1)
    with pytest.raises(UserError, match=r"split 'nosuch', cannot be loaded: it has train, test"):
        load_rows(spec, "nosuch")
    (tmp_path / "train.csv").write_text(CSV + "Who, me?,Yes.,No.\n")
    with pytest.raises(UserError, match=r"train\.csv, line 3, has 4 fields; the header has 3"):
        load_rows(spec)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_texts_that_all_look_like_dates_stay_texts(name: str, tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "When?", "answer": "1969-07-20"}
    content = {"a.csv": "prompt,answer\nWhen?,1969-07-20\n", "a.json": json.dumps([row])}
    assert read(tmp_path, name, content.get(name, json.dumps(row))) == [row]
    row = {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "1969-07-20"}]}
    assert read(tmp_path, "b.jsonl", json.dumps(row)) == [row]


def test_a_late_key_and_a_late_type_of_a_large_file_are_read(tmp_path: Path) -> None:
    first = {"prompt": "x" * 100_000, "score": 1, "meta": {"a": 1}}
    last: dict[str, Any] = {"prompt": "y", "score": 2.5, "meta": {"b": "c"}, "source": "me"}
    rows = read(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in [first] * 120 + [last]))
    assert rows[0] == first | {"source": None}
    assert rows[120] == last


def test_files_with_other_columns_are_one_dataset(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [ROW, {**ROW, "prompt": ["What?"], "score": 1.5}, {"chosen": "12", "score": 2}]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    found = list(load_rows(DatasetSpec(str(tmp_path / "*.jsonl"))))
    assert [{name: value for name, value in row.items() if value is not None} for row in found] == rows


def test_half_an_emoji_becomes_a_question_mark(tmp_path: Path) -> None:
    row = json.dumps(ROW | {"meta": {"a": "x"}}).replace("Why?", "Why \\ud83d").replace("x", "\\ud83d\\ude00 \\ude00")
    for name, content in (("a.json", f"[{row}]"), ("a.jsonl", row)):
        assert read(tmp_path, name, content) == [ROW | {"prompt": "Why ?", "meta": {"a": "😀 ?"}}]


def test_a_value_that_arrow_has_no_type_for_is_kept(tmp_path: Path) -> None:
    values = [10**15, 10**18, 10**19, True, None, "1", 0.1, [1, "a"], {}, {"b": [[], None]}]
    assert [row["a"] for row in read(tmp_path, "a.jsonl", "\n".join(json.dumps({"a": v}) for v in values))] == values
    assert len(read(tmp_path, "b.jsonl", json.dumps({"id": 10**30}))) == 1


def test_a_split_of_a_file_is_heeded_or_refused(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", LINE * 5), ("a.csv", CSV + "a,b,c\n" * 4), ("a.json", json.dumps([ROW] * 5))):
        sizes = [len(read(tmp_path, name, content, split)) for split in ("train", "train[:4]", "train[3:]")]
        assert sizes == [5, 4, 2]
        for split in ("nosuch", "test", "test[:2]"):
            with pytest.raises(SettingsError, match=rf"{name} has rows under train\. Set `--dataset_split`, or the"):
                read(tmp_path, name, content, split)
    Dataset.from_list([ROW] * 5).to_parquet(tmp_path / "a.parquet")
    spec = DatasetSpec(str(tmp_path / "a.parquet"))
    assert len(load_rows(spec, "train[:4]")) == 4
    with pytest.raises(UserError, match="split 'nosuch', cannot be loaded: it has train"):
        load_rows(spec, "nosuch")
    assert len(read(tmp_path, "b.json", json.dumps({"train": [ROW], "test": [ROW] * 3}), "test[:2]")) == 2


def test_splits_of_a_folder_may_be_added_up(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {i}", "chosen": "a", "rejected": "b"} for i in range(5)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prompts(split: str) -> list[str]:
        return list(load_rows(DatasetSpec(str(tmp_path), split=split))["prompt"])

    assert prompts("train+test") == prompts("all") == [f"{s} {i}" for s in ("train", "test") for i in range(5)]
    assert prompts("train[:2]+test[3:]") == ["train 0", "train 1", "test 3", "test 4"]
    assert prompts("test[:1]") == ["test 0"]
    with pytest.raises(UserError, match=r"it has (test, train|train, test)"):
        prompts("train+valid")


def test_a_folder_whose_card_says_how_to_read_it_is_read_so(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("p,a,b\nq,c,d\n")
    names = "  column_names: [prompt, chosen, rejected]\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: data.csv\n{names}---\n")
    assert [row["prompt"] for row in load_rows(DatasetSpec(str(tmp_path)))] == ["p", "q"]
