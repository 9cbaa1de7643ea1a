"""One HTML file in which a person reads models' answers side by side and votes, without knowing whose they are."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.core import UserError
from helpers.evaluation.questions import shown_turns

TEMPLATE = Path(__file__).with_name("vote_page.html")


def write_page(
    file: Path,
    questions: list[dict[str, Any]],
    answers: dict[str, dict[Any, list[str]]],
    title: str,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
) -> str:
    """Write the page to `file` and return its id. It is self-contained, asks nothing of any network, and shows every
    text as text.

    `questions` are rows as FastChat keeps them: question_id, turns, and where there are, category and reference.
    `answers` is model → question_id → an answer a turn; a model that lacks a question is left out of it. `settings`
    is what to say of how the answers were made. `seed` and a question's id decide whose answer stands on the left.

    A vote says which of a question's answers is best, or that it is a tie; where all are the same, none is asked for.
    The page exports them as
    {"format": "votes-1", "page": id, "voter": name, "voter_id": of the browser, "exported": when,
    "votes": [{"question_id", "order", "winner", "blind", "voted"}]}.
    """
    text = _as_json(_content(questions, answers, settings or {}, seed))
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "policy": _policy(template),
        "page": hashlib.sha256(text.encode()).hexdigest()[:12],
        "content": text,
    }
    page = re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)  # once over, so that no text is filled in
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(page.encode("utf-8", errors="replace"))  # of the title; the rest is ASCII
    draft.replace(file)
    return parts["page"]


def _content(
    questions: list[dict[str, Any]], answers: dict[str, dict[Any, list[str]]], settings: dict[str, Any], seed: int
) -> dict[str, Any]:
    """What the page shows, with each question's columns from left to right."""
    if "tie" in answers:
        raise UserError("a model is called 'tie', which is what a vote for none of them is called: rename it")
    ids = [_as_json(question["question_id"]) for question in questions]
    if not ids:
        raise UserError("no question to show: the page needs one at least")
    [(most, times)] = Counter(ids).most_common(1)
    if times > 1:
        raise UserError(f"question_id {most} occurs {times} times: a vote needs to say which question it is on")
    shown = []
    for question, i in zip(questions, ids, strict=True):
        models = [model for model in answers if answers[model].get(question["question_id"])]
        random.Random(f"{seed} {i}").shuffle(models)
        shown.append(
            {
                "id": i,  # as JSON, which the export repeats: JavaScript would round a long number
                "name": str(question["question_id"]),
                "category": question.get("category") or "",
                "turns": shown_turns(question),
                "reference": question.get("reference") or [],
                "columns": [{"model": m, "answers": answers[m][question["question_id"]]} for m in models],
            }
        )
    said = {name: value if isinstance(value, str) else _as_json(value) for name, value in settings.items()}
    return {"settings": said, "models": list(answers), "questions": shown}


def _as_json(value: Any) -> str:
    r"""JSON in ASCII, which ends no <script>: U+2028 and halves of surrogate pairs are \u escapes, and so is "<"."""
    return json.dumps(value, default=str).replace("<", "\\u003c")


def _policy(template: str) -> str:
    """Content-Security-Policy that allows this template's own style and script, by their hashes, and no request."""

    def source(tag: str) -> str:
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rest = "base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; style-src {source('style')}; script-src {source('script')}; {rest}"
