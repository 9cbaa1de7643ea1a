"""Measure the preparation of preference pairs, compared with TRL's DPOTrainer on the same rows and number of processes.

    python benchmarks/prepare.py [ROWS] [PROCESSES]

Each measurement is a fresh process; the two alternate. Rows have about the lengths of UltraFeedback: prompts and
answers are sampled from log-normal distributions. Their columns are those of trl-lib/ultrafeedback_binarized, which
both read unchanged. The tokenizer is Mistral-7B's, from mistral-common. Memory is the largest resident size of the
process plus that of its largest worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROUNDS = 3
WORDS = "the a of and to in is you that it he was for on are as with his they I at be this have from or one had by word"


def write_rows(file: Path, count: int) -> None:
    draw = random.Random(0)
    vocabulary = [
        *WORDS.split(),
        *(f"{a}{b}" for a in ("pre", "con", "inter") for b in ("sent", "tend", "ference", "vene")),
    ]

    def text(characters: float) -> str:
        return " ".join(draw.choice(vocabulary) for _ in range(max(1, int(characters / 5))))

    with file.open("w") as out:
        for i in range(count):
            prompt = f"{i}: {text(min(6000, draw.lognormvariate(5.8, 1.1)))}"
            sides = {
                name: [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": text(draw.lognormvariate(*shape))},
                ]
                for name, shape in (("chosen", (6.9, 0.8)), ("rejected", (6.7, 0.9)))
            }
            out.write(json.dumps({**sides, "score_chosen": 5.0, "score_rejected": 3.0}) + "\n")


def write_tokenizer(folder: Path) -> None:
    import mistral_common

    folder.mkdir()
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))


def prepare(which: str, folder: Path, processes: int) -> dict[str, Any]:
    """One measurement: seconds, the largest resident memory (this process and its workers), the tokens' hash."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_trainer import DPOTrainer  # by both, before the clock starts: a notebook has it anyway

    from helpers.data import LengthLimits, prepare_rows
    from helpers.models import set_chat_template

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    set_chat_template(tokenizer, "mistral")
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / which))
    start = time.perf_counter()
    if which == "ours":
        made, _ = prepare_rows(rows, tokenizer, LengthLimits(), num_proc=processes)
    else:
        args = SimpleNamespace(
            dataset_num_proc=processes if processes > 1 else None, max_length=None, truncation_mode="keep_start"
        )
        made = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    seconds = time.perf_counter() - start
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    digest = hashlib.sha256()
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in made[column]:
            digest.update(repr(list(ids)).encode())
    return {"seconds": seconds, "peak_mib": peak, "tokens": digest.hexdigest()}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder / "rows.jsonl", count)
        write_tokenizer(folder / "tokenizer")
        results: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
        for _ in range(ROUNDS):
            for which, found in results.items():
                shutil.rmtree(folder / which, ignore_errors=True)
                words = [sys.executable, __file__, "--one", which, scratch, str(processes)]
                env = os.environ | {"TOKENIZERS_PARALLELISM": "false"} if processes > 1 else None
                done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    same = len({r["tokens"] for found in results.values() for r in found}) == 1
    middle = {w: {k: statistics.median(r[k] for r in f) for k in ("seconds", "peak_mib")} for w, f in results.items()}
    ratio = middle["stock"]["seconds"] / middle["ours"]["seconds"]
    versions = {name: metadata.version(name) for name in ("trl", "datasets", "tokenizers")}
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(
        map(" ".join, versions.items())
    )
    print(f"{count:,} pairs, {processes} processes, median of {ROUNDS}, {machine}")
    for which, m in middle.items():
        print(f"{which:6} {m['seconds']:7.1f} s   peak {m['peak_mib']:7.0f} MiB")
    print(f"ratio  {ratio:.2f}   tokens {'identical' if same else 'DIFFER'}")
    target = Path(__file__).parent / "results"
    target.mkdir(exist_ok=True)
    record = {"pairs": count, "processes": processes, "machine": machine, "ratio": ratio, "identical": same, **results}
    (target / "prepare.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(prepare(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
