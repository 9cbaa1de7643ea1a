"""How far a merged model is from the policy that was trained: before it is called merged."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import UserError
from helpers.data.conversations import Message
from helpers.models.chat import render

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

    from helpers.merging.merge import StreamingMerger
    from helpers.merging.weights import WeightFiles
    from helpers.runs.run import Run


POSITIONS = 128  # of each conversation whose logits are compared
LONGEST = 1024  # tokens of a conversation that are read
LAYERS = 2  # of each kind that are looked at where the model is too large to be loaded
# What rounding to bfloat16 (8 bits) leaves of a layer's outputs, root mean square, with room for a factor of two.
ROUNDED = 2**-7
QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.", "What is 12 + 30?",
             "Explain to a child why the sky is blue.", "Translate 'good morning' into Spanish.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoadPrecision:
    """How a run's policy was computed: what its base was loaded in, and quantized to."""

    dtype: Any = "auto"
    quantization: BitsAndBytesConfig | None = None

    @classmethod
    def by(cls, run: Run | None, merge_base: str = "auto") -> LoadPrecision:
        """From run.json. An adapter from elsewhere (None) says nothing of it: with `merge_base` dequantized it is
        taken to be QLoRA's usual NF4 with double quantization, computed in bfloat16."""
        import torch
        from transformers import BitsAndBytesConfig

        plan = run.record.get("plan", {}) if run else {}
        bits = plan.get("quantization", "none")
        if run is None and merge_base == "dequantized":
            plan, bits = {"weights": "bfloat16", "computed in": "bfloat16"}, "4-bit NF4, double"
        dtype = getattr(torch, plan["weights"]) if plan else "auto"
        if bits == "none":
            return cls(dtype)
        if bits == "8-bit":
            return cls(dtype, BitsAndBytesConfig(load_in_8bit=True))
        compute = getattr(torch, plan["computed in"])
        return cls(
            dtype,
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
                bnb_4bit_quant_storage=compute,
            ),
        )


def held_out_prompts(run: Run | None, count: int = 16) -> list[list[Message]]:
    """Conversations of the run's evaluation rows up to the answer; five questions where it has kept none."""
    file = run.folder / "held_out.jsonl" if run else Path()
    lines = file.read_text(encoding="utf-8").splitlines()[:count] if file.is_file() else []
    found = [json.loads(line)["prompt"] for line in lines]
    return found or [[{"role": "user", "content": question}] for question in QUESTIONS]


def device_for(weights: WeightFiles, *dtypes: Any) -> str:
    """Where a model of these weights can be computed with, in the largest of `dtypes` ("auto", or None, is the stored
    one): "cuda", "cpu", or "" where it fits nowhere."""
    import psutil
    import torch

    known = [dtype.itemsize for dtype in dtypes if isinstance(dtype, torch.dtype)]
    entries = [weights.entry(name) for name in weights]
    size = sum(e.size // e.dtype.itemsize * max(e.dtype.itemsize, *known, 0) for e in entries)
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * size:
        return "cuda"
    return "cpu" if psutil.virtual_memory().available > 1.2 * size else ""


def last_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]
) -> list[torch.Tensor]:
    """For each conversation the float32 logits at its last positions, (tokens, vocabulary), one at a time: no padding.

    At most POSITIONS of the last LONGEST tokens each, so that a large vocabulary does not fill the memory.
    """
    import torch

    found = []
    for messages in conversations:
        text = render(tokenizer, messages, prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, -LONGEST:]
        with torch.inference_mode():
            found.append(model(input_ids=ids.to(model.device)).logits[0, -POSITIONS:].float().cpu())
    return found


def compare_logits(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """How far apart two models' next-token distributions are, over all positions of the same conversations.

    `max_abs` and `mean_abs` are differences of logits, `top1` is the share of positions with the same most likely
    token, `kl` the mean of KL(before ‖ after) in nats.
    """
    from torch.nn.functional import kl_div, log_softmax

    largest = total = same = kl = 0.0
    positions = sum(len(each) for each in before)
    for a, b in zip(before, after, strict=True):
        apart = (a - b).abs()
        largest = max(largest, float(apart.max()))
        total += float(apart.mean()) * len(a)
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        kl += float(kl_div(log_softmax(b, -1), log_softmax(a, -1), reduction="sum", log_target=True))
        largest = largest if bool(apart.isfinite().all()) else float("nan")
    return {
        "max_abs": largest,
        "mean_abs": total / positions,
        "top1": same / positions,
        "kl": kl / positions if not kl < 0 else 0.0,  # rounding can put a zero below zero
    }


def comparison_table(rows: dict[str, dict[str, float]]) -> Any:
    """A rich table of `compare_logits` results by name."""
    from rich.table import Table

    table = Table("logits of", "largest difference", "mean", "same top token", "KL", box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row(name, f"{row['max_abs']:.2e}", f"{row['mean_abs']:.2e}", f"{row['top1']:.2%}", f"{row['kl']:.2e}")
    return table


def compare_layers(trained: StreamingMerger, folder: Path) -> dict[str, float]:
    """For a model that is too large to load: outputs of some adapted layers, as trained and as they were written.

    `trained` has the base as training computed with it. `relative` is the largest root mean square difference of a
    layer's outputs for the same random inputs, beside their own root mean square; layers of every kind are looked at.
    The adapter's side is PEFT's forward, which has no part in merging. Raises UserError where there is no such layer.
    """
    import torch

    from helpers.merging.weights import WeightFiles

    written = WeightFiles(folder)
    kinds: dict[str, list[str]] = {}
    for name in trained.linear_layers():
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    draw = random.Random(0)
    names = [name for each in kinds.values() for name in draw.sample(each, min(LAYERS, len(each)))]
    if not names:
        raise UserError("the model is too large to load here, and has no layer to compare by itself: nothing is kept")
    worst = 0.0
    for name in names:
        layer = trained.layer(name).eval()
        inputs = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            before = layer(inputs)
            plain = layer.get_base_layer()
            plain.weight = torch.nn.Parameter(written[f"{name}.weight"].float(), False)
            worst = max(worst, float((plain(inputs) - before).norm() / before.norm()))
    return {"layers": len(names), "relative": worst}


def check_kl(proof: dict[str, float], max_kl: float, draft: Path) -> None:
    """Raise UserError where a merge is not the policy that was trained, and remove it."""
    said = ""
    if not proof.get("kl", 0.0) <= max_kl:  # which what is not a number is not either
        said = f"the merged model's KL is {proof['kl']:.2e}, above --max_kl {max_kl}"
    elif not proof.get("relative", 0.0) <= ROUNDED:
        said = f"merged layers differ by {proof['relative']:.1e}, which is more than rounding"
    if said:
        shutil.rmtree(draft)
        raise UserError(f"{said}: nothing is kept")


def free_memory() -> None:
    """Give memory of what is no longer named back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare_merges(
    load_policy: Callable[[], Any],
    ways: dict[str, StreamingMerger],
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    scratch: Path,
) -> dict[str, dict[str, float]]:
    """`compare_logits` of each way to merge a quantized run, and of PEFT's own merge into what is quantized.

    Each is written to `scratch`, loaded, and removed.
    """
    from transformers import AutoModelForCausalLM

    from helpers.merging.weights import write_merged

    policy = load_policy()
    device = policy.device
    trained = last_logits(policy, tokenizer, conversations)
    found = {}
    for name, merge in ways.items():
        write_merged(scratch, merge, {"merge_base": name}, 2 * 10**9, None)
        merge.config.save_pretrained(scratch)
        merged = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto", device_map={"": device}).eval()
        found[f"merged into {name}"] = compare_logits(trained, last_logits(merged, tokenizer, conversations))
        del merged
        shutil.rmtree(scratch)
        free_memory()
    merged = policy.merge_and_unload()
    found["PEFT, into 4 bits"] = compare_logits(trained, last_logits(merged, tokenizer, conversations))
    return found
