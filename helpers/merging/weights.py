"""Merged weights, one tensor at a time: read from safetensors files, added to their adapter, and written again.

Tensors are planned as meta tensors, which have a shape and a dtype but no data.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import Linear
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from helpers.core import UserError, fingerprint
from helpers.models.adapters import adapter_errors, check_adapter_keys, display_name, tensor_names
from helpers.models.plan import embedding_layers, embedding_rows
from helpers.models.resolve import BASE_KEEPING_INITS
from helpers.runs.checkpoints import format_size

Specs = dict[str, torch.Tensor]  # meta tensors by name
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


class WeightFiles:
    """The tensors of the safetensors files in a folder, each read when it is accessed. Raises UserError without any."""

    def __init__(self, folder: Path, name: str = "model.safetensors") -> None:
        self.files, index = sorted(folder.glob("*.safetensors")), folder / f"{name}.index.json"
        if (folder / name).is_file():
            self.files = [folder / name]  # as transformers: next to it may be the same in another format
        elif index.is_file():
            self.files = [folder / n for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if not self.files:
            raise UserError(f"{folder} has no weights in safetensors format.")
        opened: list[Any] = [safe_open(file, framework="pt") for file in self.files]
        self._file_of: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor whose memory is the file's until it is written to."""
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def spec(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor, as a meta tensor."""
        return self[name].to("meta")

    def stamp(self) -> list[list[Any]]:
        """Names, sizes and times of the files, which change when another model is put in their place."""
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]


def _header(specs: Specs) -> bytes:
    """The header of a safetensors file (https://github.com/huggingface/safetensors, "Format"). The library writes one
    only for tensors that are all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(file: Path, specs: Specs, merger: StreamingMerger, bar: tqdm[Any]) -> None:
    """Write a file under another name, one tensor while the next is computed, and rename it when it is complete."""
    part = file.with_name(file.name + ".part")
    with part.open("wb") as out, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(out.write, memoryview(_header(specs)))
        for name, spec in specs.items():
            value = merger.tensor(name).detach()
            if value.shape != spec.shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(spec.shape)}")
            content = value.to(spec.dtype).contiguous().view(-1).view(torch.uint8).numpy()
            bar.update(writing.result())
            writing = writer.submit(out.write, content.data)
        bar.update(writing.result())
    part.replace(file)


def write_merged(
    folder: Path, merger: StreamingMerger, max_shard_size: int | str, dtype: torch.dtype | None = None
) -> None:
    """Write the merged weights into `folder`, or the files that an interrupted merge left missing; those of another
    merge are deleted first. Raises UserError if the disk has too little space."""
    specs = merger.specs(dtype)
    split = split_torch_state_dict_into_shards(specs, max_shard_size=max_shard_size)
    shards = {file: {name: specs[name] for name in names} for file, names in split.filename_to_tensors.items()}
    plan: dict[str, Any] = {"base": merger.base.stamp(), "adapter": merger.adapter.stamp()}
    plan["quantization"] = repr(merger.quantized and merger.quantized.config)
    plan["shards"] = {f: [[n, s.shape, str(s.dtype)] for n, s in shard.items()] for f, shard in shards.items()}
    digest, mark = fingerprint(plan), folder / "merge.digest"
    if folder.exists() and not (mark.is_file() and mark.read_text() == digest):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    for part in folder.glob("*.part"):
        part.unlink()
    sizes = {file: len(_header(shard)) + sum(s.nbytes for s in shard.values()) for file, shard in shards.items()}
    written = {f for f, size in sizes.items() if (folder / f).is_file() and (folder / f).stat().st_size == size}
    done, total = sum(sizes[file] for file in written), sum(sizes.values())
    if (free := shutil.disk_usage(folder).free) < (needed := total - done + 2**20):
        raise UserError(f"The disk lacks {format_size(needed - free)} for the merged weights. Free some space.")
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="merging", mininterval=1) as bar:
        for file in [file for file in shards if file not in written]:
            try:
                _write_shard(folder / file, shards[file], merger, bar)
            except OSError as error:
                raise UserError(f"Writing merged weights failed: {error}. Run the same command to resume.") from None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class UnsupportedAdapter(Exception):
    """An adapter or checkpoint that cannot be merged one tensor at a time; the message names it."""


class StreamingMerger:
    """The tensors of the model in folder `base` with the adapter in folder `adapter` added, one at a time.

    Both are built on the meta device. Each adapted layer gets its weights when it is needed, and PEFT itself merges it
    (PEFT 0.21, tuners/tuners_utils.py, _unload_and_optionally_merge), which covers every LoRA variant. Tensors keep the
    names of the base's files: see `tensor_names`. Embeddings get the rows of `resize_embeddings` for a tokenizer of
    length `vocabulary`. With `quantization`, the base weights are those that training computed with: see
    `QuantizedBase`. Raises UnsupportedAdapter.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        vocabulary: int = 0,
        quantization: BitsAndBytesConfig | None = None,
        stored: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        peft_config = PeftConfig.from_pretrained(str(adapter))
        self.config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        _check_supported(peft_config, base, adapter, self.config)
        self.base, self.adapter = WeightFiles(base), WeightFiles(adapter, "adapter_model.safetensors")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=trust_remote_code)
        self.names, self.file_names, converted = tensor_names(model, self.base)
        weights = model.state_dict()
        if wrong := [each for each, name in self.names.items() if self.base.spec(each).shape != weights[name].shape]:
            raise UserError(
                f"{display_name(base)} is broken: {wrong[0]} does not have the shape in config.json. Restore it."
            )
        parameters = {name: torch.nn.Parameter(self.adapter.spec(name), False) for name in self.adapter}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.rows = int(model.get_input_embeddings().num_embeddings)
        self.vocabulary = embedding_rows(model, parameters) or max(vocabulary, self.rows)
        _check_token_rows(peft_config, self.vocabulary)
        self._resized = set[str]()
        if self.vocabulary != self.rows:
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
            self.config.get_text_config().vocab_size = self.vocabulary
            self._resized = {f"{name}.{kind}" for name in embedding_layers(model) for kind in ("weight", "bias")}
        self.quantized = QuantizedBase(model, quantization, stored) if quantization else None
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
        self._aliases = self.tied | {target: source for source, target in self.tied.items()}
        known = {*converted, *self.names.values()}
        if missing := [name for name in self.file_names if not {name, self._aliases.get(name)} & known]:
            raise UnsupportedAdapter(f"a base without {missing[0]}")
        peft_config.init_lora_weights, peft_config.inference_mode = False, True  # all weights come from the files
        with torch.device("meta"), adapter_errors(adapter, base):
            self.model = PeftModel(model, peft_config, low_cpu_mem_usage=True)
            keys: Any = set_peft_model_state_dict(self.model, dict(parameters), low_cpu_mem_usage=True)
        check_adapter_keys(self.model, keys.missing_keys, keys.unexpected_keys, adapter, base)
        self.wrapped = self._find_wrapped()
        self._replaced = self._find_replaced()
        changed = {*self.wrapped, *(self.quantized.names if self.quantized else ()), *map(_owner, self._replaced)}
        if name := next((name for name in converted if _owner(name) in changed), ""):
            raise UnsupportedAdapter(f"weights such as {name}, which the base's files contain in other pieces")
        self._buffers = [torch.empty(0) for _ in range(3)]
        self._merged: tuple[str, dict[str, torch.Tensor]] = "", {}  # the last layer that PEFT merged

    def _find_wrapped(self) -> dict[str, Any]:
        """Adapted modules by their names in the base."""
        wrapped: dict[str, Any] = {}
        for name, module in self.model.get_base_model().named_modules():
            is_adapted = hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer")
            if is_adapted and not any(name.startswith(f"{outer}.") for outer in wrapped):
                if list(getattr(module, "original_module", torch.nn.Identity()).children()):
                    raise UnsupportedAdapter(f"an adapter that contains all of {name}")
                wrapped[name] = module
        return wrapped

    def _find_replaced(self) -> dict[str, str]:
        """Base weights that the adapter's file contains in full, and their names in that file. Raises
        UnsupportedAdapter if a name of the file is not in the model, or a weight of the adapter not in the file."""
        replaced, used = {}, set()
        for name, parameter in self.model.get_base_model().named_parameters():
            key = self._names.get(id(parameter))
            plain = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)
            in_base = plain != name or not any(name.startswith(f"{owner}.") for owner in self.wrapped)
            if key is None and not in_base:
                raise UnsupportedAdapter(f"an adapter without {name}")
            if key is not None and in_base:
                replaced[plain] = key
            used.add(key)
        if unused := sorted(set(self.adapter) - used):
            raise UnsupportedAdapter(f"an adapter whose {unused[0]} is not in the model")
        return replaced

    def specs(self, dtype: torch.dtype | None = None) -> Specs:
        """Meta tensors of the merged checkpoint in the order of the base's, and in its dtypes or in `dtype`, which the
        configuration gets too. Tied weights that the adapter makes different are both included, and untied."""
        if dtype:
            self.config.dtype = self.config.get_text_config().dtype = dtype
        names = {file_name: self.names.get(file_name, "") for file_name in self.base}
        for name, target in self.tied.items():
            is_adapted = any(_owner(each) in self.wrapped for each in (name, target))
            if is_adapted and not torch.equal(self._weight(name), self._weight(target)):
                self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
                names |= {self.file_names[each]: each for each in (name, target)}
        self.names = names
        specs = {}
        for file_name, name in names.items():
            stored = self.base.spec(self._stored(name) if name else file_name)
            shape = (self.vocabulary, *stored.shape[1:]) if name in self._resized else stored.shape
            kind = dtype if dtype and stored.is_floating_point() else stored.dtype
            specs[file_name] = torch.empty(shape, dtype=kind, device="meta")
        return specs

    def _stored(self, name: str) -> str:
        """The name of a weight in the base's files, which contain tied weights once."""
        return self.file_names[name if self.file_names[name] in self.base else self._aliases[name]]

    def from_base(self, name: str) -> torch.Tensor:
        """A weight before merging, with rows for added tokens, or the adapter's replacement of it or a tied one."""
        alias = self._aliases.get(name, name)
        if replaced := self._replaced.get(name) or (_owner(alias) not in self.wrapped and self._replaced.get(alias)):
            return self.adapter[replaced]
        weight = self.base[self._stored(name)]
        if name in self._resized:
            more = weight.float().mean(0).to(weight.dtype) if weight.dim() > 1 else weight.new_zeros(())
            added = more.expand(max(0, self.vocabulary - self.rows), *weight.shape[1:])
            weight = torch.cat([weight[: self.vocabulary], added])
        return self.quantized.dequantize(name, weight) if self.quantized else weight

    def tensor(self, file_name: str) -> torch.Tensor:
        """A merged tensor, in float32 if anything was added to it, valid until the call after the next."""
        name = self.names.get(file_name)
        return self._weight(name) if name else self.base[file_name]

    def _weight(self, name: str) -> torch.Tensor:
        owner = _owner(name)
        if owner not in self.wrapped:
            return self.from_base(name)
        layer = self.wrapped[owner]
        if name == f"{owner}.weight" and _is_plain_lora(layer):
            return self._merge_plain(layer, self.from_base(name))
        if self._merged[0] != owner:
            self._merged = owner, self.layer(owner, merged=True).state_dict()
        return self._merged[1][name.removeprefix(f"{owner}.")]

    def _merge_plain(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """Merge as PEFT does (get_delta_weight, merge), but in buffers: new memory takes longer than the product."""
        (adapter,) = layer.active_adapters
        a, b = (self.adapter[self._names[id(m[adapter].weight)]].float() for m in (layer.lora_A, layer.lora_B))
        self._buffers[:2] = self._buffers[1::-1]  # the other one may still be written to disk
        for i in (0, 2):
            if self._buffers[i].numel() < weight.numel():
                self._buffers[i] = torch.empty(weight.numel())
        total, exact = (self._buffers[i][: weight.numel()].view(weight.shape) for i in (0, 2))
        return torch.mm(b, a, out=total).mul_(float(layer.scaling[adapter])).add_(exact.copy_(weight))

    def layer(self, owner: str, merged: bool = False) -> Any:
        """The adapted layer `owner` with its weights in float32, or the layer that PEFT merges it to."""
        layer: Any = copy.deepcopy(self.wrapped[owner])
        for path, parameter in self.wrapped[owner].named_parameters():
            parent, _, kind = path.rpartition(".")
            key = self._names.get(id(parameter))
            stored = self.adapter[key] if key is not None else self.from_base(f"{owner}.{kind}")
            value = stored.to(torch.float32, copy=True)  # PEFT adds in place, which must not change the file's memory
            layer.get_submodule(parent)._parameters[kind] = torch.nn.Parameter(value, False)
        if merged and hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        if merged:
            layer.merge(safe_merge=False, adapter_names=None)
        return layer.get_base_layer() if merged else layer


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_plain_lora(layer: Any) -> bool:
    (adapter,) = layer.active_adapters
    return type(layer) is Linear and not layer.lora_variant and not layer.fan_in_fan_out and adapter in layer.lora_A


def _check_supported(peft_config: Any, base: Path, adapter: Path, config: Any) -> None:
    """Raise UnsupportedAdapter for what cannot be merged one tensor at a time, UserError for a quantized base."""
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UserError(
            f"The base of the adapter is quantized ({display_name(base)}, {method}). It has no original weights. "
            "Merging into it would round the adapter away. Use `--base_model_id` for what it was quantized from."
        )
    init = getattr(peft_config, "init_lora_weights", True)
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    problems = {f"an adapter of type {kind}": kind != "LORA"}
    for name in ("bias", "lora_bias", "target_parameters", "layer_replication", "megatron_config",
                 "alora_invocation_tokens"):  # fmt: skip
        value = getattr(peft_config, name, None)
        problems[f"an adapter with {name}={value!r}"] = bool(value) and value != "none"
    problems |= {
        "a base that is not in safetensors format": not any(base.glob("*.safetensors")),
        "an adapter that is not in safetensors format": not (adapter / "adapter_model.safetensors").is_file(),
        # loading such an adapter changes the base
        f"an adapter initialized by {init}": not isinstance(init, bool) and init not in BASE_KEEPING_INITS,
    }
    if reason := next((reason for reason, applies in problems.items() if applies), ""):
        raise UnsupportedAdapter(reason)


def _check_token_rows(peft_config: Any, vocabulary: int) -> None:
    rows = getattr(peft_config, "trainable_token_indices", None) or []
    last = max((row for each in (rows.values() if isinstance(rows, dict) else [rows]) for row in each), default=0)
    if last >= vocabulary:
        sizes = f"The adapter has a row for token {last}, but the tokenizer has {vocabulary:,} tokens."
        raise UserError(f"{sizes} Put the tokenizer that it was trained with into its folder.")


class QuantizedBase:
    """The weights that training with quantization `config` computed with, loaded in dtype `stored`."""

    def __init__(self, model: PreTrainedModel, config: BitsAndBytesConfig, stored: torch.dtype) -> None:
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import HfQuantizer

        self.config, self.stored = config, stored
        in_float32 = getattr(model, "_keep_in_fp32_modules", None)
        keep = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, in_float32)
        twin = replace_with_bnb_linear(copy.deepcopy(model), keep, config)
        self.names = {n for n, m in twin.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}

    def dequantize(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Quantize `weight` as `Params4bit` or `Int8Params` does, and dequantize it to float32 as their layers do. A
        weight that training did not quantize stays as it is."""
        from bitsandbytes import functional

        config: Any = self.config
        if _owner(name) not in self.names or not name.endswith(".weight"):
            return weight
        weight = weight.to(self.stored).contiguous()
        if config.load_in_8bit:
            rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
            dequantized: torch.Tensor = functional.int8_vectorwise_dequant(rows, scales)
            return dequantized.to(weight.dtype).float()
        options = {"compress_statistics": config.bnb_4bit_use_double_quant, "quant_type": config.bnb_4bit_quant_type}
        packed, state = functional.quantize_4bit(weight, quant_storage=config.bnb_4bit_quant_storage, **options)
        return functional.dequantize_4bit(packed, state).to(config.bnb_4bit_compute_dtype).float()
