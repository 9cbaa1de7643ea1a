"""The table of verdicts: in a terminal and a notebook, as a picture, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.judging import Row, Said
from helpers.questions import Question
from helpers.verdicts import Counts, PairVerdict, matches_of
from helpers.win_rates import mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = ("win_rate", "loss_rate", "win_rate_adjusted")
METHOD = """\
win_rate, loss_rate and win_rate_adjusted are FastChat's: a win in one order and
not in the other is a tie, and a tie is half a win in the adjusted rate. Its 95%
interval is a bootstrap over questions, p an exact sign test over questions. At
equal lengths: a logistic regression of the outcome on tanh(difference of lengths
/ its standard deviation), with that term then set to zero; interval likewise."""


@dataclasses.dataclass
class WinTable:
    """Every pair of models that was judged, and each model over all its pairs."""

    judge: str
    pairs: list[PairVerdict]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by rule: model → share by name

    @classmethod
    def of(cls, judge: str, rows: list[Row], questions: list[Question], said: Said, seed: int = 0) -> WinTable:
        matches = matches_of(rows, questions, said)
        return cls(judge, [PairVerdict.of(*pair, found, seed) for pair, found in matches.items()])

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
class RatingTable:
    """The ratings of `--mode single`, averaged as FastChat does: by turn, and over all of them."""

    judge: str
    rows: list[Row]
    categories: dict[str, str]  # of each question
    seed: int = 0

    @classmethod
    def of(cls, judge: str, rows: list[Row], questions: list[Question], said: Said, seed: int = 0) -> RatingTable:
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


def _pair(p: PairVerdict) -> Any:
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
