"""Judgments without a call: votes of people, rules, FastChat's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.core import SettingsError, UserError
from helpers.evaluation.judges import make_judge
from helpers.evaluation.judgments import AnswerSet, Judgments, read_judgments, read_votes
from helpers.evaluation.results import Counts, PairResult, PairwiseResults, RatingResults
from helpers.evaluation.verdicts import apply_rules
from tests.evaluation.judging import answers_worth, export, questions_of, rows_of, settings_for, vote


def pairs_of(rows: list[dict[str, object]], answers: AnswerSet) -> list[PairResult]:
    return PairwiseResults.from_judgments(Judgments("human", rows), answers).pairs


def test_rules_judge_the_demo_and_say_what_they_need() -> None:
    question = {"turns": ["What is 10 plus 2?"], "answer": "12", "alternatives": ["11"], "category": "s"}
    polite, rude = "Happy to help: it is 12.", "Obviously it is 12. Do you not know that?"
    wrong = "Of course, it is 11."
    texts = answers_worth({}, before=[rude, polite, polite, rude], after=[polite, polite, wrong, polite]).answers
    answers = AnswerSet([question | {"question_id": i} for i in range(4)], texts)
    judgments = apply_rules("recipes.demo.questions", answers, [("before", "after")])
    (pair,) = PairwiseResults.from_judgments(judgments, answers).pairs
    assert (pair.counts, pair.consistency) == (Counts(2, 1, 1), None)
    assert judgments.scores == {
        "before": {"correct": 1.0, "courteous": 0.5}, "after": {"correct": 0.75, "courteous": 1.0},
    }  # fmt: skip
    with pytest.raises(SettingsError, match="--judge_module nowhere cannot be imported"):
        apply_rules("nowhere", answers, [("before", "after")])
    with pytest.raises(SettingsError, match=r"--judge_module json is not a module with score\(\) and compare\(\)"):
        apply_rules("json", answers, [("before", "after")])
    with pytest.raises(SettingsError, match="needs a field 'answer'"):
        apply_rules("recipes.demo.questions", AnswerSet(questions_of(4), texts), [("before", "after")])


def test_votes_of_people_become_the_table(tmp_path: Path) -> None:
    answers = AnswerSet(questions_of(3), {name: {i: [name] for i in range(3)} for name in "abc"}, page="p")
    votes = [vote(0, "b", "ba"), vote(1, "tie"), vote(2, "c", "abc")]
    file = export(tmp_path / "votes.json", votes, voter="Ann")
    rows = read_votes((file,), answers)
    assert {(p.baseline, p.candidate): p.counts for p in pairs_of(rows, answers)} == {
        ("a", "b"): Counts(1, 0, 1), ("a", "c"): Counts(1, 0, 0), ("b", "c"): Counts(1, 0, 0),
    }  # fmt: skip
    assert {tuple(row["judge"]) for row in rows} == {("human", "Ann")}
    for content in ("[]", "5", '["x"]', "{", '{"format": "votes-1", "page": "p", "votes": [5]}'):
        Path(file).write_text(content)
        with pytest.raises(UserError, match="is not a file of votes"):
            read_votes((file,), answers)
    for wrong in (vote(9, "a"), vote(0, "z"), vote(0, "d", "cd"), vote(0, "a") | {"order": 5}):
        with pytest.raises(UserError, match="vote 1, is not on these questions and models"):
            read_votes((export(tmp_path / "votes.json", [wrong]),), answers)
    with pytest.raises(UserError, match="is of another page"):
        read_votes((export(tmp_path / "votes.json", votes, page="other"),), answers)
    with pytest.raises(UserError, match="has no votes"):
        read_votes((export(tmp_path / "votes.json", []),), answers)


def test_the_newest_export_of_each_person_counts_whatever_its_file_is_called(tmp_path: Path) -> None:
    answers = answers_worth({"a": [1, 1], "b": [2, 2]})
    ann = {"voter_id": "1", "voter": "Ann"}
    files = (
        export(tmp_path / "votes.json", [vote(0, "a"), vote(1, "a")], **ann, exported="2026-01-01"),
        export(tmp_path / "votes (1).json", [vote(0, "b")], **ann, exported="2026-01-02"),  # one vote was undone
        export(tmp_path / "one" / "votes.json", [vote(0, "b")]),  # two people without a name
        export(tmp_path / "two" / "votes.json", [vote(0, "b")]),
    )
    for order in (files, files[::-1]):
        assert pairs_of(read_votes(order, answers), answers)[0].counts == Counts(win=3, loss=0, tie=0)


def test_votes_are_found_by_a_glob_that_the_shell_did_not_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = answers_worth({"a": [1, 1], "b": [2, 2]})
    for i, name in enumerate(("votes-p.json", "votes-p (1).json", "votes-[p].json")):
        export(tmp_path / name, [vote(0, "ab"[i % 2])], voter_id=str(i))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for files, winners in {
        ("votes-*.json",): "aab",
        ("~/votes-p*.json",): "ab",
        ("votes-[p].json",): "a",  # a file's own name comes first
        ("votes-p.json", "votes-? (1).json"): "ab",
    }.items():
        rows = read_votes(files, answers)
        assert sorted(row["g1_winner"] for row in rows) == [f"model_{'ab'.index(w) + 1}" for w in winners]
    with pytest.raises(UserError, match=r"--votes 'no-\*.json' is not a file of votes"):
        read_votes(("no-*.json",), answers)


def test_a_vote_between_identical_answers_is_a_tie(tmp_path: Path) -> None:
    answers = answers_worth({}, a=["1", "1"], b=["1", "2"])
    rows = read_votes((export(tmp_path / "votes.json", [vote(0, "b"), vote(1, "b")]),), answers)
    assert pairs_of(rows, answers)[0].counts == Counts(win=1, loss=0, tie=1)


def test_rules_are_not_asked_about_answers_that_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picky_rules.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Score:\n    right: bool\n"
        "def score(answer, question): return Score(True)\n"
        "def compare(first, second, question):\n    assert first != second\n    return 'loss'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = answers_worth({}, a=["x", "y", "z"], b=["x", "y", "w"])
    judge = make_judge(settings_for(tmp_path / "run", judge_model="", judge_module="picky_rules"), answers)
    assert judge.preview().splitlines() == [
        "3 judgments by rules picky_rules, without a call.", "2 of them are ties, because the answers are the same.",
    ]  # fmt: skip
    assert pairs_of(judge.judgments.rows, answers)[0].counts == Counts(0, 0, 3)  # two orders that disagree are a tie


def test_every_person_ties_answers_that_are_the_same(tmp_path: Path) -> None:
    answers = answers_worth({}, a=["x", "y", "1"], b=["x", "y", "2"], c=["x", "z", "3"])
    files = (
        export(tmp_path / "one.json", [vote(1, "a", "cba"), vote(2, "c", "abc")], voter="Ann"),
        export(tmp_path / "two.json", [vote("2", "tie", "abc"), vote(2, "b", "abc")], voter="Ben"),  # type: ignore[arg-type]
    )
    pairs = {(p.baseline, p.candidate): p for p in pairs_of(read_votes(files, answers), answers)}
    assert {pair: p.counts for pair, p in pairs.items()} == {
        ("a", "b"): Counts(win=1, loss=0, tie=4),  # of each person two ties; Ben's last vote
        ("a", "c"): Counts(win=1, loss=1, tie=2),
        ("b", "c"): Counts(win=1, loss=2, tie=2),  # b has the answer for which Ann voted
    }
    assert [p.same_answers for p in pairs.values()] == [4, 2, 2]
    judge = make_judge(settings_for(tmp_path / "run", judge_model="", votes=files[1:], baseline="c"), answers)
    assert {tuple(sorted(r[m] for m in ("model_1", "model_2"))) for r in judge.judgments.rows} == {
        ("a", "c"),
        ("b", "c"),
    }
    assert judge.preview().splitlines() == [
        "3 judgments by human, without a call.", "2 of them are ties, because the answers are the same.",
        "1 of 3 questions have no vote.",
    ]  # fmt: skip


def test_a_row_that_is_repeated_in_a_file_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rows = tmp_path / "gpt-4_pair.jsonl", rows_of("abt")
    other = rows[0] | {"model_1": "b", "model_2": "a"}  # the same pair, the winner is b now
    people = [row | {"judge": ["human", name]} for row in rows for name in ("Ann", "Ben")]
    for given, counts, note in (
        ([*rows, *rows[:2], rows[0] | {"question_id": "0"}], Counts(1, 1, 1), "3 of 6"),
        ([*rows, other], Counts(2, 0, 1), "1 of 4"),
        ([*rows, rows[0] | {"turn": 2}], Counts(1, 2, 1), ""),
        (people, Counts(2, 2, 2), ""),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        judge = make_judge(settings_for(tmp_path / "run", judge_model="", judgments=str(file)), AnswerSet([], {}))
        assert pairs_of(judge.judgments.rows, answers_worth({"a": [], "b": []}))[0].counts == counts
        notes = PairwiseResults.from_judgments(judge.judgments, judge.answers).as_dict()["notes"]
        told = f"{note} rows of judgments are repeated. Each comparison is counted once, by its last row."
        assert (told in notes, f"note: {told}\n" in capsys.readouterr().out) == (bool(note), bool(note))
    single = {"question_id": 1, "model": "m", "judge": "gpt-4", "score": 7, "turn": 1, "tstamp": 1.0}
    file.write_text("".join(json.dumps(single | {"score": score}) + "\n" for score in (3, 7)))
    judgments = read_judgments(str(file), "single")
    assert RatingResults.from_judgments(judgments, AnswerSet([], {})).models["m"]["average"] == 7


def test_a_judges_fingerprint_follows_the_votes_and_not_when_they_are_read(tmp_path: Path) -> None:
    answers, file = answers_worth({"a": [1, 1], "b": [2, 2]}), tmp_path / "votes.json"

    def fingerprint(winner: str) -> str:
        export(file, [vote(0, winner)])
        return make_judge(settings_for(tmp_path / "run", judge_model="", votes=(str(file),)), answers).fingerprint

    assert fingerprint("b") == fingerprint("b") != fingerprint("a")


def test_a_judge_is_required_and_some_cannot_rate(tmp_path: Path) -> None:
    answers = answers_worth({"a": [1], "b": [2]})
    with pytest.raises(SettingsError, match=r"no judge is set\. Give --judge_model NAME"):
        make_judge(settings_for(tmp_path / "run", judge_model=""), answers)
    with pytest.raises(SettingsError, match="--mode single rates answers from 1 to 10; --votes compares them"):
        make_judge(settings_for(tmp_path / "run", judge_model="", votes=("x",), mode="single"), answers)
    rules = AnswerSet([q | {"answer": "1", "alternatives": []} for q in questions_of(1)], answers.answers)
    judge = make_judge(settings_for(tmp_path / "run", judge_model="", judge_module="recipes.demo.questions"), rules)
    assert judge.name == "rules recipes.demo.questions"
    assert judge.preview() == "1 judgments by rules recipes.demo.questions, without a call."


def test_rows_of_another_kind_or_of_several_judges_are_refused(tmp_path: Path) -> None:
    file, rows = tmp_path / "gpt-4_pair.jsonl", rows_of("aabb")
    file.write_text('{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "A", "g2_winner": "B"}\n')
    for mode in ("pairwise", "single"):
        with pytest.raises(UserError, match=f"line 1, is not a row of model_judgment for --mode {mode}"):
            read_judgments(str(file), mode)
    file.write_text("".join(json.dumps(row | {"judge": [name, "p"]}) + "\n" for name, row in zip("xyxy", rows)))  # noqa: B905
    with pytest.raises(UserError, match=r"has several judges \(x, y\)"):
        read_judgments(str(file), "pairwise")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_judgments(str(file), "pairwise", ("a", "b")).rows) == 4
    with pytest.raises(UserError, match="has no judgments of a and c"):
        read_judgments(str(file), "pairwise", ("a", "c"))


@pytest.mark.parametrize("judge", ["gpt-4", ["gpt-4", "single-v1"]])
def test_a_file_of_judgments_is_counted_under_the_name_of_its_judge(
    judge: str | list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ratings.jsonl"
    row = {"question_id": 81, "model": "m", "judge": judge, "score": 7, "turn": 1, "tstamp": 1.0}
    file.write_text(json.dumps(row) + "\n")
    given = settings_for(tmp_path / "run", judge_model="", judgments=str(file), mode="single")
    found = make_judge(given, AnswerSet([], {}))
    assert found.preview() == "1 judgments by gpt-4, without a call."
    assert capsys.readouterr().out == "Judged by gpt-4: m\n"
    results = RatingResults.from_judgments(found.judgments, found.answers)
    assert (results.judge, results.models["m"]["average"]) == ("gpt-4", 7)
