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
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from helpers.core import UserError, read_jsonl
from helpers.data.messages import Message
from helpers.merging.merge import Adapter, MergedModel
from helpers.merging.weights import StreamingMerger, WeightFiles
from helpers.models.chat import render
from helpers.runs.run import Run

MAX_CONVERSATIONS = 16
MAX_TOKENS = 1024  # of a conversation
MAX_POSITIONS = 128  # of a conversation whose logits are compared: a large vocabulary must not fill the memory
LAYERS_PER_KIND = 2  # that are compared if the model is too large to load
# Rounding to bfloat16 (8 bits) changes a layer's outputs by less, root mean square; with room for a factor of two.
MAX_LAYER_DIFFERENCE = 2**-7
QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.", "What is 12 + 30?",
             "Explain to a child why the sky is blue.", "Translate 'good morning' into Spanish.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a merged model is from the trained policy."""

    metrics: dict[str, float]  # of `compare_logits` or `compare_layers`
    rows: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # of `compare_logits`, by model

    def problem(self, max_kl: float = 0.01) -> str:
        """Why the merged model is not the trained policy, or ""; a KL that is NaN is a problem too."""
        kl, relative = self.metrics.get("kl", 0.0), self.metrics.get("relative", 0.0)
        if not kl <= max_kl:
            return f"The merged model has KL {kl:.2e}, above --max_kl {max_kl}"
        return "" if relative <= MAX_LAYER_DIFFERENCE else f"Merged layers differ by {relative:.1e}, more than rounding"

    def __rich__(self) -> Group:
        if "kl" in self.metrics:
            base = f"; base alone {_short(self.rows['base alone']['kl'])}" if "base alone" in self.rows else ""
            result = f"KL {_short(self.metrics['kl'])} nats{base}"
        else:
            layers, most = f"{self.metrics['layers']:.0f} layers", _short(self.metrics["relative"])
            result = f"outputs of {layers} differ by {most} at most (the model is too large to load here)"
        verdict = "Merge differs from the trained policy" if self.problem() else "Merge verified"
        table = Table("logits of", "largest difference", "mean", "same top token", "KL", box=None, pad_edge=False)
        for name, row in self.rows.items():
            values = f"{row['max_abs']:.2e}", f"{row['mean_abs']:.2e}", f"{row['top1']:.2%}", f"{row['kl']:.2e}"
            table.add_row(name, *values)
        return Group(f"{verdict}: {result}", *([table] if self.rows else []))


def _short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def verify_merge(merged: MergedModel, adapter: Adapter) -> Verification:
    """Compare the merged model with the trained policy, 4 bits included, on held-out prompts.

    A model that does not fit into memory is compared layer by layer. The result of a finished merge is in its run.json.
    """
    precision = merged.precision
    if merged.run.finished:
        return Verification(merged.run.record["metrics"], merged.run.record.get("verification") or {})
    if not (device := device_for(WeightFiles(merged.folder), precision.dtype)):
        return Verification(compare_layers(adapter.merger(precision, "dequantized"), merged.folder))
    conversations, tokenizer = held_out_prompts(adapter.run), adapter.tokenizer
    policy = adapter.load_policy(precision, device)
    trained = last_logits(policy, tokenizer, conversations)
    with policy.disable_adapter():
        base = last_logits(policy, tokenizer, conversations)
    del policy
    clear_device_cache(garbage_collection=True)
    options: Any = {"device_map": {"": device}, "trust_remote_code": adapter.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(merged.folder, dtype="auto", **options)
    metrics = compare_logits(trained, last_logits(model.eval(), tokenizer, conversations))
    rows = {f"merged into {merged.merge_base}": metrics, "base alone": compare_logits(trained, base)}
    return Verification(metrics, rows)


def held_out_prompts(run: Run) -> list[list[Message]]:
    """Prompts of the run's evaluation rows, or five questions if there are none."""
    file = run.folder / "held_out.jsonl"
    rows = read_jsonl(file)[:MAX_CONVERSATIONS] if file.is_file() else []
    return [row["prompt"] for row in rows] or [[{"role": "user", "content": question}] for question in QUESTIONS]


def device_for(weights: WeightFiles, dtype: torch.dtype | str) -> str:
    """Where a model of these weights fits, stored or in `dtype` ("auto" is as stored): "cuda", "cpu", or ""."""
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 0
    specs = [weights.spec(name) for name in weights]
    needed = 1.2 * sum(spec.numel() * max(spec.itemsize, size) for spec in specs)
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed:
        return "cuda"
    return "cpu" if psutil.virtual_memory().available > needed else ""


def last_logits(model: Any, tokenizer: Any, conversations: list[list[Message]]) -> list[torch.Tensor]:
    """The float32 logits at the last positions of each conversation, (tokens, vocabulary), computed without padding."""
    logits = []
    for messages in conversations:
        text = render(tokenizer, messages, prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, -MAX_TOKENS:]
        with torch.inference_mode():
            logits.append(model(input_ids=ids.to(model.device)).logits[0, -MAX_POSITIONS:].float().cpu())
    return logits


def compare_logits(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Compare the next-token distributions of two models over all positions of the same conversations.

    `max_abs` and `mean_abs` are differences of logits, `top1` is the share of positions with the same most likely
    token, `kl` the mean of KL(before ‖ after) in nats.
    """
    largest = total = same = kl = 0.0
    positions = sum(map(len, before))
    for a, b in zip(before, after, strict=True):
        difference = (a - b).abs()
        largest = max(largest, float(difference.max())) if bool(difference.isfinite().all()) else math.nan
        total += float(difference.mean()) * len(a)
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        kl += float(kl_div(log_softmax(b, -1), log_softmax(a, -1), reduction="sum", log_target=True))
    kl = 0.0 if kl < 0 else kl / positions  # rounding can make a zero negative
    return {"max_abs": largest, "mean_abs": total / positions, "top1": same / positions, "kl": kl}


def compare_layers(trained: StreamingMerger, folder: Path) -> dict[str, float]:
    """Compare PEFT's forward of some adapted layers with the weights in `folder`, for a model too large to load.

    `trained` has the base as training computed with it. `relative` is the largest root mean square difference of a
    layer's outputs for the same random inputs, relative to the outputs. Raises UserError if there is no such layer.
    """
    written = WeightFiles(folder)
    kinds: dict[str, list[str]] = {}
    for name in trained.linear_layers():
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    draw = random.Random(0)
    names = [name for kind in kinds.values() for name in draw.sample(kind, min(LAYERS_PER_KIND, len(kind)))]
    if not names:
        raise UserError("The model is too large to load here, and has no layer that can be compared by itself.")
    largest = 0.0
    for name in names:
        layer = trained.layer(name).eval()
        inputs = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            before = layer(inputs)
            plain = layer.get_base_layer()
            plain.weight = torch.nn.Parameter(written[trained.file_name(f"{name}.weight")].float(), False)
            largest = max(largest, float((plain(inputs) - before).norm() / before.norm()))
    return {"layers": len(names), "relative": largest}
