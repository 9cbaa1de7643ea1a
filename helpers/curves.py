"""Training curves: one figure of a run, or of several over one another.

python -m helpers.curves outputs/a outputs/b [--out curves.png]
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import layers
from helpers.errors import SettingsError, UserError, report_user_errors
from helpers.health import Finding, examine
from helpers.history import History, read_history, read_samples, series, with_speed
from helpers.paths import find_path, short_path
from helpers.runs import read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import Trainer

# Panel title → the values drawn in it; each is drawn for training, and for evaluation behind "eval_".
PANELS = {
    "loss": ("loss",),
    "token accuracy": ("mean_token_accuracy",),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "entropy": ("entropy",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
    "tokens of a sampled answer": ("samples/mean_length",),
}
DPO_ONLY = "rewards/margins"


@dataclasses.dataclass
class Curves:
    """A run's logs, what is wrong with them, and the answers sampled on the way."""

    name: str
    history: History
    findings: list[Finding]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """Of the folder of a run, finished or not. Raises UserError where it has no logs."""
        history, record = read_history(folder / "metrics.jsonl"), read_run(folder)
        if not history:
            raise UserError(f"{short_path(folder)} is not the folder of a run that has begun: it has no metrics.jsonl")
        length = 0 if record.get("status") == "finished" else math.inf  # of what is not over, no half is over
        return cls(folder.resolve().name, history, examine(history, length), read_samples(folder))

    @property
    def figure(self) -> Figure:
        return draw(self.history, self.name, self.findings)

    def __rich__(self) -> Any:
        """The findings in words, and what was sampled first and last."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        steps = list(dict.fromkeys(row["step"] for row in self.samples))
        table = Table("held-out prompt", *(f"step {step}" for step in steps[:1] + steps[1:][-1:]), show_lines=True)
        for prompt in dict.fromkeys(row["prompt"] for row in self.samples):
            answers = [row["answer"] for row in self.samples if row["prompt"] == prompt]
            table.add_row(*map(Text, [prompt, *answers[:1], *answers[1:][-1:]]))
        words = Text("\n".join(map(str, self.findings)) or "Health: nothing is wrong with these curves.")
        return Group(words, table) if steps else words


def draw(history: History, title: str = "", findings: Sequence[Finding] = ()) -> Figure:
    """A run: a panel for each thing that was logged, over the same steps, and under them what is wrong.

    Lines are training, dots are evaluations.
    """
    return _draw({"": history}, title, findings)


def draw_over(histories: Mapping[str, History], title: str = "") -> Figure:
    """Several runs over one another, a colour each, by the names that they have in `histories`."""
    return _draw(histories, title)


def _draw(histories: Mapping[str, History], title: str, findings: Sequence[Finding] = ()) -> Figure:
    import textwrap

    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = {name: with_speed(history) for name, history in histories.items()}
    logged = {name for history in runs.values() for log in history for name in log}
    hidden = {"token accuracy"} if DPO_ONLY in logged else set()
    panels = {panel: names for panel, names in PANELS.items() if logged & set(names) and panel not in hidden}
    columns = 3 if len(panels) <= 9 else 4
    rows = max(1, math.ceil(len(panels) / columns))
    words = [line for f in findings for line in textwrap.wrap(f"{f.name}: {f.seen}", 45 * columns)]
    figure = Figure(figsize=(3.8 * columns, 2.3 * rows + 0.2 * len(words)), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        for i, (run, history) in enumerate(runs.items()):
            _draw_run(axis, history, names, f"C{i}" if run else "")
        axis.set_title(panel, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:  # over one another, a run keeps its colour and the second value is dashed
            axis.legend([name.rpartition("/")[2] for name in names], frameon=False, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step")
        axis.xaxis.set_tick_params(labelbottom=True)
    if any(runs):
        lines = [Line2D([], [], color=f"C{i}", label=run) for i, run in enumerate(runs)]
        figure.legend(handles=lines, loc="outside upper right", ncols=min(4, len(runs)), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if words:
        figure.supxlabel("\n".join(words), x=0.01, ha="left", fontsize=9, color="C3")
    return figure


def _draw_run(axis: Axes, history: History, names: Sequence[str], colour: str) -> None:
    """One run's values in one panel: in `colour`, or else a colour a value."""
    for i, name in enumerate(names):
        of_value = "C0" if len(names) == 1 else ("C2", "C3")[i]
        style: Any = {"color": colour or of_value, "linestyle": "--" if colour and i else "-"}
        axis.plot(*series(history, name), **style, marker="." if name.startswith("samples") else "")
    for i, name in enumerate(names):
        hollow: Any = {"markerfacecolor": "none"} if colour and i else {}
        of_value = "C0" if len(names) == 1 else ("C2", "C3")[i]
        axis.plot(*series(history, f"eval_{name}"), "o", color=colour or of_value, markersize=4, **hollow)


def final_metrics(trainer: Trainer) -> dict[str, float]:
    """Tokens seen, and a second; and the held-out metrics of the weights that are saved."""
    logged = [log for log in trainer.state.log_history if "train_tokens_per_second" in log]
    speed = {"tokens_per_second": logged[-1]["train_tokens_per_second"]} if logged else {}
    held_out = {name: value for name, value in _held_out(trainer).items() if name != "num_input_tokens_seen"}
    return {"tokens_seen": float(trainer.state.num_input_tokens_seen)} | speed | held_out


def _held_out(trainer: Trainer) -> dict[str, float]:
    """The metrics just logged, or an evaluation made now."""
    if trainer.args.load_best_model_at_end:  # these are other weights than those of the last step
        return trainer.evaluate()
    last = trainer.state.log_history[-2:]  # the end-of-training summary follows the last evaluation
    done = [log for log in last if "eval_loss" in log and log["step"] == trainer.state.global_step]
    return done[-1] if done else trainer.evaluate()


def main(argv: Sequence[str]) -> None:
    """Draw the runs whose folders are named, and say of each what is wrong with it."""
    report_user_errors()
    at = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    flags = dict(layers.split_flags(list(argv[at:])))
    if not argv[:at] or set(flags) - {"out"} or len(flags.get("out", [""])) != 1:
        raise SettingsError("usage: python -m helpers.curves outputs/a [outputs/b ...] [--out curves.png]")
    out = Path(flags.get("out", ["curves.png"])[0])
    runs = [Curves.read(find_path(folder) or Path(folder)) for folder in argv[:at]]
    figure = runs[0].figure if len(runs) == 1 else draw_over({run.name: run.history for run in runs})
    figure.savefig(out, dpi=120)
    for run in runs:
        for finding in run.findings:
            print(f"{run.name}: {finding}")
    print(f"Drawn: {short_path(out)}")


if __name__ == "__main__":
    main(sys.argv[1:])
