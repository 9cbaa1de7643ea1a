"""Measure steps of 16 pairs on a CPU: pair by pair, in micro-batches by tokens, and TRL at several batch sizes.

    python benchmarks/microbatches.py            # a small model with UltraFeedback's lengths, and SmolLM2
    python benchmarks/microbatches.py small      # one of the two: small, smollm2 (after `make real-model`)

Each measurement is a fresh process, and the ways alternate. The first step is not timed: it compares shared prompts
with TRL. Results go to results/microbatches.json and into the table of docs/performance.md.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from dpo_step import MIXTURE, SMALL, make_rows

HERE = Path(__file__).resolve().parent
PAIRS, STEPS, ROUNDS = 16, 3, 2
REAL = HERE.parent / "outputs" / "smollm2" / "SmolLM2-135M-Instruct"
MODELS = {
    "small": "A Mistral of 20 million weights, UltraFeedback's lengths, checkpointing",
    "smollm2": "SmolLM2-135M-Instruct, the pairs of its recipe",
}
# by name: the batch size, tokens of a micro-batch (0: a batch), and whether prompts are shared
WAYS = {
    "16 micro-batches of one pair": (1, 0, True),
    "micro-batches of 2,048 tokens": (1, 2048, True),
    "micro-batches of 4,096 tokens": (1, 4096, True),
} | {f"TRL, batches of {size}": (size, 0, False) for size in (1, 2, 4, 16)}
TABLE = re.compile(r"(?<=<!-- microbatches -->\n).*?(?=<!-- end -->)", re.DOTALL)


def measure(kind: str, way: str, folder: str) -> dict[str, float]:
    """One process: seconds a step and MiB of memory."""
    import torch
    from datasets import Dataset, load_dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import DPOConfig

    from helpers.training import MicroBatchDPOTrainer

    torch.manual_seed(0)
    if kind == "small":
        sizes = dict(SMALL)
        config = AutoConfig.for_model(
            "mistral", vocab_size=sizes.pop("vocab"), num_key_value_heads=3, max_position_embeddings=4096, **sizes
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        words = {"<s>": 0, "</s>": 1, "<unk>": 2}
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
            bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        )  # fmt: skip
        rows = make_rows(MIXTURE, SMALL["vocab"], PAIRS * STEPS)
    else:
        model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(REAL)
        rows = []
        pairs = load_dataset("json", data_files=str(HERE.parent / "recipes/smollm2/pairs.jsonl"), split="train")
        for row in itertools.islice(pairs, PAIRS * STEPS):
            talk = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            ids = {"prompt_ids": tokenizer(prompt).input_ids}
            rows.append(ids | {f"{side}_ids": tokenizer(row[side]).input_ids for side in ("chosen", "rejected")})
    batch, tokens, is_ours = WAYS[way]
    args = DPOConfig(
        output_dir=folder, max_length=None, per_device_train_batch_size=batch,
        gradient_accumulation_steps=PAIRS // batch, max_steps=STEPS, gradient_checkpointing=kind == "small",
        use_cpu=True, bf16=False, report_to="none", seed=0, save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = MicroBatchDPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        shared_prefix="on" if is_ours else "off", tokens_per_microbatch=tokens,
    )  # fmt: skip
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *words: Any, **more: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *words: Any, **more: Any) -> None:
            seconds[-1] += time.perf_counter()

    trainer.add_callback(Clock())
    trainer.train()
    return {
        "seconds": statistics.mean(seconds[1:]),
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def table(content: dict[str, Any]) -> str:
    """Markdown of the results, and where they come from."""
    have = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [f"{content['date']}, CPU, {os.cpu_count()} cores, Python {content['python']}, {have}.\n"]
    for kind, ways in content["results"].items():
        best = min(r["seconds"] for way, r in ways.items() if way.startswith("TRL"))
        lines += [f"{MODELS[kind]}:\n", "| a step of 16 pairs | seconds | pairs/s | speedup on TRL's best | MiB |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for way, r in ways.items():
            lines.append(
                f"| {way} | {r['seconds']:.1f} ({r['lowest']:.1f} to {r['highest']:.1f}) | "
                f"{PAIRS / r['seconds']:.2f} | {best / r['seconds']:.2f} | {r['mib']:,.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(kinds: list[str]) -> None:
    place, page = HERE / "results" / "microbatches.json", HERE.parent / "docs" / "performance.md"
    before = json.loads(place.read_text())["results"] if place.exists() else {}
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "results": before,
    }
    for kind in kinds:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for way in [way for _ in range(ROUNDS) for way in WAYS]:
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, __file__, "--one", kind, way, folder]
                environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
                done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parent, env=environment)
            if done.returncode:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(kind, way, found[way][-1], flush=True)
        content["results"][kind] = {
            way: {
                "seconds": statistics.median(r["seconds"] for r in results),
                "lowest": min(r["seconds"] for r in results),
                "highest": max(r["seconds"] for r in results),
                "mib": max(r["mib"] for r in results),
            }
            for way, results in found.items()
        }
        place.write_text(json.dumps(content, indent=1) + "\n")
        page.write_text(TABLE.sub(lambda _: table(content), page.read_text("utf-8"), count=1), encoding="utf-8")
    print(f"\n{table(content)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(measure(*sys.argv[2:])))
    else:
        main(sys.argv[1:] or list(MODELS))
