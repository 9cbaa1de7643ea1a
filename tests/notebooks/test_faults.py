"""Runs that are killed, harmed and starved of disk end with the numbers of one that was left alone (long)."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from helpers.runs.checkpoints import MANIFEST, checkpoint_error, list_checkpoints
from tests.conftest import DPO, Project, marks
from tests.notebooks.test_three_ways import results

STEPS = 48
GIVEN = DPO | {"max_steps": STEPS, "save_steps": 2, "eval_steps": 8, "eval_rows": 64}
FLAGS = [word for name, value in GIVEN.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def undisturbed(project: Project, sft_run: str) -> dict[str, float]:
    project.run("02_dpo.py", *FLAGS, "--run_name", "undisturbed")
    return held_out(project, "undisturbed")


def held_out(project: Project, run: str) -> dict[str, float]:
    """Final metrics but those that the Trainer and TRL count from the resume on."""
    return {k: v for k, v in results(project, run).items() if k not in ("train_loss", "eval_num_tokens")}


def start(project: Project, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        project.command("02_dpo.py", *words), cwd=project.root, env=project.env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def last_step(folder: Path) -> int:
    with contextlib.suppress(OSError):
        steps = [
            line.rpartition('"step": ')[2].split(",")[0].rstrip("}\n") for line in (folder / "metrics.jsonl").open()
        ]
        return max([int(step) for step in steps if step.isdigit()], default=0)
    return 0


def being_written(folder: Path, known: set[Path]) -> bool:
    return any(not (c / MANIFEST).exists() for c in set(folder.glob("checkpoint-*")) - known)


def beyond(folder: Path, step: int) -> bool:
    return last_step(folder) > step


@pytest.mark.parametrize("moments", [pytest.param(n, marks=marks(False, n == 4)) for n in (4, 10)])
def test_killed_at_many_moments_it_ends_with_the_same_numbers(
    moments: int, project: Project, undisturbed: dict[str, float]
) -> None:
    name = f"killed-{moments}"
    words = [*FLAGS, "--run_name", name]
    folder = project.root / "outputs" / name
    draw = random.Random(0)
    kills, during_a_write = 0, 0
    while kills < moments:
        process = start(project, *words)
        begun = last_step(folder)
        lost_at_most = {c.name for c in list_checkpoints(folder) if not checkpoint_error(c)}
        known = set(folder.glob("checkpoint-*"))
        if kills % 3 == 0:  # as soon as a checkpoint is being written: its folder is there, its marker is not
            wait(partial(being_written, folder, known), process)
        else:  # some moment after a step that it had not reached before
            wait(partial(beyond, folder, begun), process)
            time.sleep(draw.random() * 0.15)
        if process.poll() is not None:  # it came to its end first
            break
        process.kill()
        process.wait()
        kills += 1
        during_a_write += any(not (c / MANIFEST).exists() for c in folder.glob("checkpoint-*"))
        whole = {c.name for c in list_checkpoints(folder) if not checkpoint_error(c)}
        assert whole or not lost_at_most  # there is always one to go on from
    assert kills == moments
    assert during_a_write >= 1
    if project.record(name)["status"] != "finished":
        project.run("02_dpo.py", *words)
    assert held_out(project, name) == undisturbed


@pytest.mark.long
def test_a_truncated_checkpoint_is_not_resumed_from(project: Project, undisturbed: dict[str, float]) -> None:
    words = [*FLAGS, "--run_name", "truncated"]
    folder = project.root / "outputs" / "truncated"
    process = start(project, *words)
    wait(lambda: last_step(folder) >= 13, process)
    process.kill()
    process.wait()
    newest, before = [c for c in list_checkpoints(folder) if not checkpoint_error(c)][:2]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = project.run("02_dpo.py", *words)
    assert f"outputs/truncated/{newest.name} is incomplete (" in done.stdout
    assert f"Renamed to broken-{newest.name}." in done.stdout
    assert f"Resuming from outputs/truncated/{before.name}." in done.stdout
    assert held_out(project, "truncated") == undisturbed


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
def test_a_full_disk_is_one_line_and_after_some_is_freed_it_goes_on(
    project: Project, undisturbed: dict[str, float]
) -> None:
    disk = project.root / "disk"
    words = [*FLAGS, "--run_name", "starved", "--output_dir", str(disk)]
    with small_disk(disk, 12):
        filler = disk / "filler"
        folder = disk / "starved"
        process = start(project, *words)
        wait(lambda: last_step(folder) >= 5, process)
        with contextlib.suppress(OSError), filler.open("wb") as file:  # somebody else's data
            while True:
                file.write(bytes(4096))
                file.flush()
        assert process.wait(timeout=300) == 1
        done = project.run("02_dpo.py", *words, status=1)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "The disk is full. Free some space for" in line
        assert "Traceback" not in done.stderr
        assert any(not checkpoint_error(c) for c in list_checkpoints(folder))
        filler.unlink()
        project.run("02_dpo.py", *words)
        metrics = json.loads((folder / "run.json").read_text())["metrics"]
    for name, value in undisturbed.items():
        assert metrics[name] == value, name


@pytest.mark.long
def test_a_signal_in_an_evaluation_loses_no_step(project: Project, undisturbed: dict[str, float]) -> None:
    words = [*FLAGS, "--save_steps", "48", "--per_device_train_batch_size", "4", "--run_name", "evaluating"]
    folder = project.root / "outputs" / "evaluating"
    process = start(project, *words)
    wait(lambda: last_step(folder) >= 8, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 128 + signal.SIGINT
    (saved,) = list_checkpoints(folder)
    assert int(saved.name.rpartition("-")[2]) >= 8
    assert checkpoint_error(saved) == ""
    project.run("02_dpo.py", *words)
    assert held_out(project, "evaluating") == undisturbed


def wait(condition: object, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            if condition():  # type: ignore[operator]
                return
        time.sleep(0.001)
