"""One process writes a run: the second says so in one line, and what the first writes is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers.core import UserError
from helpers.runs.checkpoints import lock_folder, unlock_folder
from helpers.runs.run import Run
from helpers.runs.start import start_run
from tests.conftest import DPO, Project
from tests.tiny import settings_of

HOLD = """
import sys
from pathlib import Path
from helpers.runs.checkpoints import lock_folder
lock_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that has locked outputs/one."""
    folder = tmp_path / "one"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_writes_is_refused_until_that_ends(tmp_path: Path, holder: Any) -> None:
    folder = tmp_path / "one"
    with pytest.raises(UserError, match=r"one is in use by another process\. Wait for its end, or stop it\."):
        Run(folder, {"status": "running"}).save()
    assert not folder.exists()
    folder.mkdir()
    process = {"pid": 12, "host": "box", "since": "2026-01-02 03:04:05 UTC"}
    (folder / "run.json").write_text(json.dumps({"step": "sft", "status": "running", "process": process}))
    with pytest.raises(UserError, match=r"in use by process 12 on box since 2026-01-02 03:04:05 UTC\. Wait"):
        start_run(settings_of(tmp_path, "--run_name", "one"), base_model="m")
    holder.kill()  # as kill -9: the lock goes with the process
    holder.wait()
    Run(folder, {"status": "running"}).save()
    unlock_folder(folder)


def test_a_run_that_was_written_since_it_was_read_is_not_written_over(tmp_path: Path) -> None:
    run = start_run(settings_of(tmp_path, "--run_name", "two"), base_model="m")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(UserError, match=r"was written by another process meanwhile\. Run the same command again"):
        run.save(status="running")
    assert json.loads((tmp_path / "two" / "run.json").read_text()) == {"status": "finished"}
    assert lock_folder(tmp_path / "two")  # released
    unlock_folder(tmp_path / "two")


def test_a_finished_or_refused_run_is_not_kept_locked(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--run_name", "three")
    run = start_run(settings, base_model="m")
    run.save()
    assert not lock_folder(tmp_path / "three")  # this process has it
    assert "process" in json.loads((tmp_path / "three" / "run.json").read_text())
    run.finish()
    assert "process" not in json.loads((tmp_path / "three" / "run.json").read_text())
    assert lock_folder(tmp_path / "three")
    unlock_folder(tmp_path / "three")
    with pytest.raises(UserError):
        start_run(settings_of(tmp_path, "--run_name", "three", "--seed", "7"), base_model="m")
    assert lock_folder(tmp_path / "three")
    unlock_folder(tmp_path / "three")


def test_drafts_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    places = tmp_path / "run", tmp_path / ".run.part"  # the folder of a run, and that of its unfinished merge
    for place in places:
        place.mkdir()
        for name in (".run.json.4321", "run.json", ".keep"):
            (place / name).touch()
    lock_folder(tmp_path / "run")
    for place in places:
        assert {file.name for file in place.iterdir()} == {"run.json", ".keep"}
    unlock_folder(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("apart", [0.0, 1.0, 4.0, 8.0])
def test_of_two_starts_one_finishes_as_if_alone_and_the_other_says_so(
    apart: float, project: Project, sft_run: str
) -> None:
    flags = [word for name, value in DPO.items() for word in (f"--{name}", str(value))]
    if not (project.root / "outputs" / "alone").exists():
        project.run("02_dpo.py", *flags, "--run_name", "alone")
    name = f"raced-{apart}"
    done: list[Any] = []

    def start(wait: float) -> None:
        threading.Event().wait(wait)
        command = project.command("02_dpo.py", *flags, "--run_name", name)
        done.append(subprocess.run(command, cwd=project.root, env=project.env, capture_output=True, text=True))

    threads = [threading.Thread(target=start, args=(wait,)) for wait in (0.0, apart)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(each.returncode for each in done)
    record, alone = project.record(name), project.record("alone")
    assert (record["status"], record["fingerprint"]) == ("finished", alone["fingerprint"])
    logs = [len((project.root / "outputs" / run / "metrics.jsonl").read_text().splitlines()) for run in (name, "alone")]
    assert logs[0] == logs[1]
    (second,) = [each for each in done if each.returncode] or [max(done, key=lambda each: "already" in each.stderr)]
    lines = [line for line in second.stderr.splitlines() if line.startswith("error: ") or "already" in line]
    assert len(lines) == 1, second.stderr[-2000:]
    assert statuses == [0, 1] or "is already finished" in lines[0]
    assert "Traceback" not in second.stderr
    assert os.listdir(project.root / "outputs" / name)
