"""The page of plots of a data report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.data.report import opening

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from helpers.data.report import DataReport


COLOURS = {"prompt": "C0", "conversation": "C0", "chosen": "C2", "learned": "C2", "rejected": "C3"}
SHOWN = 8  # bars of a panel
WIDEST = 46  # characters of a label


def plot_data_report(report: DataReport) -> Figure:
    """Lengths, which answer is longer, openings of the two sides, and what became of the rows."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    pairs = bool(report.train.rejected)
    figure = Figure(figsize=(11, 6.5 if pairs else 3.4), layout="constrained")
    axes = figure.subplots(2 if pairs else 1, 2).flatten()
    _lengths(axes[0], report)
    _account(axes[-1], report)
    if pairs:
        _difference(axes[1], report)
        _openings(axes[2], report)
    counted = ("y pairs", "y pairs", "x pairs", "x rows") if pairs else ("y conversations", "x rows")
    for axis, (side, _, rows) in zip(axes, (words.partition(" ") for words in counted), strict=True):
        getattr(axis, f"{side}axis").set_major_locator(MaxNLocator("auto", integer=True))
        getattr(axis, f"set_{side}label")(rows, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure


def _lengths(axis: Any, report: DataReport) -> None:
    longest = max(int(n.max()) for n in report.lengths.values())
    bins = np.unique(np.geomspace(1, max(longest, report.max_length, 2) * 1.05, 50).astype(int))
    for name, n in report.lengths.items():
        axis.hist(
            n,
            bins=bins,
            histtype="step",
            linewidth=1.5,
            color=COLOURS[name],
            label=f"{name}, median {np.median(n):,.0f}",
        )
    if report.max_length:
        axis.axvline(report.max_length, color="grey", linestyle=":", label=f"max_length {report.max_length:,}")
    axis.set_xscale("log")
    axis.set_title("lengths", loc="left", fontsize=10)
    axis.set_xlabel("tokens", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _difference(axis: Any, report: DataReport) -> None:
    more = report.lengths["chosen"] - report.lengths["rejected"]
    edge = max(1, int(np.quantile(np.abs(more), 0.98)))
    bins = np.linspace(-edge, edge, 41)
    axis.hist(more[more < 0], bins=bins, color=COLOURS["rejected"], alpha=0.8)
    axis.hist(more[more > 0], bins=bins, color=COLOURS["chosen"], alpha=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    share = (more > 0).mean()
    axis.set_title(f"the chosen answer is the longer one in {share:.0%} of pairs", loc="left", fontsize=10)
    axis.set_xlabel("tokens of chosen less those of rejected", fontsize=8)


def _openings(axis: Any, report: DataReport) -> None:
    sides = {name: Counter(map(opening, getattr(report.train, name))) for name in ("chosen", "rejected")}
    names = [o for o, _ in (sides["chosen"] + sides["rejected"]).most_common(SHOWN)][::-1]
    for offset, (side, count) in zip((0.2, -0.2), sides.items(), strict=True):
        axis.barh(np.arange(len(names)) + offset, [count[o] for o in names], 0.4, color=COLOURS[side], label=side)
    axis.set_yticks(range(len(names)), [_short(o) for o in names])
    axis.set_title("most frequent openings, training rows", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _account(axis: Any, report: DataReport) -> None:
    account = report.account
    bars = [("kept", account.kept, "C2")]
    bars += [(reason, n, "C3") for reason, n in account.dropped.most_common(SHOWN)]
    bars += [(reason, n, "C1") for reason, n in (account.changed + account.noted).most_common(SHOWN - 4)]
    bars.reverse()
    axis.barh(range(len(bars)), [n for _, n, _ in bars], 0.7, color=[colour for *_, colour in bars])
    for i, (_, n, _) in enumerate(bars):
        axis.text(n, i, f" {n:,} ({n / max(1, account.read):.1%})", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [_short(name) for name, *_ in bars])
    axis.set_xlim(0, max(n for _, n, _ in bars) * 1.25)
    axis.set_title(f"rows: {account.read:,} read", loc="left", fontsize=10)


def _short(text: str) -> str:
    """One line without what matplotlib would read as mathematics."""
    line = " ".join(text.split()).replace("$", r"\$")
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 1]}…"
