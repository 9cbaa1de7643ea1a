"""One HTML file on which people read models' answers side by side and vote, without knowing whose they are."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.core import UserError, atomic_write
from helpers.evaluation.answers import ModelAnswers
from helpers.evaluation.questions import Question, question_turns

TEMPLATE = Path(__file__).with_name("vote_page.html")


def write_vote_page(
    file: Path,
    questions: list[Question],
    answers: ModelAnswers,
    title: str,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
) -> str:
    """Write a self-contained page that makes no network request, and return its id. Every text is shown as text.

    A model without an answer to a question is omitted there. `settings` says how the answers were made. `seed` and the
    question's id decide whose answer is on the left. No vote is asked for where all answers are the same.

    The page exports {"format": "votes-1", "page": id, "voter": name, "voter_id": of the browser, "exported": when,
    "votes": [{"question_id", "order", "winner": a model or "tie", "blind", "voted"}]}.
    """
    if "tie" in answers:
        raise UserError("a model is called 'tie', which is the vote for none of them. Rename it.")
    ids = [_to_json(question["question_id"]) for question in questions]
    if not ids:
        raise UserError("the page has no question to show")
    [(repeated, count)] = Counter(ids).most_common(1)
    if count > 1:
        raise UserError(f"question_id {repeated} occurs {count} times. Give each question its own.")
    shown = []
    for question, i in zip(questions, ids, strict=True):
        models = [model for model in answers if answers[model].get(question["question_id"])]
        random.Random(f"{seed} {i}").shuffle(models)
        shown.append(
            {
                "id": i,  # as JSON, which the export repeats: JavaScript would round a long number
                "name": str(question["question_id"]),
                "category": question.get("category") or "",
                "turns": question_turns(question),
                "reference": question.get("reference") or [],
                "columns": [{"model": m, "answers": answers[m][question["question_id"]]} for m in models],
            }
        )
    values = {name: v if isinstance(v, str) else _to_json(v) for name, v in (settings or {}).items()}
    content = _to_json({"settings": values, "models": list(answers), "questions": shown})
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "policy": _policy(template),
        "page": hashlib.sha256(content.encode()).hexdigest()[:12],
        "content": content,
    }
    page = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)  # one pass: no text is filled in twice
    atomic_write(file, page.encode("utf-8", errors="replace"))
    return parts["page"]


def _to_json(value: Any) -> str:
    r"""ASCII JSON that cannot end a <script>: U+2028, lone surrogates and "<" are \u escapes."""
    return json.dumps(value, default=str).replace("<", "\\u003c")


def _policy(template: str) -> str:
    """A Content-Security-Policy that allows the template's own style and script, by their hashes, and no request."""

    def source(tag: str) -> str:
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rest = "base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; style-src {source('style')}; script-src {source('script')}; {rest}"
