"""What judgments say of two or more models: counts, rates, intervals, and how far the judge can be trusted."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.evaluation.judges import ModelAnswers, Row
from helpers.evaluation.questions import Question
from helpers.evaluation.statistics import (
    length_controlled,
    length_controlled_interval,
    mean_interval,
    sign_test,
    zero_event_upper_bound,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ONE_ORDER = ("human", "rules")  # judges to whom the order cannot matter, or was never the same
OUTCOME = {"model_2": 1.0, "tie": 0.5, "model_1": 0.0}
CONFOUNDED = 0.95  # one model's answers are the longer ones this often: length and model cannot be told apart
FEW = 10  # decided comparisons below which no share of them is worth a sentence


@dataclasses.dataclass(frozen=True)
class Comparison:
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
    def of(cls, matches: list[Comparison]) -> Counts:
        outcomes = [m.outcome for m in matches]
        return cls(outcomes.count(1.0), outcomes.count(0.0), outcomes.count(0.5))


def comparisons_by_pair(
    rows: list[Row], questions: list[Question], said: ModelAnswers
) -> dict[tuple[str, str], list[Comparison]]:
    """Judgments by pair of models, each pair in the order of `said`, else in that of the rows.

    Two games that disagree are a tie; an error in either is none (FastChat, llm_judge/show_result.py).
    """
    known = {str(q["question_id"]): q for q in questions}
    texts = {model: {str(i): turns for i, turns in answers.items()} for model, answers in said.items()}
    names = list(dict.fromkeys([*said, *(row[m] for row in rows for m in ("model_1", "model_2"))]))
    found: dict[tuple[str, str], list[Comparison]] = {pair: [] for pair in combinations(names, 2)}
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
            Comparison(
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


def _longer(row: Row, pair: tuple[str, str], texts: ModelAnswers) -> int | None:
    try:
        one, two = (texts[model][str(row["question_id"])] for model in pair)
        turns = range(len(one)) if _judge(row) == "human" else [int(row.get("turn", 1)) - 1]
        return sum(len(two[t]) - len(one[t]) for t in turns)
    except (KeyError, IndexError):
        return None


@dataclasses.dataclass(frozen=True)
class PairResult:
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
    def of(cls, before: str, after: str, matches: list[Comparison], seed: int = 0) -> PairResult:
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
            share = f"{zero_event_upper_bound(self.alike):.1%}"
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


RATES = ("win_rate", "loss_rate", "win_rate_adjusted")
METHOD = """\
win_rate, loss_rate and win_rate_adjusted are FastChat's: a win in one order and
not in the other is a tie, and a tie is half a win in the adjusted rate. Its 95%
interval is a bootstrap over questions, p an exact sign test over questions. At
equal lengths: a logistic regression of the outcome on tanh(difference of lengths
/ its standard deviation), with that term then set to zero; interval likewise."""


@dataclasses.dataclass
class PairwiseResults:
    """Every pair of models that was judged, and each model over all its pairs."""

    judge: str
    pairs: list[PairResult]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rule: model → share by name

    @classmethod
    def of(
        cls, judge: str, rows: list[Row], questions: list[Question], said: ModelAnswers, seed: int = 0
    ) -> PairwiseResults:
        matches = comparisons_by_pair(rows, questions, said)
        return cls(judge, [PairResult.of(*pair, found, seed) for pair, found in matches.items()])

    @property
    def models(self) -> dict[str, Counts]:
        """FastChat's table: each model over all its comparisons, the highest win rate first."""
        sums: dict[str, list[int]] = {}
        for pair in self.pairs:
            c = pair.counts
            for name, won, lost in ((pair.after, c.win, c.loss), (pair.before, c.loss, c.win)):
                sums[name] = [a + b for a, b in zip(sums.get(name, [0, 0, 0]), (won, lost, c.tie), strict=True)]
        counts = {name: Counts(*numbers) for name, numbers in sums.items()}
        return dict(sorted(counts.items(), key=lambda item: -item[1].win_rate))

    def as_dict(self) -> dict[str, Any]:
        """All of it; at the top the pair of the first model and the last."""
        whole: dict[str, Any] = {"judge": self.judge}
        if self.pairs:
            ends = (self.pairs[0].before, self.pairs[-1].after)
            whole |= next((p.as_dict() for p in self.pairs if (p.before, p.after) == ends), {})
        models = {name: counts.as_dict() for name, counts in self.models.items()}
        return whole | {"models": models, "pairs": [p.as_dict() for p in self.pairs], "scores": self.scores,
                        "notes": self.notes(), "method": " ".join(METHOD.split())}  # fmt: skip

    def notes(self) -> list[str]:
        return [note for pair in self.pairs for note in pair.notes()]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        count = sum(p.counts.total + p.errors for p in self.pairs)
        rows = [(name, c.win, c.loss, c.tie, *(f"{getattr(c, rate):.5f}" for rate in RATES))
                for name, c in self.models.items()]  # fmt: skip
        title = Text(f"{count} comparisons by {self.judge}\n", style="bold")
        parts: list[Any] = [title, _table(["model", "win", "loss", "tie", *RATES], rows)]
        for p in self.pairs:
            parts += [Text(f"\n{p.after} against {p.before}", style="bold"), _pair(p)]
            if len(p.categories) > 1:
                lines = [(name, c.win, c.loss, c.tie, f"{c.win_rate_adjusted:.1%}") for name, c in p.categories.items()]
                parts += ["", _table(["category", "win", "loss", "tie", "adjusted"], lines)]
        if self.scores:
            names = list(next(iter(self.scores.values())))
            shares = [(model, *(f"{s[name]:.1%}" for name in names)) for model, s in self.scores.items()]
            parts += ["", _table(["answers that are", *names], shares)]
        return Group(*parts, "", *(Text(f"• {note}") for note in self.notes()))

    def figure(self) -> Figure:
        """Wins, ties and losses of each pair, overall and by category, with the adjusted rate and its interval."""
        lines: list[tuple[str, Counts, tuple[float, float] | None]] = [
            (f"{p.after}\nagainst {p.before}", p.counts, p.interval) for p in self.pairs
        ]
        if len(self.pairs) == 1 and len(self.pairs[0].categories) > 1:
            lines += [(category, counts, None) for category, counts in self.pairs[0].categories.items()]
        figure, axis = _bar_figure(len(lines))
        for y, (_, counts, interval) in enumerate(reversed(lines)):
            left = 0.0
            for kind, colour in (("win", "#7fa8d1"), ("tie", "#dddddd"), ("loss", "#e0a070")):
                share = getattr(counts, kind) / counts.total if counts.total else 0.0
                axis.barh(y, share, left=left, color=colour, height=0.6, label=kind if y == 0 else None)
                if share > 0.04:
                    axis.text(left + 0.01, y, str(getattr(counts, kind)), va="center", fontsize=9)
                left += share
            rate = counts.win_rate_adjusted
            around = [[rate - interval[0]], [interval[1] - rate]] if interval else None
            axis.errorbar(rate, y, xerr=around, fmt="o", color="black", capsize=3, markersize=4)
        axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(lines)), [name for name, *_ in reversed(lines)], fontsize=9)
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        figure.suptitle(f"{self.judge}; the dot counts a tie as half a win, its line is the 95% interval", fontsize=9)
        return figure


@dataclasses.dataclass
class RatingResults:
    """The ratings of `--mode single`, averaged as FastChat does: by turn, and over all of them."""

    judge: str
    rows: list[Row]
    categories: dict[str, str]  # of each question
    seed: int = 0

    @classmethod
    def of(
        cls, judge: str, rows: list[Row], questions: list[Question], said: ModelAnswers, seed: int = 0
    ) -> RatingResults:
        return cls(judge, rows, {str(q["question_id"]): q["category"] for q in questions}, seed)

    def as_dict(self) -> dict[str, Any]:
        return {"judge": self.judge, "models": {name: self._model(name) for name in self._names()}}

    def _names(self) -> list[str]:
        return list(dict.fromkeys(str(row["model"]) for row in self.rows))

    def _model(self, name: str) -> dict[str, Any]:
        own = [row for row in self.rows if row["model"] == name]
        read = [row for row in own if row["score"] != -1]
        shares = np.array([(row["score"] - 1) / 9 for row in read], dtype=float)  # of the way from 1 to 10
        around = mean_interval(shares, [str(row["question_id"]) for row in read], self.seed) if read else None

        def mean(rows: list[Row]) -> float | None:
            return sum(row["score"] for row in rows) / len(rows) if rows else None

        def category(row: Row) -> str:
            return self.categories.get(str(row["question_id"]), "general")

        return {
            "average": mean(read),
            "interval": tuple(1 + 9 * end for end in around) if around else None,
            "turns": {t: mean([r for r in read if r["turn"] == t]) for t in sorted({int(r["turn"]) for r in own})},
            "categories": {c: mean([r for r in read if category(r) == c]) for c in dict.fromkeys(map(category, own))},
            "errors": len(own) - len(read),
        }

    def __rich__(self) -> Any:
        models = dict(sorted(self.as_dict()["models"].items(), key=lambda item: -(item[1]["average"] or 0)))
        turns = sorted({t for m in models.values() for t in m["turns"]})
        kinds = list(dict.fromkeys(c for m in models.values() for c in m["categories"]))

        def line(name: str, *values: Any) -> tuple[str, ...]:
            return name, *("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)

        each = models.values()
        rows = [line("average", *(m["average"] for m in each))]
        rows += [
            line("95% interval", *("{:.2f} to {:.2f}".format(*m["interval"]) if m["interval"] else "-" for m in each))
        ]
        rows += [line(f"turn {t}", *(m["turns"].get(t) for m in each)) for t in turns]
        rows += [line(kind, *(m["categories"].get(kind) for m in each)) for kind in kinds]
        rows += [line("no rating", *(m["errors"] for m in each))]
        return _table([f"1 to 10, by {self.judge}", *models], rows)

    def figure(self) -> Figure:
        """The average rating of each model, with its interval."""
        models = sorted(self.as_dict()["models"].items(), key=lambda item: item[1]["average"] or 0)
        figure, axis = _bar_figure(len(models))
        for y, (_, m) in enumerate(models):
            low, high = m["interval"] or (0.0, 0.0)
            average = m["average"] or 0.0
            axis.barh(y, average, xerr=[[average - low], [high - average]], color="#7fa8d1", height=0.6, capsize=3)
            axis.text(0.1, y, f"{average:.2f}", va="center", fontsize=9)
        axis.set_yticks(range(len(models)), [name for name, _ in models], fontsize=9)
        axis.set_xlim(0, 10)
        figure.suptitle(f"{self.judge}: ratings from 1 to 10; the line is the 95% interval", fontsize=9)
        return figure


def _bar_figure(rows: int) -> tuple[Figure, Any]:
    """An empty figure for so many horizontal bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.5 * rows), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


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


def _pair(p: PairResult) -> Any:
    """What is known of one pair, a line each."""
    from rich.table import Table

    table = Table("", "", "95% interval", box=None, pad_edge=False, header_style="none")
    controlled, around = "-", "-"
    if p.length_controlled is not None and p.length_controlled_interval is not None:
        controlled, around = f"{p.length_controlled:.1%}", _percent(p.length_controlled_interval)
    rate = (f"{p.counts.win_rate_adjusted:.1%}", _percent(p.interval)) if p.counts.total else ("-", "-")
    table.add_row("win rate, a tie being half a win", *rate)
    table.add_row("the same at equal lengths", controlled, around)
    table.add_row("sign test", f"p = {p.sign_p:.2g}", "")
    table.add_row("same verdict in both orders", _share(p.consistency), "")
    table.add_row("wins that went to the longer answer", _share(p.longer_won), f"of {p.decided_unequal}")
    table.add_row("no verdict that could be read", str(p.errors), "")
    return table


def _percent(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
