"""Results: hand-worked tables, intervals that hold, and notes that tell what speaks against the numbers."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from helpers.core import UserError
from helpers.evaluation import results
from helpers.evaluation.judgments import AnswerSet, Judgments, model_pairs, read_judgments
from helpers.evaluation.results import (
    Counts,
    PairwiseResults,
    RatingResults,
    length_controlled,
    length_controlled_rate,
    mean_interval,
    sign_test,
)
from tests.evaluation.judging import answers_worth, better, judged, questions_of, results_of, rows_of
from tests.judge_server import Script, judge_server, shown

NOTHING = AnswerSet([], {})


def test_a_judge_with_known_preferences_gives_the_hand_worked_table(tmp_path: Path) -> None:
    answers = answers_worth({"before": [1, 1, 1, 1, 1, 1, 2, 3], "after": [2, 2, 2, 2, 2, 1, 2, 1]})
    result = results_of(better, tmp_path / "run", answers)
    (pair,) = result.pairs
    assert (pair.baseline, pair.candidate, pair.counts) == ("before", "after", Counts(win=5, loss=1, tie=2))
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
    answers = answers_worth({"before": [1] * 12, "after": [2] * 12})
    (pair,) = results_of(lambda messages: "[[A]]", tmp_path / "run", answers).pairs
    assert pair.counts == Counts(0, 0, 12)
    assert (pair.counts.win_rate_adjusted, pair.consistency, pair.first_position_win_rate) == (0.5, 0.0, 1.0)
    note = "The order changed the verdict in 100% of comparisons, 100% of these in favour of the answer shown first."
    assert f"{note} They count as ties." in pair.notes()


def test_a_judge_of_length_is_detected_on_models_of_equal_quality(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = {name: ["x" * int(n) for n in draw.integers(50, 500, 120)] for name in ("before", "after")}
    texts["after"] = [text + "x" * 120 for text in texts["after"]]  # no better, and longer
    longest: Script = lambda messages: "[[A]]" if len(shown(messages)[0]) > len(shown(messages)[1]) else "[[B]]"  # noqa: E731
    (pair,) = results_of(longest, tmp_path / "run", answers_worth({}, **texts)).pairs
    assert pair.counts.win_rate_adjusted > 0.65
    assert pair.longer_won == 1.0
    assert pair.length_controlled is not None
    assert abs(pair.length_controlled - 0.5) < 0.1
    (note,) = [note for note in pair.notes() if "longer answer" in note]
    assert note.startswith("100% of decided comparisons went to the longer answer. At equal lengths after would win ")
    assert note.endswith("apart from length the two cannot be told apart.")

    texts["after"] = [text + "x" for text in texts["before"]]
    (pair,) = results_of(longest, tmp_path / "always" / "run", answers_worth({}, **texts)).pairs
    assert pair.counts == Counts(120, 0, 0)
    notes = " ".join(pair.notes())
    assert "after's answers are longer in 100% of comparisons: length and quality can hardly be told apart" in notes
    assert "All outcomes are the same. At 95%, up to 2.5% of other questions may have another outcome." in notes


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "bootstrap_interval", functools.partial(results.bootstrap_interval, resamples=2000))


def pair_of(winners: str) -> Any:
    return PairwiseResults.from_judgments(Judgments("j", rows_of(winners)), NOTHING).pairs[0]


def test_few_or_identical_outcomes_are_not_made_surer_than_they_are() -> None:
    ties = pair_of("t" * 10)
    assert ties.interval[0] < 0.4 < 0.6 < ties.interval[1]
    assert "All outcomes are the same. At 95%, up to 25.9% of other questions may have another outcome." in ties.notes()
    one = pair_of("b")
    assert one.interval == pytest.approx((0.025, 1.0))
    assert one.notes()[0].startswith("b and a cannot be told apart here: the interval 2.5% to 100.0% contains 50%.")
    four = pair_of("bbbb" + "t" * 6)
    assert four.sign_p == 0.125
    assert four.notes()[0] == "b and a cannot be told apart here: p = 0.12."


def test_questions_with_one_mean_have_no_interval_of_zero_width() -> None:
    # scipy 1.17: binomtest(10, 10).proportion_ci(0.95, "exact") is 0.6915 to 1
    assert mean_interval(np.ones(10), list(range(10)), 0) == pytest.approx((0.691503, 1.0), abs=1e-6)
    both = mean_interval(np.array([1.0, 0.0] * 10), [i // 2 for i in range(20)], 0)  # each turn of a question differs
    assert both == pytest.approx((0.5 * 0.691503, 1 - 0.5 * 0.691503), abs=1e-6)
    assert mean_interval(np.array([1.0, 0.0]), [1, 1], 0) == pytest.approx((0.0125, 0.9875))
    lengths = np.arange(12.0) - 5
    for outcome in (0.0, 0.5, 1.0):  # nothing for length to explain
        assert length_controlled_rate(np.full(12, outcome), lengths, list(range(12)), 0) == (None, None)
    rows = [{"model": "m", "question_id": i // 2, "score": (4, 8)[i % 2], "turn": 1 + i % 2} for i in range(20)]
    low, high = RatingResults.from_judgments(Judgments("j", rows), NOTHING).models["m"]["interval"]
    assert (low, high) == pytest.approx((1 + 5 * 0.691503, 1 + 5 + 4 * (1 - 0.691503)), abs=1e-5)


def test_the_rate_at_equal_lengths_of_few_votes_has_a_warning() -> None:
    def notes(winners: str) -> list[str]:
        texts = {name: {i: ["x" * (i % 5 + (5 * (name == "a")) * (i % 3))] for i in range(40)} for name in "ab"}
        answers = AnswerSet(questions_of(40), texts)
        return PairwiseResults.from_judgments(Judgments("human", rows_of(winners)), answers).pairs[0].notes()

    warning = "The rate at equal lengths rests on 3 decided comparisons. With fewer than 20, do not rely on it."
    assert warning in notes("abbab")
    assert not [note for note in notes("abbab" * 8) if "rests on" in note]


def test_models_are_sorted_as_fastchat_sorts_them_and_notes_name_their_pair() -> None:
    rows = [*rows_of("tttt", ("x", "y")), *rows_of("zzxx", ("x", "z")), *rows_of("ttzz", ("y", "z"))]
    result = PairwiseResults.from_judgments(Judgments("j", rows), NOTHING)
    rates = {name: (c.win, c.loss, c.tie, c.win_rate_adjusted) for name, c in result.models.items()}
    assert rates == {"z": (4, 2, 2, 0.625), "x": (2, 2, 4, 0.5), "y": (0, 2, 6, 0.375)}
    rows = [*rows_of("tttt", ("x", "y")), *rows_of("zxxx", ("x", "z"))]  # z wins more than y, and is worse
    result = PairwiseResults.from_judgments(Judgments("j", rows), NOTHING)
    assert [(name, c.win, c.win_rate_adjusted) for name, c in result.models.items()] == [
        ("x", 3, 0.625), ("y", 0, 0.5), ("z", 1, 0.25),
    ]  # fmt: skip
    assert {note.partition(": ")[0] for note in result.notes()} == {"y against x", "z against x"}
    assert not [note for note in result.pairs[0].notes() if note.startswith("y against x")]


@pytest.mark.usefixtures("few_resamples")
def test_a_difference_that_is_not_there_is_seldom_found_in_eight_questions() -> None:
    draw, missed = np.random.default_rng(3), 0
    for seed in range(300):  # no difference, half of it ties
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


@pytest.mark.usefixtures("few_resamples")
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


def test_three_models_are_compared_in_all_pairs_or_with_a_baseline(tmp_path: Path) -> None:
    answers = answers_worth({"a": [1, 1, 1, 1], "b": [2, 2, 1, 0], "c": [3, 3, 3, 3]})
    result = results_of(better, tmp_path / "run", answers)
    counts = {(p.baseline, p.candidate): p.counts for p in result.pairs}
    assert counts == {("a", "b"): Counts(2, 1, 1), ("a", "c"): Counts(4, 0, 0), ("b", "c"): Counts(4, 0, 0)}
    assert {name: (c.win, c.loss, c.tie) for name, c in result.models.items()} == {
        "c": (8, 0, 0), "b": (2, 5, 1), "a": (1, 6, 1),
    }  # fmt: skip
    assert (result.as_dict()["baseline"], result.as_dict()["candidate"]) == ("a", "c")
    assert model_pairs(answers.answers, "pairwise", "b") == [("b", "a"), ("b", "c")]
    with pytest.raises(UserError, match="a comparison needs two models, and there is one: a"):
        model_pairs({"a": {}}, "pairwise")


def test_single_ratings_are_averaged_by_turn_and_category(tmp_path: Path) -> None:
    texts = {name: {i: [f"{name} one", f"{name} two"] for i in range(4)} for name in ("x", "y")}
    answers = AnswerSet(questions_of(4, turns=2), texts)

    def rate(messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        number = int(re.findall(r"question (\d)", text)[0])
        value = 2 * (1 + number) if "x" in text.rpartition("#")[0][-12:] else 5
        return "no idea" if number == 3 and "two" in text else f"[[{value}]]"

    with judge_server(rate) as server:
        judge, judgments = judged(server, tmp_path / "run", answers, mode="single")
    rows = judgments.rows
    assert len(judge.matches) == len(rows) == 16
    assert set(rows[0]) == {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert [row["judge"][1] for row in rows[:3]] == ["single", "single", "single-multi-turn"]
    models = RatingResults.from_judgments(judgments, answers).as_dict()["models"]
    assert models["x"]["turns"] == {1: 5.0, 2: 4.0}
    assert models["x"]["average"] == pytest.approx((2 + 4 + 6 + 8 + 2 + 4 + 6) / 7)
    assert models["x"]["categories"] == {"odd": 4.0, "even": pytest.approx(16 / 3)}
    assert (models["x"]["errors"], models["y"]["average"]) == (1, 5.0)


def test_ratings_that_are_all_the_same_leave_room_on_both_sides() -> None:
    for score in (1, 7, 10):
        rows = [{"model": "m", "question_id": i, "score": score, "turn": 1} for i in range(10)]
        low, high = RatingResults.from_judgments(Judgments("j", rows), NOTHING).models["m"]["interval"]
        assert 1 <= low <= score <= high <= 10
        assert high - low == pytest.approx(9 * (1 - 0.025**0.1))


def test_fastchats_own_rows_are_counted_as_its_show_result_counts_them(tmp_path: Path) -> None:
    calls = [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "tie"), ("model_2", "model_2"), ("error", "tie"),
             ("model_1", "tie"), ("model_1", "model_1")]  # fmt: skip
    rows = []
    for i, (g1, g2) in enumerate(calls):
        models = ("new", "old") if i % 2 else ("old", "new")  # either may be first
        flip = {"model_1": "model_2", "model_2": "model_1"} if i % 2 else {}
        rows.append({"question_id": 81 + i, "model_1": models[0], "model_2": models[1], "turn": 1, "judge": ["g", "p"],
                     "g1_winner": flip.get(g1, g1), "g2_winner": flip.get(g2, g2)})  # fmt: skip
    file = tmp_path / "gpt-4_pair.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = PairwiseResults.from_judgments(read_judgments(str(file), "pairwise"), NOTHING)
    assert result.judge == "g"
    assert result.models["old"].as_dict() == {
        "win": 2, "loss": 1, "tie": 3, "win_rate": 2 / 6, "loss_rate": 1 / 6, "win_rate_adjusted": 3.5 / 6,
    }  # fmt: skip
    assert result.pairs[0].errors == 1
    assert result.pairs[0].length_controlled is None


def test_the_table_is_readable_in_80_columns_and_says_everything(tmp_path: Path) -> None:
    names = ("sft-tiny-mistral-9b7849", "dpo-tiny-mistral-0b776e")
    rows = rows_of("ab" * 6, names)
    for row in rows:
        row |= {"g1_winner": "model_2", "g2_winner": f"model_{1 + row['question_id'] % 2}"}
    answers = AnswerSet(questions_of(12), {n: {i: [n * i] for i in range(12)} for n in names})
    result = PairwiseResults.from_judgments(Judgments("j", rows, {names[0]: {"correct": 0.5}}), answers)
    console = Console(width=80, record=True, file=(tmp_path / "x").open("w"))
    console.print(result)
    text = console.export_text()
    assert "12 comparisons by j" in text
    assert re.search(r"dpo-tiny-mistral-0b776e +6 +0 +6 +50\.0% +0\.0% +75\.0%", text)
    line = " ".join(text.split())
    assert f"{names[1]} against {names[0]}: 75.0% (95% interval " in line
    assert "sign test p = 0.031" in line
    assert "same verdict in both orders 50.0%" in line
    assert re.search(r"even +6 +0 +0 +100.0%", text)
    assert re.search(r"sft-tiny-mistral-9b7849 +50.0%", text)
    assert line.index("win_rate_adjusted") < line.index("against") < line.index("bootstrap over questions")
    odd = Judgments("j [/b]", [row | {"model_1": "[/b] $x$"} for row in rows])
    ratings = [{"model": f"model-{i}-[/b]", "question_id": i, "score": 7, "turn": 1} for i in range(2)]
    both = [
        PairwiseResults.from_judgments(odd, answers),
        RatingResults.from_judgments(Judgments("j", ratings), answers),
    ]
    console.print(*both)
    text = console.export_text()
    assert "[/b]" in text
    assert max(map(len, text.splitlines())) <= 80
    for each in (result, *both):
        each.figure().savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 5000
