"""TRL's DPOTrainer on rows that are tokens already: what of it is overridden, in one place."""

from __future__ import annotations

import functools
import types
from importlib import metadata
from typing import Any

import torch
from peft import PeftModel
from trl.kernels import chunked_logprob
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from helpers.core import SettingsError, UserError
from helpers.training.prefix_sharing import PackedBatch, pack_pairs, register_attention

TOKEN_COLUMNS = {"prompt_ids", "chosen_ids", "rejected_ids"}


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes the tokens of `prepare_preferences` as they are.

    TRL 1.16 (dpo_trainer.py, _prepare_dataset) tokenizes every row itself, and then drops without a word those whose
    prompt fills max_length. Rows that bring their tokens have been tokenized the same way, checked and accounted for;
    tests/test_preferences.py compares the two. Other rows go TRL's way.

    The frozen copy of an adapter that is trained further (dpo_trainer.py, __init__) lacks the rows of tokens that were
    added for a chat format, and would be another model than the policy starts as: they are copied too.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        weights = dict(model.named_parameters()) if isinstance(model, PeftModel) else {}
        exact = {name: w.detach().clone() for name, w in weights.items() if name.endswith(".default")}
        super().__init__(model, *args, **kwargs)
        weights = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        for name, weight in exact.items():
            weights[name.removesuffix("default") + "ref"].data.copy_(weight)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if set(dataset.column_names or ()) >= TOKEN_COLUMNS:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)


TESTED_VERSIONS = {"trl": "1.16.0", "transformers": "5.23.0"}
# How far a row's log-probabilities may be from stock's, root mean square, where stock's own rounding is not larger.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}
NOISE = 10  # times as far as stock is from itself, with its rows in another order and one more column of padding
# Positions that TRL's LM head scores at once on a CPU. They are scored one by one whatever this is; TRL's own 4,096 fit
# all of a small batch, and were most of a step's memory.
HEAD_TOKENS = 512
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class PrefixSharing:
    """What the policy and its reference share: whether it is on, and the batch that was packed last."""

    def __init__(self) -> None:
        self.on = True
        self.packed: tuple[Any, Any, PackedBatch] | None = None

    def pack(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> PackedBatch:
        """`prefix_packing.pack`, once for the policy's forward and its reference's."""
        if self.packed is None or self.packed[0] is not input_ids or self.packed[1] is not labels:
            self.packed = input_ids, labels, pack_pairs(input_ids, attention_mask, labels)
        return self.packed[2]

    def wrap(self, model: Any) -> None:
        """Wrap the forward that TRL's `add_fused_lm_head` gave a causal LM; it is called with TRL's batches."""
        fused, backbone = model.forward, model.base_model
        add_fused_lm_head(model)  # a second one, without what is only logged of a policy
        reference = model.forward
        register_attention(model.config._attn_implementation)
        if model.device.type == "cpu":
            chunked_logprob.TOKEN_CHUNK_SIZE = HEAD_TOKENS

        def keep_scored(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            """The LM head computes what it is given: hidden states of the scored positions alone."""
            if (plan := kwargs.get("plan")) is not None:
                hidden = out.last_hidden_state
                out.last_hidden_state = hidden[0].index_select(0, plan.gather.to(hidden.device))[None]
            return out

        if before := getattr(backbone, "_keep_scored", None):  # of an earlier trainer of this model
            before.remove()
        backbone._keep_scored = backbone.register_forward_hook(keep_scored, with_kwargs=True)

        @functools.wraps(fused.__func__)
        def forward(self_: Any, *args: Any, **kwargs: Any) -> Any:
            names = ("input_ids", "attention_mask", "labels")
            if not self.on or not kwargs.get("fused_lm_head") or any(kwargs.get(name) is None for name in names):
                return fused(*args, **kwargs)
            batch = self.pack(*(kwargs.pop(name) for name in names))
            # In training a forward without gradients is the reference's, of which only log-probabilities are read.
            out = (reference if self_.training and not torch.is_grad_enabled() else fused)(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.input_ids.new_empty(1, 1, 1, 1),  # a 4D mask is passed on as it is, and not read
                shift_labels=batch.labels,
                plan=batch.plan,
                **kwargs,
            )
            for name in PER_TOKEN:
                if (value := getattr(out, name)) is not None:
                    setattr(out, name, value.new_zeros(batch.scored.shape).masked_scatter(batch.scored, value[0]))
            return out

        model.forward = types.MethodType(forward, model)


class SharedPrefixDPOTrainer(TokenizedDPOTrainer):
    """TokenizedDPOTrainer that computes what chosen and rejected rows begin with once.

    `shared_prefix`: "on", "auto" (stock where it does not apply, or where the first batch differs, with one line that
    says why) or "off". Raises UserError where it is "on" and cannot be, and SettingsError for another word.
    """

    def __init__(self, *args: Any, shared_prefix: str = "auto", **kwargs: Any) -> None:
        if shared_prefix not in ("auto", "on", "off"):
            raise SettingsError(f"--shared_prefix takes auto, on or off, not {shared_prefix!r}")
        self.shared_prefix, self._compared = shared_prefix, False
        self.sharing: PrefixSharing | None = None
        super().__init__(*args, **kwargs)
        self._share()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._share()  # this runs inside DPOTrainer's __init__
        return super()._precompute_ref_logps(*args, **kwargs)

    def _share(self) -> None:
        if self.shared_prefix == "off" or self.sharing is not None:
            return
        models: list[Any] = [self.accelerator.unwrap_model(m) for m in (self.model, self.ref_model) if m is not None]
        if reason := next(filter(None, map(self._why_not, models)), ""):
            self._give_up(reason)
            return
        self.sharing = PrefixSharing()
        for model in models:
            self.sharing.wrap(model.get_base_model() if isinstance(model, PeftModel) else model)

    def _give_up(self, reason: str) -> None:
        if self.shared_prefix == "on":
            raise UserError(f"--shared_prefix on cannot be: {reason}; auto goes on without")
        self.shared_prefix = "off"
        if self.sharing is not None:
            self.sharing.on = False
        print(f"shared prefix: off, because {reason}")

    def _why_not(self, model: Any) -> str:
        """Why prompts cannot be shared in this run, or ""."""
        args: Any = self.args
        config, over = model.config.get_text_config(), str(model.config._attn_implementation)
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if self._is_vision_dataset:
            return "the data has images"
        if self.aux_loss_enabled:
            return "the model's auxiliary loss counts every row's tokens"
        if kinds:
            return f"the model has layers of another kind than attention ({', '.join(sorted(kinds))})"
        if over != "sdpa" and "flash" not in over:
            return f"it has no path for {over} attention (sdpa and flash-attention it has)"
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            return "the adapter puts tokens of its own before the prompt"
        if self.accelerator.parallelism_config is not None:
            return "sequences are split over devices"
        if args.torch_compile:
            return "every batch has another shape, which torch_compile would compile anew"
        if not args.disable_dropout:
            return "dropout would be the same for both answers of a prompt"
        return ""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        self._compare(model, inputs)
        try:
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        finally:
            if self.sharing is not None:
                self.sharing.packed = None  # nothing of a batch outlives its step

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self._compare(model, inputs)
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[no-untyped-call]

    def _compare(self, model: Any, inputs: Any) -> None:
        """Before anything else is computed: the log-probabilities of the first batch both ways, on every process."""
        if self.sharing is None or self._compared:
            return
        self._compared = True
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        difference = noise = -1.0
        failed = ""
        for each in {id(m): m for m in (model, self.ref_model) if m is not None}.values():
            self.sharing.on = False
            stock = self._log_probs(each, ids, mask, labels)
            order = torch.arange(len(ids), device=ids.device).view(2, -1).flip(1).flatten()
            widen = functools.partial(torch.nn.functional.pad, pad=(0, 1))
            padded = widen(ids[order], value=0), widen(mask[order], value=0), widen(labels[order], value=-100)
            again = self._log_probs(each, *padded)[order, :-1]
            self.sharing.on = True
            try:
                shared = self._log_probs(each, ids, mask, labels)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model that is not known here does to what it is given
                shared, failed = stock, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            noise = max(noise, self._apart(stock, again, labels))
            difference = max(difference, self._apart(stock, shared, labels))
        if difference < 0:  # no process has a label in this batch
            self._compared = False
            return
        if int(self.accelerator.gather(torch.tensor([bool(failed)], device=ids.device).int()).max()):
            return self._give_up(f"the model does not take a packed row ({failed or 'on another process'})")
        tolerance = max(TOLERANCE[self._computed_in()], NOISE * noise)
        far = f"differ from stock's by {difference:.1g}"
        if difference <= tolerance:
            packed = self.sharing.pack(ids, mask, labels).input_ids.numel()
            print(
                f"shared prefix: on; the first batch's log-probabilities {far} (a row's root mean square; at most "
                f"{tolerance:.1g}); {packed:,} tokens are computed for {labels.numel():,}"
            )
            return
        have = ", ".join(
            f"{name} {metadata.version(name)} (read in {TESTED_VERSIONS[name]})" for name in TESTED_VERSIONS
        )
        said = f"the first batch's log-probabilities {far}, where {tolerance:.1g} would be rounding"
        self._give_up(f"{said}, with {have}")

    def _log_probs(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
                found: torch.Tensor = model(**given, use_cache=False, fused_lm_head=True).log_probs
        finally:
            model.train(training)
        return found

    def _apart(self, one: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> float:
        """The largest root mean square difference of a row, over all processes; infinite where one is not a number, and
        -1 where no row has a label."""
        scored = labels[:, 1:] != -100
        count = scored.sum(1)
        squares = ((one - other).masked_fill(~scored, 0.0) ** 2).sum(1) / count.clamp(min=1)
        squares = torch.nan_to_num(squares, nan=torch.inf).masked_fill(count == 0, -1.0)
        worst = float(self.accelerator.gather(squares.max()[None]).max())
        return worst if worst < 0 else worst**0.5

    def _computed_in(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16
        weights: Any = self.model
        kinds: list[torch.dtype] = [w.dtype for w in weights.parameters() if w.is_floating_point()]
        return kinds[0]
