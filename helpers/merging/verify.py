"""Compare a merged model with the policy as it was trained, before the merge is kept."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from helpers.core import UserError, read_jsonl
from helpers.merging.merge import Adapter, MergedModel
from helpers.merging.weights import StreamingMerger, UnsupportedAdapter, WeightFiles
from helpers.models.chat import encode_prompt
from helpers.runs.run import Run, lineage, recorded_variables

MAX_CONVERSATIONS = 16
MAX_TOKENS = 1024  # of a conversation
MAX_POSITIONS = 128  # of a conversation whose logits are compared: a large vocabulary must not fill the memory
LAYERS_PER_KIND = 2  # that are compared if the model is too large to load
# Rounding to bfloat16 (8 bits) changes a layer's outputs by less, root mean square; with room for a factor of two.
MAX_LAYER_DIFFERENCE = 2**-7
MIN_APPLIED = 0.5  # of an adapter's change of a layer that the merged layer has
FLOAT32_KL = 1e-8  # between two models that compute the same in float32; with room
MAX_ROUNDED = 4  # conversations that are computed in 16 bits, which some CPUs do slowly
BASE, COMPUTED = "base alone", "computed in "  # rows of `compare_logits`
CHECK = "Check the adapter and its base, or use another `--merge_base`."
QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.", "What is 12 + 30?",
             "Explain to a child why the sky is blue.", "Translate 'good morning' into Spanish.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a merged model is from the trained policy, and whether it may be kept."""

    metrics: dict[str, float]  # of `compare_logits` or `compare_layers`
    rows: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # of `compare_logits`, by model
    max_kl: float = 0.01
    dtype: str = "float32"  # of the merged weights

    @property
    def problem(self) -> str:
        """Why the merge is not kept, and the fix; "" for the trained policy. A number that is NaN is a problem too."""
        if "kl" not in self.metrics:
            if not self.metrics["relative"] <= MAX_LAYER_DIFFERENCE:
                return f"layers differ by {_short(self.metrics['relative'])}, more than rounding. {CHECK}"
            return "" if self.metrics.get("applied", 1.0) > MIN_APPLIED else self._inconclusive
        kl, base = self.metrics["kl"], self.rows.get(BASE, {}).get("kl", math.inf)
        if not kl <= self.max_kl:
            return f"KL {_short(kl)} is above --max_kl {self.max_kl}. {CHECK}"
        computing = self.rows.get(COMPUTED + self.dtype, {}).get("kl")
        # rounding weights moves a model about as far as rounding what it computes
        rounding = 4 * computing if computing is not None else kl if self.dtype != "float32" else 0.0
        if not kl < base / 4 and base <= max(rounding, FLOAT32_KL):
            return self._inconclusive
        return "" if kl < base else f"KL {_short(kl)} is not below that of the base alone, {_short(base)}. {CHECK}"

    @property
    def _inconclusive(self) -> str:
        fix = "Use `--merge_dtype float32`." if self.dtype != "float32" else "Train it further, or check its file."
        return f"inconclusive: the adapter changes the model less than rounding to {self.dtype} does. {fix}"

    def __rich__(self) -> Group:
        if "kl" in self.metrics:
            base = f"; base alone {_short(self.rows[BASE]['kl'])}" if BASE in self.rows else ""
            result = f"KL {_short(self.metrics['kl'])} nats{base}"
        else:
            layers, most = f"{self.metrics['layers']:.0f} layers", _short(self.metrics["relative"])
            result = f"outputs of {layers} differ by {most} at most (the model is too large to load here)"
        verdict = f"Merge refused: {self.problem}" if self.problem else f"Merge verified: {result}"
        table = Table("logits of", "largest difference", "mean", "same top token", "KL", box=None, pad_edge=False)
        for name, row in self.rows.items():
            values = f"{row['max_abs']:.2e}", f"{row['mean_abs']:.2e}", f"{row['top1']:.2%}", f"{row['kl']:.2e}"
            table.add_row(name, *values)
        return Group(Text(verdict, no_wrap=True, overflow="ignore"), *([table] if self.rows else []))


def _short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def verify_merge(merged: MergedModel, adapter: Adapter, max_kl: float = 0.01) -> Verification:
    """Compare the merged model with the trained policy, 4 bits included, on held-out prompts, or layer by layer if it
    does not fit into memory. Both compute in the same dtype: float32 if that fits. Merged weights of 16 bits then also
    compute in 16 bits, which is compared apart. The result of a finished merge is in its run.json."""
    precision, record = merged.precision, merged.run.record
    if merged.run.finished:
        max_kl = record.get("settings", {}).get("max_kl", max_kl)  # that it was judged by
        return Verification(record["metrics"], record.get("verification") or {}, max_kl)
    weights = WeightFiles(merged.folder)
    dtype = min((weights.spec(name).dtype for name in weights), key=lambda each: each.itemsize)
    judged: dict[str, Any] = {"max_kl": max_kl, "dtype": str(dtype).removeprefix("torch.")}
    device, computing = device_for(weights, precision.dtype)
    if not device:
        try:
            return Verification(compare_layers(adapter.merger(precision, "dequantized"), merged.folder), **judged)
        except UnsupportedAdapter as reason:  # PEFT has merged it, in less memory than a comparison takes
            raise UserError(f"The merge cannot be verified: the model is too large to load here, and cannot be compared"
                            f" layer by layer ({reason}). Use a machine with more memory.") from None  # fmt: skip
    prompts = held_out_prompts(adapter.run, adapter.tokenizer)
    policy = adapter.load_policy(precision, device, dequantize=computing == torch.float32)
    if computing == torch.float32:
        policy = policy.float()
    computing = policy.get_base_model().dtype
    trained = last_logits(policy, prompts)
    with policy.disable_adapter():
        base = last_logits(policy, prompts)
    del policy
    clear_device_cache(garbage_collection=True)
    options: Any = {"device_map": {"": device}} | adapter.loading
    model = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=computing, **options).eval()
    exact = last_logits(model, prompts)
    metrics = compare_logits(trained, exact)
    rows = {f"merged into {merged.merge_base}": metrics, BASE: compare_logits(trained, base)}
    if computing == torch.float32 != dtype:
        rounded = last_logits(model.to(dtype), prompts[:MAX_ROUNDED])
        rows[COMPUTED + judged["dtype"]] = compare_logits(exact[:MAX_ROUNDED], rounded)
    return Verification(metrics, rows, **judged)


def held_out_prompts(run: Run, tokenizer: Any) -> list[list[int]]:
    """The tokens of prompts of the run's evaluation rows, or of five questions if there are none: those of training, or
    rendered with its variables of the chat template."""
    file = run.folder / "held_out.jsonl"
    rows = read_jsonl(file)[:MAX_CONVERSATIONS] if file.is_file() else []
    rows = rows or [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    variables = recorded_variables(lineage(run.folder))
    return [row.get("ids") or encode_prompt(tokenizer, row["prompt"], variables) for row in rows]


def device_for(weights: WeightFiles, dtype: torch.dtype | str) -> tuple[str, Any]:
    """Where a model of these weights fits, "cuda" or "cpu", and in which dtype: float32, or else `dtype` ("auto" is as
    stored). ("", "auto") if it fits nowhere."""
    specs = [weights.spec(name) for name in weights]
    free = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    for device, memory in (free | {"cpu": psutil.virtual_memory().available}).items():
        for kind in (torch.float32, dtype):
            size = kind.itemsize if isinstance(kind, torch.dtype) else 0
            if memory > 1.2 * sum(spec.numel() * max(spec.itemsize, size) for spec in specs):
                return device, kind
    return "", "auto"


def last_logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The float32 logits at the last positions of each prompt, (tokens, vocabulary), computed without padding."""
    logits = []
    for prompt in prompts:
        ids = torch.tensor([prompt[-MAX_TOKENS:]])
        with torch.inference_mode():
            logits.append(model(input_ids=ids.to(model.device)).logits[0, -MAX_POSITIONS:].float().cpu())
    return logits


def compare_logits(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Compare the next-token distributions of two models over all positions of the same conversations. `max_abs` and
    `mean_abs` are differences of logits, `top1` is the share of positions with the same most likely token, `kl` the
    mean of KL(before ‖ after) in nats; in double precision, or a small one would be rounding of its sum alone."""
    each = []  # of each conversation, (4, positions)
    for a, b in ((a.double(), b.double()) for a, b in zip(before, after, strict=True)):
        difference, same = (a - b).abs(), (a.argmax(-1) == b.argmax(-1)).float()
        kl = kl_div(log_softmax(b, -1), log_softmax(a, -1), reduction="none", log_target=True).sum(-1)
        each.append(torch.stack([difference.amax(-1), difference.mean(-1), same, kl]))
    stacked = torch.cat(each, 1)
    _, mean, top1, total = stacked.mean(1).tolist()
    total = 0.0 if total < 0 else total  # rounding can make a zero negative
    return {"max_abs": float(stacked[0].max()), "mean_abs": mean, "top1": top1, "kl": total}


def compare_layers(trained: StreamingMerger, folder: Path) -> dict[str, float]:
    """Compare PEFT's forward of some adapted layers with the weights in `folder`, for a model too large to load.

    `trained` has the base as training computed with it. `relative` is the largest root mean square difference of a
    layer's outputs for the same random inputs, relative to the outputs. `applied` is the share of the adapter's change
    of the outputs that a layer has, at least: 1, or 0 without the adapter. Raises UserError if there is no such layer.
    """
    written = WeightFiles(folder)
    kinds: dict[str, list[str]] = {}
    for name in [name for name, layer in trained.wrapped.items() if len(getattr(layer, "lora_A", ()))]:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    draw = random.Random(0)
    names = [name for kind in kinds.values() for name in draw.sample(kind, min(LAYERS_PER_KIND, len(kind)))]
    if not names:
        raise UserError("The model is too large to load here, and has no layer that can be compared by itself.")
    largest, applied = 0.0, math.inf
    for name in names:
        layer = trained.layer(name).eval()
        inputs = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            before = layer(inputs)
            plain = layer.get_base_layer()
            base = plain(inputs)
            plain.weight = torch.nn.Parameter(written[trained.file_names[f"{name}.weight"]].float(), False)
            after = plain(inputs)
            largest = max(largest, float((after - before).norm() / before.norm()))
            applied = min(applied, float(((after - base) * (before - base)).sum() / (before - base).square().sum()))
    return {"layers": len(names), "relative": largest, "applied": applied if applied < math.inf else 0.0}
