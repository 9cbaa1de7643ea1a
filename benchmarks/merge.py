"""Measure memory and time of merging, compared with PEFT's merge_and_unload of the same adapter.

    python benchmarks/merge.py            # a Mistral of 1.2 billion weights in bfloat16, and one twice as deep
    python benchmarks/merge.py LAYERS     # another depth

Each measurement is a fresh process; the two alternate. Time is from the files of base and adapter to those of the
merged model, without imports. The adapter has rank 64 on all linear layers, and files have 1 GB. Memory is the largest
anonymous resident size (RssAnon). Pages of the files do not count, since they can be dropped at any time.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS = 3
LAYERS = 24


def make(folder: Path, layers: int) -> None:
    """Write a random model and adapter, in files of 1 GB."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mistral", vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    print(f"{sum(w.numel() for w in model.parameters()) / 1e9:.2f} billion weights")
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    lora = LoraConfig(r=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def merge(who: str, folder: Path) -> dict[str, float]:
    """Merge in this process; return seconds and the largest MiB of anonymous memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from helpers.merging import StreamingMerger, write_merged

    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    out = folder / "merged"
    if who == "ours":
        merger = StreamingMerger(folder / "base", folder / "adapter")
        write_merged(out, merger, 10**9)
        merger.config.save_pretrained(out)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        merged.save_pretrained(out, max_shard_size="1GB")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    shutil.rmtree(out)
    return {"seconds": seconds, "mib": peak}


def main(depths: list[int]) -> None:
    results = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([sys.executable, __file__, "--make", place, str(layers)], check=True)
            found: dict[str, list[dict[str, float]]] = {"PEFT": [], "ours": []}
            for _ in range(ROUNDS):
                for who, measured in found.items():
                    words = [sys.executable, __file__, "--one", who, place]
                    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                    measured.append(json.loads(text.splitlines()[-1]))
        size = {w: {k: statistics.median(m[k] for m in found[w]) for k in ("seconds", "mib")} for w in found}
        results.append({"layers": layers, **{f"{who} {k}": v for who, each in size.items() for k, v in each.items()}})
        for who, each in size.items():
            print(f"{layers} layers  {who:5} {each['seconds']:6.1f} s  {each['mib']:7,.0f} MiB")
        print(f"{layers} layers  time ratio {size['ours']['seconds'] / size['PEFT']['seconds']:.2f}", flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    content = {"python": platform.python_version(), "versions": versions, "rounds": ROUNDS, "results": results}
    (HERE / "results" / "merge.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(merge(sys.argv[2], Path(sys.argv[3]))))
    else:
        main([int(word) for word in sys.argv[1:]] or [LAYERS, 2 * LAYERS])
