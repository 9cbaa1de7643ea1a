"""Measure time and memory of a DPO step, compared with TRL's DPOTrainer on the same model, rows and seed.

    python benchmarks/dpo_step.py                      # every case
    python benchmarks/dpo_step.py --short              # what `make bench` runs
    python benchmarks/dpo_step.py --pairs FILE.jsonl   # also rows with the columns of AlpacaFarm
    python benchmarks/dpo_step.py --large              # Mistral-7B with random weights, QLoRA, on a GPU

Each measurement is a fresh process; the two alternate. The first step is not timed: it compares shared prompts with
TRL. The speedup is the ratio of medians over processes, followed by its range over pairs. The token
ratio is the limit: padded tokens that TRL computes, divided by the tokens of packed rows.

Memory is the largest resident size on a CPU, and PyTorch's allocated memory on a GPU. On a GPU of known speed,
utilization counts what must be computed at least once: the reference's forward and the policy's forward and backward,
with 2 operations for each weight outside embeddings and each token of a packed row.

Results go to results/dpo_step-<machine>.json and into the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
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
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bf16, by the makers
TABLE_OF = {  # in docs/performance.md
    size: re.compile(rf"(?<=<!-- dpo_step {size} -->\n).*?(?=<!-- end -->)", re.DOTALL) for size in ("small", "large")
}


def make_rows(name: str, vocabulary: int, count: int) -> list[dict[str, list[int]]]:
    """Rows of tokens: of one shape, with UltraFeedback's lengths (log-normal), or from a file in pieces of at most five
    letters."""
    draw = random.Random(0)
    if name.endswith(".jsonl"):
        read = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        return [in_pieces(row, vocabulary) for row in draw.sample(read, count)]

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


def in_pieces(row: dict[str, Any], vocabulary: int) -> dict[str, list[int]]:
    better = int(row["preference"])
    texts = {"prompt_ids": f"{row['instruction']} {row['input']}".strip()}
    texts |= {"chosen_ids": row[f"output_{better}"], "rejected_ids": row[f"output_{3 - better}"]}
    pieces = {name: re.findall(r"\w{1,5}|\W", text)[:1024] for name, text in texts.items()}
    return {name: [3 + zlib.crc32(piece.encode()) % (vocabulary - 3) for piece in pieces[name]] for name in texts}


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

    from helpers.training import SharedPrefixDPOTrainer, pack_pairs

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
    base = list(model.parameters())
    words = {"<s>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", pad_token="<unk>",
    )  # fmt: skip
    rows = Dataset.from_list(make_rows(case["rows"], vocabulary, case["steps"] * case["batch"]))
    args = DPOConfig(
        output_dir=str(folder / "out"), max_length=None, per_device_train_batch_size=case["batch"],
        max_steps=case["steps"], gradient_checkpointing=case["checkpointing"], use_cpu=not gpu, bf16=gpu,
        report_to="none", seed=0, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SharedPrefixDPOTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, shared_prefix=case["shared"],
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    seconds: list[float] = []
    tokens: list[tuple[int, int, int]] = []
    collate: Any = trainer.data_collator

    def count(rows: Any) -> Any:
        batch = collate(rows)
        packed = pack_pairs(batch["input_ids"], batch["attention_mask"], batch["input_ids"])
        tokens.append((batch["input_ids"].numel(), packed.input_ids.numel(), int(batch["attention_mask"].sum())))
        return batch

    trainer.data_collator = count

    class Clock(TrainerCallback):
        def on_step_begin(self, *words: Any, **more: Any) -> None:
            torch.cuda.synchronize() if gpu else None
            seconds.append(-time.perf_counter())

        def on_step_end(self, *words: Any, **more: Any) -> None:
            torch.cuda.synchronize() if gpu else None
            seconds[-1] += time.perf_counter()

    trainer.add_callback(Clock())
    trainer.train()
    padded, packed, real = map(sum, zip(*tokens[1 : case["steps"]], strict=True))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else resident
    head = vocabulary * sizes["hidden_size"]
    weights = sum(math.prod(w.quant_state.shape if hasattr(w, "quant_state") else w.shape) for w in base) - 2 * head
    return {
        "seconds": sum(seconds[1:]),
        "steps": len(seconds) - 1,
        "peak_mib": peak,
        "limit": padded / packed,
        "tokens": real,
        "operations": 6 * weights * packed,
    }


def run(case: dict[str, Any], rounds: int, folder: str) -> dict[str, Any]:
    """Alternate stock and ours, and sum them up."""
    found: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
    for _ in range(rounds):
        for shared, results in found.items():
            words = [sys.executable, __file__, "--one", json.dumps(case | {"shared": shared}), folder]
            done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parent, env=os.environ)
            if done.returncode:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
            results.append(json.loads(done.stdout.splitlines()[-1]))
    stock, ours = (statistics.median(r["seconds"] for r in results) for results in found.values())
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*found.values(), strict=True)]
    memory = [max(r["peak_mib"] for r in results) for results in found.values()]
    one = found["on"][0]
    return case | {
        "rounds": rounds, "ratio": stock / ours, "lowest": min(ratios), "highest": max(ratios), "limit": one["limit"],
        "stock_seconds_a_step": stock / one["steps"], "our_seconds_a_step": ours / one["steps"],
        "stock_tokens_per_second": one["tokens"] / stock, "our_tokens_per_second": one["tokens"] / ours,
        "stock_mib": memory[0], "our_mib": memory[1],
        "stock_operations_per_second": one["operations"] / stock, "our_operations_per_second": one["operations"] / ours,
    }  # fmt: skip


def cases(given: argparse.Namespace) -> list[dict[str, Any]]:
    names = [*SHAPES, MIXTURE]
    if given.large:
        kinds = ["sdpa"] + ["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))
        made = [{"rows": n, "batch": b, "attention": a} for n in ("512:64", MIXTURE) for b in (4, 8) for a in kinds]
        return [case | {"large": True, "checkpointing": True, "steps": 6, "rounds": 3} for case in made]
    batches = (4,) if given.short else (4, 2)
    made = [{"rows": n, "batch": b, "checkpointing": c} for b in batches for c in (True, False) for n in names]
    made[len(names) : len(names)] = [{"rows": name, "batch": 4, "checkpointing": True} for name in given.pairs]
    for case in made:
        case["large"], first = False, case["batch"] == 4 and case["checkpointing"]
        case["steps"] = 2 if given.short else 8 if case["rows"] == MIXTURE else 4
        case["rounds"] = 2 if given.short else 5 if first else 3
    return [case for case in made if case["checkpointing"] or not given.short]


def table(content: dict[str, Any]) -> str:
    """Markdown of the results, and where they come from."""
    have = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    peak = next((peak for name, peak in PEAK.items() if name in content["machine"]), None)
    lines = [
        f"{content['date']}, {content['machine']}, Python {content['python']}, {have};\n{content['model']}.\n",
        "| prompt : answer tokens | batch | checkpointing | speedup | range (pairs) | token ratio | memory, MiB |"
        + " tokens/s | utilisation |" * bool(peak),
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- | --- |" * bool(peak),
    ]
    for r in content["results"]:
        name = Path(r["rows"]).stem.replace("_", " ") + (f" ({r['attention']})" if "attention" in r else "")
        lines.append(
            f"| {name} | {r['batch']} | {'on' if r['checkpointing'] else 'off'} | **{r['ratio']:.2f}** | "
            f"{r['lowest']:.2f} to {r['highest']:.2f} ({r['rounds']}) | {r['limit']:.2f} | "
            f"{r['stock_mib']:,.0f} to {r['our_mib']:,.0f} |"
        )
        if peak:
            speeds = [f"{r[f'{who}_tokens_per_second']:,.0f}" for who in ("stock", "our")]
            used = [f"{r[f'{who}_operations_per_second'] / peak:.0%}" for who in ("stock", "our")]
            lines[-1] += f" {' to '.join(speeds)} | {' to '.join(used)} |"
    return "\n".join(lines) + "\n"


def main(given: argparse.Namespace) -> None:
    import torch

    if given.large and not torch.cuda.is_available():
        raise SystemExit("--large needs a GPU")
    content: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if given.large else f"CPU, {os.cpu_count()} cores",
        "model": "Mistral-7B with random weights, QLoRA r 16 on all linear layers, bfloat16"
        if given.large
        else "a Mistral of 20 million weights, LoRA r 16 on all linear layers, float32",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "results": [],
    }
    name = content["machine"].lower().replace(",", "").replace(" ", "-") + ("-short" if given.short else "")
    page = HERE.parent / "docs" / "performance.md"
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(given):
            result = run(case, case["rounds"], folder) | {"rows": Path(case["rows"]).name}
            content["results"].append(result)
            print(table(content).splitlines()[-1], flush=True)
            (HERE / "results" / f"dpo_step-{name}.json").write_text(json.dumps(content, indent=1) + "\n")
            where = TABLE_OF["large" if given.large else "small"]
            page.write_text(where.sub(lambda _: table(content), page.read_text("utf-8"), count=1), encoding="utf-8")
    print(f"\n{table(content)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--pairs", nargs="*", default=[], metavar="FILE.jsonl")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(measure(json.loads(options.one[0]), Path(options.one[1]))))
    else:
        main(options)
