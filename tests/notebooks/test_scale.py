"""Several processes give what one gives: the loss curve, and a model that plain transformers loads."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.runs.curves import read_samples
from tests.conftest import REPO, Project, marks

STEPS = 6
COMMON = {
    "recipe": "recipes/demo.yaml", "setup_module": "", "max_steps": STEPS, "logging_steps": 1, "train_rows": 48,
    "eval_rows": 8, "eval_steps": 3, "save_steps": 3, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0,
    "warmup_steps": 2, "per_device_eval_batch_size": 4, "train_sampling_strategy": "random",
}  # fmt: skip
SFT = COMMON | {"tuning": "full", "learning_rate": 1e-3}
# sigmoid is a mean over pairs; TRL's sft term is one over each process's own tokens, and weighs pairs otherwise
DPO = COMMON | {"sft_run": "", "loss_type": "sigmoid"}
LORA = DPO | {"tuning": "lora", "learning_rate": 1e-3}
FULL = DPO | {"tuning": "full", "learning_rate": 1e-4}
JOBS = {"sft": ("01_sft.py", SFT), "lora": ("02_dpo.py", LORA), "full": ("02_dpo.py", FULL)}


# Runs a notebook, and then what it has trained on a few words, as it is in memory.
AND_THEN = """
import os, runpy, sys, torch
sys.argv = sys.argv[1:]
done = runpy.run_path(sys.argv[0], run_name="__main__")
words = done["tokenizer"]("What is 2 plus 3?", return_tensors="pt").to(done["trainer"].args.device)
model = done["trainer"].model_wrapped
model.eval()
with torch.no_grad():
    logits = model(**words).logits
if os.environ.get("RANK", "0") == "0":
    torch.save(logits, done["run"].folder / "logits.pt")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of these tests' own: what they train is not the "latest" of others."""
    return Project(tmp_path_factory.mktemp("project"))


def launch(project: Project, demo: Path, engine: str, job: str, folder: Path, processes: int = 2) -> list[float]:
    """Train with `processes` processes, 4 rows to a step in all; the losses of the steps."""
    notebook, given = JOBS[job]
    name = f"{engine}-{job}"
    data = "instructions" if job == "sft" else "preferences"
    given = given | {
        "run_name": name, "per_device_train_batch_size": 4 // processes,
        "model_id": demo / "tiny-mistral", "dataset_id": demo / data,
    }  # fmt: skip
    if job != "sft":  # one process computes as stock does
        given["shared_prefix"] = "off" if engine == "one" else "on"
    words = [str(w) for n, v in given.items() for w in (f"--{n}", v)]
    (folder / "and_then.py").write_text(AND_THEN)
    command = [sys.executable, str(folder / "and_then.py"), str(project.root / "notebooks" / notebook), *words]
    env = project.env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if engine != "one":
        config = yaml.safe_load((REPO / "recipes" / "accelerate" / f"{engine}.yaml").read_text())
        config |= {"num_processes": processes, "main_process_port": 29500 + os.getpid() % 500}
        file = folder / f"{engine}.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *command[1:]]
        env |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=project.root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.stdout.count("Run: ") == 1  # what is printed is printed once
    record = project.record(name)
    assert record["status"] == "finished"
    history = [
        json.loads(line) for line in (project.root / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [log["loss"] for log in history if "loss" in log]
    assert len(losses) == STEPS
    sampled = {row["step"] for row in read_samples(project.root / "outputs" / name)}
    assert sampled == (set() if engine == "zero3" else {0, 2, 4, 6})
    assert done.stdout.count("Completions are not sampled with FSDP or ZeRO-3.") == (engine == "zero3")
    assert record["processes"] == processes
    shards = project.root / "outputs" / name / "checkpoint-3" / "global_step3"  # DeepSpeed's own
    assert shards.is_dir() == engine.startswith("zero")
    return [*losses, record["metrics"]["eval_loss"]]


def logits(project: Project, demo: Path, name: str) -> Any:
    """What the saved model, or the saved adapter on its base, says in plain transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = project.root / "outputs" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapter = (folder / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(demo / "tiny-mistral" if adapter else folder)
    model = PeftModel.from_pretrained(model, folder) if adapter else model
    with torch.inference_mode():
        return model.eval()(**tokenizer("What is 2 plus 3?", return_tensors="pt")).logits


def compare(project: Project, demo: Path, engine: str, job: str, one: list[float], folder: Path) -> None:
    import torch

    losses = launch(project, demo, engine, job, folder)
    assert losses == pytest.approx(one, abs=1e-4)
    assert max(one) - min(one) > 1e-3  # something was learned on the way
    trained = torch.load(project.root / "outputs" / f"{engine}-{job}" / "logits.pt")
    torch.testing.assert_close(logits(project, demo, f"{engine}-{job}"), trained, atol=1e-5, rtol=0)  # what was saved
    torch.testing.assert_close(logits(project, demo, f"one-{job}"), trained, atol=5e-3, rtol=1e-3)  # what one gives


@pytest.fixture(scope="module")
def alone(project: Project, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """What one process gives, by job."""
    folder = tmp_path_factory.mktemp("one")
    return functools.cache(lambda job: launch(project, demo_folder, "one", job, folder, processes=1))


# The long tests have every engine and every job.
OFTEN = {("sft", "zero2"), ("lora", "ddp"), ("lora", "zero3"), ("full", "zero1"), ("full", "zero3")}


@pytest.mark.parametrize(
    ("job", "engine"),
    [
        pytest.param(job, engine, marks=marks(False, (job, engine) in OFTEN))
        for job in JOBS
        for engine in ("ddp", "zero1", "zero2", "zero3")
    ],
)
def test_an_engine_gives_what_one_process_gives(
    job: str, engine: str, project: Project, demo_folder: Path, tmp_path: Path, alone: Callable[..., list[float]]
) -> None:
    if engine != "ddp":
        pytest.importorskip("deepspeed")
    compare(project, demo_folder, engine, job, alone(job), tmp_path)
