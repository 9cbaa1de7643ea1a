"""Verdicts that are there already: votes of people, and FastChat's files of judgments."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from helpers.errors import SettingsError, UserError
from helpers.judging import Row, pair_row
from helpers.paths import find_path
from helpers.questions import Question, file_name
from helpers.rows import read_lines
from helpers.runs import Run, write_json

SOURCES = ("judge_model", "votes", "rules", "judgments")
FORMAT = "votes-1"  # see vote_page.py
WINNERS = ("model_1", "model_2", "tie", "error")


def name_of_judge(settings: Any) -> str:
    """Who judges, in a word. Raises SettingsError where nobody does, or somebody who cannot rate."""
    given = next((name for name in SOURCES if getattr(settings, name)), None)
    if given is None:
        raise SettingsError(
            "who judges? --judge_model NAME (with --base_url, for your own server), --votes FILE or --rules MODULE"
        )
    if settings.mode == "single" and given in ("votes", "rules"):
        raise SettingsError(f"--mode single rates answers, and --{given} compares them: leave one of them out")
    if given == "votes":
        return "human"
    return f"rules {settings.rules}" if given == "rules" else str(getattr(settings, given))


def save_judgments(run: Run, settings: Any, rows: list[Row], table: Any, complete: bool) -> None:
    """model_judgment/JUDGE_pair.jsonl or JUDGE_single.jsonl as FastChat has them, verdicts.json, and the run's record.

    `complete`: nothing is left to be judged.
    """
    who = name_of_judge(settings)
    if not settings.judgments:
        file = (
            run.folder
            / "model_judgment"
            / f"{file_name(who)}_{'single' if settings.mode == 'single' else 'pair'}.jsonl"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draft.replace(file)
    metrics = table.as_dict()
    write_json(run.folder / "verdicts.json", metrics)
    if complete:
        run.finish(metrics=metrics)
    else:
        run.update(status="interrupted", metrics=metrics)


def refuse_unfinished(rows: list[Row], left: int, calls: int) -> None:
    """Raises UserError where something is left to be judged, or of all that was judged nothing could be read."""
    if left:
        raise UserError(f"{left:,} of {calls:,} calls are left: the same command makes them (see --max_calls)")
    if rows and all("error" in (r.get("g1_winner"), r.get("g2_winner")) or r.get("score") == -1 for r in rows):
        said = str(rows[0].get("judgment") or rows[0].get("g1_judgment"))[:80]
        raise UserError(f"no verdict could be read in any reply; is this model able to judge? One said: {said!r}")


def read_votes(files: tuple[str, ...], questions: list[Question]) -> list[Row]:
    """The votes of the page that 04 makes, as judgments; a vote for the best of several beats each of the others.

    A person sees two answers at once, so there is one order only, and both games of a row are that vote. Of a person's
    votes on a question the last holds. Raises UserError for what is no votes file, or of other questions.
    """
    known = {str(q["question_id"]): q for q in questions}
    rows: dict[Any, Row] = {}
    for name in files:
        path = find_path(name)
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8")) if path else {}
            votes = content["votes"] if content["format"] == FORMAT else None
        except (OSError, ValueError, LookupError, TypeError):
            content, votes = {}, None
        if votes is None:
            raise UserError(f"--votes {name!r} is not a file of votes: the page of 04_vibes.py exports them")
        voter = str(content.get("voter") or Path(name).stem)
        for number, vote in enumerate(votes, 1):
            question = known.get(str(vote.get("question_id")))
            winner, order = vote.get("winner"), vote.get("order") or []
            if question is None or len(order) < 2 or winner not in (*order, "tie"):
                raise UserError(f"--votes {name!r}, vote {number}, is not on these questions and models: {vote}")
            for one, two in combinations(sorted(order), 2):
                if winner in (one, two, "tie"):
                    row = pair_row(question, 1, (one, two), ["human", voter], [winner, winner])
                    rows[voter, str(vote["question_id"]), one, two] = row | {"blind": bool(vote.get("blind", True))}
    if not rows:
        raise UserError(f"--votes {' '.join(files)}: there is not one vote in it")
    return list(rows.values())


def read_judgments(name: str) -> list[Row]:
    """The rows of a FastChat file of pairwise or single judgments, as they are. Raises UserError."""
    path = find_path(name)
    if path is None or not path.is_file():
        raise UserError(f"--judgments {name!r} is not a file")
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        single = {"question_id", "model", "score", "turn"} <= set(row)
        pairwise = {"question_id", "model_1", "model_2"} <= set(row) and all(
            row.get(game) in WINNERS for game in ("g1_winner", "g2_winner")
        )
        if not (single or pairwise):
            raise UserError(f"--judgments {name!r}, line {number}, is no row of a model_judgment file")
    return rows
