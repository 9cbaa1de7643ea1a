"""How much memory training takes, by part: estimated from a model's config.json and the settings alone."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from helpers.core import SettingsError, find_path
from helpers.models.adapters import follows_longest_row
from helpers.models.plan import no_microbatch_reason, sharding_engine, zero_stage
from helpers.models.resolve import Start, check_positions, fetch_file, missing_weights
from helpers.settings.fields import TrainSettings

GB = 10**9
# States that an optimizer keeps per weight, by the start of its name (adafactor's are rows and columns).
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "adam": 2, "ademamix": 3}
MIN_8BIT_SIZE = 4096  # parameters; bitsandbytes keeps the state of smaller weights in float32
LOGIT_TILE = (4096, 32768)  # rows and columns of logits in memory at a time (trl 1.16, kernels/chunked_logprob.py)
# Families whose layers are listed here: importing torch and transformers takes longer than a dry run may.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma")
# Families whose experts, one tensor for all, have an adapter with "all-linear" (peft 0.21). They are never quantized.
ADAPTED_EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "minimax")
USED_SHARE = 0.9  # of the memory: fragments of it cannot be used
CPU_TOKENS = 4096  # of a micro-batch on a CPU, by default: more are not faster


class Linear(NamedTuple):
    """A linear layer, under its full name as PEFT sees it."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder's config, its linear layers except the LM head, and how many other parameters it has."""

    config: Any
    linears: list[Linear]
    norms: int  # parameters outside linear layers, embeddings and LM head; experts too
    experts: list[Linear] = dataclasses.field(default_factory=list)  # all of a layer as one, as wide as their adapters

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings; the LM head has as many."""
        return int(self.config.vocab_size * self.config.hidden_size)

    @property
    def parameters(self) -> int:
        tables = self.embeddings * (1 if self.config.tie_word_embeddings else 2)
        return tables + self.norms + sum(linear.weights + linear.outputs * linear.bias for linear in self.linears)

    def targets(self, lora_target_modules: str | list[str]) -> list[Linear]:
        """The layers that PEFT gives an adapter: "all-linear", or those whose full name matches the expression."""
        if isinstance(lora_target_modules, list):
            ends = tuple(f".{name}" for name in lora_target_modules)
            return [linear for linear in self.linears if f".{linear.name}".endswith(ends)]
        if lora_target_modules == "all-linear":
            return self.linears + self.experts
        return [linear for linear in self.linears if re.fullmatch(lora_target_modules, linear.name)]


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a decoder's shapes from its config.json: at once for a family in LLAMA_LIKE, else in some seconds."""
    c: Any = SimpleNamespace(**{"tie_word_embeddings": config.get("model_type") == "gemma"} | dict(config))
    try:
        return Decoder(c, *_listed_layers(c))
    except (AttributeError, KeyError):  # another family, or a number that is left to transformers' defaults
        return Decoder(*_built_layers(config))


def _head_widths(c: Any) -> tuple[int, int, int]:
    """The widths of all query heads together, of all key heads, and of one head."""
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return c.num_attention_heads * size, (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * size, size


def _listed_layers(c: Any) -> tuple[list[Linear], int]:
    """The linear layers of a family in LLAMA_LIKE, and the parameters of its norms. Raises KeyError for another."""
    if c.model_type not in LLAMA_LIKE or not c.vocab_size:
        raise KeyError(c.model_type)
    hidden, inner, (query, key_value, size) = c.hidden_size, c.intermediate_size, _head_widths(c)
    is_qwen2, mlp_bias = c.model_type == "qwen2", bool(getattr(c, "mlp_bias", False))
    output_bias = bool(getattr(c, "attention_bias", False)) and not is_qwen2
    layer = {f"self_attn.{name}_proj": (hidden, key_value, output_bias or is_qwen2) for name in "qkv"}
    layer["self_attn.q_proj"] = hidden, query, output_bias or is_qwen2
    layer["self_attn.o_proj"] = query, hidden, output_bias
    layer |= {f"mlp.{name}_proj": (hidden, inner, mlp_bias) for name in ("gate", "up")}
    layer["mlp.down_proj"] = inner, hidden, mlp_bias
    count, norms = c.num_hidden_layers, 2 * (hidden + size * (c.model_type == "qwen3"))
    linears = [Linear(f"model.layers.{i}.{name}", *shape) for i in range(count) for name, shape in layer.items()]
    return linears, count * norms + hidden


def _built_layers(config: Mapping[str, Any]) -> tuple[Any, list[Linear], int, list[Linear]]:
    """Build the model on the meta device. Returns its text config, linear layers, other parameters, and experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    layers, linears = {model.get_input_embeddings(), model.get_output_embeddings()}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module not in layers:
            inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
            linears.append(Linear(name, inputs, outputs, module.bias is not None))
            layers.add(module)
    counted = {parameter for layer in layers for parameter in layer.parameters()}
    experts = []
    for name, weight in model.named_parameters() if model.config.model_type in ADAPTED_EXPERTS else ():
        if weight.ndim == 3:  # experts, outputs, inputs; PEFT doubles the rank of gate_up_proj
            count = len(weight) * (2 if name.endswith("gate_up_proj") else 1)
            experts.append(Linear(name, count * weight.shape[2], count * weight.shape[1]))
    others = sum(p.numel() for p in {*model.parameters()} - counted)
    return model.config.get_text_config(), linears, others, experts


class TrainingSpec:
    """What memory depends on besides the model: `RunSettings.values()`, for a GPU with bfloat16 or a CPU."""

    def __init__(self, values: Mapping[str, Any], step: str, decoder: Decoder, trained_further: bool = False) -> None:
        tuning, dpo, engine = values["tuning"], step == "dpo", sharding_engine()
        bits = {"4bit": 4, "8bit": 8, "none": 16, "auto": 4 if tuning == "qlora" else 16}
        self.on_gpu = not values.get("use_cpu", False)
        self.full, self.dora = tuning == "full", tuning == "dora"
        self.bits = bits[values["quantization"]]  # of the frozen base's linear layers
        self.compute = 2 if self.on_gpu and values.get("bf16", True) is not False else 4  # bytes, as computed with
        self.adapter = 2 if values["adapter_dtype"] == "bf16" and self.bits == 4 else 4  # bytes, as kept
        self.rank = int(values["lora_r"])
        self.targets = [] if self.full else decoder.targets(values["lora_target_modules"])
        self.modules_to_save = tuple(values["lora_modules_to_save"])
        self.batch = int(values["per_device_train_batch_size"])
        self.length = int(values["max_length"] or getattr(decoder.config, "max_position_embeddings", 0))
        self.checkpointing = values.get("gradient_checkpointing", True)
        self.optimizer = str(values.get("optim", "paged_adamw_8bit" if self.on_gpu and not engine else "adamw_torch"))
        self.frozen_copy = trained_further and dpo  # of the adapter, as the reference
        self.reference = self.full and dpo and not values.get("precompute_ref_log_probs", False)
        is_shared = dpo and self.on_gpu and values.get("shared_prefix", "off") != "off"
        is_shared = is_shared and not follows_longest_row(decoder.config)
        self.varlen = is_shared or "flash" in values["attn_implementation"]
        self.stage = zero_stage(values, engine)  # of ZeRO; FSDP shards like stage 3
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        is_cut = dpo and not no_microbatch_reason(decoder.config, values)
        self.budget = values.get("tokens_per_microbatch", 0) if is_cut else 0  # auto; 0: a batch
        is_pooled = self.budget and "sft" not in values.get("loss_type", ())
        self.pairs = self.batch * (int(values["gradient_accumulation_steps"]) if is_pooled else 1)
        self.pair = (2 if dpo else 1) * self.length  # tokens of a pair, or of a conversation
        self.tokens = self.pairs * self.pair  # at a time
        if self.budget == "auto" and self.on_gpu:
            self.tokens = largest_microbatch(decoder, self, USED_SHARE * values["memory_gb"] * GB)
        elif self.budget:
            self.tokens = min(self.tokens, max(self.pair, CPU_TOKENS if self.budget == "auto" else self.budget))


def memory_by_part(decoder: Decoder, spec: TrainingSpec, tokens: int = 0) -> dict[str, float]:
    """Bytes on one device by part; `peak` is their sum. benchmarks/memory.py compares them with real runs."""
    spec = copy.copy(spec)
    spec.tokens = tokens or spec.tokens
    trained, embeddings = trained_sizes(decoder, spec), 0
    if spec.full or any("embed" in name for name in spec.modules_to_save):
        embeddings = decoder.embeddings
    count = sum(trained) + embeddings
    # DeepSpeed and FSDP keep trained weights in bfloat16, and float32 copies with the optimizer
    mixed = spec.full and spec.stage > 0 and spec.compute == 2
    states = sum(state_bytes(n, spec) for n in trained) + state_bytes(embeddings, spec, embedding=True)
    weights = weight_bytes(decoder, spec) / (spec.processes if spec.stage >= 3 else 1)
    adapter = 0.0 if spec.full else count * spec.adapter
    gradients = count * (2 if mixed else 4 if spec.full else spec.adapter)
    parts = {
        "weights": weights,
        "adapter": adapter * (2 if spec.frozen_copy else 1),
        "gradients": gradients / (spec.processes if spec.stage >= 2 else 1),
        "buckets": gradients if spec.processes > 1 and not spec.stage else 0.0,
        "optimizer": (states + 4 * mixed * count) / (spec.processes if spec.stage >= 1 else 1),
        "reference": weights if spec.reference else 0.0,
    } | dict(zip(("activations", "logits"), step_bytes(decoder, spec), strict=True))
    return parts | {"peak": sum(parts.values())}


def largest_microbatch(decoder: Decoder, spec: TrainingSpec, limit: float, least: int = 0) -> int:
    """The most tokens at a time that need at most `limit` bytes; at least `least`, by default those of one pair."""
    tokens = range(least or spec.pair, spec.pairs * spec.pair + 1)
    fitting = bisect.bisect_right(tokens, limit, key=lambda each: memory_by_part(decoder, spec, each)["peak"])
    return tokens[max(0, fitting - 1)]


def weight_bytes(decoder: Decoder, spec: TrainingSpec) -> float:
    """The loaded base: float32 if it is trained. bitsandbytes 0.50 quantizes neither embeddings, LM head nor norms."""
    if spec.full:
        return (2.0 if spec.stage and spec.compute == 2 else 4.0) * decoder.parameters
    if spec.bits == 16:
        return float(spec.compute * decoder.parameters)
    total = float(spec.compute * (decoder.parameters - sum(linear.weights for linear in decoder.linears)))
    for linear in decoder.linears:
        blocks = math.ceil(linear.weights / 64)  # NF4: an 8-bit constant each, and one of 32 bits per 256 of those
        tables = 4 * 16 + 4 * 256 + 4  # two codebooks and an offset
        nf4 = linear.weights / 2 + blocks + 4 * math.ceil(blocks / 256) + tables
        total += nf4 if spec.bits == 4 else linear.weights + 4 * linear.outputs  # int8: a constant per row
    return total


def trained_sizes(decoder: Decoder, spec: TrainingSpec) -> list[int]:
    """Parameters of each trained weight, except the input embeddings."""
    if spec.full:
        biases = [linear.outputs for linear in decoder.linears if linear.bias]
        head = [] if decoder.config.tie_word_embeddings else [decoder.embeddings]
        return [*(linear.weights for linear in decoder.linears), *biases, *head, decoder.norms]
    sizes = [spec.rank * side for linear in spec.targets for side in (linear.inputs, linear.outputs)]
    sizes += [linear.outputs for linear in spec.targets] if spec.dora else []
    return sizes + [decoder.embeddings for name in spec.modules_to_save if "embed" not in name]


def state_bytes(size: int, spec: TrainingSpec, embedding: bool = False) -> float:
    """Bytes of the optimizer's state for a weight of `size` parameters; an unknown optimizer counts as AdamW."""
    name = spec.optimizer.removeprefix("paged_")
    states = next((n for prefix, n in OPTIMIZER_STATES.items() if name.startswith(prefix)), 2)
    # embeddings never have 8-bit states (transformers 5.23, trainer.py, create_optimizer)
    in_8bit = "8bit" in name and size >= MIN_8BIT_SIZE and not embedding
    return states * size * ((1 + 4 / 256) if in_8bit else 4.0)  # 8-bit states have a constant per 256


def step_bytes(decoder: Decoder, spec: TrainingSpec) -> tuple[float, float]:
    """Activations in the backward of a layer, and what the LM head, at another time, takes above them: often nothing.
    TRL 1.16 never has all logits in memory, but a tile, and without Triton several copies of it. The numbers for
    bfloat16 are traced in tests/training/trace.py."""
    # copies for autocast of float32 weights; with an engine, weights trained in full are in bfloat16 already
    casts = 2.0 * sum(trained_sizes(decoder, spec)) if spec.compute == 2 and not (spec.full and spec.stage) else 0.0
    layers, hidden = int(decoder.config.num_hidden_layers), int(decoder.config.hidden_size)
    inner = max((linear.outputs for linear in decoder.linears), default=hidden)  # the width of the MLP
    is_gated = any("gate" in linear.name for linear in decoder.linears)
    query, key_value, _ = _head_widths(decoder.config)
    if spec.varlen:  # queries, outputs, and keys and values of prefixes and of tails
        attention = spec.compute * (2 * query + 4 * key_value)
    elif spec.full and spec.compute == 2:  # float32 but for values; keys and values repeated by head; and a mask
        attention = 14 * query + 4 * spec.length
    else:
        attention = spec.compute * (4 * query + spec.length)
    # the residual stream and both norms, which are computed in float32, and with checkpointing gradients of these
    width = {(2, False): 20, (4, False): 17, (2, True): 22, (4, True): 27}[spec.compute, spec.full] - 8 * (not is_gated)
    width += 4 * (spec.checkpointing and spec.compute == 2 and not spec.full)
    adapters = spec.compute * spec.rank * len(spec.targets) / layers
    layer = attention + spec.compute * inner * (4 if is_gated else 2) + width * hidden + adapters
    # temporary, within one layer; a 4-bit weight is dequantized after its inputs are kept
    work = spec.compute * inner * (2 if spec.full else 3) + (0 if spec.compute == 2 else 12 * hidden)
    weight = spec.compute * max((linear.weights for linear in decoder.linears), default=0) if spec.bits < 16 else 0
    temporary = max(spec.tokens * work, spec.tokens * spec.compute * inner + weight)
    rows = min(spec.tokens, LOGIT_TILE[0])
    head = spec.tokens * hidden * (22.0 if spec.full else 20.0) + rows * LOGIT_TILE[1] * spec.compute
    if not spec.on_gpu or sys.platform == "win32":
        head += 28.0 * rows * min(int(decoder.config.vocab_size), LOGIT_TILE[1])
    gradient = 4.0 * decoder.embeddings if spec.full else 0.0  # of the LM head
    if not spec.checkpointing:
        activations = spec.tokens * (layers * layer + 6 * hidden) + temporary + casts
        more = max(gradient, casts if spec.reference else 0.0)  # the reference's casts
        return activations, max(0.0, head + more - temporary)
    kept = spec.tokens * hidden * (layers * (4 if spec.full else spec.compute) + 6)
    activations = kept + spec.tokens * layer + temporary + casts / layers
    return activations, max(0.0, kept + head + max(casts, gradient) - activations)


def suggest_changes(
    decoder: Decoder, values: dict[str, Any], step: str, limit: float, trained_further: bool = False
) -> list[tuple[str, float]]:
    """Flags that reduce the peak to `limit` bytes, each with its peak, the harmless ones first: every kind of change
    that is enough alone, else one combination, else all changes together."""

    def peak(change: dict[str, Any]) -> float:
        return memory_by_part(decoder, TrainingSpec(values | change, step, decoder, trained_further))["peak"]

    def fitting(kind: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any] | None:
        return next((before | change for change in kind if peak(before | change) <= limit), None)

    kinds = [kind for kind in _changes(values, TrainingSpec(values, step, decoder, trained_further)) if kind]
    options, combined = [change for kind in kinds if (change := fitting(kind, {}))], dict[str, Any]()
    for kind in kinds if not options else ():
        if enough := fitting(kind, combined):
            options = [enough]
            break
        combined = min(combined, combined | kind[-1], key=peak)
    options = options or [combined]
    return [(" ".join(f"--{name} {value}" for name, value in each.items()), peak(each)) for each in options]


def _changes(values: Mapping[str, Any], spec: TrainingSpec) -> Iterator[list[dict[str, Any]]]:
    """The kinds of changes to the settings, each from the mildest to the strongest."""
    if not spec.checkpointing:
        yield [{"gradient_checkpointing": True}]
    batches: list[dict[str, Any]] = [
        {"per_device_train_batch_size": spec.batch >> i} for i in range(1, spec.batch.bit_length())
    ]
    if spec.budget:
        batches = [{"tokens_per_microbatch": "auto"}][spec.budget == "auto" :]
    elif not values["global_batch_size"]:  # which would set the accumulation itself
        rows = values["gradient_accumulation_steps"] * spec.batch
        batches = [b | {"gradient_accumulation_steps": math.ceil(rows / n)} for b in batches for n in b.values()]
    yield batches
    if spec.reference:
        yield [{"precompute_ref_log_probs": True}]
    if "8bit" not in spec.optimizer and spec.stage == 0 and spec.on_gpu:
        yield [{"optim": "paged_adamw_8bit"}]
    if spec.full:
        yield [{"tuning": "qlora"} | ({"quantization": "4bit"} if values["quantization"] == "none" else {})]
    elif spec.bits > 4:
        yield [{"quantization": "4bit"}]
    if not spec.full and not spec.frozen_copy:  # an adapter that is trained further keeps its rank
        yield [{"lora_r": spec.rank >> i} for i in range(1, spec.rank.bit_length() - 3)]
    yield [{"max_length": length} for length in range((spec.length - 1) // 128 * 128, 255, -128)]


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device by part (none for an unknown type of model), a note on each, and lines on what to do."""

    parts: dict[str, float]
    notes: dict[str, str]
    lines: list[str]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("memory of one device", "", "", box=None, pad_edge=False)
        for name, size in self.parts.items():
            if size:
                note = self.notes.get(name, "")
                table.add_row(name, _format_bytes(size), note, style="bold" if name == "peak" else "")
        lines = [Text(line, no_wrap=True, overflow="ignore") for line in self.lines]  # so that flags can be copied
        return Group(*([table] if self.parts else []), *lines)


def estimate_memory(settings: TrainSettings, start: Start) -> MemoryEstimate:
    """Estimate what `settings` need on one GPU with bfloat16, or on a CPU with `--use_cpu`. Raises UserError."""
    values, lines = settings.values(), list[str]()
    values["gradient_accumulation_steps"] = settings.accumulation_steps()  # raises if they contradict each other
    config, folder = fetch_file(start.model, start.revision, "config.json"), find_path(start.model)
    if folder and (missing := missing_weights(folder)):
        lines = [f"The weights are not here yet: {folder.name} {missing}."]
    check_positions(json.loads(config.read_text()), values["max_length"])
    try:
        decoder = read_decoder(json.loads(config.read_text()))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        return MemoryEstimate({}, {}, [f"Memory: unknown, because its config.json is not supported: {reason}", *lines])
    spec = TrainingSpec(values, settings.step, decoder, start.adapter is not None)
    if not spec.full and not spec.targets:
        name = values["lora_target_modules"]
        raise SettingsError(f"`--lora_target_modules {name}` matches no linear layer of {start.base_model}.")
    parts, limit = memory_by_part(decoder, spec), values["memory_gb"] * GB
    fits = parts["peak"] <= limit
    if not fits:
        options = suggest_changes(decoder, values, settings.step, limit, start.adapter is not None)
        heading = "What would make it fit:" if options[0][1] <= limit else "No flags make it fit. The smallest is:"
        lines = [heading, *(f"  {flags}  ({_format_bytes(peak)})" for flags, peak in options), *lines]
    plain = "float32" if spec.compute == 4 or (spec.full and not spec.stage) else "bfloat16"
    pages = ", which may page to the CPU" if "paged" in spec.optimizer else ""
    known = spec.optimizer.removeprefix("paged_").startswith(tuple(OPTIMIZER_STATES))
    shape = f"batch {spec.batch}, {spec.length:,} tokens"
    if spec.budget:
        largest = largest_microbatch(decoder, spec, USED_SHARE * limit)
        count, shape = math.ceil(spec.pairs / (largest // spec.pair)), f"micro-batches of {spec.tokens:,} tokens"
        step = f"at most {count} micro-batches per step of {spec.pairs} pairs" if count > 1 else "all pairs of a step"
        lines += [f"The largest --tokens_per_microbatch that fits is {largest:,}: {step}."] if fits else []
    notes = {
        "weights": plain if spec.full else {4: "4-bit NF4", 8: "8-bit"}.get(spec.bits, plain),
        "adapter": "and its frozen copy, the reference" if spec.frozen_copy else f"rank {spec.rank}",
        "buckets": "of DistributedDataParallel",
        "optimizer": spec.optimizer + (pages if known else ", counted as AdamW"),
        "activations": shape if spec.checkpointing else f"{shape}, no checkpointing",
        "reference": "another copy of the weights",
        "peak": f"{'fits' if fits else 'does not fit'} into {limit / GB:g} GB (--memory_gb)",
    }
    return MemoryEstimate(parts, notes, lines)


def _format_bytes(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 10**6:.2f} MB"
