"""What is asked once, what is asked again after a change, and verdicts that stay with what was judged."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.core import SettingsError, UserError, read_jsonl
from helpers.evaluation.answers import AnswerStore
from helpers.evaluation.bench import Bench, _contents
from helpers.evaluation.endpoint import Endpoint
from helpers.evaluation.generators import Generators
from helpers.evaluation.judges import make_judge, rules_scorer
from helpers.evaluation.judgments import read_judgments, read_votes
from helpers.evaluation.questions import Answer, _parse_rows
from helpers.evaluation.results import PairwiseResults
from helpers.evaluation.samples import ExistingVerdicts, SampleStore, find_prompts
from helpers.evaluation.verdicts import apply_rules
from helpers.models.resolve import ModelRef
from helpers.runs.run import Run
from tests.evaluation.judging import answers_worth, better, export, judged, rows_of, settings_for, vote
from tests.evaluation.rounds import pairs_settings, write_answers, write_rows
from tests.evaluation.test_pairs import judged as judged_run
from tests.judge_server import judge_server

GREEDY = {"max_new_tokens": 8, "do_sample": False}
SAMPLED = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_p": 1.0}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module of rules, and return its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def write(text: str) -> str:
        names.append(f"rules_{uuid.uuid4().hex}")
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


# ---- Asked again, or not ----


@pytest.mark.parametrize("max_calls", [0, 6])
def test_a_judge_that_starts_over_asks_all_again_and_keeps_its_file_whole(tmp_path: Path, max_calls: int) -> None:
    answers = answers_worth({"before": [1] * 5, "after": [2] * 5})
    with judge_server(better) as server:
        judged(server, tmp_path / "run", answers, max_calls=max_calls, max_concurrency=1)
        before = len(server.requests)
        judge = make_judge(settings_for(tmp_path / "run", server.url, resume="never"), answers)
        again = judge.run(Run(tmp_path / "run", {}, overwrite=True))
        assert len(server.requests) == before + 10
        assert len(read_jsonl(tmp_path / "run" / "calls.jsonl")) == 10
        assert (again.remaining, len(again.rows)) == (0, 5)
        judged(server, tmp_path / "run", answers)
        assert len(server.requests) == before + 10


def test_calls_in_flight_count_for_the_budget(tmp_path: Path) -> None:
    answers = answers_worth({"before": [1] * 8, "after": [2] * 8})
    with judge_server(lambda messages: "Well.") as server:  # asked for once more
        server.delay = 0.05
        judged(server, tmp_path / "run", answers, max_calls=5, max_concurrency=8)
        assert len(server.requests) == 5


def test_an_endpoint_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    questions = [{"question_id": i, "category": "general", "turns": [f"question {i}"]} for i in range(4)]
    with judge_server(lambda messages: "fine") as server:
        server.refuse = lambda request: (400, "no bombs") if "question 2" in str(request["messages"]) else None
        for kind, kwargs, more, first in (
            (AnswerStore, GREEDY, {}, 4),
            (SampleStore, SAMPLED, {"num_samples": 2, "models": ["m"]}, 7),  # this server ignores `n`
        ):
            for expected in (first, 1):
                before = len(server.requests)
                store = kind(tmp_path / kind.__name__, questions, 8, **more)  # type: ignore[arg-type]
                store.generate_missing("m", Endpoint("m", server.url), **kwargs)
                assert len(server.requests) - before == expected
                assert {*store.file("m").rows} == {0, 1, 3}


class Templates:
    """Generators whose tokenizers have these chat templates."""

    def __init__(self, **templates: str) -> None:
        self.models = [ModelRef(name, "org/base") for name in templates]
        self.tokenizers = {n: (SimpleNamespace(chat_template=text), "its own") for n, text in templates.items()}
        self.fingerprints = Generators.fingerprints.func(self)  # type: ignore[arg-type]

    def fingerprint(self, *asked: Any) -> str:
        return Generators.fingerprint(self, *asked)  # type: ignore[arg-type]


def test_another_chat_template_is_another_run_and_its_samples_are_not_taken(tmp_path: Path) -> None:
    assert Templates(a="x", b="y").fingerprint([1]) == Templates(a="x", b="y").fingerprint([1])
    assert Templates(a="x", b="y").fingerprint([1]) != Templates(a="x", b="z").fingerprint([1])
    settings = SimpleNamespace(output_dir=tmp_path, resume="auto")
    questions = [{"question_id": 0, "turns": ["question"]}]
    row = {"question_id": 0, "model_id": "m", "choices": [{"index": 0, "turns": ["sampled"]}]}
    taken = {}
    for name, template in (("pairs-1", "x"), ("pairs-2", "edited"), ("pairs-3", "x")):
        generators: Any = Templates(m=template)
        generators.sampling, generators.loading = {}, {"m": {"chat template": "t.jinja"}}
        store, run = SampleStore(tmp_path / name, questions, models=["m"]), Run(tmp_path / name, {"step": "pairs"})
        store.reuse(run, settings, generators)
        taken[name] = len(store.file("m").rows)
        if name == "pairs-1":
            store.file("m").add(row)
    assert taken == {"pairs-1": 0, "pairs-2": 0, "pairs-3": 1}


def test_rules_are_others_if_a_module_beside_them_is(tmp_path: Path, module: Any) -> None:
    words = module("GOOD = 'x'")
    rules = module(f"from {words} import GOOD\ndef score(answer, question): return answer == GOOD")
    settings = SimpleNamespace(judge_module=rules)
    first = rules_scorer(settings, []).identity
    assert rules_scorer(settings, []).identity == first
    file = tmp_path / f"{words}.py"
    file.write_text("GOOD = 'other'")
    assert rules_scorer(settings, []).identity != first


def test_a_task_is_another_one_if_a_file_that_it_names_is(tmp_path: Path) -> None:
    task = tmp_path / "sums.yaml"
    task.write_text("task: sums\nprocess_results: !function check.right\ndata_files: sums.jsonl\n")
    for name in ("check.py", "sums.jsonl", "other.py"):
        (tmp_path / name).write_text("old")
    before = _contents(task)
    (tmp_path / "other.py").write_text("new")
    assert _contents(task) == before
    for name in ("check.py", "sums.jsonl"):
        (tmp_path / name).write_text("new")
        assert _contents(task) != before
        before = _contents(task)


def test_the_metric_of_a_task_is_one_for_all_models() -> None:
    def row(**values: int) -> dict[str, Any]:
        return {"metrics": [*values], "filter": "none", "docs": [{"values": values}]}

    bench = Bench.__new__(Bench)
    bench.models, rows = ["a", "b"], {("a", "t"): row(f1=0, exact=0), ("b", "t"): row(exact=1)}
    bench.store = SimpleNamespace(rows=rows)  # type: ignore[assignment]
    assert [(r["metric"], r["docs"][0]["right"]) for r in bench._choose_metric("t")] == [("exact", 0), ("exact", 1)]
    rows["b", "t"] = row(other=1)
    with pytest.raises(UserError, match="--bench t has no metric that says right or wrong"):
        bench._choose_metric("t")


# ---- Verdicts that stay with what was judged ----


def test_verdicts_are_not_put_on_other_answers(tmp_path: Path) -> None:
    run = judged_run(tmp_path, "ab", {"a": [["x 0"], ["x 1"]], "b": [["z 0"], ["z 1"]]})
    record = json.loads((run / "run.json").read_text())
    answers = answers_worth({}, a=["x 0", "x 1"], b=["z 0", "z 1"])
    (file,) = (run / "model_judgment").glob("*")
    judge = make_judge(settings_for(tmp_path / "j", judge_model="", judgments=str(file)), answers)
    judge.run(Run(tmp_path / "other" / "judge-y", {}))
    record["answers"] = json.loads((tmp_path / "other" / "judge-y" / "run.json").read_text())["answers"]
    (run / "run.json").write_text(json.dumps(record))
    settings = pairs_settings(tmp_path, "--from_judgments", str(run))
    folder = find_prompts(settings).folder
    assert folder == (tmp_path / "outputs" / "vibes-x").resolve()
    moved = tmp_path / "outputs" / "elsewhere"
    moved.mkdir()
    folder.rename(moved / "vibes-x")
    write_answers(folder, {"a": [["WRONG"], ["x 1"]], "b": [["z 0"], ["z 1"]]})
    with pytest.raises(UserError, match=r"does not have the answers that were judged in .*Judge these, or name"):
        find_prompts(settings)
    named = pairs_settings(tmp_path, "--from_judgments", str(run), "--answers_dir", str(moved / "vibes-x"))
    assert find_prompts(named).folder == (moved / "vibes-x").resolve()


def test_two_voters_of_one_name_stay_two(tmp_path: Path) -> None:
    answers = dataclasses.replace(answers_worth({"a": [1, 1], "b": [2, 2]}), page="p")
    files = [
        export(tmp_path / f"{i}.json", [vote(0, who), vote(1, who)], voter="Anna", voter_id=f"browser {i}")
        for i, who in enumerate("ab")
    ]
    rows = read_votes(tuple(files), answers)
    assert [row["judge"][1] for row in rows] == ["Anna", "Anna", "Anna (2)", "Anna (2)"]
    file = write_rows(tmp_path / "votes.jsonl", rows)
    assert len(read_judgments(file, "pairwise").rows) == 4
    (pair,) = PairwiseResults.from_judgments(read_judgments(file, "pairwise"), answers).pairs
    assert pair.counts.win_rate_adjusted == 0.5


def test_people_who_saw_one_order_have_no_consistency(tmp_path: Path) -> None:
    run = judged_run(tmp_path, "ab", {"a": [["x 0"], ["x 1"]], "b": [["z 0"], ["z 1"]]})
    (file,) = (run / "model_judgment").glob("*.jsonl")
    settings = pairs_settings(tmp_path, "--from_judgments", str(run))
    for judge, expected in ((["j", "p"], 1.0), (["human", "Ann"], None)):
        write_rows(file, [row | {"judge": judge} for row in read_jsonl(file)])
        prompts = find_prompts(settings)
        samples = prompts.open_store(tmp_path / f"{judge[0]} samples", settings)
        samples.import_answers(prompts.answers)
        assert ExistingVerdicts(settings).run(samples, Run(tmp_path / "r", {})).consistency == expected


def test_judgments_of_a_file_follow_the_baseline_and_the_order_that_are_named(tmp_path: Path) -> None:
    rows = rows_of("aba") + rows_of("cc", ("a", "c")) + rows_of("bbc", ("b", "c"))
    rows[1] |= {"g1_winner": "model_1", "g1_judgment": "first"}  # the orders disagree
    file = write_rows(tmp_path / "j.jsonl", rows)

    def pairs(*models: str, baseline: str = "") -> dict[tuple[str, str], tuple[int, ...]]:
        found = read_judgments(file, "pairwise", models, baseline)
        results = PairwiseResults.from_judgments(found, NO_ANSWERS)
        return {(p.baseline, p.candidate): tuple(p.counts) for p in results.pairs}

    assert pairs() == {("a", "b"): (0, 2, 1), ("a", "c"): (2, 0, 0), ("b", "c"): (1, 2, 0)}
    assert pairs("b", "a") == {("b", "a"): (2, 0, 1)}
    assert pairs(baseline="c") == {("c", "a"): (0, 2, 0), ("c", "b"): (2, 1, 0)}
    rated = [{"question_id": 0, "turn": 1, "judge": ["j", "p"], "model": m, "score": 5.0} for m in "abc"]
    single = write_rows(tmp_path / "single.jsonl", rated)
    assert len(read_judgments(single, "single", (), "a").rows) == 3
    swapped = read_judgments(file, "pairwise", ("b", "a")).rows[1]
    assert (swapped["g1_winner"], swapped["g2_winner"], swapped["g2_judgment"]) == ("model_1", "model_2", "first")
    for models, baseline in (((), "nobody"), (("a", "nobody"), "")):
        with pytest.raises(UserError, match=r"has no judgments of .*nobody, but of a, b, c"):
            read_judgments(file, "pairwise", models, baseline)


NO_ANSWERS = dataclasses.replace(answers_worth({"a": [1]}), questions=[], answers={})


def test_votes_on_more_models_than_are_named_count_for_those(tmp_path: Path) -> None:
    answers = answers_worth({"a": [1, 1], "b": [2, 2]})
    file = export(tmp_path / "v.json", [vote(0, "b", "abc"), vote(1, "c", "abc")])
    judge = make_judge(settings_for(tmp_path / "j", judge_model="", votes=(file,), models=("a", "b")), answers)
    assert [(row["question_id"], row["g1_winner"]) for row in judge.judgments.rows] == [(0, "model_2")]
    with pytest.raises(UserError, match="is not on these questions and models"):
        make_judge(settings_for(tmp_path / "j", judge_model="", votes=(file,)), answers)


# ---- Rules, replies and prompts of other kinds ----


@pytest.mark.parametrize(
    ("compare", "score", "said"),
    [
        ("'first'", "1", 'compare() returns \'first\'. Return "win", "tie" or "loss" for the second answer.'),
        ("True", "1", "compare() returns True. Return"),
        ("'tie'", "'good'", "score() returns 'good'. Return a finite number, or a dataclass of such numbers."),
        ("{}['y']", "1", "compare() fails in line 1 on the answer"),
        ("question['key']", "1", "needs a field 'key' in every question. Add it to the prompts"),
    ],
)
def test_rules_that_return_something_else_are_refused(compare: str, score: str, said: str, module: Any) -> None:
    name = module(f"def compare(one, two, question): return {compare}\ndef score(answer, question): return {score}\n")
    with pytest.raises(SettingsError, match=re.escape(said)):
        apply_rules(name, answers_worth({"a": [1], "b": [2]}), [("a", "b")])


def test_a_score_of_rules_may_be_a_number(module: Any) -> None:
    name = module("def compare(one, two, question): return 'win'\ndef score(answer, question): return len(answer)\n")
    judgments = apply_rules(name, answers_worth({}, a=["x", "xyz"], b=["y", "y!"]), [("a", "b")])
    assert judgments.scores == {"a": {"score": 2.0}, "b": {"score": 1.5}}


def test_half_an_emoji_in_a_reply_is_no_text() -> None:
    answer = Answer("Nice \ud83d", cut=True)
    assert (answer, answer.raw, answer.cut) == ("Nice ?", "Nice ?", True)
    answer.encode()


def test_a_transcript_is_asked_as_the_turns_of_its_user() -> None:
    text = "\n\nHuman: Name a colour.\n\nAssistant: Red.\n\nHuman: Another?\n\nAssistant:"
    (question,) = _parse_rows([{"prompt": text}], "file")
    assert question["turns"] == ["Name a colour.", "Another?"]


def test_a_prompt_that_begins_with_json_is_a_text() -> None:
    text = '{"id": 1, "role": "user", "name": "Bob"}\nConvert this to YAML.'
    assert _parse_rows([{"prompt": text}], "file")[0]["turns"] == [text]


def test_rows_without_an_id_of_their_own_have_another(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "id": 1}, {"prompt": "c", "id": ""}, {"prompt": "d", "id": 0}]
    assert [q["question_id"] for q in _parse_rows(rows, "file")] == ["row 1", 1, 3, 0]
