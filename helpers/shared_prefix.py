"""DPOTrainer that computes each prompt once, for its two answers: the same log-probabilities and gradients for less.

Read in TRL 1.16 (dpo_trainer.py, trainer/utils.py: add_fused_lm_head) and transformers 5.23 (masking_utils.py,
integrations/sdpa_attention.py, modeling_flash_attention_utils.py). What is TRL's stays TRL's: the collator, the losses,
the reference, the metrics. Only the causal LM's forward is wrapped, where TRL asks it for log-probabilities. Each run
computes its first batch both ways and compares.
"""

from __future__ import annotations

import functools
import types
from importlib import metadata
from typing import Any

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from helpers.errors import UserError
from helpers.prefix_packing import Packed, Plan, Varlen, pack
from helpers.trainer import TokenizedDPOTrainer

READ_IN = {"trl": "1.16.0", "transformers": "5.23.0"}
SDPA, FLASH = "shared_prefix_sdpa", "shared_prefix_varlen"
# How far the first batch's log-probabilities may be from stock's, root mean square: rounding, and nothing else.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, plan: Plan | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of a packed row by SDPA, two calls a pair: [prefix, chosen], and the rejected tail over its prefix and
    itself. Query, key and value are (1, heads, N, size); without a plan it is transformers' own."""
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    parts = []
    for queries, keys in plan.branches():
        k, v = (torch.cat([x[:, :, where] for where in keys], 2) for x in (key, value))
        mask = plan.mask(queries.stop - queries.start, k.shape[2], sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, query[:, :, queries], k, v, mask, dropout, scaling)[0])
    return torch.cat(parts, 1), None


def attend_varlen(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, plan: Plan | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The same by flash-attention, in two calls for the whole batch. Its causal mask is aligned at the lower right, so
    the tail's first query sees all of its prefix."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call: Any = functools.partial(
        _flash_attention_forward, is_causal=True, dropout=dropout, softmax_scale=scaling, sliding_window=sliding_window,
        softcap=more.get("softcap"), target_dtype=get_target_dtype(query, module), use_top_left_mask=False,
        attn_implementation=module.config._shared_prefix_over,
    )  # fmt: skip
    if plan is None:
        return call(query, key, value, attention_mask, query_length=query.shape[1], **more), None
    plan.varlen = where = plan.varlen or Varlen.of(plan, query.device)
    first = plan.first
    out = [
        call(
            query[:, :first], key[:, :first], value[:, :first], None, query_length=first,
            cu_seq_lens_q=where.chosen, cu_seq_lens_k=where.chosen,
            max_length_q=where.longest_chosen, max_length_k=where.longest_chosen,
        )
    ]  # fmt: skip
    if where.longest_rejected:
        keys, values = (x.index_select(1, where.keys) for x in (key, value))
        out.append(
            call(
                query[:, first:], keys, values, None, query_length=query.shape[1] - first,
                cu_seq_lens_q=where.rejected, cu_seq_lens_k=where.rejected_keys,
                max_length_q=where.longest_rejected, max_length_k=where.longest_keys,
            )
        )  # fmt: skip
    return torch.cat(out, 1), None


AttentionInterface.register(SDPA, attend)
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionInterface.register(FLASH, attend_varlen)
AttentionMaskInterface.register(FLASH, flash_attention_mask)


class Sharing:
    """What the policy and its reference share: whether it is on, and the batch that was packed last."""

    def __init__(self) -> None:
        self.on = True
        self.packed: tuple[Any, Any, Packed] | None = None

    def pack(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Packed:
        """`prefix_packing.pack`, once for the policy's forward and its reference's."""
        if self.packed is None or self.packed[0] is not input_ids or self.packed[1] is not labels:
            self.packed = input_ids, labels, pack(input_ids, attention_mask, labels)
        return self.packed[2]

    def wrap(self, model: Any) -> None:
        """Wrap the forward that TRL's `add_fused_lm_head` gave a causal LM; it is called with TRL's batches."""
        fused, over = model.forward, model.config._attn_implementation
        model.set_attn_implementation(SDPA if over == "sdpa" else FLASH)
        model.config._shared_prefix_over = over

        def keep_scored(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            """The LM head computes what it is given: hidden states of the scored positions alone."""
            if (plan := kwargs.get("plan")) is not None:
                out.last_hidden_state = out.last_hidden_state[0].index_select(0, plan.gather)[None]
            return out

        model.base_model.register_forward_hook(keep_scored, with_kwargs=True)

        @functools.wraps(fused)
        def forward(self_: Any, *args: Any, **kwargs: Any) -> Any:
            names = ("input_ids", "attention_mask", "labels")
            if not self.on or not kwargs.get("fused_lm_head") or any(kwargs.get(name) is None for name in names):
                return fused(*args, **kwargs)
            batch = self.pack(*(kwargs.pop(name) for name in names))
            out = fused(
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
    says why) or "off". Raises UserError where it is "on" and cannot be.
    """

    def __init__(self, *args: Any, shared_prefix: str = "auto", **kwargs: Any) -> None:
        self.shared_prefix, self._compared = shared_prefix, False
        self.sharing: Sharing | None = None
        super().__init__(*args, **kwargs)
        self._share()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._share()  # this runs inside DPOTrainer's __init__
        return super()._precompute_ref_logps(*args, **kwargs)

    def _share(self) -> None:
        if self.shared_prefix == "off" or self.sharing is not None:
            return
        if reason := self._why_not():
            self._give_up(reason)
            return
        self.sharing = Sharing()
        for model in filter(None, (self.model, self.ref_model)):
            whole: Any = self.accelerator.unwrap_model(model)
            self.sharing.wrap(whole.get_base_model() if isinstance(whole, PeftModel) else whole)

    def _give_up(self, reason: str) -> None:
        if self.shared_prefix == "on":
            raise UserError(f"--shared_prefix on cannot be: {reason}; auto goes on without")
        self.shared_prefix = "off"
        print(f"shared prefix: off, because {reason}")

    def _why_not(self) -> str:
        """Why prompts cannot be shared in this run, or ""."""
        model: Any = self.model
        config, over = model.config.get_text_config(), model.config._attn_implementation
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if self._is_vision_dataset:
            return "the data has images"
        if self.aux_loss_enabled:
            return "the model's auxiliary loss counts every row's tokens"
        if kinds:
            return f"the model has layers of another kind than attention ({', '.join(sorted(kinds))})"
        if over != "sdpa" and "flash" not in str(over):
            return f"it has no path for {over} attention (sdpa and flash-attention it has)"
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            return "the adapter puts tokens of its own before the prompt"
        if self.accelerator.parallelism_config is not None:
            return "sequences are split over devices"
        return ""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        self._compare(model, inputs)
        return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self._compare(model, inputs)
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[no-untyped-call]

    def _compare(self, model: Any, inputs: Any) -> None:
        """Before anything else is computed: the log-probabilities of the first batch both ways, on every process."""
        if self.sharing is None or self._compared:
            return
        self._compared = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        training, found = model.training, []
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for self.sharing.on in (False, True):
                found.append(model(**given, use_cache=False, fused_lm_head=True).log_probs)
        model.train(training)
        scored = labels[:, 1:] != -100
        squares = ((found[1] - found[0]).double()[scored] ** 2).mean()
        difference = float(self.accelerator.gather(squares[None]).max().sqrt())
        tolerance = TOLERANCE[self._computed_in()]
        packed = self.sharing.pack(*given.values()).input_ids.numel()
        if difference <= tolerance:
            print(
                f"shared prefix: on; the first batch's log-probabilities differ from stock's by {difference:.1g} "
                f"(root mean square; at most {tolerance:g}); {packed:,} tokens are computed for {labels.numel():,}"
            )
            return
        self.sharing.on = False
        have = ", ".join(f"{name} {metadata.version(name)} (read in {READ_IN[name]})" for name in READ_IN)
        self._give_up(f"the first batch's log-probabilities differ from stock's by {difference:.2g}, with {have}")

    def _computed_in(self) -> torch.dtype:
        """The type that decides on rounding; 4-bit and 8-bit layers of bitsandbytes round like bfloat16."""
        if getattr(self.model, "is_quantized", False) or self.args.bf16:
            return torch.bfloat16
        weights: Any = self.model
        return torch.float16 if self.args.fp16 else next(weights.parameters()).dtype
