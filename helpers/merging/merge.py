"""Adapter + base → merged weights, tensor by tensor: the memory of one of them, whatever the model's size.

Read in PEFT 0.21 (tuners/tuners_utils.py: _unload_and_optionally_merge; utils/save_and_load.py). The model and its
adapter are built on the meta device, without weights. Each adapted layer is given its own when its turn comes, merged
by PEFT itself, written, and emptied again; so every kind of LoRA that PEFT can merge is merged as PEFT would.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from helpers.core import UserError
from helpers.merging.weights import TensorSpec, WeightFiles
from helpers.models.resolve import BASE_KEEPING_INITS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


Transform = Callable[[str, torch.Tensor], torch.Tensor]  # of a base weight by name, before an adapter is added


class UnsupportedAdapter(Exception):
    """A kind of adapter or checkpoint that is not merged tensor by tensor; says which."""


class StreamingMerger:
    """The tensors of `base` with `adapter` added, one at a time.

    `base` and `adapter` are folders. A base with fewer than `vocabulary` rows in its embeddings is given the rows that
    `fit_embeddings` adds. `change` is done to every base weight first. Raises Unknown.
    """

    def __init__(
        self, base: Path, adapter: Path, vocabulary: int = 0, change: Any = None, trust_remote_code: bool = False
    ) -> None:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
        from transformers import AutoConfig, AutoModelForCausalLM

        peft_config = PeftConfig.from_pretrained(str(adapter))
        self.config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        text = self.config.get_text_config()
        _refuse_unknown(peft_config, base, adapter, self.config)
        self.base, self.added = WeightFiles(base), WeightFiles(adapter, "adapter_model.safetensors")
        self.rows, self.vocabulary = text.vocab_size, max(vocabulary, text.vocab_size)
        for name in self.added:  # embeddings that were saved whole have as many rows as they were trained with
            if name.endswith((".embed_tokens.weight", ".lm_head.weight", ".base_layer.weight")):
                self.vocabulary = max(self.vocabulary, self.added.entry(name).shape[0] if "embed" in name else 0)
        text.vocab_size = self.vocabulary
        _refuse_rows_beyond(peft_config, self.vocabulary)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=trust_remote_code)
        self.change: Transform = change(model) if change else lambda name, weight: weight
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))  # a name, and what it is tied to
        names = set(model.state_dict())
        if unknown := [name for name in self.base if name not in names]:
            raise UnsupportedAdapter(f"a checkpoint whose names are not the model's ({unknown[0]})")
        layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
        self._embeddings = {f"{n}.weight" for n, module in model.named_modules() if any(module is x for x in layers)}
        peft_config.init_lora_weights = False  # nothing is initialized: all of it comes from the files
        peft_config.inference_mode = True
        with torch.device("meta"):
            self.model = PeftModel(model, peft_config, low_cpu_mem_usage=True)
        keys = {name: torch.nn.Parameter(torch.empty(self.added.entry(name).shape, device="meta"), False)
                for name in self.added}  # fmt: skip
        self._names = {id(value): name for name, value in keys.items()}
        try:
            set_peft_model_state_dict(self.model, dict(keys), low_cpu_mem_usage=True)
        except (RuntimeError, KeyError) as error:
            raise UnsupportedAdapter(
                f"an adapter that does not fit its base ({' '.join(str(error).split())[:120]})"
            ) from None
        self._wrapped = self._find_wrapped()
        self._replaced = self._find_replaced()
        self._buffers = [torch.empty(0)] * 3
        self._last: tuple[str, dict[str, torch.Tensor]] = "", {}

    def _find_wrapped(self) -> dict[str, Any]:
        """Adapted modules by their names in the base."""
        found: dict[str, Any] = {}
        for name, module in self.model.get_base_model().named_modules():
            adapted = hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer")
            if adapted and not any(name.startswith(f"{outer}.") for outer in found):
                if any(True for _ in getattr(module, "original_module", torch.nn.Identity()).children()):
                    raise UnsupportedAdapter(f"an adapter that brings {name} whole")
                found[name] = module
        return found

    def _find_replaced(self) -> dict[str, str]:
        """Weights of the base that the adapter brings whole, and their names in its file.

        Raises Unknown where something in the file has no place, or a place that is not filled from it.
        """
        found, used = {}, set()
        for name, parameter in self.model.get_base_model().named_parameters():
            key = self._names.get(id(parameter))
            plain = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)
            own = plain != name or not any(name.startswith(f"{owner}.") for owner in self._wrapped)
            if key is None and not own:
                raise UnsupportedAdapter(f"an adapter without {name}")
            if key is not None and own:
                found[plain] = key
            used.add(key)
        if left := sorted(set(self.added) - used):
            raise UnsupportedAdapter(f"an adapter whose {left[0]} has no place in the model")
        return found

    def entries(self, dtype: torch.dtype | None = None) -> list[TensorSpec]:
        """What a merged checkpoint holds, in the order of the base's; floating-point tensors in `dtype`, if given.

        Weights that are tied and no longer equal are written both, and the configuration says that they are not tied.
        """
        found = [self._entry(name, dtype) for name in self.base]
        for name, to in self.tied.items():
            touched = {owner for owner in (_owner(name), _owner(to)) if owner in self._wrapped}
            if touched and not torch.equal(self.tensor(name), self.tensor(to)):
                self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
                have = {entry.name for entry in found}
                found += [self._entry(each, dtype) for each in (name, to) if each not in have]
        return found

    def _entry(self, name: str, dtype: torch.dtype | None) -> TensorSpec:
        stored = self.base.entry(self._stored(name))
        shape = (self.vocabulary, *stored.shape[1:]) if self._has_a_row_a_token(name) else stored.shape
        return TensorSpec(name, shape, dtype if dtype and stored.dtype.is_floating_point else stored.dtype)

    def _stored(self, name: str) -> str:
        """A weight's name in the base's files, where tied ones stand once."""
        if name in self.base:
            return name
        other = {**self.tied, **{to: name for name, to in self.tied.items()}}.get(name, name)
        if other not in self.base:
            raise UnsupportedAdapter(f"a base without {name}")
        return other

    def _has_a_row_a_token(self, name: str) -> bool:
        return self.vocabulary > self.rows and name in self._embeddings

    def from_base(self, name: str) -> torch.Tensor:
        """A weight of the base, with rows for added tokens, and changed."""
        if name in self._replaced:
            return self.added[self._replaced[name]]
        weight = self.base[self._stored(name)]
        if self._has_a_row_a_token(name):
            more = weight.float().mean(0).to(weight.dtype).expand(self.vocabulary - self.rows, *weight.shape[1:])
            weight = torch.cat([weight, more])
        return self.change(name, weight)

    def tensor(self, name: str) -> torch.Tensor:
        """A merged weight, in float32 where anything was added to it; it stands until the next but one is asked for."""
        owner = _owner(name)
        if owner not in self._wrapped:
            return self.from_base(name)
        if name == f"{owner}.weight" and (product := self._product(self._wrapped[owner])):
            return self._plainly(*product, self.from_base(name))
        if self._last[0] != owner:
            self._last = owner, self.layer(owner, merged=True).state_dict()
        return self._last[1][name.removeprefix(f"{owner}.")]

    def linear_layers(self) -> list[str]:
        """Names of adapted layers that multiply by a matrix."""
        return [name for name, layer in self._wrapped.items() if len(getattr(layer, "lora_A", ()))]

    def _product(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and scale of a layer that is LoRA and nothing else."""
        from peft.tuners.lora import Linear

        (adapter,) = layer.active_adapters
        if type(layer) is not Linear or layer.lora_variant or layer.fan_in_fan_out or adapter not in layer.lora_A:
            return None
        keys = [self._names[id(part[adapter].weight)] for part in (layer.lora_A, layer.lora_B)]
        a, b = (self.added[key].float() for key in keys)
        return a, b, float(layer.scaling[adapter])

    def _plainly(self, a: torch.Tensor, b: torch.Tensor, scale: float, weight: torch.Tensor) -> torch.Tensor:
        """What PEFT does (lora/layer.py: get_delta_weight, merge), in memory that is used again: without fresh pages
        for every product."""
        self._buffers[:2] = self._buffers[1::-1]  # the other one may still be on its way to the disk
        for i in (0, 2):
            if self._buffers[i].numel() < weight.numel():
                self._buffers[i] = torch.empty(weight.numel())
        total, exact = (self._buffers[i][: weight.numel()].view(weight.shape) for i in (0, 2))
        return torch.mm(b, a, out=total).mul_(scale).add_(exact.copy_(weight))

    def layer(self, owner: str, merged: bool = False) -> Any:
        """The adapted layer `owner` with its weights, in float32; or what PEFT merges it to."""
        layer = copy.deepcopy(self._wrapped[owner])
        originals = dict(self._wrapped[owner].named_parameters())
        for path, parameter in originals.items():
            kind = path.rpartition(".")[2]
            if (key := self._names.get(id(parameter))) is not None:
                value = self.added[key].float()
            else:
                stored = self.from_base(f"{owner}.{kind}")
                value = stored.float()
                value = value.clone() if value is stored else value  # PEFT adds in place: not in the file's pages
            layer.get_submodule(path.rpartition(".")[0])._parameters[kind] = torch.nn.Parameter(value, False)
        if not merged:
            return layer
        if hasattr(layer, "unload_and_optionally_merge_module"):
            unload: Any = layer.unload_and_optionally_merge_module
            return unload(merge=True, safe_merge=False, adapter_names=None)
        layer.merge(safe_merge=False, adapter_names=None)
        return layer.get_base_layer()


def _refuse_unknown(peft_config: Any, base: Path, adapter: Path, config: Any) -> None:
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    if kind != "LORA":
        raise UnsupportedAdapter(f"an adapter of kind {kind}")
    for name, usual in {"bias": "none", "lora_bias": False}.items():
        if getattr(peft_config, name, usual) != usual:
            raise UnsupportedAdapter(f"an adapter with {name}={getattr(peft_config, name)!r}")
    for name in ("target_parameters", "layer_replication", "megatron_config", "alora_invocation_tokens"):
        if getattr(peft_config, name, None):
            raise UnsupportedAdapter(f"an adapter with {name}")
    if getattr(config, "quantization_config", None):
        raise UserError(
            "the adapter's base is quantized itself, and merging into it would round the adapter away: name the "
            "weights that it was made from with --base_model_id"
        )
    if not any(base.glob("*.safetensors")):
        raise UnsupportedAdapter("a base that is not in safetensors")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UnsupportedAdapter("an adapter that is not in safetensors")
    if not isinstance(peft_config.init_lora_weights, bool) and peft_config.init_lora_weights not in BASE_KEEPING_INITS:
        # such an adapter takes a part of the base into itself when it is loaded
        raise UnsupportedAdapter(f"an adapter that was initialized by {peft_config.init_lora_weights}")


def _refuse_rows_beyond(peft_config: Any, vocabulary: int) -> None:
    rows = getattr(peft_config, "trainable_token_indices", None) or []
    last = max((max(each, default=0) for each in (rows.values() if isinstance(rows, dict) else [rows])), default=0)
    if last >= vocabulary:
        raise UserError(
            f"the adapter has a row for token {last} and the tokenizer {vocabulary:,} tokens: it needs the tokenizer "
            "that it was trained with, in its folder"
        )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


class QuantizedBase:
    """The weights of `model` (which may be on the meta device) as training with `config` computed with them.

    `stored` is the dtype in which the weights were loaded before they were quantized.
    """

    def __init__(self, model: PreTrainedModel, config: BitsAndBytesConfig, stored: torch.dtype) -> None:
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import HfQuantizer

        self.config, self.stored = config, stored
        keep = HfQuantizer.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, getattr(model, "_keep_in_fp32_modules", None)
        )
        twin = replace_with_bnb_linear(copy.deepcopy(model), keep, config)
        self.quantized = {n for n, m in twin.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight `name` of a checkpoint, quantized and back, in float32; as it is where it was left alone."""
        module, _, kind = name.rpartition(".")
        if module not in self.quantized or kind != "weight":
            return weight
        return round_trip(weight.to(self.stored), self.config).float()


def round_trip(weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Quantized as `Params4bit` or `Int8Params` does, and dequantized as their layers do."""
    from bitsandbytes import functional

    if config.load_in_8bit:
        rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
        whole: torch.Tensor = functional.int8_vectorwise_dequant(rows, scales).to(weight.dtype)
        return whole
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    found: torch.Tensor = functional.dequantize_4bit(packed, state).to(config.bnb_4bit_compute_dtype)
    return found
