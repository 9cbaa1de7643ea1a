"""Measure the answers of 04_vibes.py: batches compared with single prompts, an adapter compared with two models.

    python benchmarks/generate.py

Each measurement is a fresh process on random Mistrals in float32; the variants alternate. Throughput: 32 prompts of 64
tokens each, timed from the first to the last token. Memory: the largest resident size (VmHWM, Linux) of a process that
answers with the base and with the adapter. It is compared with a process that holds the base and the merged model at
once. Weights are mapped from their files and count too, since every token reads all of the weights.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS = 3
SIZES = {"3M": (128, 4), "480M": (1536, 14)}  # hidden size, layers
KINDS = {"3M": ("batch 1", "batch 16"), "480M": ("two models", "one, adapter")}


def make(folder: Path, hidden: int, layers: int) -> None:
    """A random base, an adapter, and the two merged, with the demo's tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from recipes.demo import write_demo

    write_demo(folder / "demo")
    tokenizer = AutoTokenizer.from_pretrained(folder / "demo" / "tiny-mistral")
    config = AutoConfig.for_model(
        "mistral", vocab_size=32000 if hidden > 128 else len(tokenizer), hidden_size=hidden,
        intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora)
    policy.save_pretrained(str(folder / "adapter"))
    policy.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "base")


def one(kind: str, folder: Path) -> dict[str, float]:
    """One process: tokens a second, or MiB."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.evaluation import HFGenerator
    from helpers.models import set_chat_template

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    set_chat_template(tokenizer, "auto")
    talks = [[{"role": "user", "content": "What is 2 plus 3? " * (8 - i // 4)}] for i in range(32)]  # longest first
    tokens = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    generator = HFGenerator(model, tokenizer)
    if kind.startswith("batch"):
        generator.generate(talks[:1], **tokens)  # warm up
        start, size = time.perf_counter(), int(kind.split()[1])
        for first in range(0, len(talks), size):
            generator.generate(talks[first : first + size], **tokens)
        return {"tokens a second": len(talks) * 64 / (time.perf_counter() - start)}
    other = AutoModelForCausalLM.from_pretrained(folder / "merged").eval() if kind == "two models" else None
    generator.generate(talks[:4], **tokens)
    candidate = other or PeftModel.from_pretrained(model, folder / "adapter").eval()
    HFGenerator(candidate, tokenizer).generate(talks[:4], **tokens)
    # not getrusage's ru_maxrss, which begins with that of the process that started this one
    return {"MiB": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024}


def main() -> None:
    results = {}
    for size, (hidden, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            make(Path(place), hidden, layers)
            measurements: dict[str, list[float]] = {kind: [] for kind in KINDS[size]}
            for _ in range(ROUNDS):
                for kind, values in measurements.items():
                    words = [sys.executable, __file__, "--one", kind, place]
                    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                    ((unit, value),) = json.loads(text.splitlines()[-1]).items()
                    values.append(value)
        usual, ours = (statistics.median(values) for values in measurements.values())
        for kind, value in zip(measurements, (usual, ours), strict=True):
            print(f"{size:5} {kind:14} {value:8,.0f} {unit}")
        print(f"{size:5} ratio {ours / usual:.2f}", flush=True)
        results[size] = {kind: {unit: values} for kind, values in measurements.items()} | {"ratio": ours / usual}
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    content = {"python": platform.python_version(), "versions": versions, "rounds": ROUNDS, "results": results}
    (HERE / "results" / "generate.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(one(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
