"""What keeps a run from being lost: marked checkpoints, a save when it is told to stop, an end when it goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from helpers.core import (
    Interrupted,
    UserError,
    figure_to_image,
    is_main_process,
    is_notebook,
    short_path,
    wait_for_everyone,
)
from helpers.models.chat import eos_token_ids
from helpers.runs.checkpoints import last_complete_checkpoint, patch_step_comparison, write_manifest
from helpers.runs.curves import SAMPLES_FILE, plot_run, read_samples
from helpers.runs.run import Run
from helpers.settings.fields import DIAGNOSTIC_NAMES, TrainSettings
from helpers.training.diagnostics import diagnose

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FOUND = 128  # and a diagnostic's number: above every signal's


def add_callbacks(trainer: Trainer, run: Run, settings: TrainSettings, eval_set: Any) -> None:
    """Log to metrics.jsonl, show curves and diagnostics, sample answers to the first rows of `eval_set`, mark checkpoints,
    and stop cleanly on SIGTERM, SIGINT, a loss of NaN, the diagnostics of --stop_on_diagnostic and --early_stopping_patience.
    """
    patch_step_comparison()
    add_log_callbacks(trainer, run)
    if settings.completion_steps:
        trainer.add_callback(
            CompletionsCallback(trainer, run.folder, eval_set, settings.completion_steps, settings.completion_tokens)
        )
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer.add_callback(CheckpointCallback(trainer, run.folder, settings.stop_on_diagnostic))


class CheckpointCallback(TrainerCallback):
    """Reads what transformers 5.23 calls while it trains (trainer.py); saves through the Trainer itself."""

    def __init__(self, trainer: Any, folder: Path, stop_on_diagnostic: Sequence[str] = ()) -> None:
        self.trainer, self.folder, self.stop_on_diagnostic = trainer, folder, stop_on_diagnostic
        self.received: int | None = None  # a signal
        self.found = ""  # a diagnostic of `stop_on_diagnostic`
        self.before: dict[int, Any] = {}
        self.limit: int | None = None  # checkpoints that are kept

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.eval_on_start = args.eval_on_start and state.global_step == 0  # it was done before what is resumed
        # the Trainer would delete old checkpoints before the new one has its marker: on_save does it after
        self.limit, args.save_total_limit = args.save_total_limit or self.limit, None
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:  # a second time: at once
            raise KeyboardInterrupt
        self.received = number
        if is_main_process():
            print(f"\n{signal.Signals(number).name}: saving a checkpoint, then stopping.", flush=True)

    def _told_to_stop(self) -> bool:
        """Whether any process has a signal or a diagnostic to stop on; asked by all of them at the same step."""
        told = FOUND + DIAGNOSTIC_NAMES.index(self.found) if self.found else self.received or 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(told, device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            told = int(flag)
        if told >= FOUND:
            self.found = DIAGNOSTIC_NAMES[told - FOUND]
        elif told:
            self.received = told
        return told > 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._told_to_stop():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if control.should_save:
            self._refuse_nan(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.before and self._told_to_stop() and not self.found:  # it may last longer than the grace that is given
            self._refuse_nan(state)
            if not (self.folder / f"checkpoint-{state.global_step}").exists() and state.global_step:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
                self.on_save(args, state, control)
            self._stop(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise self._nan(state, "the loss is not a number")
        if self.stop_on_diagnostic and not self.found:
            names = [diagnostic.name for diagnostic in diagnose(state.log_history, state.max_steps, loss_types(args))]
            self.found = next((name for name in names if name in self.stop_on_diagnostic), "")

    def _refuse_nan(self, state: TrainerState) -> None:
        """No checkpoint is made of weights that are lost."""
        weights = [p for p in self.trainer.model.parameters() if p.requires_grad]
        if not all(bool(torch.isfinite(p).all()) for p in weights):
            raise self._nan(state, "weights are not numbers any more")

    def _nan(self, state: TrainerState, what: str) -> UserError:
        self.give_signals_back()
        last = last_complete_checkpoint(self.folder)
        kept = f"{last.name} is whole" if last else "no checkpoint had been saved"
        return UserError(
            f"{what} (found at step {state.global_step}; {kept}): lower --learning_rate or --max_grad_norm, or raise "
            "--warmup_steps; with --resume never the run begins anew"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait_for_everyone()  # each process writes files of its own
        if is_main_process():
            write_manifest(self.folder / f"checkpoint-{state.global_step}")
            rotate_checkpoints(
                str(self.folder),
                save_total_limit=self.limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=False,
            )
        wait_for_everyone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._told_to_stop() and state.global_step < state.max_steps:  # else it is done, but for the last save
            self._stop(state)
        self.give_signals_back()

    def _stop(self, state: TrainerState) -> None:
        self.give_signals_back()
        last = last_complete_checkpoint(self.folder)
        goes_on = f"the same command goes on from {short_path(last)}" if last else "no checkpoint had been saved"
        at = f"at step {state.global_step} of {state.max_steps}"
        if self.found:
            found = [f for f in diagnose(state.log_history, state.max_steps) if f.name == self.found]
            said = f"{found[0].observation}; try {found[0].suggestion}" if found else "found by another process"
            # a launcher ends all when one has failed: the others do not, so that the main process can say this first
            status = 3 if is_main_process() else 0
            raise Interrupted(
                f"stopped {at} by --stop_on_diagnostic {self.found}: {said}; without it {goes_on}", status
            )
        number = self.received or 0
        raise Interrupted(f"stopped by {signal.Signals(number).name} {at}: {goes_on}", 128 + number)

    def give_signals_back(self) -> None:
        """Let signals mean what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


LINE = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "grad_norm": "gradient",
    "learning_rate": "lr",
}


class JsonlLogCallback(TrainerCallback):
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


class ConsoleLogCallback(ProgressCallback):
    """Progress bars as ever, but one short line a log, where the Trainer prints everything there is."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if is_main_process() and state.log_history and (text := log_line(state.log_history[-1])):
            tqdm.write(f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {text}")


class LiveCurvesCallback(TrainerCallback):
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
        diagnostics = diagnose(state.log_history, state.max_steps, loss_types)
        picture = figure_to_image(plot_run(state.log_history, f"{self.name}, step {state.global_step}", diagnostics))
        if self.shown is None:
            self.shown = display(picture, display_id=True)
        else:
            self.shown.update(picture)
        self.due = time.monotonic() + max(1.0, 10 * (time.monotonic() - begun))


class DiagnosticsCallback(TrainerCallback):
    """Says each diagnostic when it first appears, and keeps those there are for run.json."""

    def __init__(self, run: Run) -> None:
        self.run, self.said = run, set[str]()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.save(diagnostics=[], max_steps=state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        diagnostics = diagnose(state.log_history, state.max_steps, loss_types(args))
        before = [diagnostic["name"] for diagnostic in self.run.record["diagnostics"]]
        self.run.set(diagnostics=[dataclasses.asdict(diagnostic) for diagnostic in diagnostics])
        if before != [diagnostic.name for diagnostic in diagnostics]:
            self.run.save()  # now, for a run that is killed later
        for diagnostic in diagnostics:
            if diagnostic.name not in self.said and is_main_process():
                tqdm.write(f"step {state.global_step}: {diagnostic}")
            self.said.add(diagnostic.name)


def loss_types(args: TrainingArguments) -> Collection[str]:
    """DPOConfig's `loss_type`, a list."""
    return getattr(args, "loss_type", None) or ()


def log_line(log: dict[str, float]) -> str:
    """The few values of a log that one follows while it runs; "" for a log that has none of them."""
    held_out = "held out:  " if "eval_loss" in log else ""
    prefix = "eval_" if held_out else ""
    shown = [f"{short} {log[prefix + name]:.4g}" for name, short in LINE.items() if prefix + name in log]
    return held_out + "  ".join(shown) if prefix + "loss" in log else ""


def add_log_callbacks(trainer: Trainer, run: Run) -> None:
    """Write every log to metrics.jsonl; show a line of each in a script, and in a notebook the curves so far beside the
    Trainer's own table; say what is wrong when it first is."""
    trainer.add_callback(JsonlLogCallback(run.folder / "metrics.jsonl"))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ConsoleLogCallback())
    if is_notebook() and is_main_process():
        trainer.add_callback(LiveCurvesCallback(run.name))
    trainer.add_callback(DiagnosticsCallback(run))


SAMPLE_PROMPTS = 8


class CompletionsCallback(TrainerCallback):
    """Answers the first held-out prompts before the first step and every `every` steps (below 1: that share of all).

    Each answer is a line of samples.jsonl; their mean length (tokens) and the share that was cut off are a log of their
    own, `samples/mean_length` and `samples/cut`.
    Nothing of the training changes: the answers are greedy, and draw no random numbers. Under ZeRO-3 and FSDP there are
    none, for every process would have to take part. Read in transformers 5.23 (trainer_callback.py).
    """

    def __init__(self, trainer: Any, folder: Path, rows: Any, every: float, max_new_tokens: int) -> None:
        self.trainer, self.file, self.every, self.max_new_tokens = trainer, folder / SAMPLES_FILE, every, max_new_tokens
        few = rows.select(range(min(10 * SAMPLE_PROMPTS, len(rows))))  # pairs of one prompt stand together
        self.prompts = [p for p in dict.fromkeys(tuple(prompt_ids_of(row)) for row in few) if p][:SAMPLE_PROMPTS]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        if self.trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            self.every = 0
            print("samples: none, because the weights lie in pieces (FSDP, ZeRO-3); 04_vibes.py reads the result")
        self.every = math.ceil(self.every * state.max_steps) if self.every < 1 else math.ceil(self.every)
        if is_main_process():
            kept = [row for row in read_samples(self.file.parent) if 0 < state.global_step >= row["step"]]
            self.file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "utf-8")
        if state.global_step == 0:
            self._sample(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self._sample(args, state, control)

    def _sample(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if not (self.every and self.prompts and is_main_process()):
            return
        tokenizer, accelerator = self.trainer.processing_class, self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model)
        with accelerator.autocast():  # which the Trainer's own forward has, and `generate` has not
            answers = generate_greedily(model, tokenizer, self.prompts, self.max_new_tokens)
        with self.file.open("a", encoding="utf-8") as file:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                texts = {
                    "prompt": tokenizer.decode(prompt, skip_special_tokens=True).strip(),
                    "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                }
                file.write(json.dumps({"step": state.global_step, **texts, "tokens": len(answer)}, ensure_ascii=False))
                file.write("\n")
        mean, ends = sum(map(len, answers)) / len(answers), eos_token_ids(tokenizer, model.generation_config)
        cut = sum(len(ids) == self.max_new_tokens and ids[-1] not in ends for ids in answers) / len(answers)
        tqdm.write(f"step {state.global_step}: sampled answers have {mean:.3g} tokens; {_shorten(texts)}")
        # not Trainer.log: TRL's (dpo_trainer.py, log) adds what it has gathered since its last log, and forgets it
        row = {"samples/mean_length": mean, "samples/cut": cut, "epoch": state.epoch or 0.0}
        state.log_history.append({**row, "step": state.global_step})
        self.trainer.callback_handler.call_event("on_log", args, state, control, logs=row)


def prompt_ids_of(row: dict[str, Any]) -> list[int]:
    """The prompt's tokens: a column of their own in pairs; in a conversation, all before the first that is learned."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    first = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
    return list(row["input_ids"][:first])


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """The tokens of one answer a prompt, its end included; the model is left as it was found."""
    ends = eos_token_ids(tokenizer, model.generation_config)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,  # which gradient checkpointing has switched off in the model's own
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
    )
    batch = tokenizer.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt").to(
        model.device
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            output = model.generate(**batch, generation_config=config)
    finally:
        model.train(training)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: next((i + 1 for i, t in enumerate(ids) if t in ends), len(ids))] for ids in new]


def _shorten(texts: dict[str, str], width: int = 60) -> str:
    prompt, answer = (" ".join(texts[name].split()) for name in ("prompt", "answer"))
    return f"{prompt[-width:]} → {answer[:width]}"
