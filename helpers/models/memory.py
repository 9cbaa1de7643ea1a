"""How much memory training takes, by part, from the decoder's shapes and the settings alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.core import SettingsError, find_path
from helpers.models.decoder import Decoder, Linear, read_decoder
from helpers.models.resolve import missing_weights, resolve_model
from helpers.runs.run import Run
from helpers.settings.fields import TrainSettings

GB = 10**9
# States that an optimizer keeps of each weight: a prefix of its name, and how many (adafactor's are rows and columns).
OPTIMIZER_STATES = {
    "sgd": 0,
    "adafactor": 0,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "adamw": 2,
    "adam": 2,
    "ademamix": 3,
}
SMALL = 4096  # parameters of a weight below which bitsandbytes keeps its state in float32
TILE = (4096, 32768)  # rows and columns of the logits that TRL has at a time (trl 1.16, kernels/chunked_logprob.py)


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """What decides on the memory of a run; `bits` are those of the frozen base's linear layers."""

    step: str
    tuning: str
    bits: int
    compute: int  # bytes of what is computed in: 2 for bfloat16, 4 for float32
    rank: int
    targets: str
    adapter: int  # bytes of an adapter's weight
    batch: int
    length: int
    checkpointing: bool
    optimizer: str
    frozen_copy: bool  # an adapter that is trained further has a frozen copy, as the reference
    precomputed: bool  # the reference's log-probabilities are, and it is not there while training
    flash: bool
    on_gpu: bool
    whole: tuple[str, ...] = ()  # modules that are trained whole beside the adapter
    stage: int = 0  # ZeRO's; FSDP shards what stage 3 does
    processes: int = 1

    @property
    def full(self) -> bool:
        return self.tuning == "full"


def training_spec(
    values: Mapping[str, Any], step: str, decoder: Decoder, trained_further: bool = False
) -> TrainingSpec:
    """What the settings (`RunSettings.values()`) come to on a GPU with bfloat16, or with use_cpu on a CPU."""
    on_gpu = not values.get("use_cpu", False)
    bits = {"4bit": 4, "8bit": 8, "none": 16, "auto": 4 if values["tuning"] == "qlora" else 16}[values["quantization"]]
    engine = next((e for e in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{e}") == "true"), "")
    return TrainingSpec(
        step=step,
        tuning=values["tuning"],
        bits=bits,
        compute=2 if on_gpu and values.get("bf16", True) is not False else 4,
        rank=values["lora_r"],
        targets=values["lora_target_modules"],
        adapter=2 if values["adapter_dtype"] == "bf16" and bits == 4 else 4,
        batch=values["per_device_train_batch_size"],
        length=values["max_length"] or decoder.positions,
        checkpointing=values.get("gradient_checkpointing", True),
        optimizer=values.get("optim", "paged_adamw_8bit" if on_gpu and not engine else "adamw_torch"),
        frozen_copy=trained_further and step == "dpo",
        precomputed=values.get("precompute_ref_log_probs", False),
        flash="flash" in values["attn_implementation"],
        on_gpu=on_gpu,
        whole=tuple(values["lora_modules_to_save"]),
        stage=_stage(values, engine) if engine else 0,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def _stage(values: Mapping[str, Any], engine: str) -> int:
    """ZeRO's stage: that of --deepspeed FILE, of the file that accelerate was given, or of its own settings."""
    if engine == "FSDP":
        return 3
    file = values.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not file:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SettingsError(f"--deepspeed {file} cannot be read: {error}") from None
    return int(content.get("zero_optimization", {}).get("stage", 0))


def estimate_memory(decoder: Decoder, job: TrainingSpec) -> dict[str, float]:
    """Bytes on one device by part, with `peak` their sum.

    Weights, adapters, gradients and optimizer states are counted. Activations follow what autograd keeps of a layer of
    these widths, read from traces of TRL 1.16 with transformers 5.23 (benchmarks/memory.py compares); prompts that DPO
    computes once for both answers make them less.
    """
    trained, mixed = trained_sizes(decoder, job), job.full and job.stage > 0 and job.compute == 2
    share = {name: job.processes if job.stage >= stage else 1 for name, stage in (("optimizer", 1), ("gradients", 2))}
    weights = weight_bytes(decoder, job) / (job.processes if job.stage >= 3 else 1)
    table, count = trained_embeddings(decoder, job), sum(trained) + trained_embeddings(decoder, job)
    states = sum(state_bytes(n, job) for n in trained) + state_bytes(table, job, embedding=True)
    adapter = 0.0 if job.full else count * job.adapter
    part = {
        "weights": weights,
        "adapter": adapter * (2 if job.frozen_copy else 1),
        "gradients": count * (2 if mixed else 4 if job.full else job.adapter) / share["gradients"],
        # DeepSpeed and FSDP keep the weights that are trained in bfloat16, and the exact ones with the optimizer
        "optimizer": (states + 4 * mixed * count) / share["optimizer"],
        "reference": weights if job.full and job.step == "dpo" and not job.precomputed else 0.0,
        "activations": activation_bytes(decoder, job),
        "logits": logit_bytes(decoder, job),
    }
    return part | {"peak": sum(part.values())}


def weight_bytes(decoder: Decoder, job: TrainingSpec) -> float:
    """The base as it is loaded: float32 where it is trained; bitsandbytes leaves embeddings, head and norms alone."""
    if job.full:
        return (2.0 if job.stage and job.compute == 2 else 4.0) * decoder.parameters
    if job.bits == 16:
        return float(job.compute * decoder.parameters)
    quantized = sum(quantized_bytes(linear, job.bits) for linear in decoder.linears)
    rest = decoder.parameters - sum(linear.weights for linear in decoder.linears)
    return quantized + job.compute * rest


def quantized_bytes(linear: Linear, bits: int) -> float:
    """bitsandbytes 0.50: NF4 in blocks of 64, whose constants are 8 bits each in blocks of 256; or int8 by rows."""
    if bits == 8:
        return linear.weights + 4 * linear.outputs
    blocks = math.ceil(linear.weights / 64)
    tables = 4 * 16 + 4 * 256 + 4  # the two codes and the offset
    return linear.weights / 2 + blocks + 4 * math.ceil(blocks / 256) + tables


def trained_sizes(decoder: Decoder, job: TrainingSpec) -> list[int]:
    """The number of parameters of each weight that is trained, but for the input embeddings."""
    if job.full:
        biases = [linear.outputs for linear in decoder.linears if linear.bias]
        head = [] if decoder.tied else [decoder.vocabulary * decoder.hidden]
        return [*(linear.weights for linear in decoder.linears), *biases, *head, decoder.norms]
    targets = decoder.targets(job.targets)
    sizes = [job.rank * side for linear in targets for side in (linear.inputs, linear.outputs)]
    sizes += [linear.outputs for linear in targets] if job.tuning == "dora" else []
    return sizes + [decoder.vocabulary * decoder.hidden for name in job.whole if "embed" not in name]


def trained_embeddings(decoder: Decoder, job: TrainingSpec) -> int:
    """Parameters of the input embeddings, where they are trained."""
    return decoder.vocabulary * decoder.hidden if job.full or any("embed" in name for name in job.whole) else 0


def state_bytes(size: int, job: TrainingSpec, embedding: bool = False) -> float:
    """What the optimizer keeps of a weight with so many parameters; one that is not in STATES counts as AdamW.

    8-bit states have a constant to each block of 256; small weights and embeddings (transformers 5.23, trainer.py,
    create_optimizer) have float32 ones nevertheless.
    """
    name = job.optimizer.removeprefix("paged_")
    states = next((n for kind, n in OPTIMIZER_STATES.items() if name.startswith(kind)), 2)
    in_8bit = "8bit" in name and size >= SMALL and not embedding
    return states * size * ((1 + 4 / 256) if in_8bit else 4.0)


def activation_bytes(decoder: Decoder, job: TrainingSpec) -> float:
    """The larger of two moments: the forward's end, with adapters cast for autocast; and the first layer's backward."""
    tokens = (2 if job.step == "dpo" else 1) * job.batch * job.length
    targets = decoder.targets(job.targets) if not job.full else []
    # float32 weights as autocast has them; under an engine they are in bfloat16 already
    casts = 2.0 * sum(trained_sizes(decoder, job)) if job.compute == 2 and not (job.full and job.stage) else 0.0
    inner = job.compute * decoder.inner * (4 if decoder.gated else 2)
    attention = job.compute * 2 * (decoder.key_value if job.flash else decoder.query)  # keys and values, by head
    # the residual stream and both norms: norms are computed in float32
    width = {(2, False): 24, (4, False): 25, (2, True): 33, (4, True): 35}[job.compute, job.full]
    width -= 0 if decoder.gated else 8
    layer = attention + inner + width * decoder.hidden + job.compute * job.rank * len(targets) / decoder.layers
    work = job.compute * (4 * decoder.inner + 2 * decoder.hidden)  # what a layer needs for the moment
    ends = 6 * decoder.hidden
    if job.checkpointing:
        held = decoder.layers * decoder.hidden * (4 if job.full else job.compute) + ends
        forward, backward = held + work, held + layer + work
        return max(tokens * forward + casts, tokens * backward + casts / decoder.layers)
    return tokens * (decoder.layers * layer + ends + work) + casts


def logit_bytes(decoder: Decoder, job: TrainingSpec) -> float:
    """TRL scores answers in tiles and never has all logits; a CPU has a tile several times over."""
    tokens = (2 if job.step == "dpo" else 1) * job.batch * job.length
    rows = min(tokens, TILE[0])
    tile = float(rows * TILE[1] * job.compute)
    if not job.on_gpu:
        tile += 16.0 * rows * min(decoder.vocabulary, TILE[1])
    return tile + 6.0 * tokens * decoder.hidden + (4.0 * decoder.vocabulary * decoder.hidden if job.full else 0)


def suggest_changes(decoder: Decoder, job: TrainingSpec, accumulation: int, limit: float) -> list[tuple[str, float]]:
    """Flags that bring the peak under `limit` bytes, each with its peak: those that do it alone, or else one upon
    another, those first that leave the result as it is. Where nothing does, all together, whose peak is above it.

    `accumulation` is 0 where it follows from --global_batch_size.
    """
    alone, upon, words = [], job, list[str]()
    for kind in _changes(job, accumulation):
        tried = [(said, _peak(decoder, dataclasses.replace(job, **fields))) for said, fields in kind]
        alone += [(said, peak) for said, peak in tried if peak <= limit][:1]
    if alone:
        return alone
    for kind in _changes(job, accumulation):
        for said, fields in kind:
            peak = _peak(decoder, dataclasses.replace(upon, **fields))
            if peak <= limit:
                return [(" ".join([*words, said]), peak)]
        said, fields = kind[-1]
        if _peak(decoder, dataclasses.replace(upon, **fields)) < _peak(decoder, upon):
            upon, words = dataclasses.replace(upon, **fields), [*words, said]
    return [(" ".join(words), _peak(decoder, upon))]


def _peak(decoder: Decoder, job: TrainingSpec) -> float:
    return estimate_memory(decoder, job)["peak"]


def _changes(job: TrainingSpec, accumulation: int) -> list[list[tuple[str, dict[str, Any]]]]:
    """What may be changed, each from the mildest to the strongest."""
    kinds: list[list[tuple[str, dict[str, Any]]]] = []
    if not job.checkpointing:
        kinds.append([("--gradient_checkpointing True", {"checkpointing": True})])
    halves = [job.batch >> i for i in range(1, job.batch.bit_length())]
    batches = [(f"--per_device_train_batch_size {n}", math.ceil(accumulation * job.batch / n), n) for n in halves]
    steps = " --gradient_accumulation_steps"
    kinds.append([(f"{said}{steps} {more}" if accumulation else said, {"batch": n}) for said, more, n in batches])
    if job.full and job.step == "dpo" and not job.precomputed:
        kinds.append([("--precompute_ref_log_probs True", {"precomputed": True})])
    if "8bit" not in job.optimizer and job.stage == 0 and job.on_gpu:
        kinds.append([("--optim paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"})])
    if job.full:
        kinds.append([("--tuning qlora", {"tuning": "qlora", "bits": 4})])
    elif job.bits > 4:
        kinds.append([("--quantization 4bit", {"bits": 4})])
    ranks = [job.rank >> i for i in range(1, job.rank.bit_length() - 3)]
    if not job.full and not job.frozen_copy:  # an adapter that is trained further keeps its rank
        kinds.append([(f"--lora_r {n}", {"rank": n}) for n in ranks])
    shorter = range(job.length // 128 * 128 - (job.length % 128 == 0) * 128, 255, -128)
    kinds.append([(f"--max_length {n}", {"length": n}) for n in shorter])
    return [kind for kind in kinds if kind]


def estimate_fit(settings: TrainSettings, parent: Run | None = None) -> list[Any]:
    """What `settings` would need and do, for `display.show`: a table of memory by part, and lines.

    The memory is that of a GPU with bfloat16, unless they say --use_cpu; steps and tokens are about, and known where
    the rows are here. Nothing is written. Raises UserError where there is no such model, or a set is here that cannot
    be used, and SettingsError where the settings contradict each other.
    """
    values, whole = settings.values(), parent is not None and not parent.is_adapter
    folder = parent.folder if parent and whole else find_path(values["model_id"])
    has_config = folder is not None and (folder / "config.json").is_file()  # nothing more is read of it
    root = str(folder) if has_config else resolve_model(values["model_id"], values["revision"])
    accumulation = settings.accumulation_steps()
    notes = []
    if has_config and (lacking := missing_weights(Path(root))):
        notes.append(f"The weights are not here yet: {Path(root).name} {lacking}.")
    try:
        decoder = read_decoder(json.loads(_config_file(root, values["revision"]).read_text()))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        return [f"Memory: unknown, because its config.json is of a kind that is not known here: {reason}", *notes]
    job = training_spec(values, settings.step, decoder, parent is not None and parent.is_adapter)
    if not job.full and not decoder.targets(job.targets):
        raise SettingsError(
            f"--lora_target_modules {job.targets!r} is the name of no linear layer of {values['model_id']}"
        )
    parts, limit = estimate_memory(decoder, job), values["memory_gb"] * GB
    lines = []
    if parts["peak"] > limit:
        found = suggest_changes(decoder, job, 0 if values["global_batch_size"] else accumulation, limit)
        lines = [f"  {words}  ({_format_bytes(peak)})" for words, peak in found]
        fits = found[0][1] <= limit
        lines = [
            "What would make it fit:" if fits else "Nothing makes it fit. It needs least with:",
            *lines,
        ]
    return [_table(parts, job, limit), *lines, *notes]


def _table(parts: dict[str, float], job: TrainingSpec, limit: float) -> Any:
    from rich.table import Table

    plain = "float32" if job.compute == 4 or (job.full and not job.stage) else "bfloat16"
    known = any(job.optimizer.removeprefix("paged_").startswith(kind) for kind in OPTIMIZER_STATES)
    pages = ", which may page to the CPU" if "paged" in job.optimizer else ""
    shape = f"batch {job.batch}, {job.length:,} tokens"
    said = {
        "weights": {4: "4-bit NF4", 8: "8-bit"}.get(job.bits, plain) if not job.full else plain,
        "adapter": "and its frozen copy, the reference" if job.frozen_copy else f"rank {job.rank}",
        "optimizer": job.optimizer + (pages if known else ", counted as AdamW"),
        "activations": shape if job.checkpointing else f"{shape}, no checkpointing",
        "reference": "another copy of the weights",
        "peak": f"{'fits' if parts['peak'] <= limit else 'does not fit'} into {limit / GB:g} GB (--memory_gb)",
    }
    table = Table("memory of one device", "", "", box=None, pad_edge=False)
    for name, size in parts.items():
        if size:
            table.add_row(name, _format_bytes(size), said.get(name, ""), style="bold" if name == "peak" else "")
    return table


def _config_file(root: str, revision: str) -> Path:
    """config.json of a folder, or of a Hub id where `local_or_hub` has fetched it."""
    from huggingface_hub import hf_hub_download

    file = Path(root) / "config.json"
    return file if file.is_file() else Path(hf_hub_download(root, "config.json", revision=revision or None))


def _format_bytes(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 10**6:.2f} MB"
