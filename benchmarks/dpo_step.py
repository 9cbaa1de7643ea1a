"""How long a DPO step takes, and what it needs of memory, beside stock DPOTrainer on the same model, rows and seed.

    python benchmarks/dpo_step.py            # every case, an hour on two CPU cores
    python benchmarks/dpo_step.py --short    # what `make bench` runs, under ten minutes
    python benchmarks/dpo_step.py --large    # Mistral-7B with random weights, QLoRA, on a GPU

Each measurement is a fresh process, and the two alternate. A step's time is the median of a process's steps after the
first; a ratio is one of medians over processes, with the lowest and highest of the pairs beside it. The limit is what
the count of tokens allows: padded ones that stock computes, over those that stand in a packed row. Memory is the
largest resident size on a CPU, and what PyTorch had allocated on a GPU. Results go to results/dpo_step-<machine>.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPES = {"512:64": (512, 64), "256:256": (256, 256), "128:384": (128, 384)}
MIXTURE = "UltraFeedback-like"
SMALL = {"hidden_size": 384, "intermediate_size": 1344, "num_hidden_layers": 8, "num_attention_heads": 6, "vocab": 8000}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab": 32000,
}
STEPS = 4


def make_rows(name: str, vocabulary: int, count: int) -> list[dict[str, list[int]]]:
    """Rows of tokens, of one shape, or with the lengths of UltraFeedback's (drawn from log-normal distributions)."""
    draw = random.Random(0)

    def ids(length: float) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(max(1, int(length)))]

    rows = []
    for _ in range(count):
        if name == MIXTURE:
            prompt = min(1024.0, draw.lognormvariate(4.9, 1.0))
            answers = [min(488.0, draw.lognormvariate(*shape)) for shape in ((5.4, 0.7), (5.2, 0.8))]
        else:
            prompt, answers = SHAPES[name][0], [SHAPES[name][1]] * 2
        rows.append({"prompt_ids": ids(prompt), "chosen_ids": ids(answers[0]), "rejected_ids": ids(answers[1])})
    return rows


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One process: seconds a step, peak memory, and the tokens of its batches, padded and packed."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import DPOConfig

    from helpers.prefix_packing import pack
    from helpers.shared_prefix import SharedPrefixDPOTrainer

    gpu, sizes = case["large"], dict(LARGE if case["large"] else SMALL)
    vocabulary = sizes.pop("vocab")
    config = AutoConfig.for_model(
        "mistral", vocab_size=vocabulary, num_key_value_heads=sizes["num_attention_heads"] // (4 if gpu else 2),
        max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    if gpu:
        saved = folder / "model"
        if not saved.exists():
            with torch.device("cuda"):
                AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(saved)
            torch.cuda.empty_cache()
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": 0},
            attn_implementation=case["attention"],
        )  # fmt: skip
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    words = {"<s>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", pad_token="<unk>",
    )  # fmt: skip
    rows = Dataset.from_list(make_rows(case["rows"], vocabulary, STEPS * case["batch"]))
    args = DPOConfig(
        output_dir=str(folder / "out"), max_length=None, per_device_train_batch_size=case["batch"], max_steps=STEPS,
        gradient_checkpointing=case["checkpointing"], use_cpu=not gpu, bf16=gpu, report_to="none", seed=0,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SharedPrefixDPOTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, shared_prefix=case["shared"],
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer._compared = True  # the comparison of the first batch is not a step
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *words: Any, **more: Any) -> None:
            torch.cuda.synchronize() if gpu else None
            seconds.append(-time.perf_counter())

        def on_step_end(self, *words: Any, **more: Any) -> None:
            torch.cuda.synchronize() if gpu else None
            seconds[-1] += time.perf_counter()

    trainer.add_callback(Clock())
    trainer.train()
    padded = packed = 0
    for batch in trainer.get_train_dataloader():
        padded += batch["input_ids"].numel()
        packed += pack(batch["input_ids"], batch["attention_mask"], batch["input_ids"]).input_ids.numel()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else resident
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_mib": peak,
        "limit": padded / packed,
        "tokens": padded / STEPS,
    }


def run(case: dict[str, Any], rounds: int, folder: str) -> dict[str, Any]:
    """Alternate stock and ours, and sum them up."""
    found: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
    for _ in range(rounds):
        for shared, results in found.items():
            words = [sys.executable, __file__, json.dumps(case | {"shared": shared}), folder]
            done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parent, env=os.environ)
            if done.returncode:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
            results.append(json.loads(done.stdout.splitlines()[-1]))
    stock, ours = (statistics.median(r["seconds"] for r in results) for results in found.values())
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*found.values(), strict=True)]
    memory = [max(r["peak_mib"] for r in results) for results in found.values()]
    return case | {
        "ratio": stock / ours, "lowest": min(ratios), "highest": max(ratios), "limit": found["on"][0]["limit"],
        "stock_seconds": stock, "our_seconds": ours, "stock_mib": memory[0], "our_mib": memory[1],
        "tokens_per_second": found["on"][0]["tokens"] / ours, "rounds": rounds,
    }  # fmt: skip


def main(argv: list[str]) -> None:
    import torch

    large, short = "--large" in argv, "--short" in argv
    names = [*SHAPES, MIXTURE]
    if large:
        kinds = ["sdpa"] + ["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))
        cases = [{"rows": n, "batch": b, "attention": a} for n in ("512:64", MIXTURE) for b in (4, 8) for a in kinds]
        cases = [case | {"checkpointing": True} for case in cases]
    elif short:
        cases = [{"rows": name, "batch": 4, "checkpointing": True} for name in names]
    else:
        cases = [{"rows": n, "batch": b, "checkpointing": c} for n in names for b in (2, 4) for c in (True, False)]
    machine = torch.cuda.get_device_name() if large else f"CPU, {os.cpu_count()} cores"
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            result = run(case | {"large": large}, 2 if short else 5, folder)
            results.append(result)
            print(
                f"{case['rows']:20} batch {case['batch']} checkpointing {'on ' if case['checkpointing'] else 'off'} "
                f"{case.get('attention', '')} ratio {result['ratio']:.2f} ({result['lowest']:.2f} to "
                f"{result['highest']:.2f}; tokens {result['limit']:.2f})  memory {result['stock_mib']:,.0f} to "
                f"{result['our_mib']:,.0f} MiB",
                flush=True,
            )
    content = {"machine": machine, "python": platform.python_version(), "versions": versions, "results": results}
    name = machine.lower().replace(",", "").replace(" ", "-") + ("-short" if short else "")
    (HERE / "results" / f"dpo_step-{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print("\n" + json.dumps(measure(json.loads(sys.argv[1]), Path(sys.argv[2]))))
    else:
        main(sys.argv[1:])
