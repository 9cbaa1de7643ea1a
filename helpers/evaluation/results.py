"""What judgments say about models: counts, rates, how sure they are, and how far the judge can be trusted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from helpers.core import BLUE, LIGHT_GREY, ORANGE, Row, new_figure
from helpers.evaluation import statistics
from helpers.evaluation.answers import make_table, render_template
from helpers.evaluation.bench import BenchJudgments, BenchResults
from helpers.evaluation.judgments import AnswerSet, Judgments, describe_self_judging

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_ORDER = ("human", "rules", "reward model")  # judges that the order of two answers cannot influence, or saw one only
OUTCOMES = {"model_2": 1.0, "tie": 0.5, "model_1": 0.0}
FEW = 10  # decided comparisons below which no share of them is worth a note
# Decided comparisons between answers of different length below which the rate at equal lengths needs a warning: ten for
# each of its two parameters (Peduzzi et al., 1996, J. Clin. Epidemiol. 49).
LENGTH_NEEDS = 20
BELOW = 0.4  # where the interval of a bar is drawn, in bars
RATES = ("win_rate", "loss_rate", "win_rate_adjusted")
METHOD = (
    "Rates are FastChat's: two orders that disagree are a tie, and in win_rate_adjusted a tie is half a win. Interval: "
    "bootstrap over questions. p: exact sign test over questions. At equal lengths: logistic regression on "
    "tanh(length difference / its standard deviation), with that term set to zero."
)


class Counts(NamedTuple):
    """Wins, losses and ties as FastChat's show_result counts them: rows with an error are excluded."""

    win: int
    loss: int
    tie: int

    @classmethod
    def of(cls, rows: list[Row]) -> Counts:
        outcomes = [row["outcome"] for row in rows]
        return cls(outcomes.count(1), outcomes.count(0), outcomes.count(0.5))

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def win_rate_adjusted(self) -> float:
        return self.as_dict()["win_rate_adjusted"]

    def as_dict(self) -> dict[str, float]:
        numbers = (self.win, self.loss, self.win + 0.5 * self.tie)
        return self._asdict() | {name: n / max(1, self.total) for name, n in zip(RATES, numbers, strict=True)}


def group_by_pair(rows: list[Row], answers: AnswerSet) -> dict[tuple[str, str], list[Row]]:
    """The rows of each pair of models, in the order of `answers`, else in that of the rows.

    Adds the category, the outcome (1, 0.5 or 0 for the pair's second model, the candidate; None for an error), and by
    how many characters its answer is longer. Two calls that disagree are a tie; an error in either is an error
    (FastChat, llm_judge/show_result.py).
    """
    categories = {str(q["question_id"]): q.get("category", "general") for q in answers.questions}
    texts = {model: {str(i): turns for i, turns in by_id.items()} for model, by_id in answers.answers.items()}
    names = list(dict.fromkeys([*texts, *(row[m] for row in rows for m in ("model_1", "model_2"))]))
    pairs: dict[tuple[str, str], list[Row]] = {pair: [] for pair in combinations(names, 2)}
    for row in rows:
        i, pair = str(row["question_id"]), (row["model_1"], row["model_2"])
        calls = {row["g1_winner"], row["g2_winner"]}
        outcome = None if "error" in calls else OUTCOMES[calls.pop() if len(calls) == 1 else "tie"]
        if pair not in pairs:  # the row has the pair the other way round
            pair, outcome = pair[::-1], None if outcome is None else 1 - outcome
        shown = slice(None) if row["judge"][0] == "human" else slice(row["turn"] - 1, row["turn"])
        old, new = (sum(map(len, texts.get(model, {}).get(i, [])[shown])) for model in pair)
        pairs[pair].append(row | {"category": categories.get(i, "general"), "outcome": outcome, "longer": new - old})
    return {pair: own for pair, own in pairs.items() if own}


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
    same_answers: int  # comparisons of answers that are the same: ties without a judge
    failures: dict[str, int]  # why the comparisons in `errors` have no verdict

    @classmethod
    def of(cls, baseline: str, candidate: str, rows: list[Row], seed: int = 0) -> PairResult:
        judged = [row for row in rows if row["outcome"] is not None]
        outcomes = np.array([row["outcome"] for row in judged], dtype=float)
        lengths = np.array([row["longer"] for row in judged], dtype=float)
        groups: list[object] = [str(row["question_id"]) for row in judged]
        orders = [(row["g1_winner"], row["g2_winner"]) for row in judged
                  if row["judge"][0] not in ONE_ORDER and not row.get("identical")]  # fmt: skip
        decided = (lengths != 0) & (outcomes != 0.5)
        controlled, interval = statistics.length_controlled_rate(outcomes, lengths, groups, seed)
        return cls(
            baseline,
            candidate,
            counts=Counts.of(judged),
            errors=len(rows) - len(judged),
            interval=statistics.mean_interval(outcomes, groups, seed) if judged else (0.0, 1.0),
            sign_p=statistics.sign_test(outcomes, groups),
            consistency=_mean([one == two for one, two in orders]),
            first_position_win_rate=_mean([one == "model_1" and two == "model_2" for one, two in orders if one != two]),
            longer_won=_mean(((outcomes == 1) == (lengths > 0))[decided].tolist()),
            decided_unequal=int(decided.sum()),
            candidate_longer=_mean((lengths > 0).tolist()) if lengths.any() else None,
            length_controlled=controlled,
            length_controlled_interval=interval,
            categories={name: Counts.of([row for row in judged if row["category"] == name])
                        for name in dict.fromkeys(row["category"] for row in judged)},
            seen=sum(not row.get("blind", True) for row in judged),
            identical=len(set(groups)) if len(set(outcomes.tolist())) == 1 else 0,
            same_answers=sum(bool(row.get("identical")) for row in judged),
            failures=_count_failures(row for row in rows if row["outcome"] is None),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        categories = {name: counts.as_dict() for name, counts in self.categories.items()}
        fields = vars(self) | self.counts.as_dict() | {"categories": categories, "notes": self.notes()}
        return {name: value for name, value in fields.items() if name != "counts"}

    def describe(self) -> list[str]:
        """The rate with its interval and what else is known, in one line; then what to know before believing it."""
        unseen = statistics.zero_event_upper_bound(self.identical)
        text = render_template("notes.jinja", escape=False, p=self, few=FEW, needs=LENGTH_NEEDS, unseen=unseen)
        return text.split("\n")

    def notes(self) -> list[str]:
        return self.describe()[1:]


def _count_failures(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have no verdict for each kind of reason, without what a server said."""
    return dict(Counter(row.get("error", "without a clear verdict").partition(":")[0] for row in rows))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclasses.dataclass
class PairwiseResults:
    """Every pair of models that was judged, and each model over all its pairs."""

    judge: str
    pairs: list[PairResult]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rules: model → share by name
    general_notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_judgments(cls, judgments: Judgments, answers: AnswerSet, seed: int = 0) -> PairwiseResults:
        pairs = [PairResult.of(*pair, rows, seed) for pair, rows in group_by_pair(judgments.rows, answers).items()]
        models = dict.fromkeys(name for pair in pairs for name in (pair.baseline, pair.candidate))
        notes = [*describe_self_judging(judgments.judge, models), *judgments.notes]
        return cls(judgments.judge, pairs, judgments.scores, notes)

    @property
    def models(self) -> dict[str, Counts]:
        """FastChat's table: each model over all its comparisons, the highest win_rate_adjusted first."""
        counts: dict[str, Counts] = {}
        for pair in self.pairs:
            c = pair.counts
            for name, own in ((pair.candidate, c), (pair.baseline, Counts(c.loss, c.win, c.tie))):
                counts[name] = Counts(*map(sum, zip(own, counts.get(name, (0, 0, 0)), strict=True)))
        return dict(sorted(counts.items(), key=lambda item: -item[1].win_rate_adjusted))

    def as_dict(self) -> dict[str, Any]:
        """Everything; at the top level the pair of the first model and the last."""
        pairs = [pair.as_dict() for pair in self.pairs]
        ends = (self.pairs[0].baseline, self.pairs[-1].candidate) if pairs else None
        first: dict[str, Any] = next((p for p in pairs if (p["baseline"], p["candidate"]) == ends), {})
        models = {name: counts.as_dict() for name, counts in self.models.items()}
        rest = {"models": models, "pairs": pairs, "scores": self.scores, "notes": self.notes(), "method": METHOD}
        return {"judge": self.judge} | first | rest

    def notes(self) -> list[str]:
        """What to know before believing the results; of several pairs, each note names its own."""
        several = len(self.pairs) > 1
        own = [
            (f"{p.candidate} against {p.baseline}: " if several else "") + note
            for p in self.pairs
            for note in p.notes()
        ]
        return [*self.general_notes, *own]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        count = sum(pair.counts.total + pair.errors for pair in self.pairs)
        parts: list[Any] = [Text(f"{count} comparisons by {self.judge}\n", style="bold"),
                            _counts_table("model", self.models)]  # fmt: skip
        for pair in self.pairs:
            parts += ["", Text(pair.describe()[0])]
            if len(pair.categories) > 1:
                parts += ["", _counts_table("category", pair.categories)]
        if self.scores:
            names = list(next(iter(self.scores.values())))
            shares = [(model, *(f"{own[name]:.1%}" for name in names)) for model, own in self.scores.items()]
            parts += ["", make_table(["answers that are", *names], shares)]
        return Group(*parts, "", *(Text(f"• {note}") for note in self.notes()), "", Text(METHOD, style="dim"))

    def figure(self) -> Figure:
        """Wins, ties and losses of each pair, overall and by category, with the adjusted rate and its interval."""
        bars = {f"{p.candidate}\nagainst {p.baseline}": p.counts for p in self.pairs}
        if len(self.pairs) == 1 and len(self.pairs[0].categories) > 1:
            bars |= self.pairs[0].categories
        title = f"{self.judge}; the dot counts a tie as half a win, its line is the 95% interval"
        figure, axis = _bar_figure([*bars], title, [pair.interval for pair in self.pairs], BELOW)
        left = np.zeros(len(bars))
        for kind, colour, ink in (("win", BLUE, "white"), ("tie", LIGHT_GREY, "black"), ("loss", ORANGE, "white")):
            counts = [getattr(c, kind) for c in bars.values()]
            shares = np.array([n / max(1, c.total) for n, c in zip(counts, bars.values(), strict=True)])
            drawn = axis.barh(range(len(bars)), shares, left=left, color=colour, height=0.6, label=kind)
            labels = [str(n) if share > 0.04 else "" for n, share in zip(counts, shares, strict=True)]
            axis.bar_label(drawn, labels, label_type="center", fontsize=9, color=ink)
            left += shares
        places = np.arange(len(bars)) + BELOW
        axis.plot([c.win_rate_adjusted for c in bars.values()], places, "o", color="black", markersize=4)
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
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_judgments(cls, judgments: Judgments, answers: AnswerSet, seed: int = 0) -> RatingResults:
        categories = {str(q["question_id"]): q["category"] for q in answers.questions}
        by_model: dict[str, list[Row]] = {}
        for row in judgments.rows:
            category = categories.get(str(row["question_id"]), "general")
            by_model.setdefault(str(row["model"]), []).append(row | {"category": category})
        models = {name: _average_ratings(rows, seed) for name, rows in by_model.items()}
        notes = [*describe_self_judging(judgments.judge, models), *judgments.notes]
        for name, own in models.items():
            kinds = ", ".join(f"{count} {kind}" for kind, count in own["failures"].items())
            notes += [f"{own['errors']} answers of {name} have no rating ({kinds})."] if kinds else []
        return cls(judgments.judge, dict(sorted(models.items(), key=lambda item: -(item[1]["average"] or 0))), notes)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        models = self.models.values()
        rows: dict[str, list[Any]] = {"average": [m["average"] for m in models]}
        rows["95% interval"] = ["{:.2f} to {:.2f}".format(*m["interval"]) if m["interval"] else None for m in models]
        for kind, label in (("turns", "turn "), ("categories", "")):
            rows |= {f"{label}{key}": [m[kind].get(key) for m in models] for m in models for key in m[kind]}
        rows["no rating"] = [m["errors"] for m in models]

        def text(value: Any) -> str:
            return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

        table = make_table([f"1 to 10, by {self.judge}", *self.models], [(n, *map(text, v)) for n, v in rows.items()])
        return Group(table, "", *(Text(f"• {note}") for note in self.notes)) if self.notes else table

    def figure(self) -> Figure:
        """The average rating of each model, with its interval."""
        title = f"{self.judge}: ratings from 1 to 10; the line is the 95% interval"
        models = self.models.values()
        figure, axis = _bar_figure([*self.models], title, [m["interval"] or (0, 0) for m in models])
        drawn = axis.barh(range(len(models)), [m["average"] or 0 for m in models], color=BLUE, height=0.6)
        axis.bar_label(drawn, fmt="%.2f", label_type="center", fontsize=9, color="white")
        axis.set(xlim=(0, 10), xlabel="mean rating")
        return figure


def summarize_judgments(
    judgments: Judgments, answers: AnswerSet, mode: str, seed: int = 0
) -> PairwiseResults | RatingResults | BenchResults:
    """The results of judgments of --mode pairwise or single, or of tasks."""
    if isinstance(judgments, BenchJudgments):
        return BenchResults.from_judgments(judgments)
    return (RatingResults if mode == "single" else PairwiseResults).from_judgments(judgments, answers, seed)


def _average_ratings(rows: list[Row], seed: int) -> dict[str, Any]:
    """The ratings of one model. A score of -1 is a reply without a rating."""
    rated = [row for row in rows if row["score"] != -1]
    shares = np.array([(row["score"] - 1) / 9 for row in rated], dtype=float)  # of the way from 1 to 10
    interval = statistics.mean_interval(shares, [str(row["question_id"]) for row in rated], seed) if rated else None

    def means(key: str) -> dict[Any, float | None]:
        groups = dict.fromkeys(row[key] for row in rows)
        return {group: _mean([row["score"] for row in rated if row[key] == group]) for group in groups}

    return {
        "average": _mean([row["score"] for row in rated]),
        "interval": tuple(1 + 9 * end for end in interval) if interval else None,
        "turns": dict(sorted(means("turn").items())),
        "categories": means("category"),
        "errors": len(rows) - len(rated),
        "failures": _count_failures(row for row in rows if row["score"] == -1),
    }


def _bar_figure(
    names: list[str], title: str, intervals: list[tuple[float, float]], below: float = 0.0
) -> tuple[Figure, Any]:
    """Horizontal bars, the first name at the top. The intervals of the first bars are drawn `below` their middle."""

    figure: Figure = new_figure(figsize=(9, 1.4 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    figure.suptitle(title, fontsize=9)
    for y, ends in enumerate(intervals):
        axis.plot(ends, (y + below, y + below), color="black", marker="|")
    return figure, axis


def _counts_table(head: str, counts: dict[str, Counts]) -> Any:
    rows = [(name, c.win, c.loss, c.tie, *(f"{c.as_dict()[rate]:.1%}" for rate in RATES)) for name, c in counts.items()]
    return make_table([head, "win", "loss", "tie", *RATES], rows)
