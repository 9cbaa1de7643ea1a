"""Compare a merged model with the policy as it was trained, before the merge is kept."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Group
from rich.table import Table
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from helpers.core import UserError
from helpers.data.messages import Message
from helpers.merging.merge import Adapter, MergedModel, staging_dir
from helpers.merging.weights import StreamingMerger, WeightFiles, write_merged
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
    """How far a merged model is from the trained policy.

    `metrics` are those of `compare_logits` or `compare_layers`; `rows` has those of `compare_logits` by model.
    """

    metrics: dict[str, float]
    rows: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def problem(self, max_kl: float = 0.01) -> str:
        """Why the merged model is not the trained policy, or ""; a KL that is NaN is a problem too."""
        kl, relative = self.metrics.get("kl", 0.0), self.metrics.get("relative", 0.0)
        if not kl <= max_kl:
            return f"The merged model has KL {kl:.2e}, above --max_kl {max_kl}"
        return "" if relative <= MAX_LAYER_DIFFERENCE else f"Merged layers differ by {relative:.1e}, more than rounding"

    def check(self, max_kl: float) -> None:
        if problem := self.problem(max_kl):
            raise UserError(f"{problem}. The merge was deleted.")

    def __rich__(self) -> Group:
        if "kl" in self.metrics:
            base = f"; base alone {_short(self.rows['base alone']['kl'])}" if "base alone" in self.rows else ""
            result = f"KL {_short(self.metrics['kl'])} nats{base}"
        else:
            result = (
                f"outputs of {self.metrics['layers']:.0f} layers differ by {_short(self.metrics['relative'])} at most"
            )
            result += " (the model is too large to load here)"
        verdict = "Merge differs from the trained policy" if self.problem() else "Merge verified"
        return Group(f"{verdict}: {result}", *([comparison_table(self.rows)] if self.rows else []))


def _short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def verify_merge(merged: MergedModel, adapter: Adapter) -> Verification:
    """Compare the merged model with the trained policy, 4 bits included, on held-out prompts.

    A model that does not fit into memory is compared layer by layer. The result of a finished merge is in its run.json.
    """
    precision = merged.precision
    if merged.run.finished:
        metrics = merged.run.record["metrics"]
        rows = {f"merged into {merged.merge_base}": metrics} if "kl" in metrics else {}
        return Verification(metrics, merged.run.record.get("verification") or rows)
    if not (device := device_for(WeightFiles(merged.folder), precision.dtype, merged.dtype)):
        transform = precision.transform("dequantized" if precision.quantization else "original")
        return Verification(compare_layers(adapter.merger(transform), merged.folder))
    conversations, tokenizer = held_out_prompts(adapter.run), adapter.tokenizer
    policy = adapter.load_policy(precision, device)
    trained = last_logits(policy, tokenizer, conversations)
    with policy.disable_adapter():
        base = last_logits(policy, tokenizer, conversations)
    del policy
    free_memory()
    metrics = compare_logits(trained, _logits_of(merged.folder, adapter, device, conversations))
    return Verification(
        metrics, {f"merged into {merged.merge_base}": metrics, "base alone": compare_logits(trained, base)}
    )


def compare_merges(adapter: Adapter, merged: MergedModel) -> Any:
    """Merge a quantized run into original and into dequantized weights, and into 4 bits as PEFT does by itself; return
    a table of how far each is from the trained policy."""
    device = device_for(WeightFiles(merged.folder), merged.precision.dtype, merged.dtype)
    if not merged.precision.quantization or not merged.merger or not device:
        return "--compare_merges applies to a quantized run that was merged just now and fits into memory."
    conversations, scratch = held_out_prompts(adapter.run), staging_dir(merged.run)
    policy = adapter.load_policy(merged.precision, device)
    trained = last_logits(policy, adapter.tokenizer, conversations)
    rows = {}
    for name in ("original", "dequantized"):
        merger = adapter.merger(merged.precision.transform(name))
        write_merged(scratch, merger, {"merge_base": name}, 2 * 10**9, None)
        merger.config.save_pretrained(scratch)
        rows[f"merged into {name}"] = compare_logits(trained, _logits_of(scratch, adapter, device, conversations))
        shutil.rmtree(scratch)
    policy = policy.merge_and_unload()
    rows["PEFT, into 4 bits"] = compare_logits(trained, last_logits(policy, adapter.tokenizer, conversations))
    return comparison_table(rows)


def _logits_of(folder: Path, adapter: Adapter, device: str, conversations: list[list[Message]]) -> list[torch.Tensor]:
    code = adapter.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device}, trust_remote_code=code)
    logits = last_logits(model.eval(), adapter.tokenizer, conversations)
    del model
    free_memory()
    return logits


def held_out_prompts(run: Run) -> list[list[Message]]:
    """Prompts of the run's evaluation rows, or five questions if there are none."""
    file = run.folder / "held_out.jsonl"
    has_prompts = "step" in run.record and file.is_file()
    lines = file.read_text(encoding="utf-8").splitlines()[:MAX_CONVERSATIONS] if has_prompts else []
    prompts = [json.loads(line)["prompt"] for line in lines]
    return prompts or [[{"role": "user", "content": question}] for question in QUESTIONS]


def device_for(weights: WeightFiles, *dtypes: Any) -> str:
    """Where a model of these weights fits in the largest of `dtypes` ("auto" and None are the stored one): "cuda",
    "cpu", or "" for nowhere."""
    sizes = [dtype.itemsize for dtype in dtypes if isinstance(dtype, torch.dtype)]
    specs = [weights.spec(name) for name in weights]
    needed = 1.2 * sum(spec.numel() * max(spec.itemsize, *sizes, 0) for spec in specs)
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


def comparison_table(rows: dict[str, dict[str, float]]) -> Table:
    """A table of `compare_logits` results by model."""
    table = Table("logits of", "largest difference", "mean", "same top token", "KL", box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row(name, f"{row['max_abs']:.2e}", f"{row['mean_abs']:.2e}", f"{row['top1']:.2%}", f"{row['kl']:.2e}")
    return table


def compare_layers(trained: StreamingMerger, folder: Path) -> dict[str, float]:
    """Compare the outputs of some adapted layers, as trained and as written, for a model that is too large to load.

    `trained` has the base as training computed with it. `relative` is the largest root mean square difference of a
    layer's outputs for the same random inputs, relative to the outputs. The trained side is PEFT's forward, which does
    not merge. Raises UserError if there is no such layer.
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
            plain.weight = torch.nn.Parameter(written[f"{name}.weight"].float(), False)
            largest = max(largest, float((plain(inputs) - before).norm() / before.norm()))
    return {"layers": len(names), "relative": largest}


def free_memory() -> None:
    """Return the memory of deleted models to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
