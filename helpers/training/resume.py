"""What a resumed run has to know of the steps before: sums, times, and whether it is at its end (transformers 5.23)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import CallbackHandler

from helpers.core import UserError, write_json

PROGRESS, REFERENCE = "progress.json", "reference.pt"  # in a checkpoint; the second with --sync_ref_model


class ResumeCallback(TrainerCallback):
    """Gives a resumed run the numbers of an undisturbed one, and takes no step after the last.

    The Trainer counts its mean loss, its times and its speed from each start. TRL drops the values that it has
    collected since the last log, and counts `num_tokens` from 0. A checkpoint of the last step, or of an early stop, is
    trained further (trainer.py, _inner_training_loop).
    """

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.eval_on_start = trainer.args.eval_on_start
        self.evaluation_due = False  # an evaluation of this step has not come to its end
        self.order = ""  # PyTorch's random state at the start of the epoch
        self.seconds, self.started = 0.0, 0.0  # of training before the resume; when this start began
        self.run_epoch, trainer._run_epoch = trainer._run_epoch, self._run_epoch

    def add(self) -> None:
        """Add this callback before those that save and report, and after the one that decides when."""
        handler: CallbackHandler = self.trainer.callback_handler
        handler.callbacks.insert(1, self)

    @property
    def base(self) -> Any:
        """The model itself, which outlives the trainers of a notebook."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return getattr(model, "get_base_model", lambda: model)()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Raises UserError if the start would not be that of an undisturbed run."""
        trainer, step = self.trainer, state.global_step
        if not step and getattr(self.base, "_has_trained", False) and not args.auto_find_batch_size:
            raise UserError("The model was trained already, and no checkpoint was saved. Run the cell that loads the "
                            "model and those below it again.")  # fmt: skip
        if step and getattr(args, "sync_ref_model", False):
            self._load_reference(self.folder / f"checkpoint-{step}" / REFERENCE)
        unpage_loaded_states(kwargs.get("optimizer"))
        args.eval_on_start = self.eval_on_start and step == 0  # a resumed run has this evaluation
        try:
            saved = json.loads((self.folder / f"checkpoint-{step}" / PROGRESS).read_text()) if step else {}
        except OSError:  # a checkpoint of an older version
            saved = {}
        trainer._tr_loss = torch.tensor(saved.get("loss_since_log", 0.0), device=args.device)
        trainer._total_loss_scalar = saved.get("loss_before_log", 0.0)
        trainer._globalstep_last_logged = saved.get("last_logged", step)
        trainer._total_train_tokens = saved.get("train_tokens", 0)
        trainer._metrics["train"].clear()  # of a start in the same kernel
        trainer._metrics["train"].update(saved.get("metrics", {}))
        trainer.model.train(saved.get("is_training", True))  # TRL chooses by it which values a log gets
        if saved:
            trainer._initial_global_step = trainer._initial_num_input_tokens_seen = 0
        self.seconds, self.started = saved.get("seconds", 0.0), time.monotonic()
        self.evaluation_due, self.order = saved.get("evaluation_due", False), saved.get("order", "")

    def _load_reference(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"{file.parent.name} lacks the reference of --sync_ref_model. Use `--resume never`.")
        reference = self.trainer.accelerator.unwrap_model(self.trainer.ref_model)
        reference.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train the rest of an epoch, unless the last step or an early stop has been reached already."""
        trainer = self.trainer
        if self.evaluation_due and kwargs["resume_from_checkpoint"]:  # as in trainer.py, _maybe_log_save_evaluate
            metrics = trainer._evaluate(kwargs["trial"], kwargs["ignore_keys_for_eval"])
            trainer._determine_best_metric(metrics=metrics, trial=kwargs["trial"])
        stoppers = [each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        is_stopped = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in stoppers)
        if trainer.state.global_step >= trainer.state.max_steps or is_stopped:
            trainer.control.should_training_stop = True
        else:
            self._restore_order(**kwargs)
            self.run_epoch(**kwargs)

    def _restore_order(
        self,
        epoch: int,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        resume_from_checkpoint: Any,
        **_: Any,
    ) -> None:
        """Give an epoch that is resumed in its middle the order of rows that it had.

        A sampler that groups rows by length draws the order from PyTorch's random state at the start of an epoch, which
        transformers does not save: some rows would be met twice and others never.
        """
        if epoch == epochs_trained and resume_from_checkpoint is not None:
            if steps_trained_in_current_epoch == 0:
                self.trainer._load_rng_state(resume_from_checkpoint)
            elif self.order:
                torch.set_rng_state(torch.tensor(list(bytes.fromhex(self.order)), dtype=torch.uint8))
        self.order = bytes(torch.get_rng_state().tolist()).hex()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.evaluation_due, self.base._has_trained = control.should_evaluate, True

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.evaluation_due = False

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Turn times and speeds since the resume into those of all steps."""
        if not self.seconds or not state.log_history:
            return
        for log in (logs, state.log_history[-1]):
            if here := log.get("train_runtime"):
                log["train_runtime"] = here + self.seconds
                for name in log:
                    if name.startswith("train_") and name.endswith("_per_second"):
                        log[name] *= here / (here + self.seconds)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        since_log = trainer.accelerator.gather(trainer._tr_loss).mean()
        if args.should_save:
            progress = {
                "loss_since_log": float(since_log),
                "loss_before_log": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "train_tokens": int(trainer._total_train_tokens),
                "metrics": trainer._metrics["train"],
                "seconds": self.seconds + time.monotonic() - self.started,
                "evaluation_due": self.evaluation_due,
                "order": self.order,
                "is_training": trainer.model.training,
            }
            folder = self.folder / f"checkpoint-{state.global_step}"
            write_json(folder / PROGRESS, progress)
            is_sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
            if getattr(args, "sync_ref_model", False) and not is_sharded:
                torch.save(trainer.accelerator.unwrap_model(trainer.ref_model).state_dict(), folder / REFERENCE)


def unpage_loaded_states(optimizer: Any) -> None:
    """Take bitsandbytes' mark of paged memory off the states that a checkpoint gave to `optimizer`.

    A tensor keeps the mark in a file. Several processes load it straight onto their GPUs, as plain memory, and
    bitsandbytes 0.50 then ends each of them at its next step (its issue 1708). A new optimizer has no state yet.
    """
    for state in (getattr(optimizer, "state", None) or {}).values():
        for value in state.values():
            if getattr(value, "is_paged", False):
                value.is_paged = False
