"""Verdicts that are there already: votes of people, and FastChat's files of judgments."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

from helpers.core import SettingsError, UserError, find_path, read_jsonl, safe_file_name, write_json
from helpers.evaluation.judges import ModelAnswers, Row, pair_row
from helpers.evaluation.questions import Question
from helpers.runs.run import Run

JUDGE_FLAGS = ("judge_model", "votes", "judge_module", "judgments")
FORMAT = "votes-1"  # see vote_page.py
WINNERS = ("model_1", "model_2", "tie", "error")


def judge_name(settings: Any) -> str:
    """Who judges, in a word. Raises SettingsError where nobody does, or somebody who cannot rate."""
    given = next((name for name in JUDGE_FLAGS if getattr(settings, name)), None)
    if given is None:
        raise SettingsError(
            "who judges? --judge_model NAME (with --base_url, for your own server), --votes FILE or --judge_module MODULE"
        )
    if settings.mode == "single" and given in ("votes", "judge_module"):
        raise SettingsError(f"--mode single rates answers, and --{given} compares them: leave one of them out")
    if given == "votes":
        return "human"
    return f"rules {settings.judge_module}" if given == "judge_module" else str(getattr(settings, given))


def without_timestamps(rows: list[Row]) -> list[Row]:
    """Rows without when they were made: of the same verdicts these are the same."""
    return [{name: value for name, value in row.items() if name != "tstamp"} for row in rows]


def save_judgments(run: Run, settings: Any, rows: list[Row], table: Any, complete: bool) -> None:
    """model_judgment/JUDGE_pair.jsonl or JUDGE_single.jsonl as FastChat has them, verdicts.json, and the run's record.

    `complete`: nothing is left to be judged.
    """
    who = judge_name(settings)
    if not settings.judgments:
        file = (
            run.folder
            / "model_judgment"
            / f"{safe_file_name(who)}_{'single' if settings.mode == 'single' else 'pair'}.jsonl"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draft.replace(file)
    metrics = table.as_dict()
    write_json(run.folder / "verdicts.json", metrics)
    if complete and not _nothing_read(rows):
        run.finish(metrics=metrics)
    else:
        run.save(status="failed" if complete else "interrupted", metrics=metrics)


def raise_if_incomplete(rows: list[Row], left: int, calls: int) -> None:
    """Raises UserError where something is left to be judged, or of all that was judged nothing could be read."""
    if left:
        raise UserError(f"{left:,} of {calls:,} calls are left: the same command makes them (see --max_calls)")
    if _nothing_read(rows):
        said = str(rows[0].get("judgment") or rows[0].get("g1_judgment") or "")[:80]
        cut = " It had no room to end: raise --max_new_tokens." if not said else ""
        raise UserError(
            f"no verdict could be read in any reply; is this model able to judge? One said: {said!r}.{cut} "
            "--retry_errors asks again"
        )


def _nothing_read(rows: list[Row]) -> bool:
    return bool(rows) and all("error" in (r.get("g1_winner"), r.get("g2_winner")) or r.get("score") == -1 for r in rows)


def read_votes(files: tuple[str, ...], questions: list[Question], said: ModelAnswers, page: str = "") -> list[Row]:
    """The votes of the page that 04 makes, as judgments; a vote for the best of several beats each of the others.

    A person sees all answers at once, so there is one order only, and both games of a row are that vote. Two answers
    that are the same are a tie, whatever was voted. Of a person's exports of one page the newest holds, so that a vote
    that was undone stays undone. `files` may be globs, which a Windows shell leaves as they are. `page` is the page of
    these answers, where it is known. Raises UserError for what is no votes file, or of another page, or of other
    models.
    """
    known, names = {str(q["question_id"]): q for q in questions}, list(said)
    exports: dict[tuple[str, str], tuple[str, str, dict[str, Any]]] = {}
    for name in (file for given in files for file in _matching(given)):
        content = _votes_file(name)
        if page and content["page"] != page:
            raise UserError(f"--votes {name!r} is of another page (of other answers): {content['page']}, not {page}")
        voter = str(content.get("voter") or "")
        person = str(content.get("voter_id") or voter or find_path(name))
        when = str(content.get("exported") or max((str(vote.get("voted")) for vote in content["votes"]), default=""))
        key = (str(content["page"]), person)
        if key not in exports or when >= exports[key][0]:
            exports[key] = (when, name, content)
    rows = []
    for (_, person), (_, name, content) in exports.items():
        for number, vote in enumerate(content["votes"], 1):
            question, order, winner = known.get(str(vote.get("question_id"))), vote.get("order"), vote.get("winner")
            fits = isinstance(order, list) and len(order) > 1 and {*map(str, order)} <= set(names)
            if question is None or not fits or winner not in (*order, "tie"):
                raise UserError(f"--votes {name!r}, vote {number}, is not on these questions and models: {vote}")
            judge = ["human", str(content.get("voter") or person)]
            for one, two in combinations(sorted(order, key=names.index), 2):
                if winner in (one, two, "tie"):
                    same = said[one].get(question["question_id"]) == said[two].get(question["question_id"])
                    row = pair_row(question, 1, (one, two), judge, ["tie" if same else winner] * 2)
                    rows.append(row | {"blind": bool(vote.get("blind", True))})
    if not rows:
        raise UserError(f"--votes {' '.join(files)}: there is not one vote in it")
    return rows


def _matching(name: str) -> list[str]:
    return [name] if find_path(name) else sorted(glob.glob(str(Path(name).expanduser()))) or [name]


def _votes_file(name: str) -> dict[str, Any]:
    path = find_path(name)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if content["format"] == FORMAT and all(isinstance(vote, dict) for vote in content["votes"]) and content["page"]:
            return dict(content)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"--votes {name!r} is not a file of votes: the page of 04_vibes.py exports them")


def read_judgments(name: str, mode: str, models: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a FastChat file of pairwise or single judgments, as they are; of `models` only, if any are named.

    Raises UserError for rows of another kind, or of several judges.
    """
    path = find_path(name)
    if path is None or not path.is_file():
        raise UserError(f"--judgments {name!r} is not a file")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not (_is_single(row) if mode == "single" else _is_pair(row)):
            raise UserError(f"--judgments {name!r}, line {number}, is no row of a model_judgment file of --mode {mode}")
    judges = list(dict.fromkeys(str((row.get("judge") or ["?"])[0]) for row in rows))
    if len(judges) > 1:
        raise UserError(f"--judgments {name!r} has several judges ({', '.join(judges)}): give a file of one")
    kept = [
        r
        for r in rows
        if not models or {r.get("model", r.get("model_1")), r.get("model", r.get("model_2"))} <= {*models}
    ]
    if not kept:
        raise UserError(f"--judgments {name!r} has nothing on {' and '.join(models) or 'anything'}")
    return kept


def _is_single(row: Row) -> bool:
    number = isinstance(row.get("score"), int | float) and isinstance(row.get("turn"), int)
    return number and isinstance(row.get("model"), str) and "question_id" in row


def _is_pair(row: Row) -> bool:
    one, two, judge = row.get("model_1"), row.get("model_2"), row.get("judge", [""])
    named = isinstance(one, str) and isinstance(two, str) and one != two and isinstance(judge, list) and bool(judge)
    return named and "question_id" in row and all(row.get(game) in WINNERS for game in ("g1_winner", "g2_winner"))


def judge_by_rules(
    module: str, questions: list[Question], said: ModelAnswers, pairs: list[tuple[str, ...]]
) -> list[Row]:
    """Judge by `module`: compare(before, after, question) is "win", "tie" or "loss" for `after`, in both orders.

    Raises SettingsError where there is no such module, or it needs what the questions have not.
    """
    compare, _ = _load_rules(module)
    rows = []
    try:
        for question in questions:
            asked = {"prompt": question["turns"][0], **question}
            for one, two in pairs:
                answers = [said[model].get(question["question_id"]) for model in (one, two)]
                if all(answers):
                    a, b = (turns[0] for turns in answers if turns)
                    winners = [{"win": two, "loss": one}.get(compare(a, b, asked), "tie"),
                               {"win": one, "loss": two}.get(compare(b, a, asked), "tie")]  # fmt: skip
                    rows.append(pair_row(question, 1, (one, two), ["rules", module], winners))
    except KeyError as error:
        raise SettingsError(
            f"--judge_module {module} needs a field {error} in every question: without it, judge with --votes FILE or "
            "--judge_model NAME"
        ) from None
    if not rows:
        raise UserError(f"nothing to judge: no question has been answered by {' and '.join(pairs[0])}")
    return rows


def score_by_rules(module: str, questions: list[Question], said: ModelAnswers) -> dict[str, dict[str, float]]:
    """model → the share of its answers that each field of score(answer, question) holds for, as "correct"."""
    _, score = _load_rules(module)
    shares = {}
    for model, answers in said.items():
        scores = [
            dataclasses.asdict(score(answers[q["question_id"]][0], {"prompt": q["turns"][0], **q}))
            for q in questions if answers.get(q["question_id"])
        ]  # fmt: skip
        shares[model] = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]} if scores else {}
    return shares


def _load_rules(module: str) -> tuple[Any, Any]:
    try:
        rules = importlib.import_module(module)
        return rules.compare, rules.score
    except (ImportError, AttributeError):
        raise SettingsError(f"--judge_module {module}: a module with score() and compare() is needed") from None
