"""Training curves: read what a run has logged, and plot it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from helpers.core import (
    BLUE,
    GREY,
    ORANGE,
    SettingsError,
    UserError,
    find_path,
    new_figure,
    short_path,
)
from helpers.runs.run import Run, read_run
from helpers.settings.sources import split_flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import Trainer
    from transformers.trainer_utils import TrainOutput

History = list[dict[str, float]]  # what the Trainer logged, one dictionary per log
SAMPLES_FILE = "samples.jsonl"
MIN_STEPS = 20  # of a run, below which its curves are not judged
WINDOW = 5  # training logs that are summarized together


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Each completion sampled during training: step, prompt, answer, and number of tokens."""
    return read_history(folder / SAMPLES_FILE)


def read_history(file: Path) -> list[dict[str, Any]]:
    """The logs of a run, oldest first, without a last line that a crash has cut off; other bad lines are counted."""
    rows, bad = [], list[int]()
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = 0
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append(row)
        elif row is not None and number < len(lines):
            bad.append(number)
    if bad:
        print(f"{short_path(file)}: {len(bad)} lines are not logs and were skipped (first: line {bad[0]}).")
    return rows


def series(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one logged name."""
    points = [(log["step"], log[name]) for log in history if name in log and math.isfinite(log[name])]
    return [x for x, _ in points], [y for _, y in points]


def is_dpo_history(history: History) -> bool:
    return any("rewards/margins" in log for log in history)


def first_and_last(history: History, name: str, of: Callable[..., float]) -> list[float]:
    """A value at the start and now: its first evaluation, and `of` (min or max) the last two of the others. Medians of
    the first and last window of training if there are no evaluations, or the first came after training logs. [] before
    that."""
    (at, held_out), (steps, training) = series(history, f"eval_{name}"), series(history, name)
    if len(held_out) > 1 and at[0] <= min(steps, default=math.inf):
        return [held_out[0], of(held_out[1:][-2:])]
    return [median(training[:WINDOW]), median(training[-WINDOW:])] if len(training) >= 2 * WINDOW else []


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: the logged names it draws (for evaluation behind "eval_"), their unit, and its y axis."""

    title: str
    names: tuple[str, ...]
    unit: str
    includes: tuple[float, ...] = ()  # values that are always in view
    span: float = 0.1  # least height, so that noise does not look like a trend
    guide: tuple[float, str] | None = None  # a reference line of DPO

    def describe(self, history: History) -> str:
        """The curves in words, as alternative text; "" if nothing was logged."""
        texts = []
        for name in self.names:
            label = self.title if len(self.names) == 1 else f"{self.title}, {name.rpartition('/')[2]}"
            logged = {kind: series(history, prefix + name)[1] for kind, prefix in (("train", ""), ("eval", "eval_"))}
            ends = [f"{kind} from {v[0]:.3g} to {v[-1]:.3g}" for kind, v in logged.items() if v]
            texts += [f"{label}: {', '.join(ends)}"] if ends else []
        return "; ".join(texts)


PANELS = (  # the first four that were logged are the key panels of a report
    Panel("loss", ("loss",), "nats", (0,), guide=(math.log(2), "log 2")),
    Panel("reward margin", ("rewards/margins",), "nats scaled by β", (0,)),
    Panel("reward accuracy", ("rewards/accuracies",), "share of pairs", (0, 1), guide=(0.5, "chance")),
    Panel("log-probabilities", ("logps/chosen", "logps/rejected"), "nats per completion", span=2),
    Panel("token accuracy", ("mean_token_accuracy",), "share of tokens", (0, 1)),
    Panel("entropy", ("entropy",), "nats per token", (0,)),
    Panel("rewards", ("rewards/chosen", "rewards/rejected"), "nats scaled by β", (0,)),
    Panel("gradient norm", ("grad_norm",), "L2 norm", (0,)),
    Panel("learning rate", ("learning_rate",), "", (0,), span=0),
    Panel("mean speed", ("train_tokens_per_second",), "tokens/s", (0,)),
    Panel("completion length", ("samples/mean_length",), "tokens", (0,)),
)


def logged_panels(*histories: History) -> list[Panel]:
    """The panels that these runs have values for."""
    logged = {name for history in histories for log in history for name in log}
    hidden = "mean_token_accuracy" if "rewards/margins" in logged else ""
    return [panel for panel in PANELS if logged & (set(panel.names) - {hidden})]


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """A training problem: its name, what was observed (with numbers), why it matters, and which settings to try."""

    name: str
    observation: str
    reason: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.name}: {self.observation}. {self.reason} Try {self.suggestion}."


def no_problem_text(history: History) -> str:
    """What to say of a run without diagnostics."""
    steps = max((log.get("step", 0) for log in history), default=0)
    too_few = f"Too few steps to judge: {steps:.0f}. Diagnostics need {MIN_STEPS} or more."
    return "No training problems detected." if steps >= MIN_STEPS else too_few


@dataclasses.dataclass
class Curves:
    """A run's logs, its diagnostics, and the completions sampled during training."""

    name: str
    history: History
    diagnostics: list[Diagnostic]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """The curves of a run in any state. Raises UserError if it has no logs."""
        history = read_history(folder / "metrics.jsonl")
        if not history:
            raise UserError(f"{short_path(folder)} is not the folder of a started run: it has no metrics.jsonl.")
        diagnostics = [Diagnostic(**each) for each in read_run(folder).get("diagnostics") or ()]
        return cls(folder.resolve().name, history, diagnostics, read_samples(folder))

    @property
    def figure(self) -> Figure:
        return plot_runs({"": self.history}, self.name, self.diagnostics)

    def __rich__(self) -> Any:
        """The diagnostics in words, then the first and last completion of each prompt."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        steps = list(dict.fromkeys(row["step"] for row in self.samples))
        table = Table("held-out prompt", *(f"step {step}" for step in steps[:1] + steps[1:][-1:]), show_lines=True)
        for prompt in dict.fromkeys(row["prompt"] for row in self.samples):
            answers = [row["answer"] for row in self.samples if row["prompt"] == prompt]
            table.add_row(*map(Text, [prompt, *answers[:1], *answers[1:][-1:]]))
        words = Text("\n".join(map(str, self.diagnostics)) or no_problem_text(self.history))
        return Group(words, table) if steps else words

    def log_to_wandb(self, run: Run) -> None:
        """Add settings, row counts, completions, curves and diagnostics to the open wandb run, if there is one."""
        wandb = sys.modules.get("wandb")  # imported by the Trainer's callback, or not at all
        if wandb is None or wandb.run is None:
            return
        record, data = run.record, run.record["data"]
        counts = {name: data[name] for name in ("read", "kept", "changed", "dropped", "train", "eval")}
        counts |= {f"{kind}: {why}": n for kind, reasons in data["by"].items() for why, n in reasons.items()}
        settings = [[name, str(value), record["sources"].get(name, "")] for name, value in record["settings"].items()]
        tables = {
            "settings": wandb.Table(["setting", "value", "from"], settings),
            "rows": wandb.Table(["rows", "count"], [list(each) for each in counts.items()]),
            "curves": wandb.Image(str(run.folder / "curves.png")),
        }
        if self.samples:
            tables["samples"] = wandb.Table(list(self.samples[0]), [list(row.values()) for row in self.samples])
        wandb.run.config.update({"settings": record["settings"]}, allow_val_change=True)
        wandb.run.summary["diagnostics"] = [diagnostic.name for diagnostic in self.diagnostics]
        wandb.log(tables)


def plot_runs(
    histories: Mapping[str, History],
    title: str = "",
    diagnostics: Sequence[Diagnostic] = (),
    panels: Sequence[Panel] = (),
) -> Figure:
    """A panel for each logged value over the same steps: training as lines, evaluation as dots; diagnostics below. Runs
    are in one colour each, by their names; without a name in blue and orange."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    panels = panels or logged_panels(*histories.values())
    columns = min(max(1, len(panels)), 3 if len(panels) <= 9 else 4)
    rows = max(1, math.ceil(len(panels) / columns))
    words = [line for d in diagnostics for line in textwrap.wrap(f"{d.name}: {d.observation}", 45 * columns)]
    figure: Figure = new_figure(figsize=(3.8 * columns, 2.4 * rows + 0.2 * len(words) + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    few: list[Any] = [BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
    many = [colormaps["viridis"](0.9 * i / max(1, len(histories) - 1)) for i in range(len(histories))]
    colours = dict(zip(histories, few if len(histories) <= len(few) else many, strict=False)) if any(histories) else {}
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, histories, colours)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.set_tick_params(labelbottom=True)
    train, held_out = (BLUE, ORANGE) if not colours else (GREY, GREY)
    lines = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
    lines += [Line2D([], [], color=train, label="train")]
    lines += [Line2D([], [], color=held_out, marker="o", markersize=5, linestyle="", label="eval")]
    figure.legend(handles=lines, loc="outside upper right", ncols=min(5, len(lines)), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if words:
        figure.supxlabel("\n".join(words), x=0.01, ha="left", fontsize=9, color="#8a3c00")
    return figure


def _draw_panel(axis: Axes, panel: Panel, runs: Mapping[str, History], colours: Mapping[str, Any]) -> None:
    """Draw each run in its colour; without `colours`, training in blue and evaluation in orange, or chosen in blue and
    rejected in orange."""
    is_single = len(panel.names) == 1
    values = list(panel.includes)
    for run, history in runs.items():
        for i, name in enumerate(panel.names):
            line = colours.get(run) or (BLUE, ORANGE)[i]
            dots = colours.get(run) or (ORANGE if is_single else line)
            hollow = "none" if colours and i else dots
            trained, held_out = series(history, name), series(history, f"eval_{name}")
            if name == "rewards/accuracies" and held_out[0][:1] == [0]:  # all margins are 0: there is nothing to rank
                held_out = held_out[0][1:], held_out[1][1:]
            label = name.rpartition("/")[2] if run == next(iter(runs)) else None  # once for all runs
            axis.plot(*trained, color=line, linestyle="--" if colours and i else "-", label=label,
                      marker="." if name.startswith("samples") else "")  # fmt: skip
            axis.plot(*held_out, "o", color=dots, markersize=4.5, markerfacecolor=hollow)
            values += trained[1] + held_out[1]
    if panel.guide and any(map(is_dpo_history, runs.values())):
        level, text = panel.guide
        axis.axhline(level, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        axis.annotate(text, (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=GREY)
        values.append(level)
    if values:
        low, high = min(values), max(values)
        missing = max(0, max(panel.span, 0.1 * max(-low, high)) - (high - low))
        pad = missing / 2 + 0.05 * (missing + high - low or 1)
        axis.set_ylim(low - pad, high + pad)
    axis.set_title(panel.title, loc="left", fontsize=10)
    axis.set_ylabel(panel.unit, fontsize=8, color=GREY)
    axis.tick_params(labelsize=8)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if not is_single:
        axis.legend(frameon=False, fontsize=8)


def final_metrics(trainer: Trainer, result: TrainOutput) -> dict[str, float]:
    """The training loss, tokens, tokens per second, and held-out metrics of the weights that are saved. If the best
    checkpoint was restored, its evaluation is logged at its own step, `best_step` of the metrics."""
    history, state = trainer.state.log_history, trainer.state
    speed = [log["train_tokens_per_second"] for log in history if "train_tokens_per_second" in log]
    # the end-of-training summary follows the last evaluation
    last = [log for log in history[-2:] if "eval_loss" in log and log["step"] == state.global_step]
    best = (state.best_model_checkpoint or "").rpartition("-")[2] if trainer.args.load_best_model_at_end else ""
    end, state.global_step = state.global_step, int(best or state.global_step)
    held_out = last[-1] if last and not best else trainer.evaluate()
    state.global_step = end
    metrics = {"best_step": float(best)} if best else {}
    metrics |= {"train_loss": result.training_loss, "tokens_seen": float(state.num_input_tokens_seen)}
    metrics |= {"tokens_per_second": speed[-1]} if speed else {}
    return metrics | {name: value for name, value in held_out.items() if name != "num_input_tokens_seen"}


def main(argv: Sequence[str]) -> None:
    """Plot the curves of runs, and print their diagnostics.

    python -m helpers curves outputs/a [outputs/b ...] [--out curves.png]
    """
    at = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    flags = dict(split_flags(list(argv[at:])))
    if not argv[:at] or set(flags) - {"out"} or len(flags.get("out", [""])) != 1:
        raise SettingsError("usage: python -m helpers curves outputs/a [outputs/b ...] [--out curves.png]")
    out = Path(flags.get("out", ["curves.png"])[0])
    folders = dict.fromkeys((find_path(name) or Path(name)).resolve() for name in argv[:at])
    common = os.path.commonpath([folder.parent for folder in folders])
    runs = {str(folder.relative_to(common)): Curves.read(folder) for folder in folders}
    histories = {label: run.history for label, run in runs.items()}
    figure = plot_runs(histories) if len(runs) > 1 else next(iter(runs.values())).figure
    try:
        figure.savefig(out, dpi=120, format=out.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise SettingsError(f"--out {out} cannot be written: {error}. Name a .png, .svg or .pdf file.") from None
    for label, run in runs.items():
        for diagnostic in run.diagnostics:
            print(f"{label}: {diagnostic}")
    print(f"Wrote {short_path(out)}.")
