"""What one sees of a run while it trains: a line a log or a figure, and what is wrong as soon as it is."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.curves import draw
from helpers.display import as_picture
from helpers.errors import in_kernel
from helpers.health import examine
from helpers.processes import is_main_process
from helpers.runs import Run

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


class LiveCurves(TrainerCallback):
    """In a notebook: the curves so far, in one output that is drawn anew, for a tenth of the time at most."""

    def __init__(self, name: str) -> None:
        self.name, self.shown, self.due = name, None, 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() >= self.due:
            self._draw(state, loss_types(args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draw(state, loss_types(args))

    def _draw(self, state: TrainerState, loss_types: Collection[str]) -> None:
        from IPython.display import display

        begun = time.monotonic()
        findings = examine(state.log_history, state.max_steps, loss_types)
        picture = as_picture(draw(state.log_history, f"{self.name}, step {state.global_step}", findings))
        if self.shown is None:
            self.shown = display(picture, display_id=True)
        else:
            self.shown.update(picture)
        self.due = time.monotonic() + max(1.0, 10 * (time.monotonic() - begun))


class HealthWatch(TrainerCallback):
    """Says each finding when it first appears, and keeps those there are for run.json."""

    def __init__(self, run: Run) -> None:
        self.run, self.said = run, set[str]()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.update(findings=[], max_steps=state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        findings = examine(state.log_history, state.max_steps, loss_types(args))
        before = [finding["name"] for finding in self.run.record["findings"]]
        self.run.describe(findings=[dataclasses.asdict(finding) for finding in findings])
        if before != [finding.name for finding in findings]:
            self.run.update()  # now, for a run that is killed later
        for finding in findings:
            if finding.name not in self.said and is_main_process():
                tqdm.write(f"step {state.global_step}: {finding}")
            self.said.add(finding.name)


def loss_types(args: TrainingArguments) -> Collection[str]:
    """DPOConfig's `loss_type`, a list."""
    return getattr(args, "loss_type", None) or ()


def log_line(log: dict[str, float]) -> str:
    """The few values of a log that one follows while it runs; "" for a log that has none of them."""
    held_out = "held out:  " if "eval_loss" in log else ""
    prefix = "eval_" if held_out else ""
    shown = [f"{short} {log[prefix + name]:.4g}" for name, short in LINE.items() if prefix + name in log]
    return held_out + "  ".join(shown) if prefix + "loss" in log else ""


def show_live(trainer: Trainer, run: Run) -> None:
    """Write every log to metrics.jsonl; show a line of each in a script, and in a notebook the curves so far beside the
    Trainer's own table; say what is wrong when it first is."""
    trainer.add_callback(LogToFile(run.folder / "metrics.jsonl"))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(LogLine())
    if in_kernel() and is_main_process():
        trainer.add_callback(LiveCurves(run.name))
    trainer.add_callback(HealthWatch(run))
