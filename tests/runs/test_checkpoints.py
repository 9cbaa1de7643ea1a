"""Checkpoints are complete or not resumed from, and what ends a long run is one line that says what to do."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.core import Interrupted, UserError
from helpers.runs.checkpoints import (
    MANIFEST,
    checkpoint_error,
    explain_failure,
    last_complete_checkpoint,
    quarantine_incomplete,
    write_manifest,
)
from helpers.runs.run import Run
from helpers.runs.start import check_process_count
from tests.conftest import DPO, Project
from tests.notebooks.test_three_ways import results, wait_for


def checkpoint(folder: Path, step: int, marked: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(200)))
    (path / "global_step" / "rank_0.pt").write_bytes(b"optimizer")
    (path / "rng_state.pth").write_bytes(b"random")
    (path / "trainer_state.json").write_text("{}")
    if marked:
        write_manifest(path)
    return path


def forget(path: Path, name: str) -> None:
    """As if the file had not been saved at all."""
    (path / name).unlink()
    files = json.loads((path / MANIFEST).read_text())
    del files[name]
    (path / MANIFEST).write_text(json.dumps(files))


def test_a_marker_names_every_file_by_size_and_hash(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 10)
    files = json.loads((path / MANIFEST).read_text())
    assert {name: seal["bytes"] for name, seal in files.items()} == {
        "model.safetensors": 200,
        "global_step/rank_0.pt": 9,
        "rng_state.pth": 6,
        "trainer_state.json": 2,
    }
    assert checkpoint_error(path) == ""


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(bytes(100)), "model.safetensors differs from what was saved"),
        (lambda f: (f / "model.safetensors").write_bytes(bytes(200)), "model.safetensors differs from what was saved"),
        (lambda f: (f / "global_step" / "rank_0.pt").unlink(), "global_step/rank_0.pt is missing"),
        (lambda f: (f / MANIFEST).unlink(), "no complete checkpoint_manifest.json"),
        (lambda f: (f / MANIFEST).write_text("{"), "no complete checkpoint_manifest.json"),
        (lambda f: (f / MANIFEST).write_text("[" * 100_000), "no complete checkpoint_manifest.json"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "no complete checkpoint_manifest.json"),
        (lambda f: (f / MANIFEST).write_text('{"model.safetensors": {}}'), "no complete checkpoint_manifest.json"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{"), "no complete checkpoint_manifest.json"),
        (
            lambda f: (f / MANIFEST).write_text("{}"),
            "no trainer state and no weights and no optimizer and no scheduler and no random state",
        ),
        (lambda f: forget(f, "rng_state.pth"), "no random state"),
        (lambda f: forget(f, "global_step/rank_0.pt"), "no optimizer and no scheduler"),
    ],
)
def test_a_broken_checkpoint_is_named_and_set_aside(
    harm: Any, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 4, marked=False)  # older than a complete one: not looked at
    whole = checkpoint(tmp_path, 9)
    broken = checkpoint(tmp_path, 10)
    harm(broken)
    assert checkpoint_error(broken) == fault
    quarantine_incomplete(tmp_path)
    assert fault in capsys.readouterr().out
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-9", "broken-checkpoint-10"}
    assert last_complete_checkpoint(tmp_path) == whole


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full. Free some space for"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "The disk is full"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/no"), "/no is not writable. Use another --output_dir"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/x"), "/file/x is not writable"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --per_device_train_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "Out of memory"),
    ],
)  # fmt: skip
def test_what_ends_a_run_is_one_line_and_leaves_whole_checkpoints(error: Exception, said: str, tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, marked=False)
    run = Run(tmp_path, {})

    def train() -> None:
        with run.training() as found:
            assert found == str(whole)
            checkpoint(tmp_path, 11, marked=False)
            raise error

    with pytest.raises(UserError) as raised:
        train()
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert checkpoint_error(whole) == ""
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", str(raised.value))
    if "disk" in said:
        assert "to resume from checkpoint-9" in str(raised.value)
        assert not (tmp_path / "checkpoint-11").exists()  # what was cut short makes room


def test_what_is_not_the_user_s_stays_a_traceback(tmp_path: Path) -> None:
    assert explain_failure(ValueError("a shape does not fit"), tmp_path) is None
    run = Run(tmp_path, {})
    with pytest.raises(ValueError, match="a shape"), run.training():
        raise ValueError("a shape does not fit")
    assert run.record["status"] == "failed"
    for error in (KeyboardInterrupt(), Interrupted("stopped by SIGTERM", 143)):
        with pytest.raises(type(error)), run.training():
            raise error
        assert run.record["status"] == "interrupted"


FLAGS = [word for name, value in DPO.items() for word in (f"--{name}", str(value))]


@pytest.mark.long
def test_a_run_told_to_stop_saves_says_so_and_resumes(project: Project, dpo_run: str) -> None:
    folder = project.root / "outputs" / "told"
    words = [*FLAGS, "--save_steps", "5", "--run_name", "told"]
    process = subprocess.Popen(
        project.command("02_dpo.py", *words), cwd=project.root, env=project.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: '"step": 2' in (folder / "metrics.jsonl").read_text(), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err[-2000:]
    assert "SIGTERM received. Saving a checkpoint, then stopping." in out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    (saved,) = folder.glob("checkpoint-*")
    assert int(saved.name.rpartition("-")[2]) in (2, 3, 4)
    assert line.endswith(f"of 6. Run the same command to resume from {saved.name}.")
    assert "Traceback" not in err
    assert checkpoint_error(saved) == ""
    assert project.record("told")["status"] == "interrupted"
    assert (folder / "curves.png").is_file()
    assert "interrupted" in (folder / "report.html").read_text(encoding="utf-8")
    done = project.run("02_dpo.py", *words)
    assert f"Resuming from outputs/told/{saved.name}." in done.stdout
    ended, expected = results(project, "told"), results(project, dpo_run)
    for counted in ("train_loss", "eval_num_tokens"):  # the Trainer's mean and TRL's counter begin at the resume
        del ended[counted], expected[counted]
    assert ended == expected


def test_a_loss_that_is_not_a_number_ends_the_run(project: Project, sft_run: str) -> None:
    words = [
        *FLAGS,
        "--learning_rate",
        "1",
        "--weight_decay",
        "1e9",
        "--warmup_steps",
        "0",
        "--max_grad_norm",
        "0",
        "--run_name",
        "nan",
    ]
    done = project.run("02_dpo.py", *words, status=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "NaN or Inf at step" in line
    assert "Lower --learning_rate" in line
    assert "Traceback" not in done.stderr
    record = project.record("nan")
    assert record["status"] == "failed"
    for saved in (project.root / "outputs" / "nan").glob("checkpoint-*"):
        from safetensors.torch import load_file

        assert all(bool(t.isfinite().all()) for t in load_file(saved / "adapter_model.safetensors").values())


def test_a_restarted_run_says_which_flag_to_omit(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    run = Run(tmp_path, {}, restart=True)
    said = r"^stopped\. Omit `--resume never`: it would start over\.$"
    with pytest.raises(Interrupted, match=said), run.training():
        raise Interrupted("stopped", 143)
    with pytest.raises(UserError, match=r"The disk is full\. .* Omit `--resume never`"), run.training():
        raise OSError(errno.ENOSPC, "No space left on device", "x")
    assert "Omit `--resume never`" in run.record["error"]


def test_a_step_of_other_rows_is_refused_when_a_run_is_resumed(tmp_path: Path) -> None:
    check_process_count(tmp_path, 1, 8, False)  # nothing to resume
    checkpoint(tmp_path, 4)
    check_process_count(tmp_path, None, 8, False)
    check_process_count(tmp_path, 8, 8, False)
    check_process_count(tmp_path, 1, 8, True)  # a step is the same with any number
    with pytest.raises(UserError, match=r"was started with 1 processes\. With 8, the batch size would change"):
        check_process_count(tmp_path, 1, 8, False)


def test_only_the_last_broken_checkpoint_is_kept_and_none_of_a_finished_run(tmp_path: Path) -> None:
    for step in (4, 6):
        checkpoint(tmp_path, step, marked=False)
        quarantine_incomplete(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"broken-checkpoint-6"}
    Run(tmp_path, {}).finish()
    assert not (tmp_path / "broken-checkpoint-6").exists()


@pytest.mark.long
def test_the_same_number_of_checkpoints_is_kept_and_the_best_one_s_metrics_are_the_run_s(
    project: Project, dpo_run: str
) -> None:
    words = [*FLAGS, "--run_name", "patient", "--early_stopping_patience", "1", "--learning_rate", "0.5"]
    words += [
        "--save_total_limit",
        "1",
        "--save_steps",
        "1",
        "--eval_steps",
        "1",
        "--max_steps",
        "12",
        "--max_grad_norm",
        "1",
    ]
    project.run("02_dpo.py", *words)
    folder = project.root / "outputs" / "patient"
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    assert max(log["step"] for log in history) < 12  # it stopped early
    # the last is of the weights that are kept, which are not those of the last step
    assert losses[-2] > losses[-1] == project.record("patient")["metrics"]["eval_loss"] == min(losses[1:])
    evaluated = [log for log in history if "eval_loss" in log]
    best = project.record("patient")["metrics"]["best_step"]
    assert evaluated[-1]["step"] == best < evaluated[-2]["step"]  # the restored one is logged at its own step
    kept = list(folder.glob("checkpoint-*"))
    assert 1 <= len(kept) <= 2  # the newest, and the best
    assert all(checkpoint_error(c) == "" for c in kept)
