"""Verdicts on answers. By rule, where a module knows what is right."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from typing import Any

from helpers.errors import SettingsError


@dataclasses.dataclass(frozen=True)
class RuleVerdicts:
    """Win / tie / loss of `after` against `before`, and each model's share of right and of courteous answers."""

    before: str
    after: str
    win: int
    tie: int
    loss: int
    correct: dict[str, float]
    courteous: dict[str, float]

    @property
    def win_rate(self) -> float:
        """Wins among decided comparisons; 0 where none is decided."""
        return self.win / (self.win + self.loss) if self.win + self.loss else 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"win_rate": self.win_rate}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("model", "win", "tie", "loss", "win rate", "correct", "courteous", title_justify="left")
        table.title = f"{self.win + self.tie + self.loss} held-out prompts, judged by rule"
        for name, win, loss in ((self.after, self.win, self.loss), (self.before, self.loss, self.win)):
            rate = f"{win / (win + loss):.1%}" if win + loss else "-"
            table.add_row(name, str(win), str(self.tie), str(loss), rate,
                          f"{self.correct[name]:.1%}", f"{self.courteous[name]:.1%}")  # fmt: skip
        return table


def judge_by_rules(module: str, questions: list[dict[str, Any]], answers: dict[str, list[str]]) -> RuleVerdicts:
    """Judge the last model against the first by `module`: score(answer, question), compare(before, after, question).

    Raises SettingsError where there is no such module, or fewer than two models.
    """
    try:
        rules = importlib.import_module(module)
        score, compare = rules.score, rules.compare
    except (ImportError, AttributeError):
        raise SettingsError(f"--rules {module}: a module with score() and compare() is needed") from None
    if len(answers) < 2:
        raise SettingsError("--rules compares two models: give --models an adapter, or two models")
    if missing := sum("answer" not in question for question in questions):
        raise SettingsError(f"--rules {module} needs the right answer to each prompt; {missing} have no field answer")
    before, after = next(iter(answers)), list(answers)[-1]
    results = Counter(compare(b, a, q) for b, a, q in zip(answers[before], answers[after], questions, strict=True))
    scores = {n: [score(a, q) for a, q in zip(answers[n], questions, strict=True)] for n in (before, after)}
    return RuleVerdicts(
        before, after, results["win"], results["tie"], results["loss"],
        correct={n: sum(s.correct for s in scores[n]) / len(questions) for n in scores},
        courteous={n: sum(s.courteous for s in scores[n]) / len(questions) for n in scores},
    )  # fmt: skip
