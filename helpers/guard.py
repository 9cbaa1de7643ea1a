"""What keeps a run from being lost: marked checkpoints, a save when it is told to stop, an end when it goes wrong."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from helpers.checkpoints import compare_by_steps, mark_whole, newest_marked
from helpers.errors import Interrupted, UserError
from helpers.fields import TrainSettings
from helpers.health import NAMES, examine
from helpers.live import loss_types, show_live
from helpers.paths import short_path
from helpers.processes import is_main_process, wait_for_all
from helpers.runs import Run
from helpers.samples import Sampler

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FOUND = 128  # and a finding's number: above every signal's


def keep_watch(trainer: Trainer, run: Run, settings: TrainSettings, eval_set: Any) -> None:
    """Log to metrics.jsonl, show curves and findings, sample answers to the first rows of `eval_set`, mark checkpoints,
    and stop cleanly on SIGTERM, SIGINT, a loss of NaN, the findings of --stop_on and --early_stopping_patience.
    """
    compare_by_steps()
    show_live(trainer, run)
    if settings.sample_steps:
        trainer.add_callback(Sampler(trainer, run.folder, eval_set, settings.sample_steps, settings.sample_tokens))
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer.add_callback(Guard(trainer, run.folder, settings.stop_on))


class Guard(TrainerCallback):
    """Reads what transformers 5.23 calls while it trains (trainer.py); saves through the Trainer itself."""

    def __init__(self, trainer: Any, folder: Path, stop_on: Sequence[str] = ()) -> None:
        self.trainer, self.folder, self.stop_on = trainer, folder, stop_on
        self.received: int | None = None  # a signal
        self.found = ""  # a finding of `stop_on`
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
        """Whether any process has a signal or a finding to stop on; asked by all of them at the same step."""
        told = FOUND + NAMES.index(self.found) if self.found else self.received or 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(told, device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            told = int(flag)
        if told >= FOUND:
            self.found = NAMES[told - FOUND]
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
        if self.stop_on and not self.found:
            names = [finding.name for finding in examine(state.log_history, state.max_steps, loss_types(args))]
            self.found = next((name for name in names if name in self.stop_on), "")

    def _refuse_nan(self, state: TrainerState) -> None:
        """No checkpoint is made of weights that are lost."""
        weights = [p for p in self.trainer.model.parameters() if p.requires_grad]
        if not all(bool(torch.isfinite(p).all()) for p in weights):
            raise self._nan(state, "weights are not numbers any more")

    def _nan(self, state: TrainerState, what: str) -> UserError:
        self.give_signals_back()
        last = newest_marked(self.folder)
        kept = f"{last.name} is whole" if last else "no checkpoint had been saved"
        return UserError(
            f"{what} (found at step {state.global_step}; {kept}): lower --learning_rate or --max_grad_norm, or raise "
            "--warmup_steps; with --resume never the run begins anew"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait_for_all()  # each process writes files of its own
        if is_main_process():
            mark_whole(self.folder / f"checkpoint-{state.global_step}")
            rotate_checkpoints(
                str(self.folder),
                save_total_limit=self.limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=False,
            )
        wait_for_all()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._told_to_stop() and state.global_step < state.max_steps:  # else it is done, but for the last save
            self._stop(state)
        self.give_signals_back()

    def _stop(self, state: TrainerState) -> None:
        self.give_signals_back()
        last = newest_marked(self.folder)
        goes_on = f"the same command goes on from {short_path(last)}" if last else "no checkpoint had been saved"
        at = f"at step {state.global_step} of {state.max_steps}"
        if self.found:
            found = [f for f in examine(state.log_history, state.max_steps) if f.name == self.found]
            said = f"{found[0].seen}; try {found[0].try_}" if found else "found by another process"
            # a launcher ends all when one has failed: the others do not, so that the main process can say this first
            status = 3 if is_main_process() else 0
            raise Interrupted(f"stopped {at} by --stop_on {self.found}: {said}; without it {goes_on}", status)
        number = self.received or 0
        raise Interrupted(f"stopped by {signal.Signals(number).name} {at}: {goes_on}", 128 + number)

    def give_signals_back(self) -> None:
        """Let signals mean what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
