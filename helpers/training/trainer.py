"""TRL's DPOTrainer for rows that are already tokenized, with the shared prefix of a pair computed once."""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Iterator
from importlib import metadata
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from trl.kernels import chunked_logprob
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from helpers.core import SettingsError, UserError, replaced, shorten
from helpers.models.adapters import follows_longest_row
from helpers.training.prefix_sharing import PACKED, PER_TOKEN, pack_pairs, register_attention

TOKEN_COLUMNS = {"prompt_ids", "chosen_ids", "rejected_ids"}
TESTED_VERSIONS = {"trl": "1.16.0", "transformers": "5.23.0"}
# By dtype: the largest root mean square difference of a row's log-probabilities from TRL's, and how many times the
# difference between TRL on the batch and TRL on single, unpadded rows is taken for rounding too. With real weights in
# bfloat16, that difference was 0.06, the one of a packed row as much, and the smallest one of a fault 0.13.
HALF = (0.1, 1.5)
TOLERANCE = {torch.float64: (1e-9, 3.0), torch.float32: (2e-5, 3.0), torch.bfloat16: HALF, torch.float16: HALF}
MAX_ALONE = 4  # pairs of the first batch that TRL computes row by row
# Positions that TRL's LM head scores at once on a CPU, with the same result for any number. TRL's 4,096 hold all of a
# small batch, and took most of a step's memory.
HEAD_TOKENS = 512
NO_LABELS = (("completion_mask", 0), ("labels", -100))  # columns of a row that is not counted


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was lacking: errors of cuBLAS, Triton, MPS and CPUs are plain RuntimeErrors."""
    text = str(error).lower()
    known = "out of memory", "can't allocate memory", "alloc_failed"
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in known)


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes the token columns of `load_preferences` unchanged, and copies an adapter completely.

    TRL 1.16 (dpo_trainer.py, _prepare_dataset) tokenizes every row itself and silently drops rows whose prompt fills
    max_length. Its frozen copy of an adapter that is trained further (dpo_trainer.py, __init__) lacks the rows of
    tokens that a chat template added, so the reference would differ from the initial policy.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if args is None or args.disable_dropout:
            disable_dropout(*(each for each in (model, ref_model) if each is not None))
        weights = model.named_parameters() if isinstance(model, PeftModel) else ()
        exact = {name: weight.detach().clone() for name, weight in weights if name.endswith(".default")}

        def add_exactly(name: str, *args: Any, **kwargs: Any) -> None:
            add_adapter(name, *args, **kwargs)
            for each, weight in exact.items():
                model.get_parameter(each.removesuffix("default") + name).data.copy_(weight)

        add_adapter: Any = getattr(model, "add_adapter", None)
        # before TRL computes log-probabilities with the copy
        with replaced(model, add_adapter=add_exactly) if exact else contextlib.nullcontext():
            super().__init__(model, ref_model, args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if set(dataset.column_names or ()) >= TOKEN_COLUMNS:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)


def disable_dropout(*models: Any) -> None:
    """Set to 0, and print, the dropout that TRL 1.16 (trainer/utils.py, disable_dropout_in_model) leaves on: that of
    functions, whose probability is an attribute of a module or of its config. So is the jitter of routers."""
    changed = set()
    for module in [module for model in models for module in model.modules()]:
        configs = [config for config in vars(module).values() if isinstance(config, PreTrainedConfig)]
        for owner in (module, *configs):
            for name, value in vars(owner).items():
                if re.match("(?!classif|summary).*(drop|jitter)", name) and isinstance(value, float) and 0 < value < 1:
                    setattr(owner, name, 0.0)
                    changed.add(name)
    if changed:
        print(f"Dropout: {', '.join(sorted(changed))} set to 0, because of --disable_dropout.")


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Evaluate a model without gradients, and leave its mode and its rotary embeddings as they were.

    Some of these follow the length of the last rows (transformers 5.23, modeling_rope_utils.py, dynamic_rope_update).
    """
    rotary = [module for module in model.modules() if hasattr(module, "max_seq_len_cached")]
    before = [(dict(vars(module)), {n: b.clone() for n, b in module._buffers.items()}) for module in rotary]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, (attributes, buffers) in zip(rotary, before, strict=True):
            vars(module).update(attributes)
            module._buffers.update(buffers)
        model.train(training)


class PrefixSharing:
    """State shared by the policy and its reference: whether sharing is enabled, and the last packed batch."""

    def __init__(self) -> None:
        self.enabled = True
        self.pack = functools.lru_cache(maxsize=1)(pack_pairs)  # once for both; tensors are compared by identity

    def wrap(self, model: Any) -> None:
        """Wrap the forward that TRL's `add_fused_lm_head` gave a causal LM; it takes the batches of TRL's collator."""
        fused, backbone = model.forward, model.base_model
        add_fused_lm_head(model)  # a second one, without the values that are only logged for a policy
        reference = model.forward
        register_attention(model.config._attn_implementation)
        if model.device.type == "cpu":
            chunked_logprob.TOKEN_CHUNK_SIZE = HEAD_TOKENS

        def keep_scored(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            """Pass only the hidden states of scored positions to the LM head."""
            if (plan := kwargs.get("plan")) is not None:
                hidden = out.last_hidden_state
                out.last_hidden_state = hidden[0].index_select(0, plan.gather)[None]
            return out

        if hook := getattr(backbone, "_keep_scored", None):  # of an earlier trainer of this model
            hook.remove()
        backbone._keep_scored = backbone.register_forward_hook(keep_scored, with_kwargs=True)

        @functools.wraps(fused.__func__)
        def forward(self_: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [kwargs.get(name) for name in ("input_ids", "attention_mask", "labels")]
            if not self.enabled or not kwargs.get("fused_lm_head") or any(tensor is None for tensor in tensors):
                return fused(*args, **kwargs)
            batch = self.pack(*tensors)
            # in training, a forward without gradients is the reference's, of which only log-probabilities are read
            compute = reference if self_.training and not torch.is_grad_enabled() else fused
            unread = batch.input_ids.new_empty(1, 1, 1, 1)  # a 4D mask is passed through
            kwargs |= {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": unread}
            out = compute(**kwargs | {"labels": None, "shift_labels": batch.labels, "plan": batch.plan})
            for name in PER_TOKEN:
                if (value := getattr(out, name)) is not None:
                    setattr(out, name, value.new_zeros(batch.scored.shape).masked_scatter(batch.scored, value[0]))
            return out

        model.forward = types.MethodType(forward, model)


def count_rows_once(trainer: Any) -> None:
    """Let an evaluation in several processes count each row once, and each row the same in its loss and rewards.

    accelerate 1.15 fills the last batch of each process with rows from the start (BatchSamplerShard). transformers 5.23
    and TRL 1.16 count them, and TRL takes the mean of batches, whatever their sizes. Batches of packed rows, in which a
    row has several conversations or a part of one, stay as they are.
    """
    if getattr(trainer, "padding_free", False):
        return
    accelerator, predict, log = trainer.accelerator, trainer.prediction_step, trainer.log
    gather, processes, rank = accelerator.gather, accelerator.num_processes, accelerator.process_index
    halves = 2 if isinstance(trainer, DPOTrainer) else 1  # chosen answers, then rejected ones
    counts, losses = list[int](), list[float]()  # of each batch, over all processes

    def prediction_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        state, size = accelerator.gradient_state, len(inputs["input_ids"]) // halves
        total = state.remainder if state.end_of_dataloader and state.remainder > 0 else processes * size
        own = min(size, max(0, total - rank * size))
        if own < size:
            inputs = {name: _first_rows(value, size, max(1, own)) for name, value in inputs.items()}
            if not own:  # one row is computed, because other processes wait, and not counted
                unread = {name: torch.full_like(inputs[name], value) for name, value in NO_LABELS if name in inputs}
                inputs |= unread

        def gather_real(values: Any) -> Any:
            return gather(pad(values, (0, size - len(values))))[:total] if values.dim() else gather(values)

        with replaced(accelerator, gather=gather_real):
            loss, *outputs = predict(model, inputs, *args, **kwargs)
        counts.append(total)
        losses.append(float(gather(loss.detach()[None] * own if own else torch.zeros_like(loss)[None]).sum()) / total)
        return loss, *outputs

    def log_by_rows(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        def mean(values: list[float]) -> float:
            return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

        if counts and not trainer.model.training:
            logs |= {"eval_loss": mean(losses)} if processes > 1 and "eval_loss" in logs else {}
            metrics = trainer._metrics["eval"]
            metrics |= {name: [mean(values)] for name, values in metrics.items() if len(values) == len(counts)}
            counts.clear()
            losses.clear()
        log(logs, *args, **kwargs)

    trainer.prediction_step, trainer.log = prediction_step, log_by_rows


def _first_rows(value: Any, size: int, count: int) -> Any:
    """The first `count` of `size` rows, or of chosen and of rejected rows."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    return value.reshape(-1, size, *value.shape[1:])[:, :count].reshape(-1, *value.shape[1:])


def supports_packing(model: Any, train_set: Any) -> bool:
    """Whether two conversations in one row are computed as they are apart, on the first rows of `train_set`.

    It prints the reason if they are not: the model's attention does not end where `position_ids` start again.
    """
    rows = [train_set[i]["input_ids"][:256] for i in range(min(2, len(train_set)))]
    device = next(model.parameters()).device
    both = {"input_ids": [i for row in rows for i in row], "position_ids": [i for row in rows for i in range(len(row))]}
    try:
        with eval_mode(model):
            apart = torch.cat([model(input_ids=torch.tensor([row], device=device)).logits[0] for row in rows]).float()
            inputs = {name: torch.tensor([values], device=device) for name, values in both.items()}
            packed = model(**inputs, use_cache=False).logits[0].float()
        error = float((packed - apart).norm() / apart.norm())
        limit = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
        reason = "" if error <= limit else f"the second conversation would see the first (error {error:.1g})"
    except (TypeError, ValueError, NotImplementedError) as refused:
        reason = f"the model does not take position_ids ({shorten(str(refused), 80)})"
    if reason:
        print(f"--packing is off: {reason}.")
    return not reason


class SharedPrefixDPOTrainer(TokenizedDPOTrainer):
    """DPOTrainer that computes the common beginning of a pair's chosen and rejected rows once.

    `shared_prefix` is "on", "off" or "auto", which prints a reason and computes as TRL does where sharing is not
    supported or where the first batch differs. Raises UserError if "on" is not possible.
    """

    def __init__(self, *args: Any, shared_prefix: str = "auto", **kwargs: Any) -> None:
        if shared_prefix not in ("auto", "on", "off"):
            raise SettingsError(f"--shared_prefix {shared_prefix!r} is unknown. Use auto, on or off.")
        self.shared_prefix, self._is_compared = shared_prefix, False
        self.sharing: PrefixSharing | None = None
        super().__init__(*args, **kwargs)
        self._enable_sharing()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._enable_sharing()  # this runs inside DPOTrainer's __init__
        identity = f"{self._precompute_model_hash} {self.ld_alpha}"  # without it, TRL's cache mixes values of ld_alpha
        with replaced(self, _precompute_model_hash=identity):
            return super()._precompute_ref_logps(*args, **kwargs)

    def _enable_sharing(self) -> None:
        if self.shared_prefix == "off" or self.sharing is not None:
            return
        models: list[Any] = [self.accelerator.unwrap_model(m) for m in (self.model, self.ref_model) if m is not None]
        if reason := next(filter(None, map(self._unsupported_reason, models)), ""):
            self._disable_sharing(reason)
            return
        self.sharing = PrefixSharing()
        for model in models:
            self.sharing.wrap(model.get_base_model() if isinstance(model, PeftModel) else model)

    def _disable_sharing(self, reason: str) -> None:
        if self.shared_prefix == "on":
            raise UserError(f"`--shared_prefix on` is not possible because {reason}. Use `--shared_prefix auto`.")
        self.shared_prefix = "off"
        if self.sharing is not None:
            self.sharing.enabled = False
        print(f"Shared prefix: off, because {reason}.")

    def _unsupported_reason(self, model: Any) -> str:
        """Why prefixes cannot be shared in this run, or ""."""
        config, attention = model.config.get_text_config(), str(model.config._attn_implementation)
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        reasons = {
            "the data has images": self._is_vision_dataset,
            "the model has an auxiliary loss over all tokens of a row": self.aux_loss_enabled,
            f"layers of type {', '.join(sorted(kinds))} are not supported": bool(kinds),
            f"{attention} attention is not supported, only sdpa, eager and flash-attention": "flash" not in attention
            and attention not in PACKED,
            "the adapter puts virtual tokens before the prompt": isinstance(model, PeftModel)
            and model.active_peft_config.is_prompt_learning,
            "sequences are split over devices": self.accelerator.parallelism_config is not None,
            "torch_compile would recompile the model for every batch": self.args.torch_compile,
            "NEFTune's noise depends on the length of a row": self.args.neftune_noise_alpha,
            "dropout would be the same for both answers of a prompt": not cast(Any, self.args).disable_dropout,
        }
        return next((reason for reason, applies in reasons.items() if applies), "")

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        self._check_first_batch(model, inputs)
        try:
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        finally:
            if self.sharing is not None:
                self.sharing.pack.cache_clear()  # do not keep a batch after its step

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self._check_first_batch(model, inputs)
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[no-untyped-call]

    def _check_first_batch(self, model: Any, inputs: Any) -> None:
        """Disable sharing if the log-probabilities of the first batch differ from TRL's by more than rounding."""
        if self.sharing is None or self._is_compared:
            return
        if not int(self.accelerator.gather(inputs["completion_mask"][:, 1:].sum()[None]).sum()):
            return  # no process has a label in this batch
        self._is_compared = True
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        has_own_rotation = follows_longest_row(cast(Any, self.model).config)  # a single row has other frequencies
        alone = [row for row in range(len(ids)) if row % (len(ids) // 2) < MAX_ALONE and not has_own_rotation]
        difference, noise, failure = 0.0, 0.0, ""
        for each in {id(m): m for m in (model, self.ref_model) if m is not None}.values():
            self.sharing.enabled = False
            stock = self._log_probs(each, ids, mask, labels)
            again = stock.clone()
            for row in alone:
                end = max(2, int(mask[row].sum()))
                again[row, : end - 1] = self._log_probs(each, *(x[row : row + 1, :end] for x in (ids, mask, labels)))[0]
            self.sharing.enabled = True
            try:
                shared = self._log_probs(each, ids, mask, labels)
            except Exception as error:  # an unknown architecture may fail in any way
                if is_out_of_memory(error):
                    raise
                shared, failure = stock, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            noise = max(noise, self._largest_difference(stock, again, labels))
            difference = max(difference, self._largest_difference(stock, shared, labels))
        if failure := next(filter(None, gather_object([failure])), ""):
            return self._disable_sharing(f"the model does not accept a packed row ({failure})")
        weights: Any = self.model
        computed_in = next(w.dtype for w in weights.parameters() if w.is_floating_point())
        if self.args.bf16 or self.args.fp16:
            computed_in = torch.bfloat16
        floor, times = TOLERANCE[computed_in]
        tolerance = max(floor, times * noise)
        text = f"log-probabilities differ from TRL's by {difference:.1g}"
        if difference <= tolerance:
            tokens = f"{self.sharing.pack(ids, mask, labels).input_ids.numel():,} instead of {labels.numel():,} tokens"
            print(f"Shared prefix: on, {tokens} in the first batch; {text} (tolerance {tolerance:.1g}).")
            return
        versions = ", ".join(f"{n} {metadata.version(n)} (tested with {v})" for n, v in TESTED_VERSIONS.items())
        self._disable_sharing(f"{text}, above the tolerance of {tolerance:.1g}, with {versions}")

    def _log_probs(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with eval_mode(model), self.accelerator.autocast():
            out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
        return cast(torch.Tensor, out.log_probs)

    def _largest_difference(self, first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> float:
        """The largest root mean square difference of a row, over all processes; inf with NaN."""
        scored = labels[:, 1:] != -100
        squares = (first - second).masked_fill(~scored, 0.0).square().sum(1) / scored.sum(1).clamp(min=1)
        largest = torch.nan_to_num(squares, nan=torch.inf).max().sqrt()
        return float(self.accelerator.gather(largest[None]).max())
