"""What is judged, and judgments in FastChat's rows, from votes, rules and files; saved with a run."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.core import (
    Row,
    SettingsError,
    UserError,
    atomic_write,
    find_path,
    import_user_module,
    printable,
    read_jsonl,
    safe_file_name,
    short_path,
    write_json,
)
from helpers.evaluation.answers import MARKS, ModelAnswers, count_marks, make_table
from helpers.evaluation.questions import Question, answer_turns, find_input, read_answer_files, read_bench
from helpers.runs.run import Run, find_run, read_run

VOTES_FORMAT = "votes-1"  # see AnswerStore.write_vote_page
WINNERS = ("model_1", "model_2", "tie", "error")


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Questions and what each model answered: what 05_judge.py judges."""

    questions: list[Question]
    answers: ModelAnswers
    folder: Path = Path()
    page: str = ""  # the id of the folder's vote page

    def __rich__(self) -> Any:
        from rich.console import Group

        rows = [[own.get(q["question_id"]) for own in self.answers.values()] for q in self.questions]
        answered = [f"{len(own)} of {len(rows)}" for own in self.answers.values()]
        lengths = [[len(text) for turns in own.values() for text in turns] for own in self.answers.values()]
        means = [f"{sum(own) / max(1, len(own)):.0f}" for own in lengths]
        marks = [count_marks(own) for own in self.answers.values()]
        shown = [mark for mark in MARKS if any(own[mark] for own in marks)]
        same = sum(len(row) > 1 and row[0] is not None and row.count(row[0]) == len(row) for row in rows)
        notes = {
            "are not answered by every model and are not compared there": sum(None in row for row in rows),
            "have identical answers; the vote page of 04 skips them": same,
        }
        head = ["model", "questions answered", "mean characters per answer", *shown]
        counts = [[own[mark] for own in marks] for mark in shown]
        table = make_table(head, zip(self.answers, answered, means, *counts, strict=True))
        return Group(table, *(f"note: {count} questions {note}" for note, count in notes.items() if count))


def find_answers(settings: Any) -> AnswerSet:
    """The answers that the settings of 05_judge.py name, in the order in which models are compared. Raises UserError.

    --answers_dir is a run of 04_vibes.py or a folder of model_answer files; --bench_dir one of FastChat's folders.
    """
    bench = find_input("--bench_dir", settings.bench_dir, "folder").resolve() if settings.bench_dir else None
    if settings.judgments and not bench and not settings.is_set("answers_dir"):  # the file has all there is to count
        return AnswerSet([], {}, settings.output_dir)
    if bench and not settings.is_set("answers_dir"):
        folder = bench
    elif settings.answers_dir == "latest":
        folder = find_run(settings.output_dir, "latest", "vibes").folder
    elif not (folder := settings.output_dir / settings.answers_dir).is_dir():
        folder = find_input("--answers_dir", settings.answers_dir, "folder").resolve()
    place = folder / "model_answer" if (folder / "model_answer").is_dir() else folder
    found = read_answer_files(sorted({*place.glob("*.jsonl")} - {folder / "question.jsonl"}))
    if not found:
        raise UserError(f"{str(place)!r} has no answers. Give a folder with FastChat's NAME.jsonl for each model.")
    questions = read_bench(bench or (folder if (folder / "question.jsonl").is_file() else folder.parent))
    record = read_run(folder)
    in_order = [name for name in record.get("models", []) if name in found]  # a model after the one it started from
    first = [settings.baseline] if settings.baseline else []
    names = list(dict.fromkeys([*first, *(settings.models or [*in_order, *found])]))
    if lost := [name for name in record.get("models", []) if name not in found]:
        print(printable(f"note: {short_path(folder)} has no answers of {', '.join(lost)}"))
    if unknown := [name for name in names if name not in found]:
        raise SettingsError(f"there are no answers of {', '.join(unknown)}; there are of {', '.join(found)}")
    answers: ModelAnswers = {}
    for name in names:
        turns = {i: answer_turns(row) for i, row in found[name].items()}
        answers[name] = {q["question_id"]: own for q in questions if (own := turns.get(str(q["question_id"])))}
    return AnswerSet(questions, answers, folder, record.get("page", ""))


@dataclasses.dataclass
class Judgments:
    """What a judge decided, as rows of FastChat's model_judgment; `remaining` of `total` calls are not made yet."""

    judge: str
    rows: list[Row]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rules: model → share by name
    remaining: int = 0
    total: int = 0

    def save(self, run: Run, results: Any) -> None:
        """Write model_judgment/JUDGE_pair.jsonl or JUDGE_single.jsonl as FastChat does, results.json, and run.json."""
        kind = "single" if any("score" in row for row in self.rows) else "pair"
        file = run.folder / "model_judgment" / f"{safe_file_name(self.judge)}_{kind}.jsonl"
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
        return bool(self.rows) and all(
            "error" in (row.get("g1_winner"), row.get("g2_winner")) or row.get("score") == -1 for row in self.rows
        )

    def raise_if_incomplete(self) -> None:
        """Raise UserError if calls remain, or if no reply had a verdict."""
        if self.remaining:
            raise UserError(f"{self.remaining:,} of {self.total:,} calls are left. Run the same command again to make "
                            "them (see --max_calls).")  # fmt: skip
        if self._is_unreadable:
            reply = str(self.rows[0].get("judgment") or self.rows[0].get("g1_judgment") or "")[:80]
            raise UserError(f"no reply had a verdict; is this model able to judge? One reply: {reply!r}. If it was cut "
                            "off, raise --max_new_tokens. Give --retry_errors to ask again.")  # fmt: skip


def pair_row(question: Question, turn: int, models: Sequence[str], judge: list[str], calls: list[Row]) -> Row:
    """A row of FastChat's pairwise judgments, of the two calls in which a pair was shown in both orders."""
    names = {models[0]: "model_1", models[1]: "model_2"}
    row: Row = {"question_id": question["question_id"], "model_1": models[0], "model_2": models[1]}
    row |= {f"g{i}_winner": names.get(call["winner"], call["winner"]) for i, call in enumerate(calls, 1)}
    row["judge"] = judge
    for i, call in enumerate(calls, 1):
        row |= {f"g{i}_user_prompt": call.get("user_prompt", ""), f"g{i}_judgment": call.get("judgment", "")}
    return row | {"turn": turn, "tstamp": calls[1].get("tstamp") or time.time()}


def rating_row(judge: str, call: Row) -> Row:
    """A row of FastChat's single judgments; a score of -1 is a reply without a rating."""
    row = {key: call[key] for key in ("question_id", "user_prompt", "judgment", "turn", "tstamp")}
    score = -1 if call["winner"] == "error" else call["winner"]
    return row | {"model": call["models"][0], "judge": [judge, call["prompt"]], "score": score}


def read_votes(files: tuple[str, ...], answers: AnswerSet) -> list[Row]:
    """Votes exported by the page of 04 as judgments; a vote for the best of several beats each of the others.

    A person sees all answers at once: both calls of a row are that one vote. Identical answers tie. The newest export
    of a person counts, so that a vote that was undone stays undone. `files` may be globs, for shells that do not expand
    them. Raises UserError for a file of another kind, or of another page or other models.
    """
    exports: dict[tuple[str, str], dict[str, Any]] = {}
    found = [[file] if find_path(file) else sorted(glob.glob(os.path.expanduser(file))) or [file] for file in files]
    for name in itertools.chain(*found):
        content = _read_export(name)
        if answers.page and content["page"] != answers.page:
            raise UserError(f"--votes {name!r} is of another page, with other answers: {content['page']}, not "
                            f"{answers.page}")  # fmt: skip
        person = str(content.get("voter_id") or content.get("voter") or find_path(name))
        key = str(content["page"]), person
        if str(content.get("exported", "")) >= str(exports.get(key, {}).get("exported", "")):
            exports[key] = content | {"file": name, "voter": str(content.get("voter") or person)}
    rows = [row for export in exports.values() for row in _vote_rows(export, answers)]
    if not rows:
        raise UserError(f"--votes {' '.join(files)} has no votes")
    return rows


def _vote_rows(export: dict[str, Any], answers: AnswerSet) -> Iterator[Row]:
    known, names = {str(q["question_id"]): q for q in answers.questions}, list(answers.answers)
    for number, vote in enumerate(export["votes"], 1):
        question, order, winner = known.get(str(vote.get("question_id"))), vote.get("order"), vote.get("winner")
        fits = isinstance(order, list) and len(order) > 1 and {*map(str, order)} <= {*names}
        if question is None or not fits or winner not in (*order, "tie"):
            raise UserError(f"--votes {export['file']!r}, vote {number}, is not on these questions and models: {vote}")
        for pair in itertools.combinations(sorted(order, key=names.index), 2):
            if winner in (*pair, "tie"):
                one, two = (answers.answers[model].get(question["question_id"]) for model in pair)
                calls = [{"winner": "tie" if one == two else winner}] * 2
                row = pair_row(question, 1, pair, ["human", export["voter"]], calls)
                yield row | {"blind": bool(vote.get("blind", True))}


def _read_export(name: str) -> dict[str, Any]:
    path = find_path(name)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if content["format"] == VOTES_FORMAT and content["page"] and all(isinstance(v, dict) for v in content["votes"]):
            return dict(content)
    raise UserError(f"--votes {name!r} is not a file of votes. Export one from the page of 04_vibes.py.")


def read_judgments(name: str, mode: str, models: tuple[str, ...] = ()) -> Judgments:
    """The rows of a FastChat file of pairwise or single judgments, of `models` only if any are named.

    Raises UserError for rows of another kind, or of several judges.
    """
    rows = read_jsonl(find_input("--judgments", name))
    for number, row in enumerate(rows, 1):
        if not _is_judgment(row, mode):
            raise UserError(f"--judgments {name!r}, line {number}, is not a row of model_judgment for --mode {mode}")
        row["judge"] = row["judge"] if isinstance(row["judge"], list) else [row["judge"]]
    judges = list(dict.fromkeys(str(row["judge"][0]) for row in rows))
    if len(judges) > 1:
        raise UserError(f"--judgments {name!r} has several judges ({', '.join(judges)}). Give a file of one.")
    if models:
        rows = [row for row in rows if {row[key] for key in ("model", "model_1", "model_2") if key in row} <= {*models}]
    if not rows:
        raise UserError(f"--judgments {name!r} has no judgments of {' and '.join(models) or 'any model'}")
    return Judgments(judges[0], rows)


def _is_judgment(row: Row, mode: str) -> bool:
    kinds: dict[str, Any] = {"question_id": int | str, "turn": int, "judge": list | str}
    kinds |= {"model": str, "score": int | float} if mode == "single" else {"model_1": str, "model_2": str}
    if not all(isinstance(row.get(key), kind) for key, kind in kinds.items()) or not row["judge"]:
        return False
    is_pair = row.get("model_1") != row.get("model_2") and row.get("g1_winner") in WINNERS
    return mode == "single" or (is_pair and row.get("g2_winner") in WINNERS)


def apply_rules(module: str, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> Judgments:
    """Judge by `module`: compare(first, second, question) is "win", "tie" or "loss" for the second; in both orders.

    The scores are the shares of a model's answers for which each field of the module's score(answer, question) is true.
    Raises SettingsError if there is no such module, or if it needs a field that the questions lack.
    """
    rules = import_user_module(module, "judge_module")
    if not (hasattr(rules, "score") and hasattr(rules, "compare")):
        raise SettingsError(f"--judge_module {module} is not a module with score() and compare()")
    rows, scores = [], {}
    asked = [{"prompt": question["turns"][0], **question} for question in answers.questions]
    texts = {model: {i: turns[0] for i, turns in by_id.items()} for model, by_id in answers.answers.items()}
    try:
        for question, (one, two) in itertools.product(asked, pairs):
            first, second = (texts[model].get(question["question_id"]) for model in (one, two))
            if first is not None and second is not None:
                verdicts = rules.compare(first, second, question), rules.compare(second, first, question)
                winners = {"win": two, "loss": one}.get(verdicts[0]), {"win": one, "loss": two}.get(verdicts[1])
                calls = [{"winner": winner or "tie"} for winner in winners]
                rows.append(pair_row(question, 1, (one, two), ["rules", module], calls))
        for model, own in texts.items():
            each = [dataclasses.asdict(rules.score(own[i], q)) for q in asked if (i := q["question_id"]) in own]
            scores[model] = {name: sum(s[name] for s in each) / len(each) for name in each[0]} if each else {}
    except KeyError as error:
        raise SettingsError(f"--judge_module {module} needs a field {error} in every question. Without it, judge with "
                            "--votes FILE or --judge_model NAME.") from None  # fmt: skip
    if not rows:
        raise UserError(f"nothing to judge: no question has been answered by {' and '.join(pairs[0])}")
    return Judgments(f"rules {module}", rows, scores)
