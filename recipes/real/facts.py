"""The rule for questions with one right answer: whether an answer names it. `facts.jsonl` has 40 such questions."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from typing import Any


@dataclasses.dataclass
class Score:
    correct: bool


def score(answer: str, question: dict[str, Any]) -> Score:
    """Whether an answer has one of the `accepted` words or numbers, as a word of its own."""
    said, *wanted = map(_words, (answer, *question["accepted"]))
    correct = any(said[i : i + len(words)] == words for words in wanted for i in range(len(said)))
    return Score(correct)


def compare(before: str, after: str, question: dict[str, Any]) -> str:
    """ "win", "tie" or "loss" for `after`: the correct answer wins."""
    old, new = (score(text, question).correct for text in (before, after))
    return "tie" if old == new else "win" if new else "loss"


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", unicodedata.normalize("NFKC", text).lower())
