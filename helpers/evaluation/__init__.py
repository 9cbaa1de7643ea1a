"""Evaluation: questions, generators, answers, the vote page, judges and their results."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "questions": ["read_bench", "read_questions"],
        "generators": ["Generators", "HFGenerator"],
        "answers": ["AnswerStore"],
        "judges": ["make_judge"],
        "pairs": ["make_pairs", "make_scorer"],
        "samples": ["find_prompts"],
        "judgments": ["find_answers"],
        "results": ["summarize_judgments"],
    },
)
