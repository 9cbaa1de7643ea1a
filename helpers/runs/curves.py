"""What a run wrote down while it trained: its log history in metrics.jsonl, and answers in samples.jsonl."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError, find_path, install_error_hook, print_help_if_asked, short_path
from helpers.runs.run import read_run
from helpers.settings.load import split_flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import Trainer

    from helpers.runs.run import Run


History = list[dict[str, float]]  # what the Trainer logged, one dictionary a log
SAMPLES_FILE = "samples.jsonl"
WINDOW = 5  # logs of training that are looked at together


def read_history(file: Path) -> History:
    """The logs of a run, oldest first; a last line cut short by a crash is left out."""
    return _read_rows(file)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Each answer sampled in a run: its step, prompt, answer and number of tokens; [] where there is none."""
    return _read_rows(folder / SAMPLES_FILE)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text("utf-8").split("\n") if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def series(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged name, without those that are not numbers."""
    points = [(log["step"], log[name]) for log in history if name in log and math.isfinite(log[name])]
    return [x for x, _ in points], [y for _, y in points]


def is_dpo_history(history: History) -> bool:
    return any("rewards/margins" in log for log in history)


def first_and_last(history: History, name: str, of: Callable[..., float]) -> list[float]:
    """Where a value began and where it is now: the first evaluation and `of` (min or max) the last two of the others,
    which are of the same rows. Without those, or where the first came after logs of training, medians of the first and
    last window of training. [] before that."""
    (at, held_out), (steps, training) = series(history, f"eval_{name}"), series(history, name)
    if len(held_out) > 1 and at[0] <= min(steps, default=math.inf):
        return [held_out[0], of(held_out[1:][-2:])]
    return [median(training[:WINDOW]), median(training[-WINDOW:])] if len(training) >= 2 * WINDOW else []


def with_speed(history: History) -> History:
    """The history with `tokens_per_second` in each log of training: since the log before, evaluations left out.

    transformers 5.23 (trainer.py, log) gives tokens and seconds since the run was started or resumed; a resumed run
    begins to count anew, which is where its tokens do not grow by as many as all that were seen.
    """
    found, before, evaluating = [], (0.0, 0.0, 0.0), 0.0
    for log in history:
        evaluating += log.get("eval_runtime", 0.0)
        if "loss" in log and "train_tokens_per_second" in log:
            seconds, seen = log["train_runtime"], log["num_input_tokens_seen"]
            tokens = log["train_tokens_per_second"] * seconds
            if tokens - before[0] < (seen - before[2]) / 2:  # another start than the log before's
                before, evaluating = (0.0, 0.0, seen), 0.0
            took = seconds - before[1] - evaluating
            if took > 0 and tokens > before[0]:
                log = log | {"tokens_per_second": (tokens - before[0]) / took}
            before, evaluating = (tokens, seconds, seen), 0.0
        found.append(log)
    return found


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


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """A training problem: its name, what was observed (with numbers), why it matters, and which settings to try."""

    name: str
    observation: str
    reason: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.name}: {self.observation}. {self.reason} Try {self.suggestion}."


@dataclasses.dataclass
class Curves:
    """A run's logs, what is wrong with them, and the answers sampled on the way."""

    name: str
    history: History
    diagnostics: list[Diagnostic]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """Of the folder of a run, finished or not. Raises UserError where it has no logs."""
        history, record = read_history(folder / "metrics.jsonl"), read_run(folder)
        if not history:
            raise UserError(f"{short_path(folder)} is not the folder of a run that has begun: it has no metrics.jsonl")
        known = [Diagnostic(**each) for each in record.get("diagnostics") or ()]
        return cls(folder.resolve().name, history, known, read_samples(folder))

    @property
    def figure(self) -> Figure:
        return plot_run(self.history, self.name, self.diagnostics)

    def as_png(self) -> bytes:
        self.figure.savefig(picture := io.BytesIO(), format="png", dpi=120)
        return picture.getvalue()

    def __rich__(self) -> Any:
        """The diagnostics in words, and what was sampled first and last."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        steps = list(dict.fromkeys(row["step"] for row in self.samples))
        table = Table("held-out prompt", *(f"step {step}" for step in steps[:1] + steps[1:][-1:]), show_lines=True)
        for prompt in dict.fromkeys(row["prompt"] for row in self.samples):
            answers = [row["answer"] for row in self.samples if row["prompt"] == prompt]
            table.add_row(*map(Text, [prompt, *answers[:1], *answers[1:][-1:]]))
        words = Text("\n".join(map(str, self.diagnostics)) or "Health: nothing is wrong with these curves.")
        return Group(words, table) if steps else words


def plot_run(history: History, title: str = "", diagnostics: Sequence[Diagnostic] = ()) -> Figure:
    """A run: a panel for each thing that was logged, over the same steps, and under them what is wrong.

    Lines are training, dots are evaluations.
    """
    return _draw({"": history}, title, diagnostics)


def plot_runs(histories: Mapping[str, History], title: str = "") -> Figure:
    """Several runs over one another, a colour each, by the names that they have in `histories`."""
    return _draw(histories, title)


def _colours(count: int) -> list[Any]:
    """A colour a run: matplotlib's own, of which there are ten, or as many as it takes of a scale."""
    from matplotlib import colormaps

    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _draw(histories: Mapping[str, History], title: str, diagnostics: Sequence[Diagnostic] = ()) -> Figure:
    import textwrap

    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = {name: with_speed(history) for name, history in histories.items()}
    logged = {name for history in runs.values() for log in history for name in log}
    hidden = {"token accuracy"} if DPO_ONLY in logged else set()
    panels = {panel: names for panel, names in PANELS.items() if logged & set(names) and panel not in hidden}
    columns = 3 if len(panels) <= 9 else 4
    rows, colours = max(1, math.ceil(len(panels) / columns)), _colours(len(runs))
    words = [line for f in diagnostics for line in textwrap.wrap(f"{f.name}: {f.observation}", 45 * columns)]
    figure = Figure(figsize=(3.8 * columns, 2.3 * rows + 0.2 * len(words)), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        for (run, history), colour in zip(runs.items(), colours, strict=True):
            _draw_run(axis, history, names, colour if run else "")
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
        lines = [Line2D([], [], color=colour, label=run) for run, colour in zip(runs, colours, strict=True)]
        figure.legend(handles=lines, loc="outside upper right", ncols=min(4, len(runs)), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if words:
        figure.supxlabel("\n".join(words), x=0.01, ha="left", fontsize=9, color="C3")
    return figure


def _draw_run(axis: Axes, history: History, names: Sequence[str], colour: Any) -> None:
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
    install_error_hook()
    print_help_if_asked(argv, __doc__)
    at = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    flags = dict(split_flags(list(argv[at:])))
    if not argv[:at] or set(flags) - {"out"} or len(flags.get("out", [""])) != 1:
        raise SettingsError("usage: python -m helpers curves outputs/a [outputs/b ...] [--out curves.png]")
    out = Path(flags.get("out", ["curves.png"])[0])
    _refuse_out(out)
    runs = {folder: Curves.read(folder) for folder in ((find_path(name) or Path(name)).resolve() for name in argv[:at])}
    labelled = dict(zip(shortest_names(list(runs)), runs.values(), strict=True))
    several = {label: run.history for label, run in labelled.items()}
    figure = plot_runs(several) if len(several) > 1 else next(iter(runs.values())).figure
    figure.savefig(out, dpi=120)
    for label, run in labelled.items():
        for diagnostic in run.diagnostics:
            print(f"{label}: {diagnostic}")
    print(f"Drawn: {short_path(out)}")


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """For each of these folders the shortest end of its path that no other one has."""
    first_and_last = [["/".join(folder.parts[-n:]) for n in range(1, len(folder.parts) + 1)] for folder in folders]
    shared = Counter(end for of_one in first_and_last for end in of_one)
    return [next((end for end in of_one if shared[end] == 1), of_one[-1]) for of_one in first_and_last]


def _refuse_out(out: Path) -> None:
    """Raise SettingsError for a picture that cannot be written, before anything is read."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if out.suffix.lower().removeprefix(".") not in formats:
        raise SettingsError(f"--out {out} is no picture: its name ends in .png, .svg, .pdf ({', '.join(formats)})")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise SettingsError(f"--out {out}: there is no folder {out.parent}, or none that can be written")


def log_to_wandb(run: Run) -> None:
    """Add to the open wandb run, if there is one (--report_to wandb, main process), what makes it readable on its own.

    `settings` of its config, tables `settings`, `rows` (the account) and `samples`, the picture `curves`, and in its
    summary the names of the diagnostics.
    """
    wandb = sys.modules.get("wandb")  # imported by the Trainer's callback, or not at all
    if wandb is None or wandb.run is None:
        return
    record, samples = run.record, read_samples(run.folder)
    account = {name: record["data"][name] for name in ("read", "kept", "changed", "dropped", "train", "eval")}
    account |= {f"dropped: {reason}": count for reason, count in record["data"]["reasons"].items()}
    sources = record["sources"]
    settings = [[name, str(value), sources.get(name, "")] for name, value in record["settings"].items()]
    given = {
        "settings": wandb.Table(["setting", "value", "from"], settings),
        "rows": wandb.Table(["rows", "count"], [[name, count] for name, count in account.items()]),
        "curves": wandb.Image(str(run.folder / "curves.png")),
    }
    if samples:
        given["samples"] = wandb.Table(list(samples[0]), [list(row.values()) for row in samples])
    wandb.run.config.update({"settings": record["settings"]}, allow_val_change=True)
    wandb.run.summary["diagnostics"] = [diagnostic["name"] for diagnostic in record.get("diagnostics", [])]
    wandb.log(given)
