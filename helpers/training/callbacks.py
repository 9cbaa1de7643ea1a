"""Callbacks of a run: logs, live curves, completions, diagnostics, checkpoints and clean stops (transformers 5.23)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, GenerationConfig, ProgressCallback, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints

from helpers.core import (
    Interrupted,
    UserError,
    figure_to_png,
    handle_signals,
    is_main_process,
    is_notebook,
    printable,
    wait_for_everyone,
)
from helpers.models.adapters import make_portable, upcast_adapter
from helpers.models.chat import eos_token_ids
from helpers.runs.checkpoints import last_complete_checkpoint, write_manifest
from helpers.runs.curves import SAMPLES_FILE, Diagnostic, plot_runs, read_samples
from helpers.runs.report import save_partial_report
from helpers.runs.run import Run
from helpers.settings.fields import DIAGNOSTIC_NAMES, TrainSettings
from helpers.training.diagnostics import diagnose
from helpers.training.microbatches import MicroBatchDPOTrainer
from helpers.training.resume import ResumeCallback
from helpers.training.trainer import count_rows_once, eval_mode

DIAGNOSTIC_CODE = 128  # above the number of every signal
NO_CHECKPOINT = "No checkpoint was saved."
CONSOLE_VALUES = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy",
                  "mean_token_accuracy": "token accuracy", "grad_norm": "grad norm", "learning_rate": "lr"}  # fmt: skip
COMPLETION_PROMPTS = 8


def prepare_trainer(trainer: Any, run: Run, settings: TrainSettings, eval_set: Any) -> None:
    """Add all callbacks that `settings` ask for, and keep an adapter in float32 unless `--adapter_dtype` is bf16.

    Completions are sampled for the first rows of `eval_set`. Raises UserError if the processes of a launch would each
    train their own copy of the model.
    """
    launched, together = int(os.environ.get("WORLD_SIZE", "1")), trainer.accelerator.num_processes
    if launched != together:
        raise UserError(
            f"{launched} processes were launched, but accelerate sees {together}: each would train its own copy. "
            "Launch one process, or use a configuration of recipes/accelerate/ that fits this machine."
        )
    if settings.values()["tuning"] != "full" and settings.adapter_dtype == "fp32":
        upcast_adapter(trainer.model)
    count_rows_once(trainer)
    if isinstance(trainer, MicroBatchDPOTrainer):
        trainer.keep_budget(run)
    run.when_stopped = save_partial_report
    shows_progress = trainer.pop_callback(ProgressCallback) is not None
    if is_main_process():
        if shows_progress:
            trainer.add_callback(ConsoleLogCallback())
        trainer.add_callback(RecordCallback(run))
        if is_notebook():
            trainer.add_callback(LiveCurvesCallback(run.name))
        if settings.completion_steps:
            trainer.add_callback(CompletionsCallback(trainer, run.folder, eval_set, settings))
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer.add_callback(CheckpointCallback(trainer, run.folder, settings.stop_on_diagnostic))
    ResumeCallback(trainer, run.folder).add()


class CheckpointCallback(TrainerCallback):
    """Writes a manifest into each checkpoint and stops on a signal, a diagnostic of `stop_on_diagnostic`, or NaN.

    A signal is obeyed at the end of a step or during an evaluation. All processes of a launch stop at the same step.
    """

    def __init__(self, trainer: Any, folder: Path, stop_on_diagnostic: Sequence[str] = ()) -> None:
        self.trainer, self.folder, self.stop_on_diagnostic = trainer, folder, stop_on_diagnostic
        self.stop_code = 0  # a signal that was received, or DIAGNOSTIC_CODE plus the index of a diagnostic
        self.previous_handlers: dict[int, Any] = {}  # empty unless training runs
        self.save_total_limit: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # the Trainer would delete old checkpoints before the new one has its manifest: on_save rotates them after it
        self.save_total_limit, args.save_total_limit = args.save_total_limit or self.save_total_limit, None
        self.previous_handlers = handle_signals(self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if 0 < self.stop_code < DIAGNOSTIC_CODE:  # the second signal stops at once
            raise KeyboardInterrupt
        self.stop_code = self.stop_code or number
        if is_main_process():
            print(f"\n{signal.Signals(number).name} received. Saving a checkpoint, then stopping.", flush=True)

    def _should_stop(self) -> bool:
        """Whether any process has a signal or a diagnostic to stop on. All of them ask at the same step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            code = torch.tensor(self.stop_code, device=self.trainer.args.device)
            torch.distributed.all_reduce(code, op=torch.distributed.ReduceOp.MAX)
            self.stop_code = int(code)
        return self.stop_code > 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._should_stop():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if control.should_save:
            self._check_weights(state)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # an evaluation may take longer than the grace period between SIGTERM and SIGKILL
        if self.previous_handlers and self._should_stop() and self.stop_code < DIAGNOSTIC_CODE:
            self._check_weights(state)
            if state.global_step and not (self.folder / f"checkpoint-{state.global_step}").exists():
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
                self.trainer.callback_handler.on_save(args, state, control)
            self._stop(args, state)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise self._nan_error(state, "The loss is")
        if self.stop_on_diagnostic and not self.stop_code:
            names = [each.name for each in _diagnose(args, state) if each.name in self.stop_on_diagnostic]
            if names:
                self.stop_code = DIAGNOSTIC_CODE + DIAGNOSTIC_NAMES.index(names[0])

    def _check_weights(self, state: TrainerState) -> None:
        """Raise UserError before NaN or Inf is saved in a checkpoint."""
        if not all(bool(p.isfinite().all()) for p in self.trainer.model.parameters() if p.requires_grad):
            raise self._nan_error(state, "The trained weights contain")

    def _nan_error(self, state: TrainerState, subject: str) -> UserError:
        last = last_complete_checkpoint(self.folder)
        return UserError(
            f"{subject} NaN or Inf at step {state.global_step}. Lower --learning_rate or --max_grad_norm, or raise "
            "--warmup_steps, and use `--resume never` to retrain. "
            + (f"The last complete checkpoint is {last.name}." if last else NO_CHECKPOINT)
        )

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        wait_for_everyone()  # each process writes its own files
        if is_main_process():
            make_portable(self.folder / f"checkpoint-{state.global_step}")
            write_manifest(self.folder / f"checkpoint-{state.global_step}")
            best, limit = state.best_model_checkpoint, self.save_total_limit
            rotate_checkpoints(str(self.folder), limit, best_model_checkpoint=best, use_mtime=False)
        wait_for_everyone()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        last = last_complete_checkpoint(self.folder)
        is_saved = last is not None and last.name == f"checkpoint-{state.global_step}"
        is_signal = self._should_stop() and self.stop_code < DIAGNOSTIC_CODE
        if self.stop_code and (state.global_step < state.max_steps or (is_signal and is_saved)):
            self._stop(args, state)  # else training is complete
        for number, handler in self.previous_handlers.items():  # after an error, Run.training restores them
            signal.signal(number, handler)
        self.previous_handlers = {}

    def _stop(self, args: Any, state: TrainerState) -> None:
        last, at = last_complete_checkpoint(self.folder), f"at step {state.global_step} of {state.max_steps}"
        if self.stop_code < DIAGNOSTIC_CODE:
            advice = f"Run the same command to resume from {last.name}." if last else NO_CHECKPOINT
            cause = signal.Signals(self.stop_code).name
            raise Interrupted(f"Interrupted by {cause} {at}. {advice}", 128 + self.stop_code)
        name = DIAGNOSTIC_NAMES[self.stop_code - DIAGNOSTIC_CODE]
        causes = [each for each in _diagnose(args, state) if each.name == name]
        text = f"{causes[0].observation}. Try {causes[0].suggestion}" if causes else "found by another process"
        advice = f"Without it, the same command resumes from {last.name}." if last else NO_CHECKPOINT
        message = f"Stopped {at} by --stop_on_diagnostic {name}: {text}. {advice}"
        # a launcher kills all processes when one fails: the others exit with 0, so that the main one can print this
        raise Interrupted(message, 3 if is_main_process() else 0)


class RecordCallback(TrainerCallback):
    """Writes each log to metrics.jsonl and the current diagnostics to run.json; prints what appears for the first time.

    A resumed run first restores the logs of its checkpoint.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.file, self.printed = run, run.folder / "metrics.jsonl", set[str]()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.file.write_text("".join(json.dumps(log) + "\n" for log in state.log_history))
        self.run.save(diagnostics=[], max_steps=state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.log_history:
            with self.file.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
        diagnostics = _diagnose(args, state)
        self.run.save(diagnostics=[dataclasses.asdict(diagnostic) for diagnostic in diagnostics])
        for diagnostic in diagnostics:
            if diagnostic.name not in self.printed:
                tqdm.write(f"step {state.global_step}: {diagnostic}")
                self.printed.add(diagnostic.name)


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
        self.name, self.is_shown, self.next_time = name, False, 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.next_time:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        from IPython.display import Image, display

        start = time.monotonic()
        title = f"{self.name}, step {state.global_step}"
        figure = plot_runs({"": state.log_history}, title, _diagnose(args, state))
        display(Image(figure_to_png(figure, dpi=100)), display_id=f"curves-{id(self)}", update=self.is_shown)
        self.is_shown, self.next_time = True, time.monotonic() + max(1.0, 10 * (time.monotonic() - start))


def _diagnose(args: Any, state: TrainerState) -> list[Diagnostic]:
    return diagnose(state.log_history, state.max_steps, getattr(args, "loss_type", None) or ())


class CompletionsCallback(TrainerCallback):
    """Answers the first held-out prompts before the first step and every `every` steps (below 1: a share of all).

    Each answer is a line of samples.jsonl. The mean length (tokens) and the share of answers that are cut off are
    logged as `samples/mean_length` and `samples/cut`. Training is not affected: generation is greedy and draws no
    random numbers. Not supported under ZeRO-3 and FSDP, where every process would have to take part.
    """

    def __init__(self, trainer: Any, folder: Path, rows: Any, settings: TrainSettings) -> None:
        self.trainer, self.file = trainer, folder / SAMPLES_FILE
        self.every, self.max_new_tokens = settings.completion_steps, settings.completion_tokens
        first_rows = rows.select(range(min(10 * COMPLETION_PROMPTS, len(rows))))  # pairs of a prompt are neighbours
        prompts = {tuple(prompt_ids_of(row)): prompt_text_of(row) for row in first_rows}
        self.prompts = [prompt for prompt in prompts if prompt][:COMPLETION_PROMPTS]
        self.texts = [prompts[ids] for ids in self.prompts]

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            self.every = 0
            print("Completions are not sampled with FSDP or ZeRO-3. Use 04_vibes.py after training.")
        self.every = math.ceil(self.every * state.max_steps) if self.every < 1 else math.ceil(self.every)
        rows = [row for row in read_samples(self.file.parent) if 0 < state.global_step >= row["step"]]
        self.file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        if self.every and state.global_step == 0:
            self._sample(args, state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.every and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self._sample(args, state, control)

    def _sample(self, args: Any, state: TrainerState, control: Any) -> None:
        if not self.prompts:
            return
        tokenizer, accelerator = self.trainer.processing_class, self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model)
        with accelerator.autocast():  # as in the Trainer's own forward
            answers = generate_greedily(model, tokenizer, self.prompts, self.max_new_tokens)
        with self.file.open("a", encoding="utf-8") as file:
            for prompt, answer in zip(self.texts, answers, strict=True):
                text = tokenizer.decode(answer, skip_special_tokens=True).strip()
                row = {"step": state.global_step, "prompt": prompt, "answer": text, "tokens": len(answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        mean, ends = sum(map(len, answers)) / len(answers), eos_token_ids(tokenizer, model.generation_config)
        cut = sum(len(ids) == self.max_new_tokens and ids[-1] not in ends for ids in answers) / len(answers)
        prompt, text = " ".join(prompt.split())[-60:], " ".join(text.split())[:60]
        sample = printable(f"{prompt} → {text}")
        tqdm.write(f"step {state.global_step}: sampled answers have {mean:.3g} tokens on average; {sample}")
        # not Trainer.log: TRL's (dpo_trainer.py, log) would add and reset the metrics since the last log
        log = {"samples/mean_length": mean, "samples/cut": cut, "epoch": state.epoch or 0.0}
        state.log_history.append(log | {"step": state.global_step})
        self.trainer.callback_handler.call_event("on_log", args, state, control, logs=log)


def prompt_text_of(row: dict[str, Any]) -> str:
    """Return the user's last message before the answer that `prompt_ids_of` asks for."""
    messages = row.get("prompt") or itertools.takewhile(lambda m: m["role"] != "assistant", row["messages"])
    return str([m["content"] for m in messages if m["role"] == "user"][-1]).strip()


def prompt_ids_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a row's prompt; of a conversation, all tokens before the first that is trained on."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1] == -100, pairs)]


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of an answer to each prompt, with its end token; the model's mode is not changed."""
    ends, pad = eos_token_ids(tokenizer, model.generation_config), tokenizer.pad_token_id
    # gradient checkpointing disables the cache in the model's config
    config = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends
    )
    batch = tokenizer.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    with eval_mode(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        output = model.generate(**batch, generation_config=config)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: next((i + 1 for i, t in enumerate(ids) if t in ends), len(ids))] for ids in new]
