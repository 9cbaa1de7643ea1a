"""Rows that are held out count once each and alike, however many processes and batches they are spread over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Project, marks

KEYS = ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies",
        "eval_logps/chosen", "eval_logps/rejected")  # fmt: skip
COMMON = ["--recipe", "recipes/demo.yaml", "--setup_module", "", "--max_steps", "2", "--train_rows", "60",
          "--eval_steps", "1", "--save_steps", "1", "--per_device_train_batch_size", "2",
          "--per_device_eval_batch_size", "4", "--completion_steps", "0",
          "--warmup_steps", "0", "--train_sampling_strategy", "random"]  # fmt: skip
DPO = [*COMMON, "--sft_run", "", "--loss_type", "sigmoid", "--tuning", "lora", "--learning_rate", "1e-3"]
SFT = [*COMMON, "--tuning", "lora", "--learning_rate", "1e-3"]


def evaluate(
    project: Project, demo: Path, name: str, processes: int, notebook: str, rows: int, *flags: str
) -> list[dict[str, float]]:
    """The evaluations of a short run, before and after its step."""
    data = {"01_sft.py": "instructions", "02_dpo.py": "preferences"}[notebook]
    given = SFT if notebook == "01_sft.py" else DPO
    words = [
        *given, "--model_id", str(demo / "tiny-mistral"), "--dataset_id", str(demo / data), "--eval_rows", str(rows),
        "--run_name", name, "--eval_on_start", "True", "--gradient_accumulation_steps", str(4 // processes), *flags,
    ]  # fmt: skip
    if processes == 1:
        project.run(notebook, *words)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port",
                   str(29600 + os.getpid() % 300), str(project.root / "notebooks" / notebook), *words]  # fmt: skip
        env = project.env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=project.root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    lines = (project.root / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    return [log for log in map(json.loads, lines) if "eval_loss" in log]


# Of batches of 4 and two processes: a last round of 1, 3 and 5 rows. The last has rows of both processes.
@pytest.mark.parametrize(
    ("notebook", "rows"),
    [
        pytest.param(notebook, rows, marks=marks(False, (notebook, rows) in (("02_dpo.py", 9), ("01_sft.py", 13))))
        for notebook, rows in (("02_dpo.py", 9), ("02_dpo.py", 3), ("02_dpo.py", 13), ("01_sft.py", 13))
    ],
)
def test_two_processes_evaluate_as_one(notebook: str, rows: int, project: Project, demo_folder: Path) -> None:
    one = evaluate(project, demo_folder, f"one-{notebook[:2]}-{rows}", 1, notebook, rows)
    two = evaluate(project, demo_folder, f"two-{notebook[:2]}-{rows}", 2, notebook, rows)
    assert len(one) == len(two) == 3
    assert one[0]["eval_loss"] != one[2]["eval_loss"]
    for before, after in zip(one, two, strict=True):
        for key in [key for key in KEYS if key in before]:
            assert after[key] == pytest.approx(before[key], abs=2e-5), key


@pytest.mark.long
def test_a_last_batch_that_is_short_counts_by_its_rows(project: Project, demo_folder: Path) -> None:
    one = evaluate(project, demo_folder, "by-4", 1, "02_dpo.py", 9)
    other = evaluate(project, demo_folder, "by-9", 1, "02_dpo.py", 9, "--per_device_eval_batch_size", "9")
    for key in KEYS:
        assert one[-1][key] == pytest.approx(other[-1][key], abs=2e-5), key
