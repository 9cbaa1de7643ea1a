"""What judgments say about models: counts, rates, how sure they are, and how far the judge can be trusted.

An outcome is 1, 0.5 or 0: a win, a tie or a loss. Several outcomes may belong to one question (its turns, or several
people's votes); questions, not outcomes, are resampled.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, t

from helpers.core import BLUE, LIGHT_GREY, ORANGE, Row, new_figure
from helpers.evaluation.answers import make_table, render_template
from helpers.evaluation.bench import BenchJudgments, BenchResults
from helpers.evaluation.judgments import ONE_ORDER, AnswerSet, Judgments, describe_self_judging, outcome_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES, REFITS = 10_000, 1_000  # of a mean, and of the length-controlled rate
RIDGE = 1e-3 * np.eye(2)  # without one, outcomes that length alone decides have no finite fit
FEW = 10  # decided comparisons below which no share of them is worth a note
LENGTH_NEEDS = 20  # for the rate at equal lengths: ten for each parameter (Peduzzi et al., 1996, J Clin Epidemiol 49)
BELOW = 0.4  # where the interval of a bar is drawn, in bars
RATES = ("win_rate", "loss_rate", "win_rate_adjusted")
METHOD = (
    "Rates are FastChat's: two orders that disagree are a tie, and in win_rate_adjusted a tie is half a win. Interval: "
    "bootstrap over questions. p: exact sign test over questions. At equal lengths: logistic regression on "
    "tanh(length difference / its standard deviation), with that term set to zero."
)


def bootstrap_interval(
    questions: int, statistic: Callable[[Floats], Floats], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """The 95 % interval of `statistic`: percentiles of the bootstrap (Efron, 1979), expanded for small samples
    (Hesterberg, 2015, The American Statistician 69(4), section 5.3). It takes weights of shape (resamples, questions),
    how often each was drawn, and returns one value per resample."""
    draw = np.random.default_rng(seed)
    drawn = (
        draw.multinomial(questions, np.full(questions, 1 / questions), size=min(500, resamples - start))
        for start in range(0, resamples, 500)
    )
    tail = 0.0
    if questions > 2:  # as wide for a mean as Student's t makes it
        tail = 100 * norm.cdf(t.ppf(0.025, questions - 1) * math.sqrt(questions / (questions - 1)))
    values = np.concatenate([statistic(weights.astype(float)) for weights in drawn])
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def mean_interval(outcomes: Floats, groups: Sequence[object], seed: int) -> Interval:
    """`bootstrap_interval` of the mean; where every question has the same mean, a resample has no other, and it is
    `zero_event_upper_bound` on either side. `groups` are the questions of the outcomes."""
    _, sums, counts = _by_question(outcomes, groups)
    if np.ptp(sums / counts) < 1e-9:
        bound, value = zero_event_upper_bound(len(sums), 0.025), float(sums[0] / counts[0])
        return value * (1 - bound), value + (1 - value) * bound
    return bootstrap_interval(len(sums), lambda weights: (weights @ sums) / (weights @ counts), seed)


def zero_event_upper_bound(questions: int, tail: float = 0.05) -> float:
    """The largest share, at 95 %, of outcomes that none of so many questions had (Clopper and Pearson, 1934)."""
    return float(binomtest(0, questions).proportion_ci(1 - 2 * tail).high) if questions else 1.0


def sign_test(outcomes: Floats, groups: Sequence[object]) -> float:
    """The two-sided exact p of the sign test. A question counts once, for the model that its outcomes favour."""
    _, sums, counts = _by_question(outcomes, groups)
    wins, losses = int((2 * sums > counts).sum()), int((2 * sums < counts).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def length_controlled(outcomes: Floats, lengths: Floats, weights: Floats | None = None) -> Floats:
    """The win rate at equal lengths, for each row of `weights` (resamples, outcomes); one row of ones by default.

    A logistic model of the outcome with an intercept and tanh(length difference / its standard deviation), whose term
    is then set to zero: the length control of AlpacaEval 2 (Dubois et al., 2024, arXiv:2404.04475) without its term
    for the difficulty of a question, which is known for its own questions only. `lengths` are differences in
    characters, positive where the candidate's answer is longer.
    """
    spread = lengths.std()
    x = np.stack([np.ones_like(lengths), np.tanh(lengths / spread) if spread else np.zeros_like(lengths)], axis=1)
    weights = np.ones((1, len(outcomes))) if weights is None else weights
    fit = np.zeros((len(weights), 2))
    for _ in range(100):  # Newton's method; the likelihood with its ridge is concave
        p = 1 / (1 + np.exp(-fit @ x.T))
        gradient = ((outcomes - p) * weights) @ x - fit @ RIDGE
        curvature = np.einsum("rn,ni,nj->rij", weights * p * (1 - p), x, x) + RIDGE
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        fit += step / np.maximum(1, largest)
        if largest.max() < 1e-9:
            break
    return np.asarray(1 / (1 + np.exp(-fit[:, 0])))


def length_controlled_rate(
    outcomes: Floats, lengths: Floats, groups: Sequence[object], seed: int
) -> tuple[float | None, Interval | None]:
    """The win rate at equal lengths and its interval; None where lengths never differ, or the questions' means."""
    index, sums, counts = _by_question(outcomes, groups)
    if not lengths.any() or np.ptp(sums / counts) < 1e-9:
        return None, None
    interval = bootstrap_interval(len(sums), lambda w: length_controlled(outcomes, lengths, w[:, index]), seed, REFITS)
    return float(length_controlled(outcomes, lengths)[0]), interval


def _by_question(outcomes: Floats, groups: Sequence[object]) -> tuple[NDArray[np.int64], Floats, Floats]:
    """The number of each outcome's question; then for each question the sum of its outcomes, and how many it has."""
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = np.array([order[group] for group in groups], dtype=int)
    return index, np.bincount(index, outcomes).astype(float), np.bincount(index).astype(float)


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
        return (self.win + 0.5 * self.tie) / max(1, self.total)

    def as_dict(self) -> dict[str, float]:
        rates = self.win / max(1, self.total), self.loss / max(1, self.total), self.win_rate_adjusted
        return self._asdict() | dict(zip(RATES, rates, strict=True))


def group_by_pair(rows: list[Row], answers: AnswerSet) -> dict[tuple[str, str], list[Row]]:
    """The rows of each pair of models, in the order of `answers`, else in that of the rows; with their category, the
    outcome for the pair's second model, the candidate, and by how many characters its answer is longer."""
    categories = {str(q["question_id"]): q.get("category", "general") for q in answers.questions}
    texts = {model: {str(i): turns for i, turns in by_id.items()} for model, by_id in answers.answers.items()}
    names = list(dict.fromkeys([*texts, *(row[m] for row in rows for m in ("model_1", "model_2"))]))
    pairs: dict[tuple[str, str], list[Row]] = {pair: [] for pair in combinations(names, 2)}
    for row in rows:
        i, pair, outcome = str(row["question_id"]), (row["model_1"], row["model_2"]), outcome_of(row)
        if pair not in pairs:  # the row has the pair the other way round
            pair, outcome = pair[::-1], None if outcome is None else 1 - outcome
        shown = slice(None) if row["judge"][0] == "human" else slice(row["turn"] - 1, row["turn"])
        old, new = (sum(map(len, texts.get(model, {}).get(i, [])[shown])) for model in pair)
        pairs[pair].append(row | {"category": categories.get(i, "general"), "outcome": outcome, "longer": new - old})
    return {pair: own for pair, own in pairs.items() if own}


class PairResult:
    """A pair's second model, the candidate, against its first, the baseline."""

    def __init__(self, baseline: str, candidate: str, rows: list[Row], seed: int = 0) -> None:
        judged = [row for row in rows if row["outcome"] is not None]
        outcomes = np.array([row["outcome"] for row in judged], dtype=float)
        lengths = np.array([row["longer"] for row in judged], dtype=float)
        groups = [str(row["question_id"]) for row in judged]
        orders = [(row["g1_winner"], row["g2_winner"]) for row in judged
                  if row["judge"][0] not in ONE_ORDER and not row.get("identical")]  # fmt: skip
        decided = (lengths != 0) & (outcomes != 0.5)
        self.baseline, self.candidate = baseline, candidate
        self.counts, self.errors = Counts.of(judged), len(rows) - len(judged)
        self.interval = mean_interval(outcomes, groups, seed) if judged else (0.0, 1.0)  # of win_rate_adjusted
        self.sign_p = sign_test(outcomes, groups)
        # shares of comparisons: whose orders agree, None for judges with one order; of the others, that the answer
        # shown first won; of decided ones between answers of different lengths, that the longer won
        self.consistency = _mean([one == two for one, two in orders])
        self.first_position_win_rate = _mean([calls == ("model_1", "model_2") for calls in orders if len({*calls}) > 1])
        self.longer_won = _mean(((outcomes == 1) == (lengths > 0))[decided].tolist())
        self.decided_unequal = int(decided.sum())
        self.candidate_longer = _mean((lengths > 0).tolist()) if lengths.any() else None  # share of comparisons
        rate = length_controlled_rate(outcomes, lengths, groups, seed)
        self.length_controlled, self.length_controlled_interval = rate
        kinds = dict.fromkeys(row["category"] for row in judged)
        self.categories = {name: Counts.of([row for row in judged if row["category"] == name]) for name in kinds}
        self.seen = sum(not row.get("blind", True) for row in judged)  # votes that were cast with the names visible
        self.identical = len({*groups}) if len({*outcomes.tolist()}) == 1 else 0  # questions, if no outcome differs
        self.same_answers = sum(bool(row.get("identical")) for row in judged)  # ties without a judge
        self.failures = _count_failures(row for row in rows if row["outcome"] is None)  # why there is no verdict

    def as_dict(self) -> dict[str, Any]:
        categories = {name: counts.as_dict() for name, counts in self.categories.items()}
        fields = vars(self) | self.counts.as_dict() | {"categories": categories, "notes": self.notes()}
        return {name: value for name, value in fields.items() if name != "counts"}

    def describe(self) -> list[str]:
        """The rate with its interval and what else is known, in one line; then what to know before believing it."""
        unseen = zero_event_upper_bound(self.identical)
        values = {"p": self, "few": FEW, "needs": LENGTH_NEEDS, "unseen": unseen}
        return render_template("notes.jinja", escape=False, **values).split("\n")

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
    scores: dict[str, dict[str, float]]  # by rules: model → share by name
    general_notes: list[str]

    @classmethod
    def from_judgments(cls, judgments: Judgments, answers: AnswerSet, seed: int = 0) -> PairwiseResults:
        pairs = [PairResult(*pair, rows, seed) for pair, rows in group_by_pair(judgments.rows, answers).items()]
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
        names = [f"{p.candidate} against {p.baseline}: " if len(self.pairs) > 1 else "" for p in self.pairs]
        own = [name + note for name, pair in zip(names, self.pairs, strict=True) for note in pair.notes()]
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
        left, totals = np.zeros(len(bars)), np.array([max(1, c.total) for c in bars.values()])
        for kind, colour, ink in (("win", BLUE, "white"), ("tie", LIGHT_GREY, "black"), ("loss", ORANGE, "white")):
            counts = np.array([getattr(c, kind) for c in bars.values()])
            shares = counts / totals
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
    notes: list[str]

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
        intervals = ["{:.2f} to {:.2f}".format(*m["interval"]) if m["interval"] else None for m in models]
        rows: dict[str, list[Any]] = {"average": [m["average"] for m in models], "95% interval": intervals}
        for kind, label in (("turns", "turn "), ("categories", "")):
            rows |= {f"{label}{key}": [m[kind].get(key) for m in models] for m in models for key in m[kind]}
        rows["no rating"] = [m["errors"] for m in models]
        cells = [[name, *(f"{v:.2f}" if isinstance(v, float) else "-" if v is None else v for v in row)]
                 for name, row in rows.items()]  # fmt: skip
        table = make_table([f"1 to 10, by {self.judge}", *self.models], cells)
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
    interval = mean_interval(shares, [str(row["question_id"]) for row in rated], seed) if rated else None
    turns, categories = sorted({row["turn"] for row in rows}), dict.fromkeys(row["category"] for row in rows)
    return {
        "average": _mean([row["score"] for row in rated]),
        "interval": tuple(1 + 9 * end for end in interval) if interval else None,
        "turns": {turn: _mean([row["score"] for row in rated if row["turn"] == turn]) for turn in turns},
        "categories": {c: _mean([row["score"] for row in rated if row["category"] == c]) for c in categories},
        "errors": len(rows) - len(rated),
        "failures": _count_failures(row for row in rows if row["score"] == -1),
    }


def _bar_figure(names: list[str], title: str, intervals: list[Interval], below: float = 0.0) -> tuple[Figure, Any]:
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
