"""The judge: a scripted one gives hand-worked tables, and what fails on the way changes none of them."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.core import SettingsError, UserError, read_jsonl
from helpers.evaluation import generators as endpoints
from helpers.evaluation.answer_sets import AnswerSet, find_answers, model_pairs
from helpers.evaluation.generators import Endpoint
from helpers.evaluation.judges import (
    Budget,
    Judge,
    JudgePrompts,
    Match,
    make_matches,
    pair_row,
    parse_rating,
    parse_verdict,
    uncached,
)
from helpers.evaluation.judgments import (
    judge_by_rules,
    raise_if_incomplete,
    read_judgments,
    read_votes,
    score_by_rules,
    without_timestamps,
)
from helpers.evaluation.results import Counts, PairwiseResults, RatingResults
from helpers.evaluation.statistics import length_controlled, mean_interval, sign_test
from tests.judge_server import JudgeServer, Script, judge_server, shown

PROMPTS = JudgePrompts()


def questions_of(count: int, turns: int = 1) -> list[dict[str, Any]]:
    kinds = ("odd", "even")
    return [
        {"question_id": i, "category": kinds[i % 2], "turns": [f"question {i}.{t}" for t in range(turns)]}
        for i in range(count)
    ]


def better(messages: list[dict[str, str]]) -> str:
    """The script of a judge that looks at what an answer says of itself: the higher number is the better."""
    a, b = (int(m[1]) if (m := re.search(r"worth (\d+)", text)) else 0 for text in shown(messages))
    return f"One of them says [[A]], but my verdict is [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def judged(server: JudgeServer, file: Path, questions: Any, said: Any, mode: str = "pairwise", **more: Any) -> Any:
    """(judge, its games, the rows of what it said), all games asked."""
    games = make_matches(questions, said, model_pairs(said, mode), mode, PROMPTS)
    judge = Judge(Endpoint("judge", server.url, timeout=1.0), PROMPTS, said, file, temperature=0.0, max_tokens=9)
    judge.ask(judge.missing(games), more.pop("concurrency", 4), Budget(**more))
    return judge, games, judge.rows(games)


def table(script: Script, tmp_path: Path, questions: Any, said: Any) -> PairwiseResults:
    with judge_server(script) as server:
        _, games, rows = judged(server, tmp_path / "calls.jsonl", questions, said)
        assert len(server.requests) == len(games) == 2 * len(rows)
    return PairwiseResults.of("judge", rows, questions, said)


def said_of(worth: dict[str, list[int]], **texts: list[str]) -> dict[str, dict[Any, list[str]]]:
    return {name: {i: [f"worth {n}"] for i, n in enumerate(numbers)} for name, numbers in worth.items()} | {
        name: {i: [text] for i, text in enumerate(own)} for name, own in texts.items()
    }


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import openai._base_client

    monkeypatch.setattr(endpoints, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


def test_a_judge_with_known_preferences_gives_the_hand_worked_table(tmp_path: Path) -> None:
    questions = questions_of(8)
    said = said_of({"before": [1, 1, 1, 1, 1, 1, 2, 3], "after": [2, 2, 2, 2, 2, 1, 2, 1]})
    result = table(better, tmp_path, questions, said)
    (pair,) = result.pairs
    assert (pair.before, pair.after, pair.counts) == ("before", "after", Counts(win=5, loss=1, tie=2))
    assert result.models["after"].as_dict() == {
        "win": 5, "loss": 1, "tie": 2, "win_rate": 0.625, "loss_rate": 0.125, "win_rate_adjusted": 0.75,
    }  # fmt: skip
    assert result.models["before"].win_rate_adjusted == 0.25
    assert pair.consistency == 1.0
    assert pair.sign_p == pytest.approx(2 * (1 + 6) / 2**6)  # 0 or 1 losses of 6, both sides
    assert pair.interval[0] < 0.75 < pair.interval[1]
    assert pair.categories == {"odd": Counts(3, 0, 1), "even": Counts(2, 1, 1)}
    assert list(result.models) == ["after", "before"]
    assert result.as_dict()["win"] == 5
    assert result.as_dict()["pairs"][0]["categories"]["even"]["win_rate_adjusted"] == 0.625


def test_a_judge_that_always_says_a_gives_ties_only_and_no_consistency(tmp_path: Path) -> None:
    said = said_of({"before": [1] * 12, "after": [2] * 12})
    (pair,) = table(lambda messages: "[[A]]", tmp_path, questions_of(12), said).pairs
    assert pair.counts == Counts(0, 0, 12)
    assert (pair.counts.win_rate_adjusted, pair.consistency, pair.first_favoured) == (0.5, 0.0, 1.0)
    note = "The order changed the verdict in 100% of comparisons, 100% of these for whatever stood first: they count"
    assert note in " ".join(pair.notes())


def test_a_judge_of_length_is_found_out_on_models_of_equal_quality(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = {name: ["x" * int(n) for n in draw.integers(50, 500, 120)] for name in ("before", "after")}
    texts["after"] = [text + "x" * 120 for text in texts["after"]]  # no better, and longer
    longest: Script = lambda messages: "[[A]]" if len(shown(messages)[0]) > len(shown(messages)[1]) else "[[B]]"  # noqa: E731
    (pair,) = table(longest, tmp_path, questions_of(120), said_of({}, **texts)).pairs
    assert pair.counts.win_rate_adjusted > 0.65
    assert pair.longer_won == 1.0
    assert pair.length_controlled is not None
    assert abs(pair.length_controlled - 0.5) < 0.1
    (note,) = [note for note in pair.notes() if "longer answer" in note]
    assert note.startswith("100% of decided comparisons went to the longer answer. At equal lengths after would win ")
    assert note.endswith("apart from length the two are alike.")

    texts["after"] = [text + "x" for text in texts["before"]]
    (pair,) = table(longest, tmp_path / "always", questions_of(120), said_of({}, **texts)).pairs
    assert pair.counts == Counts(120, 0, 0)
    notes = " ".join(pair.notes())
    assert "after's answers are the longer ones in 100% of comparisons: length and quality can hardly be told" in notes
    assert "All outcomes are alike; at 95% up to 2.5% of other questions may still go another way." in notes


def test_few_or_like_outcomes_are_not_made_surer_than_they_are(tmp_path: Path) -> None:
    def pair(winners: str) -> Any:
        questions = questions_of(len(winners))
        rows = [pair_row(q, 1, ("a", "b"), ["j", "p"], [w, w]) for q, w in zip(questions, winners, strict=True)]
        rows = [row | {g: "tie" for g in ("g1_winner", "g2_winner") if row[g] == "t"} for row in rows]
        return PairwiseResults.of("j", rows, questions, {}).pairs[0]

    ties = pair("t" * 10)
    assert ties.interval[0] < 0.4 < 0.6 < ties.interval[1]
    assert "All outcomes are alike; at 95% up to 25.9% of other questions may still go another way." in ties.notes()
    one = pair("b")
    assert one.interval == pytest.approx((0.025, 1.0))
    assert "a" in one.notes()[0]
    four = pair("bbbb" + "t" * 6)
    assert four.sign_p == 0.125
    assert four.notes()[0].startswith("b and a cannot be told apart here: ")
    draw, missed = np.random.default_rng(3), 0
    for seed in range(300):  # nothing to be found, half of it ties
        outcomes = draw.choice([0.0, 0.5, 1.0], 8, p=[0.25, 0.5, 0.25])
        low, high = mean_interval(outcomes, list(range(8)), seed)
        missed += not low <= 0.5 <= high
    assert missed / 300 < 0.08


def test_length_control_finds_the_strength_that_outcomes_were_drawn_with() -> None:
    draw = np.random.default_rng(1)
    lengths = draw.normal(100, 300, 4000)
    strength, slope = 0.8, 2.0
    p = 1 / (1 + np.exp(-(strength + slope * np.tanh(lengths / lengths.std()))))
    outcomes = (draw.random(4000) < p).astype(float)
    assert length_controlled(outcomes, lengths)[0] == pytest.approx(1 / (1 + np.exp(-strength)), abs=0.03)
    assert length_controlled(1 - outcomes, -lengths)[0] == pytest.approx(1 - 1 / (1 + np.exp(-strength)), abs=0.03)
    assert length_controlled(outcomes, np.zeros(4000))[0] == pytest.approx(outcomes.mean(), abs=1e-3)
    # the same fit by PyTorch's own optimizer, ridge and all
    import torch

    x, y = torch.tensor(np.tanh(lengths / lengths.std())), torch.tensor(outcomes)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(w[0] + w[1] * x, y, reduction="sum")
        value = bce + 0.5 * (1e-3 * w[0] ** 2 + 1e-3 * w[1] ** 2)
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    assert length_controlled(outcomes, lengths)[0] == pytest.approx(torch.sigmoid(w[0]).item(), abs=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says_and_turns_of_a_question_count_as_one() -> None:
    draw = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        outcomes = draw.choice([0.0, 0.5, 1.0], 60, p=[0.2, 0.3, 0.5])
        low, high = mean_interval(outcomes, list(range(60)), seed)
        held += low <= 0.65 <= high
    assert 0.89 < held / 200 <= 0.99
    single = draw.choice([0.0, 1.0], 40)
    once = mean_interval(single, list(range(40)), 0)
    twice = mean_interval(np.repeat(single, 2), list(np.repeat(np.arange(40), 2)), 0)
    assert twice == pytest.approx(once)  # asking everything twice makes nothing surer
    assert sign_test(np.array([1.0] * 9 + [0.0]), list(range(10))) == pytest.approx(22 / 1024)
    assert sign_test(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"]) == 1.0
    assert sign_test(np.array([0.5, 0.5]), [1, 2]) == 1.0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("My verdict: [[A]]", "A"),
        ("Assistant A wrote [[A]] in its answer. Final verdict: [[B]]", "B"),
        ("[[C]]", "tie"),
        ("<think>[[A]] surely... no</think>[[B]]", "B"),
        ("<think>Perhaps [[A]], or", "error"),
        ("[[B]] <thinking>[[A]]</thinking>", "B"),
        ("A is better", "error"),
        ("[[D]]", "error"),
        ("", "error"),
        ("Let me compare. [[A]] perhaps</think>I cannot decide.", "error"),
        ("Let me compare. [[A]] perhaps</think>No: [[B]]", "B"),
        ("Assistant A forgot to close its <think> tag. [[B]]", "B"),
    ],
)
def test_the_verdict_is_the_last_one_stated_outside_of_thoughts(text: str, verdict: str) -> None:
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "rating"),
    [("Rating: [[7]]", 7), ("[[3]] at first, but [[8.5]]", 8.5), ("[[11]]", -1), ("seven", -1), ("Rating: [6]", 6),
     ("<think>[[2]]</think> Rating: [[9]]", 9), ("[[0]]", -1)],
)  # fmt: skip
def test_the_rating_is_the_last_one_stated(text: str, rating: float) -> None:
    assert parse_rating(text) == rating


FAULTS = [429, 500, "malformed", "html", "empty", "cut", "short", "hang"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_fails_now_and_then_gives_the_undisturbed_table(tmp_path: Path, fault: Any) -> None:
    questions = questions_of(4)
    said = said_of({"before": [1, 1, 2, 1], "after": [2, 1, 1, 3]})
    with judge_server(better) as server:
        server.retry_after = "0.01"
        server.faults = [None, fault, *[None] * 5, fault]
        judge, games, rows = judged(server, tmp_path / "calls.jsonl", questions, said, concurrency=2)
        assert PairwiseResults.of("judge", rows, questions, said).pairs[0].counts == Counts(2, 1, 1)
        assert len(judge.ledger.rows) == len(games) == 8
        assert len(read_jsonl(tmp_path / "calls.jsonl")) == 8
        assert len(server.requests) == 10
        assert server.most_at_once <= 2 or fault == "hang"  # a request that was given up goes on in the server


def test_a_judge_that_dies_half_way_is_asked_only_for_the_rest(tmp_path: Path) -> None:
    questions = questions_of(6)
    said = said_of({"before": [1] * 6, "after": [2, 1, 2, 0, 2, 2]})
    file = tmp_path / "calls.jsonl"
    with judge_server(better) as server:
        server.faults = [None] * 5 + ["gone"]
        with pytest.raises(UserError, match=r"no answer from http://127.0.0.1:\d+/v1: Connection error. Is the server"):
            judged(server, file, questions, said, concurrency=1)
    before = read_jsonl(file)
    assert len(before) == 5
    with judge_server(better) as server:
        _, _, rows = judged(server, file, questions, said)
        assert len(server.requests) == 7
        assert set(server.answered.values()) == {1}
    assert PairwiseResults.of("judge", rows, questions, said).pairs[0].counts == Counts(4, 1, 1)
    orders = Counter((row["question_id"], tuple(row["models"])) for row in read_jsonl(file))
    assert set(orders.values()) == {1}
    assert len(orders) == 12
    assert read_jsonl(file)[:5] == before


def test_what_the_client_says_of_a_server_that_refuses_is_one_line(tmp_path: Path) -> None:
    with judge_server(lambda messages: "x") as server:
        judge = Endpoint("nobody", server.url, tries=2)
        for status, said in {
            401: "does not take the key in OPENAI_API_KEY (401)",
            404: "has no model 'nobody' (404): it has judge",
            400: "refuses the request: scripted 400",
            429: "asks to slow down (429), and went on asking: scripted 429",
            503: "fails (503): scripted 503",
        }.items():
            server.faults = [status] * 4
            with pytest.raises(UserError, match=re.escape(said)):
                judge.ask([{"role": "user", "content": "x"}])
        server.faults = ["html"] * 9
        with pytest.raises(UserError, match="answers with what is no reply, 2 times in a row"):
            judge.ask([{"role": "user", "content": "x"}])


def test_a_judge_that_wants_other_words_for_its_length_gets_them() -> None:
    def picky(messages: list[dict[str, str]]) -> str:
        return "fine"

    with judge_server(picky) as server:
        judge = Endpoint("o9", server.url)
        original = server.RequestHandlerClass._answer  # type: ignore[attr-defined]

        def answer(handler: Any, request: dict[str, Any], fault: Any) -> None:
            for name in ("max_tokens", "temperature"):
                if name in request:
                    message = f"Unsupported parameter: '{name}' is not supported with this model."
                    return handler._send(400, json.dumps({"error": {"message": message}}).encode())
            return original(handler, request, fault)

        server.RequestHandlerClass = type("Picky", (server.RequestHandlerClass,), {"_answer": answer})  # type: ignore[assignment]
        assert judge.ask([{"role": "user", "content": "x"}], max_tokens=5, temperature=0.0).text == "fine"
        assert judge.ask([{"role": "user", "content": "y"}], max_tokens=6, temperature=0.0).text == "fine"
    assert [r.get("max_completion_tokens") for r in server.requests] == [None, 5, 5, 6]


def test_a_model_without_a_place_for_a_system_message_gets_it_in_the_users(tmp_path: Path) -> None:
    questions, said = questions_of(3), said_of({"before": [1] * 3, "after": [2] * 3})
    with judge_server(better) as server:
        original = server.RequestHandlerClass._answer  # type: ignore[attr-defined]

        def answer(handler: Any, request: dict[str, Any], fault: Any) -> None:
            refuses = request["messages"][0]["role"] == "system"
            original(handler, request, 500 if refuses else fault)

        server.RequestHandlerClass = type("Strict", (server.RequestHandlerClass,), {"_answer": answer})  # type: ignore[assignment]
        _, _, rows = judged(server, tmp_path / "calls.jsonl", questions, said, concurrency=1)
    assert PairwiseResults.of("judge", rows, questions, said).pairs[0].counts == Counts(3, 0, 0)
    sent = [request["messages"] for request in server.requests]
    assert [len(messages) for messages in sent] == [2] * 6 + [1] * 6  # the client asks six times before it gives up
    assert sent[-1][0]["content"].startswith("You compare two answers")
    assert "# Answer B" in sent[-1][0]["content"]


def test_a_budget_ends_after_so_many_calls_or_tokens_and_the_rest_is_asked_later(tmp_path: Path) -> None:
    questions, said = questions_of(5), said_of({"before": [1] * 5, "after": [2] * 5})
    file = tmp_path / "calls.jsonl"
    with judge_server(better) as server:
        judge, games, rows = judged(server, file, questions, said, max_calls=3)
        assert (len(server.requests), len(judge.missing(games)), len(rows)) == (3, 7, 1)
        with pytest.raises(UserError, match="7 of 10 calls are left: the same command makes them"):
            raise_if_incomplete(rows, len(judge.missing(games)), len(games))
        _, games, _ = judged(server, file, questions, said, max_tokens=30, concurrency=1)  # 13 a call
        assert len(server.requests) == 6
        judge, games, rows = judged(server, file, questions, said)
        assert (len(server.requests), judge.missing(games), len(rows)) == (10, [], 5)
    budget = Budget()
    budget.calls, budget.prompt_tokens, budget.completion_tokens = 10, 1_000_000, 500_000
    assert budget.cost(2.0, 8.0) == "10 calls, 1,000,000 tokens read, 500,000 written: 6.00 at the prices given"


def test_one_pair_that_the_server_refuses_is_an_error_and_the_others_are_judged(tmp_path: Path) -> None:
    questions, said = questions_of(3), said_of({"before": [1, 1, 1], "after": [2, 2, 7]})
    with judge_server(better) as server:
        original = server.RequestHandlerClass._answer  # type: ignore[attr-defined]

        def answer(handler: Any, request: dict[str, Any], fault: Any) -> None:
            if "worth 7" in request["messages"][-1]["content"]:
                text = "This model's maximum context length is 9 tokens, 4 in max_tokens. Change the temperature."
                return handler._send(400, json.dumps({"error": {"message": text}}).encode())
            return original(handler, request, fault)

        server.RequestHandlerClass = type("Short", (server.RequestHandlerClass,), {"_answer": answer})  # type: ignore[assignment]
        judge, games, rows = judged(server, tmp_path / "calls.jsonl", questions, said, concurrency=1)
        assert (judge.missing(games), judge.endpoint.respelled) == ([], {})
    (pair,) = PairwiseResults.of("judge", rows, questions, said).pairs
    assert (pair.counts, pair.errors) == (Counts(2, 0, 0), 1)
    refused = [row for row in read_jsonl(tmp_path / "calls.jsonl") if row["winner"] == "error"]
    assert len(refused) == 2
    assert all("maximum context length" in row["refused"] for row in refused)
    assert {r["temperature"] for r in server.requests} == {0.0}


def test_what_another_run_has_asked_the_same_judge_is_not_asked_again(tmp_path: Path) -> None:
    questions, said = questions_of(4), said_of({"a": [1, 1, 1, 1], "b": [2, 2, 1, 0]})
    with judge_server(better) as server:
        judged(server, tmp_path / "one" / "calls.jsonl", questions, said)
        more = said | said_of({"c": [3, 3, 3, 3]})
        games = make_matches(questions, more, model_pairs(more, "pairwise"), "pairwise", PROMPTS)
        judge = Judge(Endpoint("judge", server.url), PROMPTS, more, tmp_path / "two" / "calls.jsonl", temperature=0.0)
        one = [tmp_path / "one" / "calls.jsonl"]
        asked = [game.messages(PROMPTS, more) for game in games]
        assert len(uncached(asked, "judge", 0.0, one)) == 16
        assert len(uncached(asked, "judge", 1.0, one)) == len(uncached(asked, "another", 0.0, one)) == 24
        assert judge.take_over(games, one) == 8
        judge.ask(judge.missing(games), 4, Budget())
        assert len(server.requests) == 8 + 16
        found = {
            (p.before, p.after): p.counts for p in PairwiseResults.of("judge", judge.rows(games), questions, more).pairs
        }
        assert found["a", "b"] == Counts(2, 1, 1)
        warm = Judge(Endpoint("judge", server.url), PROMPTS, said, tmp_path / "three" / "calls.jsonl", temperature=1.0)
        assert warm.take_over(games[:2], [tmp_path / "one" / "calls.jsonl"]) == 0


def test_a_long_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(sleep=waits.append))
    with judge_server(lambda messages: "x") as server:
        server.faults, server.retry_after = [429], "130"
        assert Endpoint("judge", server.url).ask([{"role": "user", "content": "x"}]).text == "x"
        assert waits == [130.0]
        server.faults, server.retry_after = [429], "0.4"
        begun = time.monotonic()
        Endpoint("judge", server.url).ask([{"role": "user", "content": "x"}])
        assert time.monotonic() - begun >= 0.4  # by the client itself


def test_an_unreadable_verdict_is_an_error_row_that_counts_nowhere(tmp_path: Path) -> None:
    questions, said = questions_of(3), said_of({"before": [1, 1, 1], "after": [2, 2, 7]})
    mumbles: Script = lambda messages: "Well." if "worth 7" in messages[-1]["content"] else better(messages)  # noqa: E731
    with judge_server(mumbles) as server:
        judge, games, rows = judged(server, tmp_path / "calls.jsonl", questions, said)
        assert len(server.requests) == 4 + 2 * 2  # asked once more each
        (pair,) = PairwiseResults.of("judge", rows, questions, said).pairs
        assert (pair.counts, pair.errors) == (Counts(2, 0, 0), 1)
        assert "1 of 3 comparisons have no verdict that could be read" in pair.notes()[0]
        assert [row["g1_winner"] for row in rows] == ["model_2", "model_2", "error"]
        assert rows[2]["g1_judgment"] == "Well."
        assert judge.missing(games) == []
        assert len(judge.missing(games, retry_errors=True)) == 2
    with pytest.raises(UserError, match=r"no verdict could be read in any reply; .* One said: 'Well.'"):
        raise_if_incomplete(rows[2:], 0, 2)


def test_three_models_are_compared_all_with_all_or_with_a_baseline(tmp_path: Path) -> None:
    questions, said = questions_of(4), said_of({"a": [1, 1, 1, 1], "b": [2, 2, 1, 0], "c": [3, 3, 3, 3]})
    result = table(better, tmp_path, questions, said)
    found = {(p.before, p.after): p.counts for p in result.pairs}
    assert found == {("a", "b"): Counts(2, 1, 1), ("a", "c"): Counts(4, 0, 0), ("b", "c"): Counts(4, 0, 0)}
    assert {name: (c.win, c.loss, c.tie) for name, c in result.models.items()} == {
        "c": (8, 0, 0), "b": (2, 5, 1), "a": (1, 6, 1),
    }  # fmt: skip
    assert (result.as_dict()["before"], result.as_dict()["after"]) == ("a", "c")
    assert model_pairs(said, "pairwise", "b") == [("b", "a"), ("b", "c")]
    with pytest.raises(SettingsError, match="two models are compared, and there is one: a"):
        model_pairs({"a": {}}, "pairwise")


def test_single_ratings_are_averaged_by_turn_and_category(tmp_path: Path) -> None:
    questions = questions_of(4, turns=2)
    said = {name: {i: [f"{name} one", f"{name} two"] for i in range(4)} for name in ("x", "y")}

    def rate(messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        number = int(re.findall(r"question (\d)", text)[0])
        value = 2 * (1 + number) if "x" in text.rpartition("#")[0][-12:] else 5
        return "no idea" if number == 3 and "two" in text else f"[[{value}]]"

    with judge_server(rate) as server:
        _, games, rows = judged(server, tmp_path / "calls.jsonl", questions, said, mode="single")
    assert len(games) == len(rows) == 16
    assert set(rows[0]) == {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert [row["judge"][1] for row in rows[:3]] == ["single", "single", "single-multi-turn"]
    models = RatingResults.of("judge", rows, questions, said).as_dict()["models"]
    assert models["x"]["turns"] == {1: 5.0, 2: 4.0}
    assert models["x"]["average"] == pytest.approx((2 + 4 + 6 + 8 + 2 + 4 + 6) / 7)
    assert models["x"]["categories"] == {"odd": 4.0, "even": pytest.approx(16 / 3)}
    assert (models["x"]["errors"], models["y"]["average"]) == (1, 5.0)


def test_ratings_that_are_all_alike_leave_room_on_both_sides() -> None:
    for score in (1, 7, 10):
        rows = [{"model": "m", "question_id": i, "score": score, "turn": 1} for i in range(10)]
        low, high = RatingResults.of("j", rows, questions_of(10), {}).as_dict()["models"]["m"]["interval"]
        assert 1 <= low <= score <= high <= 10
        assert high - low == pytest.approx(9 * (1 - 0.025**0.1))


def test_prompts_show_references_and_whole_conversations() -> None:
    question = {"question_id": 1, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["four", "six"]}
    answers = [["4", "{6}"], ["5", "7"]]
    assert PROMPTS.name_for(question, 1, "pairwise") == "pair-reference"
    name = PROMPTS.name_for(question, 2, "pairwise")
    assert name == "pair-reference-multi-turn"
    system, user = PROMPTS.messages(name, question, 2, answers)
    assert "[[A]]" in system["content"]
    for text in ("2+2?", "And 3+3?", "four", "six", "{6}", "5", "7"):
        assert text in user["content"]
    assert PROMPTS.name_for(question | {"reference": ["four"]}, 2, "single") == "single-multi-turn"
    assert not [n for n, row in PROMPTS.rows.items() if "{" in row["system_prompt"]]
    assert len(PROMPTS.rows) == 8
    assert "8 calls like this one" in PROMPTS.preview([[system, user]] * 8, [[system, user]] * 8)
    said = PROMPTS.preview([[system, user]] * 8, [[system, user]] * 3).splitlines()
    tokens = 3 * (len(system["content"]) + len(user["content"])) // 4
    assert said[-2:] == [f"3 calls like this one, some {tokens:,} tokens to read.", "5 more have been judged before."]


def test_every_turn_is_judged_in_both_orders_where_both_have_answered_it() -> None:
    questions = questions_of(2, turns=3)
    said: dict[str, dict[Any, list[str]]] = {"a": {0: ["x", "y", "z"], 1: ["x", "y", "z"]}, "b": {0: ["x", "y"]}}
    games = make_matches(questions, said, [("a", "b")], "pairwise", PROMPTS)
    assert [(g.question["question_id"], g.turn, g.models) for g in games] == [
        (0, 1, ("a", "b")), (0, 1, ("b", "a")), (0, 2, ("a", "b")), (0, 2, ("b", "a")),
    ]  # fmt: skip
    assert games[0] != games[1]
    assert isinstance(games[0], Match)


def test_rules_judge_the_demo_and_say_what_they_need() -> None:
    question = {
        "question_id": 1,
        "turns": ["What is 10 plus 2?"],
        "answer": "12",
        "alternatives": ["11"],
        "category": "s",
    }
    questions = [question | {"question_id": i} for i in range(4)]
    polite, rude, wrong = (
        "Happy to help: it is 12.",
        "Obviously it is 12. Do you not know that?",
        "Of course, it is 11.",
    )
    said = said_of({}, before=[rude, polite, polite, rude], after=[polite, polite, wrong, polite])
    rows = judge_by_rules("recipes.demo.questions", questions, said, [("before", "after")])
    (pair,) = PairwiseResults.of("rules", rows, questions, said).pairs
    assert (pair.counts, pair.consistency) == (Counts(2, 1, 1), None)
    assert score_by_rules("recipes.demo.questions", questions, said) == {
        "before": {"correct": 1.0, "courteous": 0.5}, "after": {"correct": 0.75, "courteous": 1.0},
    }  # fmt: skip
    with pytest.raises(SettingsError, match="--judge_module nowhere: a module"):
        judge_by_rules("nowhere", questions, said, [("before", "after")])
    with pytest.raises(SettingsError, match="needs a field 'answer'"):
        judge_by_rules("recipes.demo.questions", questions_of(4), said, [("before", "after")])


def vote(question: int, winner: str, order: str = "ab") -> dict[str, Any]:
    return {
        "question_id": question,
        "order": [*order],
        "winner": winner,
        "blind": True,
        "voted": "2026-01-01T00:00:00Z",
    }


def export(file: Path, votes: list[dict[str, Any]], **more: Any) -> str:
    file.parent.mkdir(exist_ok=True)
    content = {"format": "votes-1", "page": "p", "voter": "", "votes": votes} | more
    file.write_text(json.dumps(content))
    return str(file)


def test_votes_of_people_become_the_table(tmp_path: Path) -> None:
    questions = questions_of(3)
    votes = [vote(0, "b", "ba"), vote(1, "tie"), vote(2, "c", "abc")]
    file = export(tmp_path / "votes.json", votes, voter="Ann")
    said: dict[str, dict[Any, list[str]]] = {name: {i: [name] for i in range(3)} for name in "abc"}
    rows = read_votes((file,), questions, said, "p")
    found = {(p.before, p.after): p.counts for p in PairwiseResults.of("human", rows, questions, said).pairs}
    assert found == {("a", "b"): Counts(1, 0, 1), ("a", "c"): Counts(1, 0, 0), ("b", "c"): Counts(1, 0, 0)}
    assert {tuple(row["judge"]) for row in rows} == {("human", "Ann")}
    for content in ("[]", "5", '["x"]', "{", '{"format": "votes-1", "page": "p", "votes": [5]}'):
        Path(file).write_text(content)
        with pytest.raises(UserError, match="is not a file of votes"):
            read_votes((file,), questions, said)
    for wrong in (vote(9, "a"), vote(0, "z"), vote(0, "d", "cd"), vote(0, "a") | {"order": 5}):
        with pytest.raises(UserError, match="vote 1, is not on these questions and models"):
            read_votes((export(tmp_path / "votes.json", [wrong]),), questions, said)
    with pytest.raises(UserError, match="is of another page"):
        read_votes((export(tmp_path / "votes.json", votes),), questions, said, "other")
    with pytest.raises(UserError, match="there is not one vote in it"):
        read_votes((export(tmp_path / "votes.json", []),), questions, said)


def test_the_newest_export_of_each_person_counts_whatever_its_file_is_called(tmp_path: Path) -> None:
    questions, said = questions_of(2), said_of({"a": [1, 1], "b": [2, 2]})
    ann = {"voter_id": "1", "voter": "Ann"}
    files = (
        export(tmp_path / "votes.json", [vote(0, "a"), vote(1, "a")], **ann, exported="2026-01-01"),
        export(tmp_path / "votes (1).json", [vote(0, "b")], **ann, exported="2026-01-02"),  # one vote was undone
        export(tmp_path / "one" / "votes.json", [vote(0, "b")]),  # two people without a name
        export(tmp_path / "two" / "votes.json", [vote(0, "b")]),
    )
    for order in (files, files[::-1]):
        rows = read_votes(order, questions, said)
        assert PairwiseResults.of("human", rows, questions, said).pairs[0].counts == Counts(win=3, loss=0, tie=0)


def test_votes_are_found_by_a_glob_that_the_shell_has_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, said = questions_of(2), said_of({"a": [1, 1], "b": [2, 2]})
    for i, name in enumerate(("votes-p.json", "votes-p (1).json", "votes-[p].json")):
        export(tmp_path / name, [vote(0, "ab"[i % 2])], voter_id=str(i))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for files, winners in {
        ("votes-*.json",): "aab",
        ("~/votes-p*.json",): "ab",
        ("votes-[p].json",): "a",  # a file is what it is called
        ("votes-p.json", "votes-? (1).json"): "ab",
    }.items():
        rows = read_votes(files, questions, said)
        assert sorted(row["g1_winner"] for row in rows) == [f"model_{'ab'.index(w) + 1}" for w in winners]
    with pytest.raises(UserError, match=r"--votes 'no-\*.json' is not a file of votes"):
        read_votes(("no-*.json",), questions, said)


def test_a_vote_between_answers_that_are_the_same_is_a_tie(tmp_path: Path) -> None:
    questions, said = questions_of(2), said_of({"a": [1, 1], "b": [1, 2]})
    rows = read_votes((export(tmp_path / "votes.json", [vote(0, "b"), vote(1, "b")]),), questions, said)
    assert PairwiseResults.of("human", rows, questions, said).pairs[0].counts == Counts(win=1, loss=0, tie=1)


def test_rows_without_their_time_are_the_same_for_the_same_votes(tmp_path: Path) -> None:
    questions, said = questions_of(2), said_of({"a": [1, 1], "b": [2, 2]})
    first = export(tmp_path / "votes.json", [vote(0, "b")])
    rows = [without_timestamps(read_votes((first,), questions, said)) for _ in range(2)]
    assert rows[0] == rows[1]
    assert (
        without_timestamps(read_votes((export(tmp_path / "votes.json", [vote(0, "a")]),), questions, said)) != rows[0]
    )


def test_what_all_models_answer_alike_is_said() -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(AnswerSet(Path("x"), questions_of(4), said_of({"a": [1, 1, 3, 4], "b": [1, 1, 2]}), Path("x")))
    assert shown.get().splitlines()[-2:] == [
        "note: 1 questions are not answered by all of them, and are left out there",
        "note: in 2 questions all answers are the same; the page of 04 asks for no vote there",
    ]
    with console.capture() as shown:
        console.print(AnswerSet(Path("x"), questions_of(1), said_of({"a": [1]}), Path("x")))
    assert "note" not in shown.get()


def test_fastchats_own_rows_are_counted_as_its_show_result_counts_them(tmp_path: Path) -> None:
    games = [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "tie"), ("model_2", "model_2"), ("error", "tie"),
             ("model_1", "tie"), ("model_1", "model_1")]  # fmt: skip
    rows = []
    for i, (g1, g2) in enumerate(games):
        models = ("new", "old") if i % 2 else ("old", "new")  # either may stand first
        flip = {"model_1": "model_2", "model_2": "model_1"} if i % 2 else {}
        rows.append({"question_id": 81 + i, "model_1": models[0], "model_2": models[1], "turn": 1, "judge": ["g", "p"],
                     "g1_winner": flip.get(g1, g1), "g2_winner": flip.get(g2, g2)})  # fmt: skip
    file = tmp_path / "gpt-4_pair.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = PairwiseResults.of("gpt-4", read_judgments(str(file), "pairwise"), [], {})
    assert result.models["old"].as_dict() | {} == {
        "win": 2, "loss": 1, "tie": 3, "win_rate": 2 / 6, "loss_rate": 1 / 6, "win_rate_adjusted": 3.5 / 6,
    }  # fmt: skip
    assert result.pairs[0].errors == 1
    assert result.pairs[0].length_controlled is None
    file.write_text('{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "A", "g2_winner": "B"}\n')
    for mode in ("pairwise", "single"):
        with pytest.raises(UserError, match=f"line 1, is no row of a model_judgment file of --mode {mode}"):
            read_judgments(str(file), mode)
    file.write_text(
        "".join(json.dumps(row | {"judge": [name, "p"]}) + "\n" for name, row in zip("xy", rows, strict=False))
    )
    with pytest.raises(UserError, match=r"has several judges \(x, y\)"):
        read_judgments(str(file), "pairwise")


def test_the_table_is_readable_in_80_columns_and_says_everything(tmp_path: Path) -> None:
    from rich.console import Console

    names = ("sft-tiny-mistral-9b7849", "dpo-tiny-mistral-0b776e")
    questions = questions_of(12)
    rows = [pair_row(q, 1, names, ["j", "p"], [names[1], names[q["question_id"] % 2]]) for q in questions]
    result = PairwiseResults.of("j", rows, questions, {n: {i: [n * i] for i in range(12)} for n in names})
    console = Console(width=80, record=True, file=(tmp_path / "x").open("w"))
    console.print(result)
    text = console.export_text()
    assert "12 comparisons by j" in text
    assert re.search(r"dpo-tiny-mistral-0b776e +6 +0 +6 +0\.50000 +0\.00000 +0\.75000", text)
    assert "same verdict in both orders          50.0%" in text
    assert re.search(r"even +6 +0 +0 +100.0%", text)
    odd = PairwiseResults.of("j [/b]", [row | {"model_1": "[/b]"} for row in rows], questions, {})
    console.print(odd, RatingResults.of("j", [{"model": f"model-{i}-[/b]", "question_id": i, "score": 7, "turn": 1}
                                            for i in range(2)], questions_of(9), {}))  # fmt: skip
    text = console.export_text()
    assert "[/b]" in text
    assert max(map(len, text.splitlines())) <= 80
    result.figure().savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


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
        values |= {"bench_dir": "", "baseline": ""} | given
        return find_answers(SimpleNamespace(**values, output_dir=tmp_path, given=lambda name: name in given))

    result = found(bench_dir=str(bench))
    assert result.said == {"m1": {101: ["1", "2"]}, "m2": {101: ["1", "2"]}}
    assert result.questions[0]["reference"] == ["r1", "r2"]
    assert found(bench_dir=str(bench), models=("m2", "m1")).said.keys() == {"m2", "m1"}
    assert list(found(bench_dir=str(bench), baseline="m2").said) == ["m2", "m1"]  # stands first, as "before"
    assert found(judgments="x").said == {}
    assert found(answers_dir=str(bench)).said == result.said
    assert found(answers_dir=str(bench / "model_answer")).said == result.said
    for given, said in (
        ({"bench_dir": "nowhere"}, "--bench_dir 'nowhere' is not a folder"),
        ({"answers_dir": str(tmp_path)}, "has no answers"),
        ({"bench_dir": str(bench), "models": ("m3",)}, "there are no answers of m3; there are of m1, m2"),
        ({}, "no finished vibes run"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            found(**given)
