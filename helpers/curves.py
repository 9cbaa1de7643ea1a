"""Training curves: every logged value on disk as it comes, and one figure at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.processes import is_main_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panel title → the values drawn in it; each is drawn for training, and for evaluation behind "eval_".
PANELS = {
    "loss": ("loss",),
    "token accuracy": ("mean_token_accuracy",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
}
DPO_ONLY = "rewards/margins"
LINE = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "grad_norm": "gradient",
    "learning_rate": "lr",
}


class LogToFile(TrainerCallback):
    """metrics.jsonl: one line a log, rewritten from the checkpoint's own history when a run goes on."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_main_process():
            self.file.write_text("".join(json.dumps(log) + "\n" for log in state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if is_main_process() and state.log_history:
            with self.file.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class LogLine(ProgressCallback):
    """Progress bars as ever, but one short line a log, where the Trainer prints everything there is."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if is_main_process() and state.log_history and (text := log_line(state.log_history[-1])):
            tqdm.write(f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {text}")


def log_line(log: dict[str, float]) -> str:
    """The few values of a log that one follows while it runs; "" for a log that has none of them."""
    held_out = "held out:  " if "eval_loss" in log else ""
    prefix = "eval_" if held_out else ""
    shown = [f"{short} {log[prefix + name]:.4g}" for name, short in LINE.items() if prefix + name in log]
    return held_out + "  ".join(shown) if prefix + "loss" in log else ""


def log_to(trainer: Trainer, file: Path) -> None:
    """Write every log to `file`, and in a script print a line of each; a notebook has the Trainer's own table."""
    trainer.add_callback(LogToFile(file))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(LogLine())


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


def read_history(file: Path) -> list[dict[str, float]]:
    """The logs of a run, oldest first; a last line cut short by a crash is left out."""
    history = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            history.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return history


def series(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged name."""
    points = [(log["step"], log[name]) for log in history if name in log]
    return [x for x, _ in points], [y for _, y in points]


def draw(history: list[dict[str, float]], title: str = "") -> Figure:
    """One figure with a panel for each thing that was logged, over the same steps. Dots are evaluations."""
    from matplotlib.figure import Figure

    panels = {
        panel: names
        for panel, names in PANELS.items()
        if any(n in log for n in names for log in history)
        and not (panel == "token accuracy" and any(DPO_ONLY in log for log in history))
    }
    rows = max(1, (len(panels) + 1) // 2)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(names):
            colour = f"C{i}" if len(names) == 1 else ("C2", "C3")[i]
            axis.plot(*series(history, name), color=colour, label=name.rpartition("/")[2])
            axis.plot(*series(history, f"eval_{name}"), "o", color=colour, markersize=4)
        axis.set_title(panel, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - 2) : len(panels)]:
        axis.set_xlabel("step")
        axis.xaxis.set_tick_params(labelbottom=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
