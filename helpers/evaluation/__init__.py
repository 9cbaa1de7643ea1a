"""Evaluation: questions, answers, the vote page, judges and their results."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "questions": ["read_questions"],
    },
)
