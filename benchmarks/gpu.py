"""Measure QLoRA DPO of Mistral-7B with random weights on one GPU: run it through benchmarks/gpu.sh.

02_dpo.py trains stock (TRL's way) and with shared prompts, one pair and 16 pairs at a time, 16 pairs a step, on pairs
with the lengths of UltraFeedback. For each it prints tokens per second, the peak of PyTorch's memory, the estimate of
--dry_run for the same batch, and the line of the first batch's check. Then a run is interrupted after a checkpoint and
resumed, and 04_vibes.py answers with the base and the policy, whose peak must be that of one model.

Each measurement is a fresh process. Results are written to results/gpu-<machine>.json after each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path[:0] = [str(REPO), str(HERE)]
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_hidden_layers": 2}
PAIRS, STEPS = 16, 4  # pairs a step; steps, of which the first is not timed
PROMPT, ANSWERS = (4.9, 1.0), ((5.4, 0.7), (5.2, 0.8))  # log-normal lengths, as UltraFeedback's


def write_inputs(folder: Path, small: bool) -> None:
    """A random model with Mistral's tokenizer, pairs, and prompts for 04."""
    import torch
    from prepare import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SMALL if small else LARGE
    config = AutoConfig.for_model(
        "mistral", vocab_size=32000, num_key_value_heads=sizes["num_attention_heads"] // 4,
        max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    with torch.device("cpu" if small else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    write_tokenizer(folder / "model")
    model.save_pretrained(folder / "model")
    draw, words = random.Random(0), ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

    def text(shape: tuple[float, float], most: int) -> str:
        count = min(most, max(1, int(draw.lognormvariate(*shape)) // (32 if small else 1)))
        return " ".join(draw.choice(words) for _ in range(count))

    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(PAIRS * STEPS + 8):
            answers = [f"{name} {text(shape, 400)}" for name, shape in zip(("yes", "no"), ANSWERS, strict=True)]
            row = {"prompt": f"{i} {text(PROMPT, 900)}", "chosen": answers[0], "rejected": answers[1]}
            file.write(json.dumps(row) + "\n")


def train_flags(case: dict[str, Any], folder: Path) -> list[str]:
    """02_dpo.py's flags for a case."""
    given = {
        "model_id": folder / "model", "dataset_id": folder / "pairs.jsonl", "output_dir": folder / "out",
        "run_name": case["name"], "train_rows": 0, "eval_rows": 2, "max_steps": STEPS, "eval_strategy": "no",
        "eval_on_start": False, "save_strategy": "no", "completion_steps": 0, "logging_steps": 1, "lora_r": 16,
        "shared_prefix": case["shared"], "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": PAIRS // case["batch"],
    }  # fmt: skip
    if case["resume"]:
        given |= {"save_strategy": "steps", "save_steps": 2}
    if case["small"]:
        given |= {"use_cpu": True, "max_prompt_length": 128, "max_length": 256}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a notebook in this process: 02 for a case of training, else 04."""
    import torch
    from transformers import TrainerCallback, trainer

    gpu, found, started = not case["small"], dict[str, Any](), time.monotonic()

    class Measure(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 2 and case["resume"] == "interrupt":  # its checkpoint is complete
                raise KeyboardInterrupt
            if state.global_step == 1:
                torch.cuda.synchronize() if gpu else None
                found["start"] = time.monotonic(), state.num_input_tokens_seen

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            torch.cuda.synchronize() if gpu else None
            found["steps"] = state.global_step
            if state.global_step == STEPS and "start" in found:
                seconds, tokens = time.monotonic() - found["start"][0], state.num_input_tokens_seen - found["start"][1]
                found.update(seconds_per_step=seconds / (STEPS - 1), tokens_per_second=tokens / seconds)

    if case["notebook"] == "04_vibes.py":
        models = str(folder / "model"), str(folder / "out" / "ours-1")
        words = ["--models", *models, "--output_dir", str(folder / "out"), "--max_new_tokens", "32",
                 "--prompts", "one two three", "four five", "--run_name", "answers"]  # fmt: skip
    else:
        trainer.DEFAULT_CALLBACKS.append(Measure)
        words = train_flags(case, folder)
    sys.argv = [case["notebook"], *words]
    try:
        notebook = runpy.run_path(str(REPO / "notebooks" / case["notebook"]), run_name="__main__")
    except BaseException:  # as the interrupt of this script ends a notebook
        if case["resume"] != "interrupt":
            raise
        notebook = {}
    if "training_args" in notebook:
        from helpers.models import estimate_memory

        settings = notebook["settings"]
        parts = estimate_memory(settings, notebook["start"]).parts
        paged = parts["optimizer"] if "paged" in notebook["training_args"].optim else 0.0
        found |= {"estimate_gb": (parts["peak"] - paged) / 1e9, "status": notebook["run"].record["status"]}
    found.pop("start", None)
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    return found | {"peak_gb": peak / 1e9, "seconds": time.monotonic() - started}


def cases(small: bool) -> list[dict[str, Any]]:
    """What is measured, in its order."""
    common = {"notebook": "02_dpo.py", "small": small, "resume": ""}
    made = [
        common | {"name": f"{who}-{batch}", "shared": shared, "batch": batch}
        for batch in (1, PAIRS)
        for who, shared in (("stock", "off"), ("ours", "auto"))
    ]
    resumed = common | {"name": "resumed", "shared": "auto", "batch": 4}
    made += [resumed | {"resume": word} for word in ("interrupt", "resume")]
    return [*made, common | {"notebook": "04_vibes.py", "name": "answers", "shared": "", "batch": 0}]


def describe(case: dict[str, Any], result: dict[str, Any]) -> str:
    """One line of the results."""
    known = {
        "tokens_per_second": "{:,.0f} tokens/s", "seconds_per_step": "{:.2f} s a step", "peak_gb": "peak {:.2f} GB",
        "estimate_gb": "estimate {:.2f} GB", "steps": "step {}", "status": "{}", "check": "{}", "error": "{}",
    }  # fmt: skip
    parts = [text.format(result[name]) for name, text in known.items() if result.get(name)]
    name = f"{case['name']} {case['resume']}".strip()
    return f"{name}: {', '.join(parts)} ({result['seconds']:.0f} s in all)"


def main(small: bool) -> int:
    import torch

    if not small and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch sees no GPU here. Use `SMALL=1 benchmarks/gpu.sh` to test the script.")
    machine = "CPU, tiny model" if small else torch.cuda.get_device_name()
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    content: dict[str, Any] = {"machine": machine, "versions": versions, "results": []}
    name = re.sub(r"\W+", "-", machine.lower())
    with tempfile.TemporaryDirectory() as work:
        folder, quiet = Path(work), os.environ | {"TQDM_DISABLE": "1"}
        file = (folder if small else HERE / "results") / f"gpu-{name}.json"
        write_inputs(folder, small)
        for case in cases(small):
            started, words = time.monotonic(), [sys.executable, __file__, "--one", json.dumps(case), str(folder)]
            done = subprocess.run(words, capture_output=True, text=True, cwd=REPO, env=quiet)
            lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
            result = json.loads(lines[-1].partition(" ")[2]) if lines else {"seconds": time.monotonic() - started}
            if not lines:
                result["error"] = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            if check := re.search(r"^Shared prefix: .*$", done.stdout, re.MULTILINE):
                result["check"] = check[0]
            content["results"].append(case | result)
            file.write_text(json.dumps(content, indent=1) + "\n")
            print(describe(case, result), flush=True)
    speeds = {each["name"]: each.get("tokens_per_second", 0.0) for each in content["results"]}
    for batch in (1, PAIRS):
        if speeds[f"stock-{batch}"] and speeds[f"ours-{batch}"]:
            print(f"batch {batch}: {speeds[f'ours-{batch}'] / speeds[f'stock-{batch}']:.2f} times stock's tokens/s")
    return int(any("error" in each for each in content["results"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on a CPU, to test the script")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\nMEASURED " + json.dumps(measure(json.loads(options.one[0]), Path(options.one[1]))))
    else:
        raise SystemExit(main(options.small))
