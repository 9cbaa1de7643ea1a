"""Measure the memory of 02_dpo.py and compare it with the estimate of --dry_run.

    python benchmarks/memory.py

On a GPU: QLoRA DPO of Mistral-7B with random weights, at two lengths and two batch sizes. The peak is PyTorch's
max_memory_allocated. It excludes a paged optimizer, and so does the estimate it is compared with. Tokens per second are
those of the measured steps.

On a CPU: small models of the same architectures, computed in bfloat16 as on a GPU. The storage of every tensor is
traced. Logits are not compared: TRL's tiles of logits are made small, because without Triton they take several times
their size.

Each measurement is a fresh process. Results are written to results/memory-<machine>.json.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
REPO = Path(__file__).resolve().parents[1]
SMALL = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_hidden_layers": 4}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
ON_GPU: list[dict[str, Any]] = [
    {"batch": batch, "length": length, "kind": "mistral"} for length in (1512, 768) for batch in (1, 8)
]
ON_CPU: list[dict[str, Any]] = [
    {"kind": "mistral", "batch": 2, "length": 512},
    {"kind": "mistral", "batch": 2, "length": 512, "gradient_checkpointing": False},
    {"kind": "mistral", "batch": 1, "length": 1024},
    {"kind": "mistral", "batch": 2, "length": 512, "tuning": "lora", "gradient_checkpointing": False},
    {"kind": "mistral", "batch": 2, "length": 512, "tuning": "full"},
    {"kind": "mistral", "batch": 2, "length": 512, "tuning": "full", "gradient_checkpointing": False},
    {"kind": "gpt_neox", "batch": 2, "length": 512},
    {"kind": "gpt_neox", "batch": 2, "length": 512, "gradient_checkpointing": False},
    {"kind": "qwen2", "batch": 2, "length": 512},
]
STEPS = 6  # the third of them is traced; on a GPU those from the third on are timed


def write_inputs(folder: Path, kind: str, sizes: dict[str, int]) -> None:
    """A random model with Mistral's tokenizer, and pairs that are longer than any length measured."""
    import torch
    from prepare import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    groups = {} if kind == "gpt_neox" else {"num_key_value_heads": sizes["num_attention_heads"] // 4}
    config = AutoConfig.for_model(kind, vocab_size=32000, max_position_embeddings=4096, **sizes, **groups)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    write_tokenizer(folder)
    model.save_pretrained(folder)
    text = "one two three four five six seven eight nine ten "
    with (folder.parent / "pairs.jsonl").open("w") as rows:
        for i in range(200):
            row = {"prompt": f"{i} {text * 250}", "chosen": f"{i} yes {text * 25}", "rejected": f"{i} no {text * 25}"}
            rows.write(json.dumps(row) + "\n")


def flags(case: dict[str, Any], folder: Path) -> list[str]:
    """02_dpo.py's, for a case; --overlong truncate_prompt makes every pair as long as may be."""
    given = {
        "model_id": folder / case["kind"], "dataset_id": folder / "pairs.jsonl", "output_dir": folder / "out",
        "run_name": "measured", "resume": "never", "max_prompt_length": 0, "max_length": case["length"],
        "overlong": "truncate_prompt", "train_rows": 0, "eval_rows": 2, "max_steps": STEPS, "save_strategy": "no",
        "eval_strategy": "no", "eval_on_start": False, "tuning": case.get("tuning", "qlora"),
        "per_device_train_batch_size": case["batch"], "gradient_accumulation_steps": 2, "logging_steps": 1,
        "gradient_checkpointing": case.get("gradient_checkpointing", True), "shared_prefix": "off",
    }  # fmt: skip
    if not case["gpu"]:
        given |= {"lora_r": 64, "optim": "adamw_torch"}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the notebook in this process and measure its third step; the bytes by part that are estimated for it."""
    import torch
    from transformers import TrainerCallback, trainer
    from trl.trainer import utils

    from helpers.models import estimate_memory, plan_model

    found: dict[str, Any] = {}
    watch = None if case["gpu"] else _tracker()

    class Measure(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step != 2:
                return
            found["start"] = time.monotonic(), state.num_input_tokens_seen
            if case["gpu"]:
                torch.cuda.reset_peak_memory_stats()
            else:
                watch.__enter__()
                for thing in gc.get_objects():
                    if isinstance(thing, torch.Tensor):
                        watch.see(thing)
                watch.peak = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 3 and not case["gpu"]:
                watch.__exit__(None, None, None)
                found["peak"] = watch.peak
            if state.global_step == STEPS and case["gpu"]:
                seconds, tokens = time.monotonic() - found["start"][0], state.num_input_tokens_seen - found["start"][1]
                found.update(peak=torch.cuda.max_memory_allocated(), tokens_per_second=tokens / seconds)

    trainer.DEFAULT_CALLBACKS.append(Measure)
    if not case["gpu"]:  # as it would be on a GPU
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = 256

        def plan_for_gpu(*args: Any, **kwargs: Any) -> Any:
            plan = plan_model(*args, **kwargs)
            dtype = torch.float32 if kwargs["tuning"] == "full" else torch.bfloat16
            if plan.quantization is not None:
                plan.quantization.bnb_4bit_compute_dtype = plan.quantization.bnb_4bit_quant_storage = torch.bfloat16
            return dataclasses.replace(plan, dtype=dtype, bf16=True)

        vars(sys.modules[estimate_memory.__module__.rpartition(".")[0]])["plan_model"] = plan_for_gpu  # the room's door
    sys.argv = ["02_dpo.py", *flags(case, folder)]
    notebook = runpy.run_path(str(REPO / "notebooks" / "02_dpo.py"), run_name="__main__")
    parts = estimate_memory(notebook["settings"], notebook["start"]).parts
    paged = "paged" in notebook["training_args"].optim
    excluded = ("optimizer" if paged else "") if case["gpu"] else "logits"
    expected = parts["peak"] - parts.get(excluded, 0.0)
    found.pop("start")
    return case | found | {"estimate": parts, "compared": expected, "ratio": expected / found["peak"]}


def _tracker() -> Any:
    """Follows every storage that is made while it is entered."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live: dict[int, int] = {}
            self.now = self.peak = 0

        def see(self, tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
            return tensor

        def drop(self, key: int) -> None:
            self.now -= self.live.pop(key, 0)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return tree_map_only(torch.Tensor, self.see, func(*args, **(kwargs or {})))

    return Tracker()


def main() -> None:
    import torch

    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in ON_GPU if gpu else ON_CPU:
            if not (Path(folder) / case["kind"]).exists():
                write_inputs(Path(folder) / case["kind"], case["kind"], LARGE if gpu else SMALL)
            words = [sys.executable, __file__, json.dumps(case | {"gpu": gpu}), folder]
            quiet = os.environ | {"TQDM_DISABLE": "1"}
            done = subprocess.run(words, capture_output=True, text=True, cwd=REPO, env=quiet)
            if done.returncode:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            speed = f"  {result['tokens_per_second']:,.0f} tokens/s" if gpu else ""
            name = " ".join(f"{k} {v}" for k, v in case.items())
            peaks = f"measured {result['peak'] / 1e9:.3f} GB, estimated {result['compared'] / 1e9:.3f} GB"
            print(f"{name}: {peaks}, ratio {result['ratio']:.2f}{speed}", flush=True)
    file = Path(__file__).parent / "results" / f"memory-{machine.lower().replace(' ', '-')}.json"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    file.write_text(json.dumps({"machine": machine, "versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print("\n" + json.dumps(measure(json.loads(sys.argv[1]), Path(sys.argv[2])), default=str))
    else:
        main()
