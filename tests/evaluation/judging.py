"""What the tests of judges share: questions, answers, a judge that can be predicted, and its run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.evaluation.judges import ModelJudge, make_judge
from helpers.evaluation.judgments import AnswerSet, Judgments, pair_row
from helpers.evaluation.results import PairwiseResults
from helpers.runs.run import Run
from tests.judge_server import JudgeServer, Script, judge_server, shown


def questions_of(count: int, turns: int = 1) -> list[dict[str, Any]]:
    kinds = ("odd", "even")
    return [
        {"question_id": i, "category": kinds[i % 2], "turns": [f"question {i}.{t}" for t in range(turns)]}
        for i in range(count)
    ]


def answers_worth(worth: dict[str, list[int]], **texts: list[str]) -> AnswerSet:
    """Answers that say what they are worth to `better`, and whose they are, or any texts."""
    answers = {name: {i: [f"worth {n} ({name[0]})"] for i, n in enumerate(numbers)} for name, numbers in worth.items()}
    answers |= {name: {i: [text] for i, text in enumerate(own)} for name, own in texts.items()}
    return AnswerSet(questions_of(max(map(len, answers.values()))), answers)


def better(messages: list[dict[str, str]]) -> str:
    """The script of a judge that prefers the answer with the higher worth."""
    a, b = (int(m[1]) if (m := re.search(r"worth (\d+)", text)) else 0 for text in shown(messages))
    return f"One of them says [[A]], but my verdict is [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def settings_for(folder: Path, url: str = "", **given: Any) -> SimpleNamespace:
    """Settings of 05_judge.py, as far as judges read them."""
    values: dict[str, Any] = dict(
        mode="pairwise", baseline="", judge_model="judge", base_url=url, reward_model="", quantization="none", votes=(),
        judge_module="", judgments="", judge_prompts="", bench_dir="", models=(), temperature=0.0, max_new_tokens=9,
        max_concurrency=4, timeout=1.0, max_calls=0, max_tokens=0, input_price=0.0, output_price=0.0,
        retry_errors=False, resume="auto", seed=0, output_dir=folder.parent,
    )  # fmt: skip
    return SimpleNamespace(**values | given)


def judged(server: JudgeServer, folder: Path, answers: AnswerSet, **given: Any) -> tuple[ModelJudge, Judgments]:
    """A judge behind `server` and its judgments, made in the run `folder`."""
    judge = make_judge(settings_for(folder, server.url, **given), answers)
    assert isinstance(judge, ModelJudge)
    return judge, judge.run(Run(folder, {}))


def results_of(script: Script, folder: Path, answers: AnswerSet) -> PairwiseResults:
    with judge_server(script) as server:
        judge, judgments = judged(server, folder, answers)
        assert len(server.requests) == len(judge.matches) == 2 * len(judgments.rows)
    return PairwiseResults.from_judgments(judgments, answers)


def rows_of(winners: str, models: tuple[str, str] = ("a", "b")) -> list[dict[str, Any]]:
    """A row of judgments per letter: the winner of both calls, "t" for a tie."""
    return [
        pair_row(q, 1, models, ["j", "p"], [{"winner": {"t": "tie"}.get(letter, letter)}] * 2)
        for q, letter in zip(questions_of(len(winners)), winners, strict=True)
    ]


def vote(question: int, winner: str, order: str = "ab") -> dict[str, Any]:
    when = "2026-01-01T00:00:00Z"
    return {"question_id": question, "order": [*order], "winner": winner, "blind": True, "voted": when}


def export(file: Path, votes: list[dict[str, Any]], **more: Any) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"format": "votes-1", "page": "p", "voter": "", "votes": votes} | more))
    return str(file)
