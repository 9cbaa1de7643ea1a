"""Pairs of scored answers and of verdicts: which are made, what is counted, and the control."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from helpers.core import CleanExit, SettingsError, UserError, read_jsonl
from helpers.evaluation.pairs import PairSet, make_pairs, make_scorer
from helpers.evaluation.questions import Answer
from helpers.evaluation.samples import find_prompts
from helpers.runs.run import Run
from tests.evaluation.judging import better, export, rows_of, vote
from tests.evaluation.rounds import pairs_settings, write_answers, write_rows
from tests.evaluation.test_reward_model import load, scores_alone, write_model
from tests.judge_server import judge_server

NO_MODELS: Any = SimpleNamespace(tokenizers={}, variables={})
RULES = """
import dataclasses

@dataclasses.dataclass
class Score:
    right: bool
    brief: bool

def score(answer, question):
    return Score("right" in answer, len(answer) < 10)
"""


def made(folder: Path, *words: str, name: str = "pairs-x") -> tuple[PairSet, Run]:
    """What 06 does with existing answers, in the run `name`."""
    settings = pairs_settings(folder, *words)
    prompts, run = find_prompts(settings), Run(folder / "outputs" / name, {})
    scorer = make_scorer(settings, prompts)
    samples = prompts.open_store(run.folder, settings)
    samples.import_answers(prompts.answers)
    scored = scorer.run(samples, run)
    return make_pairs(settings, prompts, samples=samples, score_set=scored, generators=NO_MODELS), run


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rules_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


ANSWERS = [
    ["right", "right, and at length", "wrong", "wrong, and at length"],
    ["right", "right", "right", "right"],
    ["right a", "right b", "right c", "right d"],
    ["wrong, and at length", "wrong: nothing fits", "wrong, once more so", "wrong, yet another"],
    ["", "", "", ""],
    ["", "right, and at length", "right", ""],
    ["wrong", "wrong!", "false", "no"],
]


def of(pairs: PairSet) -> list[tuple[Any, str, str]]:
    return [(p.question["question_id"], p.chosen.text, p.rejected.text) for p in pairs.pairs]


def test_the_account_adds_up_from_prompts_to_pairs(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": ANSWERS})
    pairs, run = made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules)
    assert of(pairs) == [(0, "right", "wrong, and at length"), (5, "right", "right, and at length")]
    assert pairs.dropped == {
        "all answers are the same": 1, "all answers have the best score": 1, "all answers have the worst score": 1,
        "all answers are empty": 1, "all answers have the same score": 1,
    }  # fmt: skip
    assert pairs.kept + pairs.dropped.total() == pairs.read == 7
    assert pairs.answers == {"in all": 28, "empty": 6, "cut off at --max_new_tokens": 0, "repeated": 3}
    # right counts twice as much as brief
    assert [(p.chosen.score, p.rejected.score) for p in pairs.pairs] == [(1.0, 0.0), (1.0, pytest.approx(2 / 3))]
    assert pairs.metrics["no_spread"] == pytest.approx(4 / 7)
    assert pairs.metrics["longer_won"] == 0.0
    assert pairs.metrics["chosen_length"] == 5.0
    pairs.save(run)
    row = read_jsonl(run.folder / "preferences.jsonl")[0]
    assert row == {
        "question_id": 0, "prompt": [{"role": "user", "content": "question 0"}],
        "chosen": [{"role": "assistant", "content": "right"}],
        "rejected": [{"role": "assistant", "content": "wrong, and at length"}],
        "score_chosen": 1.0, "score_rejected": 0.0, "chosen_model": "m", "rejected_model": "m",
        "scorer": f"rules {rules}", "sampling": {},
    }  # fmt: skip
    data = json.loads((run.folder / "run.json").read_text())["data"]
    assert data["read"] == data["kept"] + data["dropped"] == data["kept"] + sum(data["reasons"].values())


def test_pairings_margins_and_the_control(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": ANSWERS[:1]})
    flags = ["--answers_dir", str(folder), "--judge_module", rules]
    every, _ = made(tmp_path, *flags, "--pairing", "all_pairs", "--control")
    texts = [text for _, *both in of(every) for text in both]
    assert len(every.pairs) == 6
    assert [texts.count(text) for text in ANSWERS[0]] == [3, 3, 3, 3]
    assert len(every.control) == 6
    assert {p.scorer for p in every.control} == {"random"}
    assert all(p.chosen.text != p.rejected.text and p.chosen.score is None for p in every.control)
    assert len({frozenset((p.chosen.text, p.rejected.text)) for p in every.control}) == 6  # none twice
    again, _ = made(tmp_path, *flags, "--pairing", "all_pairs", "--control")
    assert [(p.chosen.text, p.rejected.text) for p in again.control] == [
        (p.chosen.text, p.rejected.text) for p in every.control
    ]
    wide, _ = made(tmp_path, *flags, "--pairing", "all_pairs", "--min_score_margin", "0.5")
    assert len(wide.pairs) == 3
    assert wide.lost == {"margin below --min_score_margin": 3}
    none, run = made(tmp_path, *flags, "--min_score_margin", "1.5")
    assert none.dropped == {"margin below --min_score_margin": 1}
    with pytest.raises(UserError, match=r"none of 1 prompts gave a pair \(margin below --min_score_margin: 1\)"):
        none.save(run)
    assert not (run.folder / "preferences.jsonl").exists()
    drawn = {of(made(tmp_path, *flags, "--pairing", "best_vs_random", "--seed", str(n))[0])[0][1:] for n in range(12)}
    assert drawn == {("right", text) for text in ANSWERS[0][1:]}


def test_a_control_without_scores_is_read_and_its_scored_twin_has_its_margins(tmp_path: Path, rules: str) -> None:
    from helpers.data.formats import PairingConfig, choose_format
    from helpers.data.loading import DatasetSpec, load_rows

    folder = write_answers(tmp_path / "given", {"m": ANSWERS})
    pairs, run = made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules, "--control")
    pairs.save(run)
    margins = {}
    for name in ("preferences", "control"):
        rows = load_rows(DatasetSpec(str(run.folder / f"{name}.jsonl")))
        row_format = choose_format(rows, "auto", use_pairs=True)
        examples = [example for row in rows for example in row_format.read(dict(row), PairingConfig())]
        assert row_format.name == "messages"
        margins[name] = [example.margin for example in examples]
    assert margins == {"preferences": [1.0, pytest.approx(1 / 3)], "control": [None, None]}


def test_two_models_give_a_side_each(tmp_path: Path, rules: str) -> None:
    answers = {"strong": [["right"], ["right"], ["wrong"]], "weak": [["wrong"], ["right"], ["right"]]}
    folder = write_answers(tmp_path / "given", answers)
    flags = ["--answers_dir", str(folder), "--judge_module", rules]
    pairs, _ = made(tmp_path, *flags, "--chosen_from", "strong", "--rejected_from", "weak")
    assert [(p.chosen.model, p.rejected.model) for p in pairs.pairs] == [("strong", "weak")]
    assert pairs.dropped == {"all answers are the same": 1, "--chosen_from is not better": 1}


def test_an_answer_that_was_cut_off_is_rejected_at_most(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["right", "wrong"], ["right", "wrong"], ["right", "wrong"]]})
    rows = read_jsonl(folder / "model_answer" / "m.jsonl")
    rows[0]["choices"][0]["cut"] = [True]
    rows[1]["choices"][1]["cut"] = [True]
    write_rows(folder / "model_answer" / "m.jsonl", rows)
    pairs, _ = made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules)
    assert [p.question["question_id"] for p in pairs.pairs] == [1, 2]
    assert pairs.dropped == {"no better answer is complete (see --max_new_tokens)": 1}
    assert pairs.answers["cut off at --max_new_tokens"] == 2


def test_thoughts_are_trained_where_the_template_keeps_them(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["right", "wrong"]]})
    rows = read_jsonl(folder / "model_answer" / "m.jsonl")
    rows[0]["choices"][0]["raw"] = ["<think>\nright? wrong?\n</think>\n\nright"]
    write_rows(folder / "model_answer" / "m.jsonl", rows)
    pairs, run = made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules)
    assert pairs.pairs[0].chosen.score == 1.0  # of the answer alone, which is brief
    for keeps, thoughts in ((True, "right? wrong?"), (False, None)):
        pairs.keeps_thoughts = keeps
        pairs.save(run)
        (row,) = read_jsonl(run.folder / "preferences.jsonl")
        assert row["chosen"][0].get("reasoning_content") == thoughts
        assert row["chosen"][0]["content"] == "right"
        assert "reasoning_content" not in row["rejected"][0]


# ---- Scorers ----


def test_a_score_is_kept_and_used_again_by_another_run_but_not_one_of_rules(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": ANSWERS})
    flags = ["--answers_dir", str(folder), "--judge_module", rules]
    first, run = made(tmp_path, *flags)
    first.save(run)
    run.save(step="pairs")
    store = run.folder / "scores.jsonl"
    assert len(read_jsonl(store)) == len({(i, text) for i, own in enumerate(ANSWERS) for text in own if text})
    marked = [row | {"score": 0.25 if row["score"] == 1 else row["score"]} for row in read_jsonl(store)]
    write_rows(store, marked)
    other = Run(tmp_path / "outputs" / "pairs-y", {})
    settings = pairs_settings(tmp_path, *flags)
    prompts = find_prompts(settings)
    samples = prompts.open_store(other.folder, settings)
    samples.import_answers(prompts.answers)
    scorer = make_scorer(settings)
    assert scorer.run(samples, other).scores[0]["m #1"] == 1.0
    (other.folder / "scores.jsonl").unlink()
    scorer.is_reusable = True  # as that of a reward model
    assert scorer.run(samples, other).scores[0]["m #1"] == 0.25
    (folder.parent / "outputs" / "pairs-x" / "scores.jsonl").write_text("broken\n{}\n")
    scorer = make_scorer(settings)
    scorer.is_reusable = True
    fresh = scorer.run(prompts.open_store(tmp_path / "z", settings), Run(tmp_path / "z", {}))
    assert fresh is not None


def worth(messages: list[dict[str, str]]) -> str:
    return f"[[{re.search(r'worth ([0-9]+)', messages[-1]['content'])[1]}]]"  # type: ignore[index]


def test_a_judge_rates_each_answer_once_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["worth 3", "worth 9", "worth 5"], ["worth 4", "worth 4", ""]]})
    with judge_server(worth) as server:
        flags = ["--answers_dir", str(folder), "--judge_model", "judge", "--judge_base_url", server.url]
        pairs, _ = made(tmp_path, *flags)
        assert of(pairs) == [(0, "worth 9", "worth 3")]
        assert [(p.chosen.score, p.rejected.score) for p in pairs.pairs] == [(9, 3)]
        assert len(server.requests) == 4  # a repeated answer is rated once, an empty one never
        again, _ = made(tmp_path, *flags, "--pairing", "all_pairs")
        assert len(again.pairs) == 3
        assert len(server.requests) == 4


def test_a_judge_that_compares_is_asked_in_both_orders_and_told_from_itself(tmp_path: Path) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["worth 3", "worth 9", "worth 5"]]})
    with judge_server(better) as server:
        flags = ["--answers_dir", str(folder), "--judge_model", "judge", "--judge_base_url", server.url]
        pairs, _ = made(tmp_path, *flags, "--mode", "pairwise")
        assert len(server.requests) == 6
    assert of(pairs) == [(0, "worth 9", "worth 3")]
    assert [(p.chosen.score, p.rejected.score) for p in pairs.pairs] == [(1.0, 0.0)]
    assert pairs.metrics["consistency"] == 1.0
    with judge_server(lambda messages: "[[A]]") as server:  # always the first
        flags[-1] = server.url
        flags[-3] = "first"
        first, _ = made(tmp_path, *flags, "--mode", "pairwise", name="pairs-y")
    assert first.metrics["consistency"] == 0.0
    assert first.dropped == {"all answers have the same score": 1}


def test_a_second_scorer_is_compared_on_some_prompts(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["right worth 3", "worth 9"]] * 4})
    with judge_server(worth) as server:
        flags = ["--answers_dir", str(folder), "--judge_module", rules, "--judge_model", "judge"]
        flags += ["--judge_base_url", server.url]
        with pytest.raises(SettingsError, match="--judge_module and --judge_model exclude each other"):
            made(tmp_path, *flags)
        pairs, _ = made(tmp_path, *flags, "--second_scorer", "judge_model", "--second_rows", "3")
        assert len(server.requests) == 3 * 2
    assert len(pairs.pairs) == 4
    assert pairs.metrics["second"] == {"scorer": "judge", "disagrees": 3}
    assert "judge disagrees on 3 of these pairs." in pairs.notes()
    with pytest.raises(SettingsError, match="--second_scorer reward_model needs --reward_model"):
        made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules, "--second_scorer", "reward_model")


def test_a_reward_model_scores_as_a_plain_loop_over_the_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = write_model(tmp_path / "reward", tokenizer, pad_token_id=tokenizer.pad_token_id)
    answers = [["five", "five is it", "five is it and so on and so on"], ["and so on", "it"]]
    folder = write_answers(tmp_path / "given", {"m": answers})
    pairs, run = made(tmp_path, "--answers_dir", str(folder), "--reward_model", str(model), "--batch_size", "2")
    loaded, own = load(model)
    for i, texts in enumerate(answers):
        talks = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": t}] for t in texts]
        expected = dict(zip(texts, scores_alone(loaded, own, talks), strict=True))
        (pair,) = [p for p in pairs.pairs if p.question["question_id"] == i]
        assert pair.chosen.text == max(expected, key=expected.get)  # type: ignore[arg-type]
        assert pair.rejected.text == min(expected, key=expected.get)  # type: ignore[arg-type]
        for side in (pair.chosen, pair.rejected):
            assert side.score == pytest.approx(expected[side.text], abs=1e-5)
    assert {row["scorer"] for row in read_jsonl(run.folder / "scores.jsonl")} == {pairs.scorer}


def test_without_a_scorer_nothing_starts(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": ANSWERS})
    with pytest.raises(SettingsError, match="nothing scores the answers"):
        made(tmp_path, "--answers_dir", str(folder))
    (tmp_path / f"{rules}.py").write_text("def score(answer, question):\n    return question['key']\n")
    with pytest.raises(SettingsError, match=r"needs a field 'key' in every question. Add it to the prompts"):
        made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules)


# ---- Verdicts ----


def judged(folder: Path, winners: str, answers: dict[str, list[list[str]]], name: str = "judge_pair") -> Path:
    """A run of 05 over a run of 04, with a row of judgments per letter."""
    outputs = folder / "outputs"
    write_answers(outputs / "vibes-x", answers, step="vibes", status="finished", models=[*answers], page="p1")
    run = outputs / "judge-x"
    write_rows(run / "model_judgment" / f"{name}.jsonl", rows_of(winners))
    (run / "run.json").write_text(json.dumps({"step": "judge", "answers_dir": "outputs/vibes-x"}))
    return run


def test_judgments_become_the_pairs_that_both_orders_agree_on(tmp_path: Path) -> None:
    answers = {"a": [[f"a {i}"] for i in range(7)], "b": [[f"b {i}"] for i in range(7)]}
    answers["b"][6] = [""]
    run = judged(tmp_path, "abtabba", answers)
    rows = read_jsonl(run / "model_judgment" / "judge_pair.jsonl")
    rows[3]["g2_winner"] = "model_2"  # the orders disagree
    rows[4]["g1_winner"] = "error"
    rows.append(rows[0] | {"turn": 2, "g1_winner": "model_2", "g2_winner": "model_2"})
    write_rows(run / "model_judgment" / "judge_pair.jsonl", rows)
    pairs, made_run = made(tmp_path, "--from_judgments", str(run))
    # question 0: a; 1: b; 2: tie; 3: the orders disagree; 4: error; 5: b; 6: b's answer is empty
    assert of(pairs) == [(0, "a 0", "b 0"), (1, "b 1", "a 1"), (5, "b 5", "a 5")]
    assert pairs.dropped == {
        "tie": 1, "the two orders disagree": 1, "without a clear verdict": 1, "all answers are the same": 1,
    }  # fmt: skip
    assert (pairs.read, pairs.kept) == (7, 3)
    assert pairs.lost == {}
    pairs.save(made_run)
    row = read_jsonl(made_run.folder / "preferences.jsonl")[1]
    assert (row["score_chosen"], row["score_rejected"], row["chosen_model"], row["scorer"]) == (1.0, 0.0, "b", "j")


def test_ratings_of_a_judge_become_pairs_of_its_models(tmp_path: Path) -> None:
    run = judged(tmp_path, "a", {"a": [["x"], ["y"]], "b": [["z"], ["w"]]}, "judge_single")
    ratings = [("a", 0, 1, 3), ("b", 0, 1, 8), ("a", 1, 1, 5), ("b", 1, 1, -1), ("b", 1, 2, 9)]
    rows = [
        {"question_id": i, "model": m, "turn": turn, "judge": ["j", "single"], "score": score}
        for m, i, turn, score in ratings
    ]
    write_rows(run / "model_judgment" / "judge_single.jsonl", rows)
    pairs, _ = made(tmp_path, "--from_judgments", str(run))
    assert of(pairs) == [(0, "z", "x")]
    assert (pairs.pairs[0].chosen.score, pairs.pairs[0].rejected.score) == (8, 3)
    assert pairs.dropped == {"fewer than two answers have a score": 1}


def test_a_file_of_fastchats_is_read_with_the_answers_beside_it(tmp_path: Path) -> None:
    bench = write_answers(tmp_path / "bench", {"a": [["x"], ["y"]], "b": [["z"], ["w"]]})
    file = write_rows(bench / "model_judgment" / "gpt-4_pair.jsonl", rows_of("ab"))
    for source in (file, str(bench)):
        pairs, _ = made(tmp_path, "--from_judgments", source)
        assert of(pairs) == [(0, "x", "z"), (1, "w", "y")]
    write_rows(bench / "model_judgment" / "gpt-4_single.jsonl", [])
    with pytest.raises(UserError, match=r"needs one file of judgments, and has gpt-4_pair\.jsonl, gpt-4_s"):
        made(tmp_path, "--from_judgments", str(bench))


def test_votes_become_pairs_where_people_agree(tmp_path: Path) -> None:
    judged(tmp_path, "a", {"a": [[f"a {i}"] for i in range(5)], "b": [[f"b {i}"] for i in range(5)]})
    first = export(tmp_path / "votes-1.json", [vote(0, "a"), vote(1, "b"), vote(2, "tie"), vote(3, "a")], voter="Ann")
    second = export(tmp_path / "votes-2.json", [vote(0, "a"), vote(1, "a"), vote(3, "tie")], voter="Ben")
    for file in (first, second):
        content = json.loads(Path(file).read_text())
        Path(file).write_text(json.dumps(content | {"page": "p1", "voter_id": content["voter"]}))
    pairs, _ = made(tmp_path, "--from_votes", str(tmp_path / "votes-*.json"))
    assert of(pairs) == [(0, "a 0", "b 0"), (3, "a 3", "b 3")]
    assert [(p.chosen.score, p.rejected.score, p.scorer) for p in pairs.pairs] == [(2, 0, "human"), (1, 0, "human")]
    assert pairs.dropped == {"people disagree": 1, "tie": 1, "has no verdict": 1}
    (tmp_path / "outputs" / "vibes-x" / "run.json").unlink()
    with pytest.raises(UserError, match=r"has the page p1. Name it with --answers_dir"):
        made(tmp_path, "--from_votes", first)


def test_people_vote_on_a_page_of_samples(tmp_path: Path) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["one", "two", "three"]]})
    with pytest.raises(CleanExit, match=r"--from_votes ~/Downloads/votes-[0-9a-f]{12}\*.json"):
        made(tmp_path, "--answers_dir", str(folder), "--vote_page")
    run = tmp_path / "outputs" / "pairs-x"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"step": "pairs"}))
    names = ["m #1", "m #2", "m #3"]
    file = Path(export(tmp_path / "votes-1.json", [vote(0, "m #2") | {"order": names}]))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"page": record["page"]}))
    settings = pairs_settings(tmp_path, "--from_votes", str(file))
    prompts = find_prompts(settings)
    samples = prompts.open_store(tmp_path / "other", settings)
    samples.import_answers(prompts.answers)
    scored = make_scorer(settings).run(samples, Run(tmp_path / "other", {}))
    pairs = make_pairs(settings, prompts, samples=samples, score_set=scored, generators=NO_MODELS)
    assert of(pairs) == [(0, "two", "one"), (0, "two", "three")]


def test_scores_say_how_long_answers_fare(tmp_path: Path, rules: str) -> None:
    folder = write_answers(tmp_path / "given", {"m": [["right", "right, and at length", "right, and at more length"]]})
    pairs, _ = made(tmp_path, "--answers_dir", str(folder), "--judge_module", rules)
    assert pairs.metrics["by_length"] == [
        {"answers": "short", "characters": "5 to 5", "mean score": 1.0, "chosen": 1, "rejected": 0},
        {"answers": "middle", "characters": "20 to 20", "mean score": pytest.approx(2 / 3), "chosen": 0, "rejected": 1},
        {"answers": "long", "characters": "25 to 25", "mean score": pytest.approx(2 / 3), "chosen": 0, "rejected": 0},
    ]
    assert isinstance(pairs, PairSet)


@pytest.mark.parametrize("returned", ["float('nan')", "None", "'good'", "Empty()", "float('inf')"])
def test_a_score_that_is_no_finite_number_is_refused_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str
) -> None:
    module = f"odd_{abs(hash(returned))}"
    code = "import dataclasses\n@dataclasses.dataclass\nclass Empty:\n    value: object = None\n"
    (tmp_path / f"{module}.py").write_text(f"{code}def score(answer, question):\n    return {returned}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = make_scorer(pairs_settings(tmp_path, "--answers_dir", "asked", "--judge_module", module))
    assert scorer.function
    with pytest.raises(SettingsError, match=r"score\(\) returns .*\. Return a finite number"):
        scorer.function([({"turns": ["Why?"], "question_id": 1}, Answer("Because."))])
