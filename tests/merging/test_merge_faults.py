"""A merge that is killed at any moment resumes, and is not taken for a finished one before."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from helpers.core import UserError
from helpers.merging.weights import WeightFiles
from helpers.models.resolve import resolve_models
from helpers.runs.run import find_run
from tests.conftest import Project

pytestmark = pytest.mark.long

# Runs 03 in a process that kills itself at the n-th call of a function.
KILLED = """
import os, pathlib, runpy, shutil, signal, sys
from helpers.merging import merge, verify, weights
from helpers.runs import run
where, calls = {where!r}, 0
def die(*words, **more):
    global calls
    calls += 1
    if calls > {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*words, **more)
owner = {owner}
before = getattr(owner, where)
setattr(owner, where, die)
sys.argv = ["03_merge_push.py", *{flags!r}]
runpy.run_path("notebooks/03_merge_push.py", run_name="__main__")
"""
MOMENTS = [
    *(("weights.StreamingMerger", "tensor", after) for after in (0, 1, 3, 2, 4)),
    ("merge", "save_config", 0),
    ("verify", "last_logits", 1),
    ("run.Run", "finish", 0),
    ("pathlib.Path", "rename", 0),
    ("verify", "compare_logits", 1),
]


def test_killed_at_ten_moments(project: Project, dpo_run: str) -> None:
    outputs = project.root / "outputs"
    flags = ["--run", f"outputs/{dpo_run}", "--max_shard_size", "500KB"]
    project.run("03_merge_push.py", *flags, "--run_name", "merged-undisturbed")
    flags += ["--run_name", "merged-killed"]
    for owner, where, after in MOMENTS:
        code = KILLED.format(where=where, after=after, owner=owner, flags=flags)
        done = project.python("-c", code)
        assert done.returncode == -signal.SIGKILL, (where, done.stdout[-500:], done.stderr[-1000:])
        assert not (outputs / "merged-killed").exists(), where
        with pytest.raises(UserError, match="is not the folder of a run"):
            find_run(outputs, str(outputs / "merged-killed"), "merge")
        assert find_run(outputs, "latest", "merge").name == "merged-undisturbed"
        # 04 takes it for a name on the Hub
        assert resolve_models((str(outputs / "merged-killed"),), outputs)[0].base == str(outputs / "merged-killed")
    done = project.run("03_merge_push.py", *flags)
    assert "inished" in project.run("03_merge_push.py", *flags).stderr
    assert [file.name for file in outputs.glob(".merged-killed*")] == [".merged-killed.lock"]
    one, two = (WeightFiles(outputs / name) for name in ("merged-undisturbed", "merged-killed"))
    assert list(one) == list(two)
    assert len(one.files) > 5
    assert all(torch.equal(one[name], two[name]) for name in one)
    names = [
        sorted(file.name for file in Path(outputs / name).iterdir()) for name in ("merged-undisturbed", "merged-killed")
    ]
    assert names[0] == names[1]
