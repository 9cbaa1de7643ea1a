"""What is judged, and judgments in FastChat's rows, from votes and files; saved with a run."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.core import (
    Row,
    SettingsError,
    UserError,
    atomic_write,
    find_path,
    fingerprint,
    printable,
    read_jsonl,
    short_path,
    write_json,
)
from helpers.evaluation.answers import MARKS, ModelAnswers, count_marks, hash_answers, make_table
from helpers.evaluation.questions import (
    Question,
    answer_turns,
    answers_folder,
    choose_models,
    find_input,
    model_name,
    read_answers,
    safe_file_name,
)
from helpers.runs.checkpoints import load_record, shell_quote
from helpers.runs.run import Run, find_run

VOTES_FORMAT = "votes-1"  # see AnswerStore.write_vote_page
ONE_ORDER = ("human", "rules", "reward model")  # judges that the order of two answers cannot influence, or saw one only
OUTCOMES = {"model_1": 0.0, "tie": 0.5, "model_2": 1.0}  # of a call, for the second model


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Questions and what each model answered: what 05_judge.py judges."""

    questions: list[Question]
    answers: ModelAnswers
    folder: Path = Path()
    page: str = ""  # the id of the folder's vote page

    def is_same(self, question_id: Any, pair: Sequence[str], turns: int | None = None) -> bool:
        """Whether both models of a pair gave the same answers, up to a turn: a tie, about which nobody is asked."""
        one, two = (self.answers[model].get(question_id, []) for model in pair)
        return len(one) > 0 and one[:turns] == two[:turns]

    def unanswered(self, pairs: Sequence[Sequence[str]]) -> list[str]:
        """Which pairs are not judged on all questions, because a model lacks answers."""
        notes = []
        for pair in pairs:
            lacking = [[m for m in pair if len(self.answers[m].get(q["question_id"], ())) < len(q["turns"])]
                       for q in self.questions]  # fmt: skip
            if counts := Counter(itertools.chain(*lacking)):
                who = ", ".join(f"{model} lacks {count}" for model, count in counts.items())
                notes.append(f"{' and '.join(pair)}: {sum(map(bool, lacking))} of {len(lacking)} questions are not "
                             f"judged, or not in all turns, because answers are missing: {who}.")  # fmt: skip
        return notes

    def find_runs(self, outputs: Path, models: Iterable[str]) -> list[Path]:
        """The folders of the judged models that are runs. `models` are those of a benchmark, which has no answers."""
        return [path for name in self.answers or models if (path := outputs / name).is_dir()]

    def print_next(self, settings: Any, run: Run, runs: Sequence[Path]) -> None:
        """Print where the answers and the results are, and the commands of 06_pairs.py for another round."""
        if (self.folder / "answers.html").is_file():
            print(f"Page: {short_path(self.folder / 'answers.html')}")
        print(f"Results: {short_path(run.folder / 'results.png')}")
        if self.answers and runs:
            judge = settings.judge_model
            scorer = f"--judge_model {shell_quote(judge)}" if judge else "--judge_module MODULE"
            recipe = f"--recipe {shell_quote(settings.recipe)}" if settings.recipe else ""
            source = recipe or f"--prompts_file OTHER_PROMPTS {scorer}"
            print(f"Another round: python notebooks/06_pairs.py --models {shell_quote(runs[-1])} {source}")
        if self.answers:
            print(f"or with these verdicts: python notebooks/06_pairs.py --from_judgments {shell_quote(run.folder)}")

    def __rich__(self) -> Any:
        from rich.console import Group

        rows = [[own.get(q["question_id"]) for own in self.answers.values()] for q in self.questions]
        marks = [count_marks(own) for own in self.answers.values()]
        shown = [mark for mark in MARKS if any(own[mark] for own in marks)]
        cells = []
        for (name, own), counts in zip(self.answers.items(), marks, strict=True):
            mean = sum(len(text) for turns in own.values() for text in turns) / max(1, sum(map(len, own.values())))
            cells.append([name, f"{len(own)} of {len(rows)}", f"{mean:.0f}", *(counts[mark] for mark in shown)])
        notes = {
            "are not answered by every model and are not compared there": sum(None in row for row in rows),
            "have identical answers, which are ties in a comparison: nobody is asked":
                sum(len(row) > 1 and row[0] is not None and row.count(row[0]) == len(row) for row in rows),
        }  # fmt: skip
        table = make_table(["model", "questions answered", "mean characters per answer", *shown], cells)
        return Group(table, *(f"note: {count} questions {note}" for note, count in notes.items() if count))


def find_answers(settings: Any) -> AnswerSet:
    """The answers that the settings of 05_judge.py name, in the order of the comparison. Raises UserError."""
    if settings.bench:  # the models are asked themselves
        return AnswerSet([], {}, settings.output_dir)
    bench = find_input("--bench_dir", settings.bench_dir, "folder").resolve() if settings.bench_dir else None
    if settings.judgments and not bench and not settings.is_set("answers_dir"):  # the file has all there is to count
        print(printable(f"Judgments: {settings.judgments}"))
        return AnswerSet([], {}, settings.output_dir)
    if bench and not settings.is_set("answers_dir"):
        folder = bench
    elif settings.answers_dir == "latest":
        folder = find_run(settings.output_dir, "latest", "vibes").folder
    else:
        folder = answers_folder(settings)
    questions, found = read_answers(folder, bench)
    record = load_record(folder)
    in_order = [name for name in record.get("models", []) if name in found]  # a model after the one it started from
    names = choose_models([*filter(None, [settings.baseline]), *(settings.models or [*in_order, *found])], found)
    if lost := [name for name in record.get("models", []) if name not in found]:
        print(printable(f"note: {short_path(folder)} has no answers of {', '.join(lost)}"))
    answers: ModelAnswers = {}
    for name in names:
        rows = [(q["question_id"], found[name].get(str(q["question_id"]))) for q in questions]
        answers[name] = {i: turns for i, row in rows if row and (turns := answer_turns(row))}
    print(printable(f"Answers: {short_path(folder)} ({', '.join(names)})"))
    return AnswerSet(questions, answers, folder, record.get("page", ""))


def model_pairs(answers: ModelAnswers, mode: str, baseline: str = "") -> list[tuple[str, ...]]:
    """Models that are judged together: all pairs, those with `baseline`, or each model alone. Raises SettingsError."""
    pairs = list(itertools.combinations(answers, 2 if mode == "pairwise" else 1))
    if baseline and mode == "pairwise":
        pairs = [(baseline, name) for name in answers if name != baseline]
    if not pairs:
        raise SettingsError(f"a comparison needs two models, and there is one: {', '.join(answers)}. Add another.")
    return pairs


@dataclasses.dataclass
class Judgments:
    """What a judge decided, as rows of FastChat's model_judgment; `remaining` of `total` calls are not made yet."""

    judge: str
    rows: list[Row]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rules: model → share by name
    remaining: int = 0
    total: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)  # what was not judged, or counted once

    def save(self, run: Run, results: Any) -> None:
        """Write model_judgment/JUDGE_pair.jsonl or JUDGE_single.jsonl as FastChat does, results.json, and run.json."""
        kind = "single" if any("score" in row for row in self.rows) else "pair"
        file = run.folder / "model_judgment" / f"{safe_file_name(self.judge)}_{kind}.jsonl"
        if self.rows:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        metrics = results.as_dict()
        write_json(run.folder / "results.json", metrics)
        if self.remaining or self._is_unreadable:
            run.save(status="interrupted" if self.remaining else "failed", metrics=metrics)
        else:
            run.finish(metrics=metrics)

    @property
    def _is_unreadable(self) -> bool:
        """Whether no reply had a verdict."""
        asked = [row for row in self.rows if not row.get("identical")]
        return bool(asked) and all(
            "error" in (row.get("g1_winner"), row.get("g2_winner")) or row.get("score") == -1 for row in asked
        )

    def raise_if_incomplete(self, limit: str = "--max_new_tokens") -> None:
        """Raise UserError if calls remain, or if no reply had a verdict. `limit` is the flag that cuts replies off."""
        if self.remaining:
            raise UserError(f"{self.remaining:,} of {self.total:,} calls are left. Run the same command again to make "
                            "them (see --max_calls).")  # fmt: skip
        if self._is_unreadable:
            first = next(row for row in self.rows if not row.get("identical"))
            reply = str(first.get("judgment") or first.get("g1_judgment") or first.get("error") or "")[:80]
            raise UserError(f"no reply had a verdict; is this model able to judge? One reply: {reply!r}. If it was cut "
                            f"off, raise {limit}. Give --retry_errors to ask again.")  # fmt: skip


def outcome_of(row: Row) -> float | None:
    """1, 0.5 or 0 for the second model of a pair. Two calls that disagree are a tie; an error in either is an error,
    None (FastChat, llm_judge/show_result.py)."""
    calls = {row["g1_winner"], row["g2_winner"]}
    return None if "error" in calls else OUTCOMES[calls.pop() if len(calls) == 1 else "tie"]


def pair_row(question: Question, turn: int, models: Sequence[str], judge: list[str], calls: list[Row]) -> Row:
    """A row of FastChat's pairwise judgments, of the two calls in which a pair was shown in both orders. "error", why
    there is no verdict, is ours as "identical" is."""
    names = {models[0]: "model_1", models[1]: "model_2"}
    row: Row = {"question_id": question["question_id"], "model_1": models[0], "model_2": models[1]}
    row |= {f"g{i}_winner": names.get(call["winner"], call["winner"]) for i, call in enumerate(calls, 1)}
    row["judge"] = judge
    for i, call in enumerate(calls, 1):
        row |= {f"g{i}_user_prompt": call.get("user_prompt", ""), f"g{i}_judgment": call.get("judgment", "")}
    failed = [call_failure(call) for call in calls if call["winner"] == "error"]
    row |= {"error": failed[0]} if failed else {}
    return row | {"turn": turn, "tstamp": calls[1].get("tstamp") or time.time()}


def tie_row(question: Question, turn: int, models: Sequence[str], judge: list[str]) -> Row:
    """The row of a pair whose answers are the same: a tie without a call."""
    return pair_row(question, turn, models, judge, [{"winner": "tie"}] * 2) | {"identical": True}


def rating_row(judge: str, call: Row) -> Row:
    """A row of FastChat's single judgments; a score of -1 is a reply without a rating."""
    row = {key: call[key] for key in ("question_id", "user_prompt", "judgment", "turn", "tstamp")}
    score = -1 if call["winner"] == "error" else call["winner"]
    row |= {"error": call_failure(call)} if score == -1 else {}
    return row | {"model": call["models"][0], "judge": [judge, call["prompt"]], "score": score}


def call_failure(call: Row) -> str:
    """Why a call has no verdict: a kind, and after a colon what the server says."""
    if call.get("refused"):
        return f"refused by the server: {call['refused']}"
    return "without a clear verdict" if call.get("finished", True) else "cut off before a verdict"


def describe_self_judging(judge: str, models: Iterable[str]) -> list[str]:
    """A note if the judge is one of the models that it judges, by the last part of its name."""
    own = [name for name in models if name.casefold() == model_name(judge.casefold(), [name.casefold()])]
    return [f"{name} is judged by itself. Judges tend to prefer their own answers." for name in own]


def read_exports(names: Iterable[str], flag: str) -> dict[str, Row]:
    """The content of each file of votes. Names may be globs, for shells that do not expand them. Raises UserError."""
    found = [[name] if find_path(name) else sorted(glob.glob(os.path.expanduser(name))) or [name] for name in names]
    exports: dict[str, Row] = {}
    for name in itertools.chain(*found):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            content = json.loads((find_path(name) or Path(name)).read_text(encoding="utf-8"))
            is_whole = all(isinstance(vote, dict) for vote in content["votes"])
            if is_whole and content["page"] and content["format"] == VOTES_FORMAT:
                exports[name] = content
        if name not in exports:
            raise UserError(f"{flag} {name!r} is not a file of votes. Export one from the page of 04_vibes.py.")
    return exports


def read_votes(
    files: tuple[str, ...], answers: AnswerSet, pairs: Sequence[tuple[str, ...]] = (), flag: str = "--votes",
    is_part: bool = False,
) -> list[Row]:  # fmt: skip
    """Votes exported by the page of 04 as judgments of `pairs`, by default of all. Raises UserError.

    A vote for the best of several beats each of the others, in both calls of a row. Identical answers tie for every
    person. The newest export of a person counts, so that a vote that was undone stays undone. With `is_part`, votes on
    other questions and models are left out.
    """
    newest: dict[tuple[str, str], Row] = {}
    for name, export in read_exports(files, flag).items():
        if answers.page and export["page"] != answers.page:
            raise UserError(f"{flag} {name!r} is of another page, with other answers: {export['page']}, not "
                            f"{answers.page}")  # fmt: skip
        person = str(export.get("voter_id") or export.get("voter") or Path(str(find_path(name))).resolve())
        key = str(export["page"]), person
        if str(export.get("exported", "")) >= str(newest.get(key, {}).get("exported", "")):
            voter = export.get("voter") or export.get("voter_id") or f"voter {fingerprint(export)[:6]}"
            newest[key] = export | {"file": f"{flag} {name!r}", "voter": str(voter)}
    if not any(export["votes"] for export in newest.values()):
        raise UserError(f"{flag} {' '.join(files)} has no votes")
    for voter in {str(export["voter"]) for export in newest.values()}:  # two people may have given one name
        own = [export for export in newest.values() if export["voter"] == voter]
        for number, export in enumerate(own[1:], 2):
            export["voter"] = f"{voter} ({number})"
    pairs = pairs or list(itertools.combinations(answers.answers, 2))
    return [row for export in newest.values() for row in _vote_rows(export, answers, pairs, is_part)]


def _vote_rows(export: Row, answers: AnswerSet, pairs: Sequence[tuple[str, ...]], is_part: bool) -> Iterator[Row]:
    known, votes = {str(q["question_id"]): q for q in answers.questions}, dict[str, Row]()
    for number, vote in enumerate(export["votes"], 1):
        i, order, winner = str(vote.get("question_id")), vote.get("order"), vote.get("winner")
        names = {*map(str, order)} if isinstance(order, list) else set()
        fits = is_part or (i in known and names <= {*answers.answers})
        if not fits or len(names) < 2 or winner not in (*order, "tie"):
            raise UserError(f"{export['file']}, vote {number}, is not on these questions and models: {vote}")
        votes[i] = vote
    if len(votes) < len(export["votes"]):
        print(printable(f"note: {export['file']} repeats questions. The last vote on each counts."))
    for (i, question), pair in itertools.product(known.items(), pairs):
        vote, judge = votes.get(i, {"order": []}), ["human", export["voter"]]
        if answers.is_same(question["question_id"], pair):
            yield tie_row(question, 1, pair, judge)
        elif {*pair} <= {*map(str, vote["order"])}:  # an answer that is the same as the best one wins with it
            best = [vote["winner"], *(m for m in pair if vote["winner"] in answers.answers
                                      and answers.is_same(question["question_id"], (m, vote["winner"])))]  # fmt: skip
            if winner := next((m for m in best if m in (*pair, "tie")), None):
                row = pair_row(question, 1, pair, judge, [{"winner": winner}] * 2)
                yield row | {"blind": bool(vote.get("blind", True))}


def read_judgments(
    name: str, mode: str, models: tuple[str, ...] = (), baseline: str = "", flag: str = "--judgments"
) -> Judgments:
    """The rows of a FastChat file of judgments; of repeated rows the last. If `models` are named, only theirs, and in
    each pair the earlier one is the baseline; with `baseline`, only its pairs. Without `mode`, the first row tells
    whether they are pairwise or single. Raises UserError."""
    rows = read_jsonl(find_input(flag, name))
    kind = mode or ("single" if rows and "score" in rows[0] else "pairwise")
    for number, row in enumerate(rows, 1):
        if not _is_judgment(row, kind):
            needed = f"for --mode {mode}" if mode else "such as FastChat's and those of 05_judge.py"
            raise UserError(f"{flag} {name!r}, line {number}, is not a row of model_judgment {needed}")
        row["judge"] = row["judge"] if isinstance(row["judge"], list) else [row["judge"]]
    judges = list(dict.fromkeys(str(row["judge"][0]) for row in rows))
    if len(judges) > 1:
        raise UserError(f"{flag} {name!r} has several judges ({', '.join(judges)}). Give a file of one.")
    known = list(dict.fromkeys(name for row in rows for name in _models_of(row)))
    first = [model_name(baseline, known)] if baseline and kind == "pairwise" else []
    order = [*dict.fromkeys([*first, *(model_name(name, known) for name in models or known)])]
    rows = [row for row in rows if {*_models_of(row)} <= {*order} and {*first} <= {*_models_of(row)}]
    if not rows:
        named = [*dict.fromkeys([*filter(None, [baseline]), *models])]
        raise UserError(f"{flag} {name!r} has no judgments of {' and '.join(named) or 'any model'}, but of "
                        f"{', '.join(known) or 'none'}")  # fmt: skip
    rows = [row if _models_of(row) == [m for m in order if m in _models_of(row)] else _swap(row) for row in rows]
    # what a row is about: a question's turn, one or two models, a judge and its prompt
    unique = {(str(r["question_id"]), r["turn"], *sorted(_models_of(r)), *map(str, r["judge"])): r for r in rows}
    notes = []
    if repeated := len(rows) - len(unique):
        notes = [f"{repeated} of {len(rows)} rows of judgments are repeated. Each comparison is counted once, by its "
                 "last row."]  # fmt: skip
        print("note:", notes[0])
    print(printable(f"Judged by {judges[0]}: {', '.join(dict.fromkeys(m for row in rows for m in _models_of(row)))}"))
    return Judgments(judges[0], list(unique.values()), notes=notes)


def _models_of(row: Row) -> list[str]:
    return [row[name] for name in ("model", "model_1", "model_2") if name in row]


def _swap(row: Row) -> Row:
    """A row about a pair the other way round."""
    names = {"model_1": "model_2", "model_2": "model_1"}
    calls = {f"g{i}_{key}": row[old] for i in (1, 2) for key in ("winner", "user_prompt", "judgment")
             if (old := f"g{3 - i}_{key}") in row}  # fmt: skip
    calls |= {key: names.get(calls[key], calls[key]) for key in ("g1_winner", "g2_winner")}
    return row | calls | {"model_1": row["model_2"], "model_2": row["model_1"]}


def _is_judgment(row: Row, mode: str) -> bool:
    kinds: dict[str, Any] = {"question_id": int | str, "turn": int, "judge": list | str}
    kinds |= {"model": str, "score": int | float} if mode == "single" else {"model_1": str, "model_2": str}
    if not all(isinstance(row.get(key), kind) for key, kind in kinds.items()) or not row["judge"]:
        return False
    winners = row.get("g1_winner"), row.get("g2_winner")
    is_pair = row.get("model_1") != row.get("model_2") and all(winner in (*OUTCOMES, "error") for winner in winners)
    return mode == "single" or is_pair


class Judge:
    """A judge that makes no call: people's votes, rules, or a file. `fingerprint` names what is judged."""

    def __init__(
        self, judgments: Judgments, answers: AnswerSet, pairs: Sequence[tuple[str, ...]] = (), *prompts: Any
    ) -> None:
        self.name, self.judgments, self.answers = judgments.judge, judgments, answers
        judgments.notes += answers.unanswered(pairs)
        timeless = [{key: value for key, value in row.items() if key != "tstamp"} for row in judgments.rows]
        texts = [[name, *([str(i), turns] for i, turns in own.items())] for name, own in answers.answers.items()]
        order: list[Any] = sorted(pairs) or [*answers.answers]  # which model of a pair is the baseline
        self.fingerprint = fingerprint(answers.questions, sorted(texts), order, prompts, *sorted(map(str, timeless)))

    def preview(self) -> str:
        """What `run` would do, and what to know before."""
        notes = [*self.judgments.notes, *describe_self_judging(self.name, self.answers.answers)]
        return "\n".join([*self._preview(), *notes])

    def _preview(self) -> list[str]:
        ties = sum(row.get("identical", False) for row in self.judgments.rows)
        lines = [f"{len(self.judgments.rows):,} judgments by {self.name}, without a call."]
        return lines + [f"{ties:,} of them are ties, because the answers are the same."] * bool(ties)

    def run(self, run: Run) -> Judgments:
        """All judgments; what costs time is stored in the run's folder as it completes."""
        if not run.finished:
            run.save(answers_dir=short_path(self.answers.folder), answers=hash_answers(self.answers.answers))
        return self.judgments
