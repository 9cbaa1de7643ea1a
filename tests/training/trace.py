"""What a training step of 02 would hold in a GPU's memory, traced with fake tensors on a machine without one.

The trainer is the product's, and the batch is real: ids, masks and lengths are computed as always. Weights and
activations have shapes and dtypes alone. bitsandbytes' fake kernels stand for its CUDA kernels; PyTorch's flash and
memory-efficient attention are chosen as on a GPU of compute capability 8; autocast is that of the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer, models
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig
from trl.kernels import chunked_logprob
from trl.trainer import dpo_trainer, utils

from helpers.training import prefix_sharing
from helpers.training import trainer as training
from helpers.training.trainer import SharedPrefixDPOTrainer

ITEM, BY_MASK = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor
BLOCK = 512  # bytes: PyTorch's allocator on a GPU rounds up to them
Lengths = list[tuple[int, int, int]]  # tokens of prompt, chosen and rejected answer


class Call(NamedTuple):
    """A call of attention: its kernel, whether with a mask, with GQA, and with as many queries as keys."""

    kernel: str
    mask: bool
    gqa: bool
    square: bool


@dataclasses.dataclass
class Traced:
    """Bytes held at the peak, and before the step; how often attention was called; bytes at the peak by origin."""

    peak: int
    before: int
    calls: Counter[Call]
    at_peak: dict[str, int]


class Tracker(TorchDispatchMode):
    """Follows every storage. Operations on real tensors alone stay real; numbers read from fake ones are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, str]] = {}
        self.now = self.peak = 0
        self.label = ""
        self.at_peak: dict[str, int] = {}

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live and tensor.device.type != "meta":
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live[storage._cdata] = size, self.label
            self.now += size
            if self.now > self.peak:
                self.peak, self.at_peak = self.now, {}
                for each, label in self.live.values():
                    self.at_peak[label] = self.at_peak.get(label, 0) + each
            weakref.finalize(storage, self.drop, storage._cdata)
        return tensor

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key, (0, ""))[0]

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        dtype = kwargs.get("dtype") or (torch.int64 if "arange" in str(func) else torch.float32)
        is_real = bool(tensors) or not (dtype.is_floating_point or dtype.is_complex)
        if is_real and not any(isinstance(each, FakeTensor) for each in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is ITEM:
            return 0.0 if args[0].is_floating_point() else 0
        if func is BY_MASK:
            with unset_fake_temporarily():
                args = (args[0], [i for each in args[1] for i in _positions(each)], *args[2:])
        return tree_map_only(torch.Tensor, self.see, func(*args, **kwargs))


def _positions(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,)


@contextlib.contextmanager
def as_on_a_gpu(calls: Counter[Call], varlen: bool, triton: bool) -> Iterator[None]:
    """Choose kernels as on a GPU of compute capability 8 in half precision, and count calls of attention."""
    ops = torch.ops.aten

    def attend(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
               scale: Any = None, enable_gqa: bool = False) -> Any:  # fmt: skip
        kernel = "flash" if attn_mask is None else "math" if enable_gqa else "efficient"
        calls[Call(kernel, attn_mask is not None, enable_gqa, q.shape[2] == k.shape[2])] += 1
        if kernel == "flash":
            return ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        bias = torch.zeros((), dtype=q.dtype).expand(attn_mask.shape) + torch.empty(attn_mask.shape, dtype=q.dtype)
        bias = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        grad = torch.is_grad_enabled()
        return ops._scaled_dot_product_efficient_attention(q, k, v, bias, grad, 0.0, is_causal, scale=scale)[0]

    def varlen_attention(*args: Any, **kwargs: Any) -> Any:
        calls[Call("varlen", False, kwargs["enable_gqa"], len(args[0]) == len(args[1]))] += 1
        return varlen_attn(*args, **kwargs)

    def dequantized(ctx: Any, a: Any, b: Any, out: Any = None, bias: Any = None, quant_state: Any = None) -> Any:
        weight = torch.empty(quant_state.shape, dtype=a.dtype)  # bitsandbytes 0.50, backends/cuda/ops.py: many rows
        result = matmul(ctx, a, b, out, bias, quant_state)
        del weight
        return result

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    varlen_attn, matmul = prefix_sharing.varlen_attn, _functions.MatMul4Bit.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        patch.setattr(prefix_sharing, "varlen_attn", varlen_attention)
        patch.setattr(prefix_sharing, "varlen_dtype", lambda q, v: torch.bfloat16 if varlen else None)
        patch.setattr(_functions.MatMul4Bit, "forward", staticmethod(dequantized))
        patch.setitem(functional.name2qmap, "dynamic", functional.create_dynamic_map())
        patch.setattr(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *args, **kwargs: None)
        patch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
        patch.setattr(dpo_trainer, "get_peft_model", get_policy)
        patch.setattr(training, "HEAD_TOKENS", chunked_logprob.TOKEN_CHUNK_SIZE)
        patch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", chunked_logprob.TOKEN_CHUNK_SIZE)
        if triton:
            for name in ("_forward_kernel", "_backward_kernel"):
                patch.setattr(chunked_logprob, name, Nothing())
            patch.setattr(chunked_logprob, "triton", types.SimpleNamespace(cdiv=lambda *args: 0), raising=False)
            patch.setattr(chunked_logprob, "_use_triton", lambda device: True)
            patch.setattr(utils, "_use_triton", lambda device: True)
        patch.setattr(chunked_logprob, "_addmm_fp32", lambda total, a, b: total.add_(0))  # CUDA adds in place
        yield


def fake_model(config: dict[str, Any], values: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model as 02 would load it."""
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=dtype, attn_implementation="sdpa"
    ).eval()
    if values["tuning"] == "qlora":
        model.requires_grad_(False)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
                model.set_submodule(name, in_4_bits(layer))
    return model


def get_policy(model: Any, config: LoraConfig) -> Any:
    """The model with an adapter. TRL does not learn of its 4 bits, and so does not round the adapter to bfloat16, which
    `prepare_trainer` takes back."""
    model.is_loaded_in_4bit = any(isinstance(layer, bnb.nn.Linear4bit) for layer in model.modules())
    policy = get_peft_model(model, config)
    model.is_loaded_in_4bit = False
    return policy


def in_4_bits(layer: torch.nn.Linear) -> Any:
    kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    packed, state = functional.quantize_4bit(layer.weight.detach(), **kind)
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    vars(weight).update(kind | {"bnb_quantized": True, "blocksize": 64})
    with unset_fake_temporarily():
        new: Any = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind
        )
    new._parameters["weight"], new.quant_state, new.support_avx512bf16_for_cpu = weight, state, False
    return new


def rows_of(lengths: Lengths, vocabulary: int) -> Dataset:
    """Pairs of these lengths that share their prompt and no more."""
    return Dataset.from_list([
        {"prompt_ids": [3] * prompt, "chosen_ids": [4] * chosen, "rejected_ids": [5] * rejected}
        for prompt, chosen, rejected in lengths
    ])  # fmt: skip


def trace_step(
    config: dict[str, Any], values: dict[str, Any], lengths: Lengths, shared: bool, varlen: bool = True,
    triton: bool = True, **given: Any,
) -> Traced:  # fmt: skip
    """Trace the second micro-batch of a step, with all that is held by then: gradients and the optimizer's states.

    Args:
        config: of the model, as in config.json.
        values: settings of 02, as for `TrainingSpec`.
        lengths: of the pairs of the micro-batch.
        given: arguments of DPOConfig, and of the trainer.
    """
    calls = Counter[Call]()
    full, tracker = values["tuning"] == "full", Tracker()
    dtype = torch.float32 if full else torch.bfloat16
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<unk>")
    data = rows_of(lengths, config["vocab_size"])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder, as_on_a_gpu(calls, varlen, triton):
        args = DPOConfig(
            output_dir=folder, report_to="none", use_cpu=True, bf16=True, max_length=None, gradient_checkpointing=
            values.get("gradient_checkpointing", True), per_device_train_batch_size=len(lengths), **given,
        )  # fmt: skip
        with fake, tracker:
            tracker.label = "weights"
            model = fake_model(config, values, dtype)
            tracker.label = "reference"
            reference = fake_model(config, values, dtype) if full else None
            tracker.label = "trainer"
            lora = LoraConfig(
                r=values["lora_r"], target_modules=values["lora_target_modules"], task_type="CAUSAL_LM",
                init_lora_weights=False,
            )  # fmt: skip
            trainer = SharedPrefixDPOTrainer(
                model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer,
                peft_config=None if full else lora, shared_prefix="on" if shared else "off",
            )  # fmt: skip
            trainer._is_compared, trainer.current_gradient_accumulation_steps = True, 2
            trainer.model = trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
            if args.gradient_checkpointing:
                trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            trainer.model.train()
            with unset_fake_temporarily():
                batch = trainer.data_collator([data[i] for i in range(len(data))])
            for label in ("gradients", "second"):
                tracker.label = label
                calls.clear()
                if label == "second":
                    tracker.label = "optimizer"
                    states = optimizer_states(trainer.model)
                    tracker.label, tracker.peak, before = label, tracker.now, tracker.now
                trainer.training_step(trainer.model, copy.copy(batch))
            del states
    return Traced(tracker.peak, before, calls, tracker.at_peak)


def optimizer_states(model: Any) -> Any:
    """The states that bitsandbytes' 8-bit AdamW makes for each trained weight; those of embeddings have 32 bits."""
    optimizer: Any = bnb.optim.AdamW8bit([weight for weight in model.parameters() if weight.requires_grad])
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer.check_overrides()
    for group_index, group in enumerate(optimizer.param_groups):
        for index, weight in enumerate(group["params"]):
            optimizer.init_state(group, weight, group_index, index)
    return optimizer
