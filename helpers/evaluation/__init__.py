"""Evaluation: questions, generators, answers, the vote page, judges and their results."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "questions": ["read_bench", "read_questions"],
        "generators": ["chat_loop", "generation_kwargs", "HFGenerator", "iter_generators", "plan_generators"],
        "answers": ["AnswerStore", "SideBySide", "resumable", "write_vote_page"],
        "judges": ["make_judge"],
        "judgments": ["find_answers", "save_judgments"],
        "results": ["PairwiseResults", "RatingResults"],
    },
)
