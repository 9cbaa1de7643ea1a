"""A model as a judge: what it is asked, how its verdict is read, and that failures on the way change no table."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.core import UserError, read_jsonl
from helpers.evaluation.endpoint import Reply
from helpers.evaluation.judges import (
    JudgePrompts,
    ModelJudge,
    make_judge,
)
from helpers.evaluation.judgments import AnswerSet
from helpers.evaluation.results import Counts, PairResult, PairwiseResults
from helpers.runs.run import Run
from tests.evaluation.judging import answers_worth, better, judged, questions_of, settings_for
from tests.judge_server import Script, judge_server

pytestmark = pytest.mark.usefixtures("no_waiting")
PROMPTS = JudgePrompts()


def pairs_of(judgments: Any, answers: AnswerSet) -> list[PairResult]:
    return PairwiseResults.from_judgments(judgments, answers).pairs


@pytest.mark.parametrize("fault", [429, 500, "malformed", "html", "empty", "cut", "short", "hang"])
def test_a_judge_that_fails_now_and_then_gives_the_undisturbed_table(tmp_path: Path, fault: Any) -> None:
    answers = answers_worth({"before": [1, 1, 2, 1], "after": [2, 1, 1, 3]})
    with judge_server(better) as server:
        server.retry_after = "0.01"
        server.faults = [None, fault, *[None] * 5, fault]
        judge, judgments = judged(server, tmp_path / "run", answers, max_concurrency=2, timeout=0.4)
        assert pairs_of(judgments, answers)[0].counts == Counts(2, 1, 1)
        assert judgments.total == len(judge.matches) == 8
        assert len(read_jsonl(tmp_path / "run" / "calls.jsonl")) == 8
        assert len(server.requests) == 10
        assert server.most_at_once <= 2 or fault == "hang"  # the server still works on a request that was given up


def test_a_judge_that_dies_half_way_is_asked_only_for_the_rest(tmp_path: Path) -> None:
    answers = answers_worth({"before": [1] * 6, "after": [2, 1, 2, 0, 2, 2]})
    file = tmp_path / "run" / "calls.jsonl"
    with judge_server(better) as server:
        server.faults = [None] * 5 + ["gone"]
        with pytest.raises(UserError, match=r"no answer from http://127.0.0.1:\d+/v1: Connection error. Is the server"):
            judged(server, tmp_path / "run", answers, max_concurrency=1)
    before = read_jsonl(file)
    assert len(before) == 5
    with judge_server(better) as server:
        _, judgments = judged(server, tmp_path / "run", answers)
        assert len(server.requests) == 7
        assert set(server.answered.values()) == {1}
    assert pairs_of(judgments, answers)[0].counts == Counts(4, 1, 1)
    orders = Counter((row["question_id"], tuple(row["models"])) for row in read_jsonl(file))
    assert set(orders.values()) == {1}
    assert len(orders) == 12
    assert read_jsonl(file)[:5] == before


def test_a_model_without_a_system_role_gets_the_system_message_in_the_users(tmp_path: Path) -> None:
    answers = answers_worth({"before": [1] * 3, "after": [2] * 3})
    with judge_server(better) as server:
        server.refuse = lambda request: 500 if request["messages"][0]["role"] == "system" else None
        _, judgments = judged(server, tmp_path / "run", answers, max_concurrency=1)
    assert pairs_of(judgments, answers)[0].counts == Counts(3, 0, 0)
    sent = [request["messages"] for request in server.requests]
    assert [len(messages) for messages in sent] == [2] * 6 + [1] * 6  # the client asks six times before it gives up
    assert sent[-1][0]["content"].startswith("You compare two answers")
    assert "# Answer B" in sent[-1][0]["content"]


def test_a_budget_ends_after_so_many_calls_or_tokens_and_the_rest_is_asked_later(tmp_path: Path) -> None:
    answers, run = answers_worth({"before": [1] * 5, "after": [2] * 5}), tmp_path / "run"
    with judge_server(better) as server:
        _, judgments = judged(server, run, answers, max_calls=3, max_concurrency=1)
        assert (len(server.requests), judgments.remaining, len(judgments.rows)) == (3, 7, 1)
        with pytest.raises(UserError, match=r"7 of 10 calls are left\. Run the same command again to make them"):
            judgments.raise_if_incomplete()
        judged(server, run, answers, max_tokens=30, max_concurrency=1)  # 13 a call
        assert len(server.requests) == 6
        _, judgments = judged(server, run, answers)
        assert (len(server.requests), judgments.remaining, len(judgments.rows)) == (10, 0, 5)
        judgments.raise_if_incomplete()
    with judge_server(lambda messages: "Well.") as server:  # a reply without a verdict is asked for once more
        judged(server, tmp_path / "another" / "run", answers, max_calls=3, max_concurrency=1)
        assert len(server.requests) == 3
    judge = make_judge(settings_for(run, input_price=2.0, output_price=8.0), answers)
    assert isinstance(judge, ModelJudge)
    judge.replies = [Reply("", True, 100_000, 50_000)] * 10
    assert judge.describe_cost() == "10 calls, 1,000,000 tokens read, 500,000 written: 6.00 at the prices given"


def test_one_pair_that_the_server_refuses_is_an_error_and_the_others_are_judged(tmp_path: Path) -> None:
    answers = answers_worth({"before": [1, 1, 1], "after": [2, 2, 7]})
    text = "This model's maximum context length is 9 tokens, 4 in max_tokens. Change the temperature."
    with judge_server(better) as server:
        server.refuse = lambda request: (400, text) if "worth 7" in request["messages"][-1]["content"] else None
        _, judgments = judged(server, tmp_path / "run", answers, max_concurrency=1)
    assert judgments.remaining == 0
    (pair,) = pairs_of(judgments, answers)
    assert (pair.counts, pair.errors) == (Counts(2, 0, 0), 1)
    refused = [row for row in read_jsonl(tmp_path / "run" / "calls.jsonl") if row["winner"] == "error"]
    assert len(refused) == 2
    assert all("maximum context length" in row["refused"] for row in refused)
    assert {r["temperature"] for r in server.requests} == {0.0}  # no argument was dropped


def test_what_another_run_has_asked_the_same_judge_is_not_asked_again(tmp_path: Path) -> None:
    answers = answers_worth({"a": [1, 1, 1, 1], "b": [2, 2, 1, 0]})
    more = answers_worth({"a": [1, 1, 1, 1], "b": [2, 2, 1, 0], "c": [3, 3, 3, 3]})
    with judge_server(better) as server:
        judged(server, tmp_path / "one", answers)

        def uncached(**given: Any) -> int:
            judge = make_judge(settings_for(tmp_path / "two", server.url, **given), more)
            assert isinstance(judge, ModelJudge)
            calls = re.search(r"^(\d+) calls like this one", judge.preview(), re.MULTILINE)
            assert calls
            return int(calls[1])

        assert uncached() == 16
        assert uncached(temperature=1.0) == uncached(judge_model="another") == uncached(resume="never") == 24
        _, judgments = judged(server, tmp_path / "two", more)
        assert len(server.requests) == 8 + 16
        counts = {(p.baseline, p.candidate): p.counts for p in pairs_of(judgments, more)}
        assert counts["a", "b"] == Counts(2, 1, 1)
        renamed = AnswerSet(answers.questions, {"x": answers.answers["a"], "y": answers.answers["b"]})
        _, judgments = judged(server, tmp_path / "three", renamed)  # the same answers under other names
        assert pairs_of(judgments, renamed)[0].counts == Counts(2, 1, 1)
        assert len(server.requests) == 8 + 16


def test_an_unreadable_verdict_is_an_error_row_that_counts_nowhere(tmp_path: Path) -> None:
    answers = answers_worth({"before": [1, 1, 1], "after": [2, 2, 7]})
    mumbles: Script = lambda messages: "Well." if "worth 7" in messages[-1]["content"] else better(messages)  # noqa: E731
    with judge_server(mumbles) as server:
        _, judgments = judged(server, tmp_path / "run", answers)
        assert len(server.requests) == 4 + 2 * 2  # asked once more each
        (pair,) = pairs_of(judgments, answers)
        assert (pair.counts, pair.errors) == (Counts(2, 0, 0), 1)
        expected = "1 of 3 comparisons are not counted, because they have no verdict (1 without a clear verdict)."
        assert pair.notes()[0] == expected
        assert [row["g1_winner"] for row in judgments.rows] == ["model_2", "model_2", "error"]
        assert judgments.rows[2]["g1_judgment"] == "Well."
        assert judgments.remaining == 0
        judged(server, tmp_path / "run", answers, retry_errors=True)
        assert len(server.requests) == 8 + 2 * 2
    judgments.rows = judgments.rows[2:]
    with pytest.raises(UserError, match=r"no reply had a verdict; .* One reply: 'Well.'"):
        judgments.raise_if_incomplete()


def test_prompts_show_references_and_complete_conversations(tmp_path: Path) -> None:
    question = {"question_id": 1, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["four", "six"]}
    answers = AnswerSet([question], {"a": {1: ["4", "{6}"]}, "b": {1: ["5", "7"]}})
    assert PROMPTS.name_for(question, 1, "pairwise") == "pair-reference"
    name = PROMPTS.name_for(question, 2, "pairwise")
    assert name == "pair-reference-multi-turn"
    system, user = PROMPTS.messages({"turn": 2, "models": ["a", "b"], "prompt": name}, question, answers.answers)
    assert "[[A]]" in system["content"]
    for text in ("2+2?", "And 3+3?", "four", "six", "{6}", "5", "7"):
        assert text in user["content"]
    assert PROMPTS.name_for(question | {"reference": ["four"]}, 2, "single") == "single-multi-turn"
    assert not [n for n, row in PROMPTS.rows.items() if "{" in row["system_prompt"]]
    assert len(PROMPTS.rows) == 8
    with judge_server(lambda messages: "[[A]]") as server:
        judge = make_judge(settings_for(tmp_path / "run", server.url, max_calls=1, max_concurrency=1), answers)
        assert isinstance(judge, ModelJudge)
        assert "4 calls like this one" in judge.preview()
        judge.run(Run(tmp_path / "run", {}))
        lines = judge.preview().splitlines()
    cached = judge.cached_calls()
    left = [match for match in judge.matches if judge.request_hash(match) not in cached]
    texts = [m["content"] for match in left for m in judge.messages(match)]
    tokens = sum(map(len, texts)) // 4
    assert lines[-2:] == [f"3 calls like this one, about {tokens:,} tokens to read.", "1 more have been judged before."]
    assert lines[0] == "--- system ---"


def test_every_turn_is_judged_in_both_orders_where_both_have_answered_it() -> None:
    texts: dict[str, dict[Any, list[str]]] = {"a": {0: ["x", "y", "z"], 1: ["x", "y", "z"]}, "b": {0: ["x", "y"]}}
    answers = AnswerSet(questions_of(2, turns=3), texts)
    matches = PROMPTS.make_matches(answers.questions, answers.answers, [("a", "b")], "pairwise")
    assert [(m["question_id"], m["turn"], tuple(m["models"])) for m in matches] == [
        (0, 1, ("a", "b")), (0, 1, ("b", "a")), (0, 2, ("a", "b")), (0, 2, ("b", "a")),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"Nothing to judge: no question has answers of all of a and b\. Run 04"):
        PROMPTS.make_matches(questions_of(1), {"a": {}, "b": {}}, [("a", "b")], "pairwise")


def test_a_template_with_an_unknown_field_is_one_line(tmp_path: Path) -> None:
    row = {"name": "pair", "system_prompt": "Judge.", "prompt_template": "{answr_a}"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    settings = settings_for(tmp_path / "run", "http://127.0.0.1:1/v1", judge_prompts=str(tmp_path / "prompts.jsonl"))
    judge = make_judge(settings, answers_worth({"a": [1], "b": [2]}))
    with pytest.raises(UserError, match="the template of pair cannot be filled in: 'answr_a'"):
        judge.preview()


@pytest.mark.parametrize("ids", [range(4), [1, "x", "02", 4]])
def test_answers_that_are_the_same_are_ties_without_a_call(tmp_path: Path, ids: Any) -> None:
    texts = {"a": ["same", "worth 1", "worth 5", ""], "b": ["same", "worth 2", "worth 3", ""], "c": ["same"] * 4}
    questions = [q | {"question_id": i} for i, q in zip(ids, questions_of(4), strict=True)]
    answers = AnswerSet(questions, {n: {i: [t] for i, t in zip(ids, own, strict=True)} for n, own in texts.items()})
    with judge_server(better) as server:
        judge, judgments = judged(server, tmp_path / "run", answers, models=("a", "b"), baseline="b")
        assert len(server.requests) == len(judge.matches) == judgments.total == 2 * 2 + 2 * 3  # b and a, b and c
        shown = judge.preview().splitlines()
        assert shown[-3:-1] == ["0 calls like this one, about 0 tokens to read.", "10 more have been judged before."]
        assert shown[-1] == "3 comparisons are ties without a call, because the answers are the same."
        first, _ = results = pairs_of(judgments, answers)
        assert [(p.baseline, p.candidate, p.same_answers) for p in results] == [("a", "b", 2), ("b", "c", 1)]
        assert first.counts == Counts(win=1, loss=1, tie=2)
        assert first.consistency == 1.0  # of the two that were asked
        same = [row for row in judgments.rows if row.get("identical")]
        assert [(row["question_id"], row["g1_winner"], row["g2_winner"]) for row in same if row["model_2"] == "a"] == [
            (ids[0], "tie", "tie"), (ids[3], "tie", "tie"),
        ]  # fmt: skip
        assert "2 of 4 comparisons are ties without a judge, because the answers are the same." in first.notes()
        alike = AnswerSet(questions, dict.fromkeys("xy", answers.answers["c"]))
        judge, judgments = judged(server, tmp_path / "alike" / "run", alike)
        assert "\n".join(judge.preview().splitlines()) == (
            "---\n0 calls like this one, about 0 tokens to read.\n"
            "4 comparisons are ties without a call, because the answers are the same."
        )
        assert pairs_of(judgments, alike)[0].counts == Counts(0, 0, 4)
        judgments.raise_if_incomplete()
        assert len(server.requests) == 10
    with judge_server(lambda messages: "[[7]]") as server:
        judge, judgments = judged(server, tmp_path / "rated" / "run", alike, mode="single")
        assert len(server.requests) == 4  # one answer of two models is rated once
        assert [(row["model"], row["score"]) for row in judgments.rows] == [("x", 7.0), ("y", 7.0)] * 4


def test_a_prompt_that_several_comparisons_share_is_sent_once(tmp_path: Path) -> None:
    texts = {"a": "worth 1", "b": "worth 1", "c": "worth 2"}
    answers = AnswerSet(questions_of(2), {name: {i: [text] for i in (0, 1)} for name, text in texts.items()})
    with judge_server(better) as server:
        given = dict(models=("c", "a", "b"), baseline="c")
        judge = make_judge(settings_for(tmp_path / "run", server.url, **given), answers)
        shown = judge.preview()
        assert "\n4 calls like this one, " in shown
        assert shown.endswith("\n4 more are the same as one of them, and are not sent.")
        _, judgments = judged(server, tmp_path / "run", answers, **given)
        assert len(server.requests) == 4  # two questions in two orders, of a and b at once
        assert judgments.remaining == 0
        assert [(row["model_2"], row["g1_winner"], row["g2_winner"]) for row in judgments.rows] == [
            ("a", "model_1", "model_1"), ("b", "model_1", "model_1"),
        ] * 2  # fmt: skip


def test_a_turn_is_the_same_if_all_before_it_are_too(tmp_path: Path) -> None:
    texts: dict[str, dict[Any, list[str]]] = {
        "a": {0: ["worth 1", "same"], 1: ["same", "worth 1"], 2: ["same", "same"]},
        "b": {0: ["worth 2", "same"], 1: ["same", "worth 2"], 2: ["same", "same"]},
    }
    judge = make_judge(settings_for(tmp_path / "run", "http://127.0.0.1:1/v1"), AnswerSet(questions_of(3, 2), texts))
    assert isinstance(judge, ModelJudge)
    assert [(m["question_id"], m["turn"]) for m in judge.matches[::2]] == [(0, 1), (0, 2), (1, 2)]
    assert [(row["question_id"], row["turn"]) for row in judge.ties] == [(1, 1), (2, 1), (2, 2)]


def test_why_a_pair_was_not_judged_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = answers_worth({"before": [1, 1, 1, 1], "after": [2, 7, 8, 9], "third": [3]})
    mumbles: Script = lambda messages: "Well." if "worth 8" in messages[-1]["content"] else better(messages)  # noqa: E731
    with judge_server(mumbles) as server:
        server.refuse = lambda request: (
            (400, "too\x1blong") if "worth 7" in request["messages"][-1]["content"] else None
        )
        _, judgments = judged(server, tmp_path / "run", answers, max_concurrency=1)
        url = server.url
    shown = capsys.readouterr().out
    refusal = f"refused by the server: judge at {url} refuses the request: too"
    assert f"Not judged: 2 calls (the first is question 1, turn 1): {refusal}\\x1blong\n" in shown
    assert "Not judged: 2 calls (the first is question 2, turn 1): without a clear verdict\n" in shown
    assert [row.get("error") for row in judgments.rows if row["model_2"] == "after"] == [
        None, f"{refusal}\x1blong", "without a clear verdict", None,
    ]  # fmt: skip
    results = PairwiseResults.from_judgments(judgments, answers).as_dict()
    missing = "before and third: 3 of 4 questions are not judged, or not in all turns, because answers are missing"
    assert results["notes"][0] == f"{missing}: third lacks 3."
    first = "after against before: 2 of 4 comparisons are not counted, because they have no verdict"
    assert f"{first} (1 refused by the server, 1 without a clear verdict)." in results["notes"]
    assert url not in json.dumps(results)  # the card has these notes
    with judge_server(lambda messages: "Well.") as server:
        server.faults = ["short"] * 4
        _, judgments = judged(server, tmp_path / "cut" / "run", answers_worth({"a": [1]}), mode="single")
    assert [row["error"] for row in judgments.rows] == ["cut off before a verdict"]


@pytest.mark.parametrize("name", ["b", "outputs/b", "/home/me/models/B/"])
def test_a_judge_that_is_one_of_the_judged_is_noted(tmp_path: Path, name: str) -> None:
    answers = answers_worth({"a": [1], "b": [2]})
    note = "b is judged by itself. Judges tend to prefer their own answers."
    with judge_server(lambda messages: "[[A]]" if "first" not in messages[0] else "[[5]]") as server:
        judge, judgments = judged(server, tmp_path / "run", answers, judge_model=name)
    assert judge.preview().splitlines()[-1] == note
    assert PairwiseResults.from_judgments(judgments, answers).as_dict()["notes"][0] == note
    other = make_judge(settings_for(tmp_path / "run", server.url, judge_model="b2"), answers)
    assert "itself" not in other.preview()
