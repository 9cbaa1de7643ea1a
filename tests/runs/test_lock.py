"""One process writes a run: the second says so in one line, and what the first writes is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.core import UserError
from helpers.runs.checkpoints import lock_folder, unlock_folder
from helpers.runs.run import Run
from helpers.runs.start import start_run
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
    with pytest.raises(
        UserError, match=rf"one is in use by process {holder.pid} on .+ since \d.+ UTC\. Wait until it finishes"
    ):
        Run(folder, {"status": "running"}).save()
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(UserError, match=rf"one is in use by process {holder.pid} on "):  # once more
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
    run.finish()
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
