"""What judgments say about models: counts, rates, how sure they are, and how far the judge can be trusted."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from helpers.core import BLUE, LIGHT_GREY, ORANGE, Row
from helpers.evaluation.answers import ModelAnswers, render_template
from helpers.evaluation.judgments import AnswerSet, Judgments
from helpers.evaluation.statistics import (
    bootstrap_interval,
    group_index,
    length_controlled,
    mean_interval,
    sign_test,
    zero_event_upper_bound,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFITS = 1_000  # resamples of the length-controlled rate
ONE_ORDER = ("human", "rules")  # judges that are not influenced by the order of two answers, or saw one order only
OUTCOMES = {"model_2": 1.0, "tie": 0.5, "model_1": 0.0}
FEW = 10  # decided comparisons below which no share of them is worth a note
RATES = ("win_rate", "loss_rate", "win_rate_adjusted")
METHOD = (
    "Rates are FastChat's: two orders that disagree are a tie, and in win_rate_adjusted a tie is half a win. Interval: "
    "bootstrap over questions. p: exact sign test over questions. At equal lengths: logistic regression on "
    "tanh(length difference / its standard deviation), with that term set to zero."
)


class Comparison(NamedTuple):
    """One turn of one question: who won over both orders, seen from the pair's second model, the candidate."""

    question_id: str
    category: str
    outcome: float | None  # 1, 0.5 or 0; None for an error
    is_swapped: bool  # the judge saw both orders
    is_consistent: bool  # both orders gave the same verdict
    first_won: bool  # the answer shown first won in both orders
    longer: int | None  # characters by which the candidate's answer is longer; None for unknown answers
    is_blind: bool  # a person who voted had not seen the names


@dataclasses.dataclass(frozen=True)
class Counts:
    """Wins, losses and ties as FastChat's show_result counts them: rows with an error are excluded."""

    win: int
    loss: int
    tie: int

    @property
    def total(self) -> int:
        return self.win + self.loss + self.tie

    def as_dict(self) -> dict[str, float]:
        wins = (self.win, self.loss, self.win + 0.5 * self.tie)
        rates = {name: count / self.total if self.total else 0.0 for name, count in zip(RATES, wins, strict=True)}
        return dataclasses.asdict(self) | rates

    @property
    def win_rate_adjusted(self) -> float:
        return self.as_dict()["win_rate_adjusted"]

    @classmethod
    def of(cls, comparisons: list[Comparison]) -> Counts:
        outcomes = [c.outcome for c in comparisons]
        return cls(outcomes.count(1.0), outcomes.count(0.0), outcomes.count(0.5))


def group_by_pair(rows: list[Row], answers: AnswerSet) -> dict[tuple[str, str], list[Comparison]]:
    """Comparisons by pair of models, each pair in the order of `answers`, else in that of the rows.

    Two calls that disagree are a tie; an error in either is an error (FastChat, llm_judge/show_result.py).
    """
    categories = {str(q["question_id"]): q.get("category", "general") for q in answers.questions}
    texts = {model: {str(i): turns for i, turns in by_id.items()} for model, by_id in answers.answers.items()}
    names = list(dict.fromkeys([*texts, *(row[m] for row in rows for m in ("model_1", "model_2"))]))
    pairs: dict[tuple[str, str], list[Comparison]] = {pair: [] for pair in combinations(names, 2)}
    for row in rows:
        one, two = row["g1_winner"], row["g2_winner"]
        pair = (row["model_1"], row["model_2"])
        outcome = None if "error" in (one, two) else OUTCOMES[one if one == two else "tie"]
        if pair not in pairs:  # the row has the pair the other way round
            pair, outcome = pair[::-1], None if outcome is None else 1 - outcome
        judge, i = str(row.get("judge", [""])[0]), str(row["question_id"])
        longer = _length_difference(row, pair, texts, all_turns=judge == "human")
        first_won, is_blind = (one, two) == ("model_1", "model_2"), row.get("blind", True)
        own = (judge not in ONE_ORDER, one == two, first_won, longer, is_blind)
        pairs[pair].append(Comparison(i, categories.get(i, "general"), outcome, *own))
    return {pair: comparisons for pair, comparisons in pairs.items() if comparisons}


def _length_difference(row: Row, pair: tuple[str, str], texts: ModelAnswers, all_turns: bool) -> int | None:
    try:
        one, two = (texts[model][str(row["question_id"])] for model in pair)
        turns = range(len(one)) if all_turns else [int(row.get("turn", 1)) - 1]
        return sum(len(two[t]) - len(one[t]) for t in turns)
    except (KeyError, IndexError):
        return None


@dataclasses.dataclass(frozen=True)
class PairResult:
    """A pair's second model, the candidate, against its first, the baseline."""

    baseline: str
    candidate: str
    counts: Counts
    errors: int
    interval: tuple[float, float]  # of win_rate_adjusted
    sign_p: float
    consistency: float | None  # share of comparisons whose two orders agree; None for judges with one order
    first_position_win_rate: float | None  # of those that disagree, the share that the answer shown first won
    longer_won: float | None  # share of decided comparisons that the longer answer won
    decided_unequal: int  # decided comparisons between answers of different lengths
    candidate_longer: float | None  # share of comparisons in which the candidate's answer is longer
    length_controlled: float | None
    length_controlled_interval: tuple[float, float] | None
    categories: dict[str, Counts]
    seen: int  # votes that were cast with the names visible
    identical: int  # questions, if all their outcomes are the same; else 0

    @classmethod
    def of(cls, baseline: str, candidate: str, comparisons: list[Comparison], seed: int = 0) -> PairResult:
        judged = [c for c in comparisons if c.outcome is not None]
        outcomes = np.array([c.outcome for c in judged], dtype=float)
        groups: list[object] = [c.question_id for c in judged]
        swapped = [c for c in judged if c.is_swapped]
        inconsistent = [c for c in swapped if not c.is_consistent]
        lengths = [c.longer for c in judged]
        decided = [c for c in judged if c.longer and c.outcome != 0.5]
        controlled, interval = None, None
        if any(lengths) and None not in lengths:
            differences, index = np.array(lengths, dtype=float), group_index(groups)
            controlled = float(length_controlled(outcomes, differences)[0])
            interval = bootstrap_interval(
                groups, lambda weights: length_controlled(outcomes, differences, weights[:, index]), seed, REFITS
            )
        return cls(
            baseline,
            candidate,
            counts=Counts.of(judged),
            errors=len(comparisons) - len(judged),
            interval=mean_interval(outcomes, groups, seed) if judged else (0.0, 1.0),
            sign_p=sign_test(outcomes, groups) if judged else 1.0,
            consistency=_share([c.is_consistent for c in swapped]),
            first_position_win_rate=_share([c.first_won for c in inconsistent]),
            longer_won=_share([(c.outcome == 1.0) == ((c.longer or 0) > 0) for c in decided]),
            decided_unequal=len(decided),
            candidate_longer=_share([(n or 0) > 0 for n in lengths]) if any(lengths) else None,
            length_controlled=controlled,
            length_controlled_interval=interval,
            categories={name: Counts.of([c for c in judged if c.category == name])
                        for name in dict.fromkeys(c.category for c in judged)},
            seen=sum(not c.is_blind for c in judged),
            identical=len(set(groups)) if len(set(outcomes.tolist())) == 1 else 0,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        categories = {name: counts.as_dict() for name, counts in self.categories.items()}
        fields = vars(self) | self.counts.as_dict() | {"categories": categories, "notes": self.notes()}
        return {name: value for name, value in fields.items() if name != "counts"}

    def notes(self) -> list[str]:
        """What to know before believing the table."""
        unseen = zero_event_upper_bound(self.identical)
        return render_template("notes.jinja", escape=False, p=self, few=FEW, unseen=unseen).split("\n")[1:]

    def __str__(self) -> str:
        """The rate with its interval, and what else is known, in one line."""
        rate, p = f"{self.counts.win_rate_adjusted:.1%}", f"sign test p = {self.sign_p:.2g}"
        low, high = self.interval
        parts = [f"{self.candidate} against {self.baseline}: {rate} (95% interval {low:.1%} to {high:.1%}), {p}"]
        if self.length_controlled is not None and self.length_controlled_interval is not None:
            low, high = self.length_controlled_interval
            parts.append(f"at equal lengths {self.length_controlled:.1%} ({low:.1%} to {high:.1%})")
        if self.longer_won is not None:
            decided = f"{self.decided_unequal} decided comparisons between answers of different length"
            parts.append(f"the longer answer won {self.longer_won:.1%} of {decided}")
        if self.consistency is not None:
            parts.append(f"same verdict in both orders {self.consistency:.1%}")
        return "; ".join(parts)


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


@dataclasses.dataclass
class PairwiseResults:
    """Every pair of models that was judged, and each model over all its pairs."""

    judge: str
    pairs: list[PairResult]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rules: model → share by name

    @classmethod
    def from_judgments(cls, judgments: Judgments, answers: AnswerSet, seed: int = 0) -> PairwiseResults:
        pairs = group_by_pair(judgments.rows, answers)
        return cls(
            judgments.judge, [PairResult.of(*pair, rows, seed) for pair, rows in pairs.items()], judgments.scores
        )

    @property
    def models(self) -> dict[str, Counts]:
        """FastChat's table: each model over all its comparisons, the highest win rate first."""
        counts: dict[str, Counts] = {}
        for pair in self.pairs:
            c = pair.counts
            for name, own in ((pair.candidate, c), (pair.baseline, Counts(c.loss, c.win, c.tie))):
                total = counts.get(name, Counts(0, 0, 0))
                counts[name] = Counts(total.win + own.win, total.loss + own.loss, total.tie + own.tie)
        return dict(sorted(counts.items(), key=lambda item: -item[1].as_dict()["win_rate"]))

    def as_dict(self) -> dict[str, Any]:
        """Everything; at the top level the pair of the first model and the last."""
        pairs = [pair.as_dict() for pair in self.pairs]
        ends = (self.pairs[0].baseline, self.pairs[-1].candidate) if pairs else None
        first: dict[str, Any] = next((p for p in pairs if (p["baseline"], p["candidate"]) == ends), {})
        models = {name: counts.as_dict() for name, counts in self.models.items()}
        rest = {"models": models, "pairs": pairs, "scores": self.scores, "notes": self.notes(), "method": METHOD}
        return {"judge": self.judge} | first | rest

    def notes(self) -> list[str]:
        return [note for pair in self.pairs for note in pair.notes()]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        count = sum(pair.counts.total + pair.errors for pair in self.pairs)
        parts: list[Any] = [Text(f"{count} comparisons by {self.judge}\n", style="bold"),
                            _counts_table("model", self.models)]  # fmt: skip
        for pair in self.pairs:
            parts += ["", Text(str(pair))]
            if len(pair.categories) > 1:
                parts += ["", _counts_table("category", pair.categories)]
        if self.scores:
            names = list(next(iter(self.scores.values())))
            shares = [(model, *(f"{own[name]:.1%}" for name in names)) for model, own in self.scores.items()]
            parts += ["", _table(["answers that are", *names], shares)]
        return Group(*parts, "", *(Text(f"• {note}") for note in self.notes()), "", Text(METHOD, style="dim"))

    def figure(self) -> Figure:
        """Wins, ties and losses of each pair, overall and by category, with the adjusted rate and its interval."""
        bars: list[tuple[str, Counts, tuple[float, float] | None]] = [
            (f"{p.candidate}\nagainst {p.baseline}", p.counts, p.interval) for p in self.pairs
        ]
        if len(self.pairs) == 1 and len(self.pairs[0].categories) > 1:
            bars += [(category, counts, None) for category, counts in self.pairs[0].categories.items()]
        title = f"{self.judge}; the dot counts a tie as half a win, its line is the 95% interval"
        figure, axis = _bar_figure([name for name, *_ in bars], title)
        for y, (_, counts, interval) in enumerate(bars):
            left = 0.0
            for kind, colour in (("win", BLUE), ("tie", LIGHT_GREY), ("loss", ORANGE)):
                share = getattr(counts, kind) / counts.total if counts.total else 0.0
                axis.barh(y, share, left=left, color=colour, height=0.6, label=kind if y == 0 else None)
                if share > 0.04:
                    ink = "black" if kind == "tie" else "white"
                    axis.text(left + 0.01, y, str(getattr(counts, kind)), va="center", fontsize=9, color=ink)
                left += share
            rate = counts.win_rate_adjusted
            around = [[rate - interval[0]], [interval[1] - rate]] if interval else None
            axis.errorbar(rate, y, xerr=around, fmt="o", color="black", capsize=3, markersize=4)
        axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlim=(0, 1), xlabel="share of comparisons")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        return figure


@dataclasses.dataclass
class RatingResults:
    """The ratings of `--mode single`, averaged as FastChat does: by turn, and over all of them."""

    judge: str
    models: dict[str, dict[str, Any]]  # the highest average first

    @classmethod
    def from_judgments(cls, judgments: Judgments, answers: AnswerSet, seed: int = 0) -> RatingResults:
        categories = {str(q["question_id"]): q["category"] for q in answers.questions}
        by_model: dict[str, list[Row]] = {}
        for row in judgments.rows:
            category = categories.get(str(row["question_id"]), "general")
            by_model.setdefault(str(row["model"]), []).append(row | {"category": category})
        models = {name: _average_ratings(rows, seed) for name, rows in by_model.items()}
        return cls(judgments.judge, dict(sorted(models.items(), key=lambda item: -(item[1]["average"] or 0))))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __rich__(self) -> Any:
        def row(name: str, values: list[Any]) -> tuple[str, ...]:
            return name, *("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)

        models = list(self.models.values())
        rows = [row("average", [m["average"] for m in models])]
        rows += [row("95% interval", ["{:.2f} to {:.2f}".format(*m["interval"]) if m["interval"] else None
                                      for m in models])]  # fmt: skip
        for kind, label in (("turns", "turn "), ("categories", "")):
            for key in dict.fromkeys(key for m in models for key in m[kind]):
                rows.append(row(f"{label}{key}", [m[kind].get(key) for m in models]))
        rows += [row("no rating", [m["errors"] for m in models])]
        return _table([f"1 to 10, by {self.judge}", *self.models], rows)

    def figure(self) -> Figure:
        """The average rating of each model, with its interval."""
        figure, axis = _bar_figure(
            list(self.models), f"{self.judge}: ratings from 1 to 10; the line is the 95% interval"
        )
        for y, m in enumerate(self.models.values()):
            average, (low, high) = m["average"] or 0.0, m["interval"] or (0.0, 0.0)
            axis.barh(y, average, xerr=[[average - low], [high - average]], color=BLUE, height=0.6, capsize=3)
            axis.text(0.1, y, f"{average:.2f}", va="center", fontsize=9, color="white")
        axis.set(xlim=(0, 10), xlabel="mean rating")
        return figure


def _average_ratings(rows: list[Row], seed: int) -> dict[str, Any]:
    """The ratings of one model. A score of -1 is a reply without a rating."""
    rated = [row for row in rows if row["score"] != -1]
    shares = np.array([(row["score"] - 1) / 9 for row in rated], dtype=float)  # of the way from 1 to 10
    interval = mean_interval(shares, [str(row["question_id"]) for row in rated], seed) if rated else None

    def means(key: str) -> dict[Any, float | None]:
        groups: dict[Any, list[float]] = {row[key]: [] for row in rows}
        for row in rated:
            groups[row[key]].append(row["score"])
        return {group: sum(scores) / len(scores) if scores else None for group, scores in groups.items()}

    return {
        "average": sum(row["score"] for row in rated) / len(rated) if rated else None,
        "interval": tuple(1 + 9 * end for end in interval) if interval else None,
        "turns": dict(sorted(means("turn").items())),
        "categories": means("category"),
        "errors": len(rows) - len(rated),
    }


def _bar_figure(names: list[str], title: str) -> tuple[Figure, Any]:
    """An empty figure for horizontal bars, the first name at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axis.invert_yaxis()
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure, axis


def _counts_table(head: str, counts: dict[str, Counts]) -> Any:
    rows = [(name, c.win, c.loss, c.tie, *(f"{c.as_dict()[rate]:.1%}" for rate in RATES)) for name, c in counts.items()]
    return _table([head, "win", "loss", "tie", *RATES], rows)


def _table(head: list[str], rows: list[tuple[Any, ...]]) -> Any:
    """A table that fits 80 columns: names on the left, numbers on the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="underline")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
