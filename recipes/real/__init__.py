"""Another round on a real model: prompts of the kinds that people ask, and the rule that scores the answers.

The rule asks for a short answer in plain text: at most two finished sentences in one paragraph, without headings, lists
or other markup, that still say something. `train.jsonl` has the prompts whose answers become pairs. `heldout.jsonl` has
the prompts of the comparison. recipes/real/facts.py judges 40 questions with one right answer.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

SENTENCES, WORDS, NEW_WORDS = 2, 50, 4
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d)*_]*(?=\s|$)")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|Dr|Mr|Mrs|Ms|St)\.(?=\s)")
MARKUP = re.compile(r"\n|[*#`|_\u2022]|^\W*(?:\d+\.|-)\s")
REFUSAL = re.compile(r"\b(?:i (?:can't|cannot|am unable|don't have)|as an ai)\b")
SMALL = """a an and are as at be been but by can could did do does for from had has have he her his how i if in into is
it its me my not of on or our she should so some than that the their them then there these they this those to very was
we were what when where which who why will with would you your"""
SMALL_WORDS = frozenset(SMALL.split())


@dataclasses.dataclass
class Score:
    """What an answer is, the most important one first: see `score`."""

    answers: bool
    brief: float
    plain: bool


def score(answer: str, question: dict[str, Any]) -> Score:
    """Whether an answer says something, is brief and is plain.

    Answers: it is no refusal, and has at least NEW_WORDS words that the question does not have. "A volcano is a volcano
    that erupts." has one. Words such as "the" and "is" do not count.
    Brief: 1 if it has at most SENTENCES sentences and WORDS words, less the more it has, and 0 if its end is missing.
    Plain: it is one paragraph without markup.
    """
    text = answer.strip().replace("\u2019", "'")
    asked, said = content_words(question["prompt"]), content_words(text)
    sentences, words = len(SENTENCE_END.findall(ABBREVIATION.sub(" ", text))), len(text.split())
    is_finished = text.rstrip("\"'\u201d)*_").endswith((".", "!", "?"))
    return Score(
        answers=not REFUSAL.search(text.lower()) and len(said - asked) >= NEW_WORDS,
        brief=min(1.0, SENTENCES / sentences, WORDS / words) if is_finished else 0.0,
        plain=not MARKUP.search(text),
    )


def compare(before: str, after: str, question: dict[str, Any]) -> str:
    """ "win", "tie" or "loss" for `after`: the one that says something wins, and of two the briefer and plainer one.

    Brevity counts twice as much as plain text, as in the scores of 06.
    """
    scores = (score(text, question) for text in (before, after))
    old, new = ((each.answers, round(2 * each.brief + each.plain, 9)) for each in scores)
    return "tie" if old == new else "win" if new > old else "loss"


def content_words(text: str) -> set[str]:
    """The first five letters of each word that is not small, so that "volcano" and "volcanoes" are one."""
    return {word[:5] for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in SMALL_WORDS}
