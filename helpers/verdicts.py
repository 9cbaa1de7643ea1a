"""What judgments say of two or more models: counts, rates, intervals, and how far the judge can be trusted."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np

from helpers.judging import Row, Said
from helpers.questions import Question
from helpers.win_rates import (
    length_controlled,
    length_controlled_interval,
    mean_interval,
    most_unseen,
    sign_test,
)

ONE_ORDER = ("human", "rules")  # judges to whom the order cannot matter, or was never the same
OUTCOME = {"model_2": 1.0, "tie": 0.5, "model_1": 0.0}
CONFOUNDED = 0.95  # one model's answers are the longer ones this often: length and model cannot be told apart
FEW = 10  # decided comparisons below which no share of them is worth a sentence


@dataclasses.dataclass(frozen=True)
class Match:
    """One turn of one question: who won over both orders, seen from the pair's second model."""

    question_id: str
    category: str
    outcome: float | None  # 1, 0.5 or 0; None for an error
    games: tuple[str, str]  # model_1, model_2, tie or error
    two_orders: bool
    first_won: bool  # the answer shown first, in both orders
    longer: int | None  # characters that the second model's answer is longer; None where answers are not known
    blind: bool = True  # a person who voted had not seen the names

    @property
    def consistent(self) -> bool:
        return self.games[0] == self.games[1]


@dataclasses.dataclass(frozen=True)
class Counts:
    """Wins, losses and ties as FastChat's show_result counts them: rows with an error are left out."""

    win: int
    loss: int
    tie: int

    @property
    def total(self) -> int:
        return self.win + self.loss + self.tie

    @property
    def win_rate(self) -> float:
        return self.win / self.total if self.total else 0.0

    @property
    def loss_rate(self) -> float:
        return self.loss / self.total if self.total else 0.0

    @property
    def win_rate_adjusted(self) -> float:
        return (self.win + 0.5 * self.tie) / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, float]:
        names = ("win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, matches: list[Match]) -> Counts:
        outcomes = [m.outcome for m in matches]
        return cls(outcomes.count(1.0), outcomes.count(0.0), outcomes.count(0.5))


def matches_of(rows: list[Row], questions: list[Question], said: Said) -> dict[tuple[str, str], list[Match]]:
    """Judgments by pair of models, each pair in the order of `said`, else in that of the rows.

    Two games that disagree are a tie; an error in either is none (FastChat, llm_judge/show_result.py).
    """
    known = {str(q["question_id"]): q for q in questions}
    texts = {model: {str(i): turns for i, turns in answers.items()} for model, answers in said.items()}
    names = list(dict.fromkeys([*said, *(row[m] for row in rows for m in ("model_1", "model_2"))]))
    found: dict[tuple[str, str], list[Match]] = {pair: [] for pair in combinations(names, 2)}
    for row in rows:
        pair = (row["model_1"], row["model_2"])
        turned = names.index(pair[0]) > names.index(pair[1])
        games = (row["g1_winner"], row["g2_winner"])
        swap = {"model_1": "model_2", "model_2": "model_1"} if turned else {}
        one, two = (str(swap.get(game, game)) for game in games)
        winner = "error" if "error" in games else one if one == two else "tie"
        i = str(row["question_id"])
        pair = pair[::-1] if turned else pair
        found[pair].append(
            Match(
                question_id=i,
                category=known.get(i, {}).get("category", "general"),
                outcome=OUTCOME.get(winner),
                games=(one, two),
                two_orders=_judge(row) not in ONE_ORDER,
                first_won=games == ("model_1", "model_2"),
                longer=_longer(row, pair, texts),
                blind=row.get("blind", True),
            )
        )
    return {pair: matches for pair, matches in found.items() if matches}


def _judge(row: Row) -> str:
    return str(row.get("judge", [""])[0])


def _longer(row: Row, pair: tuple[str, str], texts: Said) -> int | None:
    try:
        one, two = (texts[model][str(row["question_id"])] for model in pair)
        turns = range(len(one)) if _judge(row) == "human" else [int(row.get("turn", 1)) - 1]
        return sum(len(two[t]) - len(one[t]) for t in turns)
    except (KeyError, IndexError):
        return None


@dataclasses.dataclass(frozen=True)
class PairVerdict:
    """A pair's second model ("after") against its first ("before")."""

    before: str
    after: str
    counts: Counts
    errors: int
    interval: tuple[float, float]  # of win_rate_adjusted
    sign_p: float
    consistency: float | None  # share of comparisons whose two orders agree; None where there was one order
    first_favoured: float | None  # of those that disagree, the share in which the answer shown first won both times
    longer_won: float | None  # share of decided comparisons that went to the longer answer
    decided_unequal: int  # decided comparisons of answers of different lengths
    after_longer: float | None  # share of comparisons in which the second model's answer is the longer one
    length_controlled: float | None
    length_controlled_interval: tuple[float, float] | None
    categories: dict[str, Counts]
    seen: int = 0  # votes that were cast with the names in sight
    alike: int = 0  # questions, where all their outcomes are the same

    @classmethod
    def of(cls, before: str, after: str, matches: list[Match], seed: int = 0) -> PairVerdict:
        judged = [m for m in matches if m.outcome is not None]
        outcomes = np.array([m.outcome for m in judged], dtype=float)
        groups: list[object] = [m.question_id for m in judged]
        swapped = [m for m in judged if m.two_orders]
        torn = [m for m in swapped if not m.consistent]
        lengths = [m.longer for m in judged]
        decided = [m for m in judged if m.longer and m.outcome != 0.5]
        won = sum((m.outcome == 1.0) == ((m.longer or 0) > 0) for m in decided)
        controlled, around = None, None
        if judged and all(n is not None for n in lengths) and any(lengths):
            by = np.array(lengths, dtype=float)
            controlled = float(length_controlled(outcomes, by)[0])
            around = length_controlled_interval(outcomes, by, groups, seed)
        return cls(
            before, after,
            counts=Counts.of(judged),
            errors=len(matches) - len(judged),
            interval=mean_interval(outcomes, groups, seed) if judged else (0.0, 1.0),
            sign_p=sign_test(outcomes, groups) if judged else 1.0,
            consistency=sum(m.consistent for m in swapped) / len(swapped) if swapped else None,
            first_favoured=sum(m.first_won for m in torn) / len(torn) if torn else None,
            longer_won=won / len(decided) if decided else None,
            decided_unequal=len(decided),
            after_longer=sum((n or 0) > 0 for n in lengths) / len(lengths) if any(lengths) else None,
            length_controlled=controlled,
            length_controlled_interval=around,
            categories={c: Counts.of([m for m in judged if m.category == c])
                        for c in dict.fromkeys(m.category for m in judged)},
            seen=sum(not m.blind for m in judged),
            alike=len(set(groups)) if len(set(outcomes.tolist())) == 1 else 0,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        own = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("counts", "categories")
        }
        by_category = {c: n.as_dict() for c, n in self.categories.items()}
        return own | self.counts.as_dict() | {"categories": by_category, "notes": self.notes()}

    def notes(self) -> list[str]:
        """What one should know before believing the table, in words."""
        (low, high), after, before, said = self.interval, self.after, self.before, []
        level = low <= 0.5 <= high or self.sign_p > 0.05
        if self.errors:
            of = self.counts.total + self.errors
            said.append(f"{self.errors} of {of} comparisons have no verdict that could be read, and count nowhere.")
        if not self.counts.total:
            return said
        if level:
            why = f"{low:.1%} to {high:.1%} holds 50%" if low <= 0.5 <= high else f"p = {self.sign_p:.2g}"
            said.append(f"{after} and {before} cannot be told apart here: {why}.")
        if self.seen:
            said.append(f"{self.seen} of {self.counts.total} votes were cast with the names in sight.")
        if self.alike:
            share = f"{most_unseen(self.alike):.1%}"
            said.append(f"All outcomes are alike; at 95% up to {share} of other questions may still go another way.")
        if self.consistency is not None and self.consistency < 0.7:
            torn, first = f"{1 - self.consistency:.0%}", f"{self.first_favoured or 0.0:.0%}"
            said.append(f"The order changed the verdict in {torn} of comparisons, {first} of these for whatever stood "
                        "first: they count as ties.")  # fmt: skip
        if self.longer_won is not None and self.decided_unequal >= FEW and abs(self.longer_won - 0.5) > 0.2:
            kind, part = ("longer", self.longer_won) if self.longer_won > 0.5 else ("shorter", 1 - self.longer_won)
            said.append(f"{part:.0%} of decided comparisons went to the {kind} answer.{self._at_equal_length()}")
        if self.after_longer is not None and self.counts.total >= FEW:
            name, most = (after, self.after_longer) if self.after_longer > 0.5 else (before, 1 - self.after_longer)
            if most >= CONFOUNDED:
                said.append(f"{name}'s answers are the longer ones in {most:.0%} of comparisons: length and quality "
                            "can hardly be told apart, by the length-controlled rate neither.")  # fmt: skip
        return said

    def _at_equal_length(self) -> str:
        if self.length_controlled is None or self.length_controlled_interval is None:
            return ""
        low, high = self.length_controlled_interval
        text = f" At equal lengths {self.after} would win {self.length_controlled:.1%} ({low:.1%} to {high:.1%})"
        if low <= 0.5 <= high:
            return f"{text}: apart from length the two are alike."
        return f"{text}."
