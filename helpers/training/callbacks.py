"""Callbacks of a run: logs, live curves, completions, diagnostics, checkpoints and clean stops (transformers 5.23)."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, GenerationConfig, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from helpers.core import Interrupted, UserError, figure_to_image, is_main_process, is_notebook, wait_for_everyone
from helpers.models.chat import eos_token_ids
from helpers.runs.checkpoints import last_complete_checkpoint, write_manifest
from helpers.runs.curves import SAMPLES_FILE, Diagnostic, plot_run, read_samples
from helpers.runs.report import save_partial_report
from helpers.runs.run import Run
from helpers.settings.fields import DIAGNOSTIC_NAMES, TrainSettings
from helpers.training.diagnostics import diagnose

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DIAGNOSTIC_CODE = 128  # plus a diagnostic's index: above the number of every signal
CONSOLE_VALUES = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy",
                  "mean_token_accuracy": "token accuracy", "grad_norm": "grad norm", "learning_rate": "lr"}  # fmt: skip
COMPLETION_PROMPTS = 8


def add_callbacks(trainer: Any, run: Run, settings: TrainSettings, eval_set: Any) -> None:
    """Add all callbacks that `settings` ask for; completions are sampled for the first rows of `eval_set`."""
    run.when_stopped = save_partial_report
    shows_progress = trainer.pop_callback(ProgressCallback) is not None
    if is_main_process():
        trainer.add_callback(JsonlLogCallback(run.folder / "metrics.jsonl"))
        if shows_progress:
            trainer.add_callback(ConsoleLogCallback())
        if is_notebook():
            trainer.add_callback(LiveCurvesCallback(run.name))
        trainer.add_callback(DiagnosticsCallback(run))
        if settings.completion_steps:
            steps, tokens = settings.completion_steps, settings.completion_tokens
            trainer.add_callback(CompletionsCallback(trainer, run.folder, eval_set, steps, tokens))
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer.add_callback(CheckpointCallback(trainer, run.folder, settings.stop_on_diagnostic))


class CheckpointCallback(TrainerCallback):
    """Writes a manifest into each checkpoint and stops on a signal, a diagnostic of `stop_on_diagnostic`, or NaN.

    A signal is obeyed at the end of a step or during an evaluation. All processes of a launch stop at the same step.
    """

    def __init__(self, trainer: Any, folder: Path, stop_on_diagnostic: Sequence[str] = ()) -> None:
        self.trainer, self.folder, self.stop_on_diagnostic = trainer, folder, stop_on_diagnostic
        self.received_signal = 0
        self.diagnostic = ""  # the name of the diagnostic to stop on
        self.previous_handlers: dict[int, Any] = {}
        self.save_total_limit: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        args.eval_on_start = args.eval_on_start and state.global_step == 0  # a resumed run has this evaluation
        # the Trainer would delete old checkpoints before the new one has its manifest: on_save rotates them after it
        self.save_total_limit, args.save_total_limit = args.save_total_limit or self.save_total_limit, None
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        if self.received_signal:  # the second signal stops at once
            raise KeyboardInterrupt
        self.received_signal = number
        if is_main_process():
            print(f"\n{signal.Signals(number).name} received. Saving a checkpoint, then stopping.", flush=True)

    def _should_stop(self) -> bool:
        """Whether any process has a signal or a diagnostic to stop on. All of them ask at the same step."""
        index = DIAGNOSTIC_CODE + DIAGNOSTIC_NAMES.index(self.diagnostic) if self.diagnostic else 0
        code = index or self.received_signal
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(code, device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            code = int(flag)
        if code >= DIAGNOSTIC_CODE:
            self.diagnostic = DIAGNOSTIC_NAMES[code - DIAGNOSTIC_CODE]
        elif code:
            self.received_signal = code
        return code > 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._should_stop():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if control.should_save:
            self._check_weights(state)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # an evaluation may take longer than the grace period between SIGTERM and SIGKILL
        if self.previous_handlers and self._should_stop() and not self.diagnostic:
            self._check_weights(state)
            if state.global_step and not (self.folder / f"checkpoint-{state.global_step}").exists():
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
                self.on_save(args, state, control)
            self._stop(args, state)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise self._nan_error(state, "The loss is")
        if self.stop_on_diagnostic and not self.diagnostic:
            names = [diagnostic.name for diagnostic in _diagnose(args, state)]
            self.diagnostic = next((name for name in names if name in self.stop_on_diagnostic), "")

    def _check_weights(self, state: TrainerState) -> None:
        """Raise UserError before NaN or Inf is saved in a checkpoint."""
        if not all(bool(p.isfinite().all()) for p in self.trainer.model.parameters() if p.requires_grad):
            raise self._nan_error(state, "Trained weights are")

    def _nan_error(self, state: TrainerState, subject: str) -> UserError:
        self.restore_handlers()
        last = last_complete_checkpoint(self.folder)
        return UserError(
            f"{subject} NaN or Inf at step {state.global_step}. Lower --learning_rate or --max_grad_norm, or raise "
            "--warmup_steps, and use `--resume never` to retrain. "
            + (f"The last complete checkpoint is {last.name}." if last else "No checkpoint was saved.")
        )

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        wait_for_everyone()  # each process writes its own files
        if is_main_process():
            write_manifest(self.folder / f"checkpoint-{state.global_step}")
            best, limit = state.best_model_checkpoint, self.save_total_limit
            rotate_checkpoints(str(self.folder), limit, best_model_checkpoint=best, use_mtime=False)
        wait_for_everyone()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._should_stop() and state.global_step < state.max_steps:  # else training is complete
            self._stop(args, state)
        self.restore_handlers()

    def _stop(self, args: Any, state: TrainerState) -> None:
        self.restore_handlers()
        last, at = last_complete_checkpoint(self.folder), f"at step {state.global_step} of {state.max_steps}"
        if not self.diagnostic:
            advice = f"Run the same command to resume from {last.name}." if last else "No checkpoint was saved."
            cause = signal.Signals(self.received_signal).name
            raise Interrupted(f"Interrupted by {cause} {at}. {advice}", 128 + self.received_signal)
        causes = [each for each in _diagnose(args, state) if each.name == self.diagnostic]
        text = f"{causes[0].observation}. Try {causes[0].suggestion}" if causes else "found by another process"
        advice = f"Without it, the same command resumes from {last.name}." if last else "No checkpoint was saved."
        message = f"Stopped {at} by --stop_on_diagnostic {self.diagnostic}: {text}. {advice}"
        # a launcher kills all processes when one fails: the others exit with 0, so that the main one can print this
        raise Interrupted(message, 3 if is_main_process() else 0)

    def restore_handlers(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}


class JsonlLogCallback(TrainerCallback):
    """Writes each log as a line of metrics.jsonl; a resumed run first restores the logs of its checkpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.file.write_text("".join(json.dumps(log) + "\n" for log in state.log_history))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.log_history:
            with self.file.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class ConsoleLogCallback(ProgressCallback):
    """Shows progress bars, and each log as one short line instead of the Trainer's dictionary."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.log_history and (text := log_line(state.log_history[-1])):
            tqdm.write(f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {text}")


def log_line(log: dict[str, float]) -> str:
    """Return a log's main values as text; "" for a log without a loss."""
    prefix = "eval_" if "eval_loss" in log else ""
    values = [f"{short} {log[prefix + name]:.4g}" for name, short in CONSOLE_VALUES.items() if prefix + name in log]
    return "held out:  " * bool(prefix) + "  ".join(values) if prefix + "loss" in log else ""


class LiveCurvesCallback(TrainerCallback):
    """Updates a plot of the curves in a notebook; drawing takes at most a tenth of the time."""

    def __init__(self, name: str) -> None:
        self.name, self.display, self.next_time = name, None, 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.next_time:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        from IPython.display import display

        start = time.monotonic()
        figure = plot_run(state.log_history, f"{self.name}, step {state.global_step}", _diagnose(args, state))
        if self.display is None:
            self.display = display(figure_to_image(figure), display_id=True)
        else:
            self.display.update(figure_to_image(figure))
        self.next_time = time.monotonic() + max(1.0, 10 * (time.monotonic() - start))


class DiagnosticsCallback(TrainerCallback):
    """Prints each diagnostic when it first appears, and keeps the current ones in run.json."""

    def __init__(self, run: Run) -> None:
        self.run, self.printed = run, set[str]()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.run.save(diagnostics=[], max_steps=state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        diagnostics = _diagnose(args, state)
        before = [diagnostic["name"] for diagnostic in self.run.record["diagnostics"]]
        self.run.set(diagnostics=[dataclasses.asdict(diagnostic) for diagnostic in diagnostics])
        if before != [diagnostic.name for diagnostic in diagnostics]:
            self.run.save()  # now, in case the run is killed
        for diagnostic in diagnostics:
            if diagnostic.name not in self.printed:
                tqdm.write(f"step {state.global_step}: {diagnostic}")
                self.printed.add(diagnostic.name)


def _diagnose(args: Any, state: TrainerState) -> list[Diagnostic]:
    return diagnose(state.log_history, state.max_steps, getattr(args, "loss_type", None) or ())


class CompletionsCallback(TrainerCallback):
    """Answers the first held-out prompts before the first step and every `every` steps (below 1: a share of all).

    Each answer is a line of samples.jsonl. The mean length (tokens) and the share of answers that are cut off are
    logged as `samples/mean_length` and `samples/cut`. Training is not affected: generation is greedy and draws no
    random numbers. Not supported under ZeRO-3 and FSDP, where every process would have to take part.
    """

    def __init__(self, trainer: Any, folder: Path, rows: Any, every: float, max_new_tokens: int) -> None:
        self.trainer, self.file, self.every, self.max_new_tokens = trainer, folder / SAMPLES_FILE, every, max_new_tokens
        first_rows = rows.select(range(min(10 * COMPLETION_PROMPTS, len(rows))))  # pairs of a prompt are neighbours
        prompts = dict.fromkeys(tuple(prompt_ids_of(row)) for row in first_rows)
        self.prompts = [prompt for prompt in prompts if prompt][:COMPLETION_PROMPTS]

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        if self.trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            self.every = 0
            print("Completions are not sampled with FSDP or ZeRO-3. Use 04_vibes.py after training.")
        self.every = math.ceil(self.every * state.max_steps) if self.every < 1 else math.ceil(self.every)
        rows = [row for row in read_samples(self.file.parent) if 0 < state.global_step >= row["step"]]
        self.file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        if state.global_step == 0:
            self._sample(args, state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.every and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self._sample(args, state, control)

    def _sample(self, args: Any, state: TrainerState, control: Any) -> None:
        if not self.every or not self.prompts:
            return
        tokenizer, accelerator = self.trainer.processing_class, self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model)
        with accelerator.autocast():  # as in the Trainer's own forward
            answers = generate_greedily(model, tokenizer, self.prompts, self.max_new_tokens)
        with self.file.open("a", encoding="utf-8") as file:
            for ids, answer in zip(self.prompts, answers, strict=True):
                prompt, text = (tokenizer.decode(x, skip_special_tokens=True).strip() for x in (ids, answer))
                row = {"step": state.global_step, "prompt": prompt, "answer": text, "tokens": len(answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        mean, ends = sum(map(len, answers)) / len(answers), eos_token_ids(tokenizer, model.generation_config)
        cut = sum(len(ids) == self.max_new_tokens and ids[-1] not in ends for ids in answers) / len(answers)
        prompt, text = " ".join(prompt.split())[-60:], " ".join(text.split())[:60]
        tqdm.write(f"step {state.global_step}: sampled answers have {mean:.3g} tokens on average; {prompt} → {text}")
        # not Trainer.log: TRL's (dpo_trainer.py, log) would add and reset the metrics since the last log
        log = {"samples/mean_length": mean, "samples/cut": cut, "epoch": state.epoch or 0.0}
        state.log_history.append(log | {"step": state.global_step})
        self.trainer.callback_handler.call_event("on_log", args, state, control, logs=log)


def prompt_ids_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a row's prompt; of a conversation, all tokens before the first that is trained on."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    first = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
    return list(row["input_ids"][:first])


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of an answer to each prompt, with its end token; the model's mode is not changed."""
    ends = eos_token_ids(tokenizer, model.generation_config)
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    # gradient checkpointing disables the cache in the model's config
    config = GenerationConfig(do_sample=False, use_cache=True, **options)
    batch = tokenizer.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            output = model.generate(**batch, generation_config=config)
    finally:
        model.train(training)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: next((i + 1 for i, t in enumerate(ids) if t in ends), len(ids))] for ids in new]
