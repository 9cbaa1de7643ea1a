"""The batches of an optimizer step in micro-batches of at most so many tokens, with the same gradient (TRL 1.16)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel

from helpers.core import UserError, replaced
from helpers.models.memory import CPU_TOKENS, USED_SHARE, TrainingSpec, largest_microbatch, memory_by_part, read_decoder
from helpers.models.plan import no_microbatch_reason
from helpers.runs.run import Run
from helpers.settings.fields import PAIR_LOSSES, TrainSettings
from helpers.training.prefix_sharing import PER_TOKEN, PairBatch
from helpers.training.trainer import PrefixSharing, SharedPrefixDPOTrainer, is_out_of_memory

MORE_TOKENS = 1.1  # times as many as before: the memory is not the same


class MicroBatchDPOTrainer(SharedPrefixDPOTrainer):
    """SharedPrefixDPOTrainer that computes at most `tokens_per_microbatch` tokens at a time, and 0 any number.

    The batches of an optimizer step are computed together, in the step's last batch, with the gradient, loss and
    metrics of all their pairs. A micro-batch that does not fit into memory is computed again in smaller ones, down to
    one pair. The reference's log-probabilities of evaluation batches are computed once.
    """

    def __init__(self, *, model: Any, args: Any, tokens_per_microbatch: int = 0, **kwargs: Any) -> None:
        self._budget = self._asked = tokens_per_microbatch
        self._run: Run | None = None
        self._waiting: list[dict[str, Any]] = []  # batches of this optimizer step
        self._outputs: list[Any] | None = None  # of the policy, for each micro-batch, while gradients are computed
        self._is_inner = False  # within a micro-batch, or in what is computed of all of them
        self._references: dict[bytes, Any] = {}  # log-probabilities by evaluation batch
        is_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        if self._budget and (reason := no_microbatch_reason(model.config, vars(args), is_prompt)):
            self._budget = 0
            print(f"Micro-batches: off, because {reason}.")
        elif self._budget:
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            args.precompute_ref_batch_size = args.precompute_ref_batch_size or rows
            # with drop_last, a batch of a step's rows may leave out all evaluation rows
            if args.per_device_eval_batch_size == args.per_device_train_batch_size and not args.dataloader_drop_last:
                args.per_device_eval_batch_size = rows
        super().__init__(model=model, args=args, **kwargs)

    def keep_budget(self, run: Run) -> None:
        """Record a smaller budget that was enough in `run`, and use the one that is recorded. A number that the user
        gives is used as it is, and so is what "auto" allows in more memory than before."""
        self._run, record, given = run, run.record, run.record.get("settings") or {}
        known, asked = (record.get(name, self._budget) for name in ("tokens_per_microbatch", "tokens_asked"))
        is_same = given.get("tokens_per_microbatch", "auto") == "auto" and self._budget <= MORE_TOKENS * asked
        if is_same and known < self._budget:
            print(f"--tokens_per_microbatch is {known:,}: more did not fit in this run before. Set it to override.")
            self._budget = known

    @property
    def _is_packed(self) -> bool:
        return self.sharing is not None and self.sharing.enabled

    def _shrink(self, tokens: int, batch: PairBatch, part: list[int]) -> None:
        """Halve the budget after `part` did not fit into memory. A pair, which no budget makes smaller, is tried once
        more: raises UserError if it fails again."""
        clear_device_cache(garbage_collection=True)
        if len(part) == 1 and part[0] in batch.failed:
            row = self._describe_row(batch.take(part)["input_ids"][0].tolist())
            raise UserError(f"{row}, of {tokens:,} tokens, is too large for the memory of this device. Lower "
                            "--max_length, or see `--dry_run` for what else makes it fit.")  # fmt: skip
        change = ""
        if len(part) == 1:
            batch.failed.update(part)
        else:
            self._budget = max(1, min(tokens, self._budget) // 2)
            change = f" --tokens_per_microbatch is {self._budget:,} from now on."
        print(f"Out of memory: a micro-batch of {tokens:,} tokens is computed again.{change}", flush=True)

    def _describe_row(self, ids: list[int]) -> str:
        """What to call the pair whose chosen row has these tokens."""
        for kind, rows in (("training", self.train_dataset), ("evaluation", self.eval_dataset)):
            for number, row in enumerate(cast(Iterable[Any], rows or ()), 1):
                chosen = [*row["prompt_ids"], *row["chosen_ids"]]
                if chosen == ids[: len(chosen)]:
                    return f"Row {number:,} of the {kind} pairs"
        return "A pair"

    def _each(
        self, batch: PairBatch, packed: bool, compute: Callable[[list[int]], Any]
    ) -> Iterator[tuple[list[int], Any]]:
        """Each micro-batch of a pass without gradients and what `compute` returns for it."""
        parts = batch.cut(self._budget, packed, range(len(batch.lengths)))
        while parts:
            result = None
            with _fitting():  # nothing keeps its tensors
                result = compute(parts[0])
            if result is None:
                self._shrink(batch.tokens(parts[0], packed), batch, parts[0])
                parts = batch.cut(self._budget, packed, itertools.chain(*parts))
            else:
                yield parts.pop(0), result

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        compute = super().compute_ref_log_probs
        if not self._budget:
            return compute(model, inputs)
        batch, joined = PairBatch([inputs]), None
        each = self._each(batch, self._is_packed, lambda part: torch.stack(compute(model, batch.take(part))))
        for part, found in each:
            joined = found.new_empty(2, len(batch.lengths)) if joined is None else joined
            joined[:, part] = found
        return joined

    def _check_first_batch(self, model: Any, inputs: Any) -> None:
        """Compare the first micro-batch with TRL, padded as TRL has it; a smaller one if it does not fit."""
        if self._is_inner or self.sharing is None or self._is_compared:
            return
        if not self._budget:
            return super()._check_first_batch(model, inputs)
        batch, check = PairBatch([inputs]), super()._check_first_batch

        def compare(part: list[int]) -> bool:
            try:
                check(model, batch.take(part))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.accelerator.num_processes > 1:  # which wait for this one
                    raise UserError("The first micro-batch is too large. Lower --tokens_per_microbatch.") from error
                self._is_compared, cast(PrefixSharing, self.sharing).enabled = False, True
                raise
            return True

        next(self._each(batch, False, compare))

    def _add_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with its reference's log-probabilities; those of an evaluation batch are computed once."""
        if "ref_chosen_logps" in inputs:
            return inputs
        key = b""
        if not cast(Any, self.model).training and not cast(Any, self.args).sync_ref_model:
            content = torch.stack([inputs[name].long() for name in ("input_ids", "attention_mask", "completion_mask")])
            key = hashlib.blake2b(content.cpu().numpy().tobytes()).digest() + str(content.shape).encode()
        is_known = key in self._references
        if key and (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # all processes compute, or none
            is_known = all(gather_object([is_known]))
        found = self._references[key] if is_known else self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        if key:
            self._references[key] = found
        return {**inputs, "ref_chosen_logps": found[0], "ref_rejected_logps": found[1]}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._waiting.clear()  # of a step that was interrupted
        self._outputs = None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._budget:
            return cast(torch.Tensor, super().training_step(model, inputs, num_items_in_batch))  # type: ignore[no-untyped-call]
        self._waiting.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)  # the step's last batch has the loss of all
        batch, done = PairBatch(self._waiting), None
        self._waiting.clear()
        model.train()
        self._check_first_batch(model, batch.inputs)
        batch.inputs = self._add_reference(batch.inputs)
        while done is None:
            done = self._accumulate(model, batch, num_items_in_batch)
        loss, outputs = done
        with torch.no_grad(), self.compute_loss_context_manager():  # for metrics
            self._compute_all(lambda **_: batch.join(outputs), batch.inputs)
        if self.accelerator.num_processes > 1:
            self._average_gradients(model)
        if self._run is not None and self._budget != self._run.record.get("tokens_per_microbatch", self._asked):
            self._run.save(tokens_per_microbatch=self._budget, tokens_asked=self._asked)
        return loss

    def _accumulate(
        self, model: Any, batch: PairBatch, count: Any
    ) -> tuple[torch.Tensor, list[tuple[list[int], Any]]] | None:
        """Compute a step's gradients; returns its loss, and the policy's outputs. None if a micro-batch did not fit."""
        step, losses, self._outputs = cast(Callable[..., torch.Tensor], super().training_step), [], []
        groups, parts = batch.groups(by_batch="sft" in self.loss_types), list[list[int]]()
        for size, pairs in ((size, pairs) for size, each in groups.items() for pairs in each):
            for part in batch.cut(self._budget, self._is_packed, pairs):
                inputs, parts, is_done = batch.take(part), [*parts, part], False
                with _fitting(), self._apart(batch, part, pairs, size):
                    with self.accelerator.no_sync(model):
                        losses.append(step(model, inputs, count))
                    is_done = True
                if not is_done:  # a backward pass that failed has added some of its gradients
                    self._outputs = None
                    model.zero_grad()
                    self._shrink(batch.tokens(part, self._is_packed), batch, part)
                    return None
        outputs, self._outputs = self._outputs, None
        return torch.stack(losses).sum(), list(zip(parts, outputs, strict=True))

    @contextlib.contextmanager
    def _apart(self, batch: PairBatch, part: list[int], pairs: list[int], size: int) -> Iterator[None]:
        """Give the losses of `part` their share of a batch's, and keep its metrics from logs and other processes."""
        shares = dict.fromkeys(PAIR_LOSSES, len(part) / size)
        if "sft" in self.loss_types:  # `pairs` are a batch
            labels = batch.inputs["completion_mask"][: len(batch.lengths), 1:].sum(1)
            shares["sft"] = int(labels[part].sum()) / int(labels[pairs].sum())
        # without the mean of no tokens, which is NaN
        types = [name for name in self.loss_types if shares[name]]
        weights = [shares[n] * w for n, w in zip(self.loss_types, self.loss_weights, strict=True) if shares[n]]
        metrics, tokens = {"train": defaultdict[str, Any](list)}, self._total_train_tokens
        try:
            with (
                replaced(self.accelerator, gather=_same, gather_for_metrics=_same),
                replaced(self, loss_types=types, loss_weights=weights, _metrics=metrics),
                replaced(self, precompute_ref_logps=True, _is_inner=True),
            ):
                yield
        finally:
            self._total_train_tokens = tokens

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self._outputs is not None and torch.is_grad_enabled():
            return super()._compute_loss(functools.partial(self._record, model, self._outputs), inputs, return_outputs)
        if torch.is_grad_enabled():
            return super()._compute_loss(model, inputs, return_outputs)
        self._check_first_batch(model, inputs)
        inputs = self._add_reference(inputs)
        if not self._budget or return_outputs:
            return self._compute_all(model, inputs, return_outputs)
        batch = PairBatch([inputs])

        def forward(**kwargs: Any) -> SimpleNamespace:
            return batch.join(self._each(batch, self._is_packed, lambda part: model(**batch.take(part, kwargs))))

        return self._compute_all(forward, inputs)

    def _compute_all(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """TRL's loss and metrics of a batch that has its reference's log-probabilities."""
        with replaced(self, _is_inner=True, precompute_ref_logps=True):
            return super()._compute_loss(model, inputs, return_outputs)

    def _record(self, model: Any, outputs: list[Any], **kwargs: Any) -> Any:
        output = model(**kwargs)
        values = ((name, getattr(output, name, None)) for name in PER_TOKEN)
        outputs.append(SimpleNamespace(**{name: value.detach() for name, value in values if value is not None}))
        return output

    def _average_gradients(self, model: Any) -> None:
        """Average gradients over processes, after each has summed up its own, and agree on the smallest budget.

        DistributedDataParallel would do it in the last backward pass, which could then not be repeated in one process.
        """
        budget = torch.tensor(self._budget, device=self.accelerator.device)
        works = [torch.distributed.all_reduce(budget, torch.distributed.ReduceOp.MIN, async_op=True)]
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad /= self.accelerator.num_processes
            works.append(torch.distributed.all_reduce(weight.grad, async_op=True))
        for work in works:
            work.wait()
        self._budget = int(budget)


def microbatch_tokens(settings: TrainSettings, model: Any) -> int:
    """The value of --tokens_per_microbatch; of "auto", what the estimate allows in the memory that `model` leaves."""
    values, device = settings.values(), model.device
    if values["tokens_per_microbatch"] != "auto":
        return int(values["tokens_per_microbatch"])
    if device.type != "cuda":
        return CPU_TOKENS
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = USED_SHARE * (torch.cuda.mem_get_info(device)[0] + cached)
    values["gradient_accumulation_steps"] = settings.accumulation_steps()
    config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    try:
        decoder = read_decoder(config)
    except (KeyError, ValueError, TypeError, AttributeError):  # an unknown architecture
        return CPU_TOKENS
    spec = TrainingSpec(values, settings.step, decoder)
    parts = memory_by_part(decoder, spec)  # weights and reference are loaded
    return largest_microbatch(decoder, spec, free + parts["weights"] + parts["reference"], least=1)


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """Suppress errors for lack of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def _same(values: Any) -> Any:
    return values
