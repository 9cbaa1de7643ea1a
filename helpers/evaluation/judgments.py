"""What is judged, and judgments in FastChat's rows: from votes, rules and files; saved with a run."""

from __future__ import annotations

import dataclasses
import glob
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from helpers.core import (
    Row,
    SettingsError,
    UserError,
    atomic_write,
    find_path,
    import_user_module,
    read_jsonl,
    safe_file_name,
    write_json,
)
from helpers.evaluation.answers import ModelAnswers
from helpers.evaluation.questions import Question, answer_turns, read_bench
from helpers.runs.run import Run, find_run, read_run

VOTES_FORMAT = "votes-1"  # see write_vote_page
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
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "questions answered", "mean characters per answer", box=None, pad_edge=False)
        for model, answers in self.answers.items():
            texts = [text for turns in answers.values() for text in turns]
            mean = sum(map(len, texts)) / max(1, len(texts))
            table.add_row(Text(model), f"{len(answers)} of {len(self.questions)}", f"{mean:.0f}")
        rows = [[own.get(q["question_id"]) for own in self.answers.values()] for q in self.questions]
        complete = [row for row in rows if None not in row]
        same = sum(len(row) > 1 and row.count(row[0]) == len(row) for row in complete)
        notes = []
        if len(complete) < len(rows):
            unfinished = read_run(self.folder).get("status") == "interrupted"
            notes.append(f"note: {len(rows) - len(complete)} questions are not answered by every model and are not "
                         f"compared there{'; the run of 04_vibes.py is not finished' * unfinished}")  # fmt: skip
        if same:
            notes.append(f"note: {same} questions have identical answers; the vote page of 04 skips them")
        return Group(table, *map(Text, notes))


def find_answers(settings: Any) -> AnswerSet:
    """The answers that the settings of 05_judge.py name, in the order in which models are compared. Raises UserError.

    --answers_dir is a run of 04_vibes.py or a folder of model_answer files; --bench_dir one of FastChat's folders.
    """
    bench = _find_folder("--bench_dir", settings.bench_dir) if settings.bench_dir else None
    if settings.judgments and not bench and not settings.is_set("answers_dir"):  # the file has all there is to count
        return AnswerSet([], {}, settings.output_dir)
    if bench and not settings.is_set("answers_dir"):
        folder = bench
    elif settings.answers_dir == "latest":
        folder = find_run(settings.output_dir, "latest", "vibes").folder
    else:
        folder = settings.output_dir / settings.answers_dir
        folder = folder if folder.is_dir() else _find_folder("--answers_dir", settings.answers_dir)
    place = folder / "model_answer" if (folder / "model_answer").is_dir() else folder
    files = {_model_name(file): file for file in sorted(place.glob("*.jsonl")) if file.name != "question.jsonl"}
    if not files:
        raise UserError(f"{str(place)!r} has no answers. Give a folder with FastChat's NAME.jsonl for each model.")
    questions = read_bench(bench or (folder if (folder / "question.jsonl").is_file() else folder.parent))
    record = read_run(folder)
    in_order = [name for name in record.get("models", []) if name in files]  # a model after the one it started from
    names = list(settings.models) or list(dict.fromkeys([*in_order, *files]))
    if settings.baseline:
        names = list(dict.fromkeys([settings.baseline, *names]))
    if unknown := [name for name in names if name not in files]:
        raise SettingsError(f"there are no answers of {', '.join(unknown)}; there are of {', '.join(files)}")
    return AnswerSet(questions, {n: _read_answers(files[n], questions) for n in names}, folder, record.get("page", ""))


def _find_folder(flag: str, name: str) -> Path:
    path = find_path(name)
    if path is None or not path.is_dir():
        raise UserError(f"{flag} {name!r} is not a folder")
    return path.resolve()


def _model_name(file: Path) -> str:
    """The model whose answers these are; a file's name may lack some of its characters."""
    models = [str(row.get("model_id") or "") for row in read_jsonl(file)[:1]]
    return models[0] if models and safe_file_name(models[0]) == file.stem else file.stem


def _read_answers(file: Path, questions: list[Question]) -> dict[Any, list[str]]:
    rows = {str(row.get("question_id")): row for row in read_jsonl(file)}
    answers = {q["question_id"]: answer_turns(rows[i]) for q in questions if (i := str(q["question_id"])) in rows}
    return {i: turns for i, turns in answers.items() if turns}


@dataclasses.dataclass
class Judgments:
    """What a judge decided, as rows of FastChat's model_judgment; `remaining` of `total` calls are not made yet."""

    judge: str
    rows: list[Row]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rules: model → share by name
    remaining: int = 0
    total: int = 0
    is_file: bool = False  # read from a file of the user's, which is not saved again

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
            hint = "" if reply else " It was cut off: raise --max_new_tokens."
            raise UserError(f"no reply had a verdict; is this model able to judge? One reply: {reply!r}.{hint} Give "
                            "--retry_errors to ask again.")  # fmt: skip


def save_judgments(run: Run, judgments: Judgments, results: Any) -> None:
    """Write model_judgment/JUDGE_pair.jsonl or JUDGE_single.jsonl as FastChat does, results.json, and run.json."""
    if not judgments.is_file:
        kind = "single" if any("score" in row for row in judgments.rows) else "pair"
        file = run.folder / "model_judgment" / f"{safe_file_name(judgments.judge)}_{kind}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, "".join(json.dumps(row) + "\n" for row in judgments.rows).encode())
    metrics = results.as_dict()
    write_json(run.folder / "results.json", metrics)
    if judgments.remaining or judgments._is_unreadable:
        run.save(status="interrupted" if judgments.remaining else "failed", metrics=metrics)
    else:
        run.finish(metrics=metrics)


def pair_row(question: Question, turn: int, models: tuple[str, ...], judge: list[str], calls: list[Row]) -> Row:
    """A row of FastChat's pairwise judgments, of the two calls in which a pair was shown in both orders."""
    names = {models[0]: "model_1", models[1]: "model_2"}
    row: Row = {"question_id": question["question_id"], "model_1": models[0], "model_2": models[1]}
    row |= {f"g{i}_winner": names.get(call["winner"], call["winner"]) for i, call in enumerate(calls, 1)}
    row["judge"] = judge
    for i, call in enumerate(calls, 1):
        row |= {f"g{i}_user_prompt": call.get("user_prompt", ""), f"g{i}_judgment": call.get("judgment", "")}
    return row | {"turn": turn, "tstamp": calls[1].get("tstamp") or time.time()}


def read_votes(files: tuple[str, ...], answers: AnswerSet) -> list[Row]:
    """Votes exported by the page of 04 as judgments; a vote for the best of several beats each of the others.

    A person sees all answers at once: both calls of a row are that one vote. Identical answers tie. The newest export
    of a person counts, so that a vote that was undone stays undone. `files` may be globs, for shells that do not expand
    them. Raises UserError for a file of another kind, or of another page or other models.
    """
    known, names = {str(q["question_id"]): q for q in answers.questions}, list(answers.answers)
    exports: dict[tuple[str, str], tuple[str, str, dict[str, Any]]] = {}
    for name in (match for file in files for match in _expand(file)):
        content = _read_export(name)
        page = str(content["page"])
        if answers.page and page != answers.page:
            raise UserError(f"--votes {name!r} is of another page, with other answers: {page}, not {answers.page}")
        person = str(content.get("voter_id") or content.get("voter") or find_path(name))
        when = str(content.get("exported") or max((str(vote.get("voted")) for vote in content["votes"]), default=""))
        if (page, person) not in exports or when >= exports[page, person][0]:
            exports[page, person] = (when, name, content)
    rows = []
    for (_, person), (_, name, content) in exports.items():
        judge = ["human", str(content.get("voter") or person)]
        for number, vote in enumerate(content["votes"], 1):
            question, order, winner = known.get(str(vote.get("question_id"))), vote.get("order"), vote.get("winner")
            fits = isinstance(order, list) and len(order) > 1 and {*map(str, order)} <= set(names)
            if question is None or not fits or winner not in (*order, "tie"):
                raise UserError(f"--votes {name!r}, vote {number}, is not on these questions and models: {vote}")
            for pair in combinations(sorted(order, key=names.index), 2):
                if winner in (*pair, "tie"):
                    one, two = (answers.answers[model].get(question["question_id"]) for model in pair)
                    row = pair_row(question, 1, pair, judge, [{"winner": "tie" if one == two else winner}] * 2)
                    rows.append(row | {"blind": bool(vote.get("blind", True))})
    if not rows:
        raise UserError(f"--votes {' '.join(files)} has no votes")
    return rows


def _expand(name: str) -> list[str]:
    return [name] if find_path(name) else sorted(glob.glob(str(Path(name).expanduser()))) or [name]


def _read_export(name: str) -> dict[str, Any]:
    path = find_path(name)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path else {}
        is_format = content["format"] == VOTES_FORMAT and content["page"]
        if is_format and all(isinstance(vote, dict) for vote in content["votes"]):
            return dict(content)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"--votes {name!r} is not a file of votes. Export one from the page of 04_vibes.py.")


def read_judgments(name: str, mode: str, models: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a FastChat file of pairwise or single judgments, of `models` only if any are named.

    Raises UserError for rows of another kind, or of several judges.
    """
    path = find_path(name)
    if path is None or not path.is_file():
        raise UserError(f"--judgments {name!r} is not a file")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not (_is_single(row) if mode == "single" else _is_pair(row)):
            raise UserError(f"--judgments {name!r}, line {number}, is not a row of model_judgment for --mode {mode}")
    judges = list(dict.fromkeys(str((row.get("judge") or ["?"])[0]) for row in rows))
    if len(judges) > 1:
        raise UserError(f"--judgments {name!r} has several judges ({', '.join(judges)}). Give a file of one.")
    if models:
        rows = [row for row in rows if {row[key] for key in ("model", "model_1", "model_2") if key in row} <= {*models}]
    if not rows:
        raise UserError(f"--judgments {name!r} has no judgments of {' and '.join(models) or 'any model'}")
    return rows


def _is_single(row: Row) -> bool:
    is_rating = isinstance(row.get("score"), int | float) and isinstance(row.get("turn"), int)
    return is_rating and isinstance(row.get("model"), str) and "question_id" in row


def _is_pair(row: Row) -> bool:
    one, two, judge = row.get("model_1"), row.get("model_2"), row.get("judge", [""])
    is_named = isinstance(one, str) and isinstance(two, str) and one != two and isinstance(judge, list) and bool(judge)
    return is_named and "question_id" in row and all(row.get(call) in WINNERS for call in ("g1_winner", "g2_winner"))


def apply_rules(module: str, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> list[Row]:
    """Judge by `module`: compare(first, second, question) is "win", "tie" or "loss" for the second; in both orders.

    Raises SettingsError if there is no such module, or if it needs a field that the questions lack.
    """
    compare, rows = _import_rules(module).compare, []
    try:
        for question in answers.questions:
            asked = {"prompt": question["turns"][0], **question}
            for one, two in pairs:
                texts = [turns[0] for model in (one, two)
                         if (turns := answers.answers[model].get(question["question_id"]))]  # fmt: skip
                if len(texts) == 2:
                    first, second = compare(*texts, asked), compare(*texts[::-1], asked)
                    winners = {"win": two, "loss": one}.get(first, "tie"), {"win": one, "loss": two}.get(second, "tie")
                    calls = [{"winner": winner} for winner in winners]
                    rows.append(pair_row(question, 1, (one, two), ["rules", module], calls))
    except KeyError as error:
        raise SettingsError(f"--judge_module {module} needs a field {error} in every question. Without it, judge with "
                            "--votes FILE or --judge_model NAME.") from None  # fmt: skip
    if not rows:
        raise UserError(f"nothing to judge: no question has been answered by {' and '.join(pairs[0])}")
    return rows


def score_by_rules(module: str, answers: AnswerSet) -> dict[str, dict[str, float]]:
    """model → the share of its answers for which each field of the module's score(answer, question) is true."""
    score, shares = _import_rules(module).score, {}
    for model, by_id in answers.answers.items():
        scores = [
            dataclasses.asdict(score(by_id[q["question_id"]][0], {"prompt": q["turns"][0], **q}))
            for q in answers.questions if by_id.get(q["question_id"])
        ]  # fmt: skip
        shares[model] = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]} if scores else {}
    return shares


def _import_rules(module: str) -> Any:
    rules = import_user_module(module, "judge_module")
    if not (hasattr(rules, "score") and hasattr(rules, "compare")):
        raise SettingsError(f"--judge_module {module} is not a module with score() and compare()")
    return rules
