"""A run that is killed and started again has the weights and the numbers of one that was left alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs.checkpoints import MANIFEST, list_checkpoints
from helpers.training.resume import PROGRESS, unpage_loaded_states
from tests import warm
from tests.conftest import DPO, Project

# One epoch has 16 steps, and a log or a checkpoint falls where the other does not.
GIVEN = DPO | {"max_steps": 7, "save_steps": 3, "eval_steps": 7, "logging_steps": 2, "lr_scheduler_type": "constant"}
FLAGS = [word for name, value in GIVEN.items() for word in (f"--{name}", str(value))]
TIMES = ("_runtime", "_per_second", "tokens_per_second")


def kill(project: Project, target: str, count: str, number: int, notebook: str, *flags: str) -> Any:
    """Run a notebook until the signal at a call; see tests/killed.py."""
    killer = str(Path(__file__).resolve().parents[1] / "killed.py")
    path = str(project.root / "notebooks" / notebook)
    return warm.run([killer, target, count, str(number), path, *flags], project.root, project.env)


def outcome(project: Project, run: str) -> dict[str, Any]:
    """All that a run says and keeps, but times."""
    folder = project.root / "outputs" / run
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    return {
        "status": record["status"],
        "fingerprint": record["fingerprint"],
        "metrics": {k: v for k, v in record["metrics"].items() if not k.endswith(TIMES)},
        "logs": [{k: v for k, v in log.items() if not k.endswith(TIMES)} for log in logs],
        "samples": (folder / "samples.jsonl").read_text(),
        "diagnostics": record["diagnostics"],
    }


@pytest.fixture(scope="module")
def undisturbed(project: Project, sft_run: str) -> dict[str, Any]:
    project.run("02_dpo.py", *FLAGS, "--run_name", "left-alone")
    return outcome(project, "left-alone")


@pytest.mark.parametrize(
    ("name", "target", "count", "resumed_from"),
    [
        pytest.param(
            "between", "helpers.training.trainer:SharedPrefixDPOTrainer.training_step", "6", 3, marks=pytest.mark.long
        ),
        pytest.param("end", "transformers.trainer:Trainer._finalize_training", "1", 7, marks=pytest.mark.long),
        pytest.param("metrics", "helpers.runs.curves:final_metrics", "1+", 7, marks=pytest.mark.long),
        ("saved", "helpers.runs.run:Run.finish", "1", 7),
    ],
)
def test_killed_it_ends_as_if_it_had_not_been(
    name: str, target: str, count: str, resumed_from: int, project: Project, undisturbed: dict[str, Any]
) -> None:
    words = [*FLAGS, "--run_name", f"killed-{name}"]
    assert kill(project, target, count, signal.SIGKILL, "02_dpo.py", *words).returncode == -signal.SIGKILL
    done = project.run("02_dpo.py", *words)
    assert f"Resuming from outputs/killed-{name}/checkpoint-{resumed_from}." in done.stdout
    after = outcome(project, f"killed-{name}")
    for part, value in undisturbed.items():
        assert after[part] == value, part


@pytest.mark.long
def test_an_evaluation_that_a_signal_ended_is_made_up_for(project: Project, undisturbed: dict[str, Any]) -> None:
    words = [*FLAGS, "--eval_steps", "5", "--save_steps", "7"]
    project.run("02_dpo.py", *words, "--run_name", "evaluated")
    words += ["--run_name", "evaluated-late"]
    target = "helpers.training.callbacks:CheckpointCallback.on_prediction_step"
    assert kill(project, target, "2", signal.SIGTERM, "02_dpo.py", *words).returncode == 128 + signal.SIGTERM
    (saved,) = list_checkpoints(project.root / "outputs" / "evaluated-late")
    assert (saved.name, json.loads((saved / PROGRESS).read_text())["evaluation_due"]) == ("checkpoint-5", True)
    project.run("02_dpo.py", *words)
    assert outcome(project, "evaluated-late") == outcome(project, "evaluated")


@pytest.mark.long
def test_after_a_resume_times_are_those_of_all_steps(project: Project, sft_run: str) -> None:
    words = [*FLAGS, "--run_name", "timed"]
    kill(project, "helpers.runs.run:Run.finish", "1", signal.SIGKILL, "02_dpo.py", *words)
    folder = project.root / "outputs" / "timed"
    progress = json.loads((folder / "checkpoint-7" / PROGRESS).read_text())
    progress["seconds"] = 1000.0
    (folder / "checkpoint-7" / PROGRESS).write_text(json.dumps(progress))
    (folder / "checkpoint-7" / MANIFEST).write_text(manifest_without(folder / "checkpoint-7", PROGRESS))
    project.run("02_dpo.py", *words)
    summary = next(
        log for log in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "train_loss" in log
    )
    assert 1000 < summary["train_runtime"] < 1100
    assert summary["train_steps_per_second"] == pytest.approx(7 / summary["train_runtime"], abs=1e-3)
    assert summary["train_samples_per_second"] == pytest.approx(28 / summary["train_runtime"], abs=1e-3)


def manifest_without(checkpoint: Path, name: str) -> str:
    files = json.loads((checkpoint / MANIFEST).read_text())
    del files[name]
    return json.dumps(files)


@pytest.mark.long
def test_an_early_stop_is_not_trained_further(project: Project, sft_run: str) -> None:
    words = [*FLAGS, "--eval_steps", "1", "--save_steps", "1", "--learning_rate", "1e-12", "--max_steps", "9"]
    words += ["--early_stopping_patience", "2"]
    project.run("02_dpo.py", *words, "--run_name", "early")
    before = outcome(project, "early")
    stopped_at = max(log["step"] for log in before["logs"])
    assert stopped_at < 9
    words += ["--run_name", "early-killed"]
    kill(project, "helpers.runs.run:Run.finish", "1", signal.SIGKILL, "02_dpo.py", *words)
    project.run("02_dpo.py", *words)
    assert outcome(project, "early-killed") == before


def test_weights_of_a_resumed_run_are_bitwise_equal(project: Project, undisturbed: dict[str, Any]) -> None:
    folder = project.root / "outputs"
    alone, killed = (load_file(folder / run / "adapter_model.safetensors") for run in ("left-alone", "killed-saved"))
    assert all(torch.equal(alone[name], killed[name]) for name in alone)


def test_paged_optimizer_states_of_a_checkpoint_are_plain_memory(tmp_path: Path) -> None:
    from bitsandbytes.functional import prefetch_tensor
    from bitsandbytes.optim import PagedAdamW8bit

    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = PagedAdamW8bit([weight], lr=0.1)
    states = {"state1": torch.zeros(64, 64, dtype=torch.uint8), "state2": torch.zeros(64, 64, dtype=torch.uint8)}
    for value in states.values():
        value.is_paged = True  # as bitsandbytes marks them on a GPU
    optimizer.state[weight] = states | {"step": 3}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = PagedAdamW8bit([weight], lr=0.1)
    # the same device: nothing is copied, as in a launch of several processes, which load onto their GPUs
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True))
    value = loaded.state[weight]["state1"]
    assert value.is_paged
    with pytest.raises(AttributeError, match="page_deviceid"):  # which ends a step
        prefetch_tensor(value)
    unpage_loaded_states(loaded)
    assert not any(each.is_paged for name, each in loaded.state[weight].items() if name != "step")
    assert loaded.state[weight]["step"] == 3
    unpage_loaded_states(None)  # DeepSpeed's has no state of this kind
