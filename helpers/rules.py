"""A judge by rules: a module that knows what is right."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from helpers.errors import SettingsError, UserError
from helpers.judging import Row, Said, pair_row
from helpers.questions import Question


def judge_by_rules(module: str, questions: list[Question], said: Said, pairs: list[tuple[str, ...]]) -> list[Row]:
    """Judge by `module`: compare(before, after, question) is "win", "tie" or "loss" for `after`, in both orders.

    Raises SettingsError where there is no such module, or it needs what the questions have not.
    """
    compare, _ = _rules(module)
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
            f"--rules {module} needs a field {error} in every question: without it, judge with --votes FILE or "
            "--judge_model NAME"
        ) from None
    if not rows:
        raise UserError(f"nothing to judge: no question has been answered by {' and '.join(pairs[0])}")
    return rows


def score_by_rules(module: str, questions: list[Question], said: Said) -> dict[str, dict[str, float]]:
    """model → the share of its answers that each field of score(answer, question) holds for, as "correct"."""
    _, score = _rules(module)
    shares = {}
    for model, answers in said.items():
        scores = [
            dataclasses.asdict(score(answers[q["question_id"]][0], {"prompt": q["turns"][0], **q}))
            for q in questions if answers.get(q["question_id"])
        ]  # fmt: skip
        shares[model] = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]} if scores else {}
    return shares


def _rules(module: str) -> tuple[Any, Any]:
    try:
        rules = importlib.import_module(module)
        return rules.compare, rules.score
    except (ImportError, AttributeError):
        raise SettingsError(f"--rules {module}: a module with score() and compare() is needed") from None
