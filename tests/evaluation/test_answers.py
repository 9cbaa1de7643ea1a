"""Where answers are found, and the files that they and the judge's calls are stored in."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.core import UserError, read_jsonl
from helpers.evaluation.answers import AnswerStore, JsonlStore
from helpers.evaluation.judgments import find_answers
from tests.evaluation.judging import answers_worth


def test_answers_side_by_side_are_escaped_and_evenly_picked(tmp_path: Path) -> None:
    questions = [{"question_id": i, "category": "", "turns": [f"<b>{i}"]} for i in range(4)]
    answers = AnswerStore(tmp_path, questions)
    for name in ("one", "two"):
        answers.file(name).add(*({"question_id": i, "choices": [{"turns": [f"<script>{name}{i}"]}]} for i in range(4)))
    page = answers.side_by_side(["one", "two"], 4)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;one0" in page
    assert [row[0] for row in answers.side_by_side(["one"], 2).rows] == ["<b>1", "<b>3"]
    assert [row[0] for row in answers.side_by_side(["one"], 9).rows] == [f"<b>{i}" for i in range(4)]


def test_a_store_removes_a_line_that_was_cut_short_and_keeps_one_without_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"id": 2}')
    store = JsonlStore(file, lambda row: row["id"])
    assert list(store.rows) == [1, 2]
    store.add({"id": 3}, {"id": 2, "again": True})
    assert file.read_text() == '{"id": 1}\n{"id": 2}\n{"id": 3}\n{"id": 2, "again": true}\n'
    assert store.rows[2]["again"]
    with file.open("a") as out:
        out.write('{"id": 4, "te')
    store = JsonlStore(file, lambda row: row["id"])
    assert list(store.rows) == [1, 2, 3]
    store.add({"id": 5, "text": "\ud800 \u2028"})
    assert [row["id"] for row in read_jsonl(file)] == [1, 2, 3, 2, 5]
    file.write_text('{"name": 1}\n')
    with pytest.raises(UserError, match="has a row of another kind"):
        JsonlStore(file, lambda row: row["id"])


def test_two_processes_that_add_to_one_store_lose_nothing_of_each_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    one, two = (JsonlStore(file, lambda row: row["id"]) for _ in range(2))
    for i in range(5):
        one.add({"id": f"one {i}", "text": "x" * i})
        two.add({"id": f"two {i}", "text": "x" * 7 * i})
    assert len(read_jsonl(file)) == 10


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
@pytest.mark.parametrize(("rest", "ids"), [(b' rest"}\n', [1, "half rest", 2]), (b"", [1, 2])])
def test_a_store_waits_for_a_process_that_is_writing_and_removes_what_it_left_half_written(
    rest: bytes, ids: list[Any], tmp_path: Path
) -> None:
    import fcntl

    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n')
    store = JsonlStore(file, lambda row: row["id"])
    adding = threading.Thread(target=store.add, args=({"id": 2},))
    with file.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"id": "half')
        assert list(JsonlStore(file, lambda row: row["id"]).rows) == [1]
        adding.start()
        adding.join(0.3)
        assert adding.is_alive()
        other.write(rest)
    adding.join(10)
    assert [row["id"] for row in read_jsonl(file)] == ids


def test_unanswered_and_identical_answers_are_noted() -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(answers_worth({}, a=[*"1134"], b=[*"112"]))
    assert shown.get().splitlines()[-2:] == [
        "note: 1 questions are not answered by every model and are not compared there",
        "note: 2 questions have identical answers, which are ties in a comparison: nobody is asked",
    ]
    with console.capture() as shown:
        console.print(answers_worth({"a": [1]}))
    assert "note" not in shown.get()


def test_answers_are_found_in_a_run_a_folder_or_a_bench(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    (bench / "model_answer").mkdir(parents=True)
    (bench / "reference_answer").mkdir()
    rows = [
        {"question_id": 101, "category": "math", "turns": ["a", "b"]},
        {"question_id": 102, "category": "x", "turns": ["c"]},
    ]
    (bench / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("m1", "m2"):
        answer = {
            "question_id": 101,
            "answer_id": "i",
            "model_id": name,
            "choices": [{"index": 0, "turns": ["1", "2"]}],
        }
        (bench / "model_answer" / f"{name}.jsonl").write_text(json.dumps(answer | {"tstamp": 1.0}) + "\n")
    reference = {"question_id": 101, "choices": [{"turns": ["r1", "r2"]}]}
    (bench / "reference_answer" / "gpt-4.jsonl").write_text(json.dumps(reference) + "\n")

    def found(**given: Any) -> Any:
        values: dict[str, Any] = {"answers_dir": "latest", "judgments": "", "models": (), "judge_prompts": ""}
        values |= {"bench_dir": "", "baseline": "", "bench": ()} | given
        return find_answers(SimpleNamespace(**values, output_dir=tmp_path, is_set=lambda name: name in given))

    result = found(bench_dir=str(bench))
    assert result.answers == {"m1": {101: ["1", "2"]}, "m2": {101: ["1", "2"]}}
    assert result.questions[0]["reference"] == ["r1", "r2"]
    assert found(bench_dir=str(bench), models=("m2", "m1")).answers.keys() == {"m2", "m1"}
    assert list(found(bench_dir=str(bench), baseline="m2").answers) == ["m2", "m1"]  # first, as the baseline
    assert found(judgments="x").answers == {}
    assert found(answers_dir=str(bench)).answers == result.answers
    assert found(answers_dir=str(bench / "model_answer")).answers == result.answers
    for given, said in (
        ({"bench_dir": "nowhere"}, "--bench_dir 'nowhere' is not a folder"),
        ({"answers_dir": str(tmp_path)}, "has no answers"),
        ({"bench_dir": str(bench), "models": ("m3",)}, "There are no answers of m3. Use one of: m1, m2"),
        ({}, "no finished vibes run"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            found(**given)
