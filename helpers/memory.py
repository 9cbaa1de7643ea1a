"""How much memory training takes, by part, from the decoder's shapes and the settings alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from helpers.decoder import Decoder, Linear

GB = 10**9
# Bytes of optimizer state to a parameter, where it is not AdamW's 8 in float32 (bitsandbytes' have blocks of 256).
STATES = {"8bit": 2 + 2 * 4 / 256, "sgd": 0.0, "adafactor": 4.0, "lion": 4.0, "lion_8bit": 1 + 4 / 256}
SMALL = 4096  # parameters of a weight below which bitsandbytes keeps its state in float32
TILE = (4096, 32768)  # rows and columns of the logits that TRL has at a time (trl 1.16, kernels/chunked_logprob.py)


@dataclasses.dataclass(frozen=True)
class Job:
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
    whole: int = 0  # modules that are trained whole beside the adapter
    stage: int = 0  # ZeRO's; FSDP shards what stage 3 does
    processes: int = 1

    @property
    def full(self) -> bool:
        return self.tuning == "full"


def read_job(values: Mapping[str, Any], step: str, decoder: Decoder, trained_further: bool = False) -> Job:
    """What the settings (`RunSettings.values()`) come to on a GPU with bfloat16, or with use_cpu on a CPU."""
    on_gpu = not values.get("use_cpu", False)
    bits = {"4bit": 4, "8bit": 8, "none": 16, "auto": 4 if values["tuning"] == "qlora" else 16}[values["quantization"]]
    engine = next((e for e in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{e}") == "true"), "")
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if engine == "DEEPSPEED" else 3
    return Job(
        step=step,
        tuning=values["tuning"],
        bits=bits,
        compute=2 if on_gpu and values.get("bf16", True) is not False else 4,
        rank=values["lora_r"],
        targets=values["lora_targets"],
        adapter=2 if values["adapter_dtype"] == "bf16" and bits == 4 else 4,
        batch=values["per_device_train_batch_size"],
        length=values["max_length"] or decoder.positions,
        checkpointing=values.get("gradient_checkpointing", True),
        optimizer=values.get("optim", "paged_adamw_8bit" if on_gpu and not engine else "adamw_torch"),
        frozen_copy=trained_further and step == "dpo",
        precomputed=values.get("precompute_ref_log_probs", False),
        flash="flash" in values["attention"],
        on_gpu=on_gpu,
        whole=len(values["modules_to_save"]),
        stage=stage if engine else 0,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def estimate(decoder: Decoder, job: Job) -> dict[str, float]:
    """Bytes on one device by part, with `peak` their sum.

    Weights, adapters, gradients and optimizer states are counted. Activations follow what autograd keeps of a layer of
    these widths, read from traces of TRL 1.16 with transformers 5.23 (benchmarks/memory.py compares).
    """
    trained, mixed = trained_sizes(decoder, job), job.full and job.stage > 0 and job.compute == 2
    share = {name: job.processes if job.stage >= stage else 1 for name, stage in (("optimizer", 1), ("gradients", 2))}
    weights = weight_bytes(decoder, job) / (job.processes if job.stage >= 3 else 1)
    adapter = 0.0 if job.full else sum(trained) * job.adapter
    part = {
        "weights": weights,
        "adapter": adapter * (2 if job.frozen_copy else 1),
        "gradients": sum(trained) * (2 if mixed else 4 if job.full else job.adapter) / share["gradients"],
        # DeepSpeed and FSDP keep the weights that are trained in bfloat16, and the exact ones with the optimizer
        "optimizer": (sum(state_bytes(n, job) for n in trained) + 4 * mixed * sum(trained)) / share["optimizer"],
        "reference": weights if job.full and job.step == "dpo" and not job.precomputed else 0.0,
        "activations": activation_bytes(decoder, job),
        "logits": logit_bytes(decoder, job),
    }
    return part | {"peak": sum(part.values())}


def weight_bytes(decoder: Decoder, job: Job) -> float:
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


def trained_sizes(decoder: Decoder, job: Job) -> list[int]:
    """The number of parameters of each weight that is trained."""
    if job.full:
        biases = [linear.outputs for linear in decoder.linears if linear.bias]
        tables = [decoder.vocabulary * decoder.hidden] * (1 if decoder.tied else 2)
        return [*(linear.weights for linear in decoder.linears), *biases, *tables, decoder.norms]
    targets = decoder.targets(job.targets)
    sizes = [job.rank * side for linear in targets for side in (linear.inputs, linear.outputs)]
    sizes += [linear.outputs for linear in targets] if job.tuning == "dora" else []
    return sizes + [decoder.vocabulary * decoder.hidden] * job.whole


def state_bytes(size: int, job: Job) -> float:
    """What the optimizer keeps of a weight with so many parameters."""
    name = job.optimizer.removeprefix("paged_")
    eight = "8bit" in name
    kind = "lion" if "lion" in name else next((k for k in ("sgd", "adafactor") if name.startswith(k)), "adamw")
    if eight and size >= SMALL:
        return size * (STATES["lion_8bit"] if kind == "lion" else STATES["8bit"])
    return size * STATES.get(kind, 8.0)


def activation_bytes(decoder: Decoder, job: Job) -> float:
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


def logit_bytes(decoder: Decoder, job: Job) -> float:
    """TRL scores answers in tiles and never has all logits; a CPU has a tile several times over."""
    tokens = (2 if job.step == "dpo" else 1) * job.batch * job.length
    rows = min(tokens, TILE[0])
    tile = float(rows * TILE[1] * job.compute)
    if not job.on_gpu:
        tile += 16.0 * rows * min(decoder.vocabulary, TILE[1])
    return tile + 6.0 * tokens * decoder.hidden + (4.0 * decoder.vocabulary * decoder.hidden if job.full else 0)


def fitting(decoder: Decoder, job: Job, accumulation: int, limit: float) -> list[tuple[str, float]]:
    """Flags that bring the peak under `limit` bytes, each with its peak: those that do it alone, or else one upon
    another, those first that leave the result as it is. [] where nothing does."""
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
    return []


def _peak(decoder: Decoder, job: Job) -> float:
    return estimate(decoder, job)["peak"]


def _changes(job: Job, accumulation: int) -> list[list[tuple[str, dict[str, Any]]]]:
    """What may be changed, each from the mildest to the strongest."""
    kinds: list[list[tuple[str, dict[str, Any]]]] = []
    if not job.checkpointing:
        kinds.append([("--gradient_checkpointing True", {"checkpointing": True})])
    halves = [job.batch >> i for i in range(1, job.batch.bit_length())]
    batch, steps = "--per_device_train_batch_size", "--gradient_accumulation_steps"
    kinds.append([(f"{batch} {n} {steps} {math.ceil(accumulation * job.batch / n)}", {"batch": n}) for n in halves])
    if "8bit" not in job.optimizer and job.stage == 0 and job.on_gpu:
        kinds.append([("--optim paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"})])
    if job.full:
        kinds.append([("--tuning qlora", {"tuning": "qlora", "bits": 4})])
    elif job.bits > 4:
        kinds.append([("--quantization 4bit", {"bits": 4})])
    ranks = [job.rank >> i for i in range(1, job.rank.bit_length() - 3)]
    if not job.full:
        kinds.append([(f"--lora_r {n}", {"rank": n}) for n in ranks])
    shorter = range(job.length // 128 * 128 - (job.length % 128 == 0) * 128, 255, -128)
    kinds.append([(f"--max_length {n}", {"length": n}) for n in shorter])
    return [kind for kind in kinds if kind]
