"""benchmarks/gpu.sh at a tiny scale on a CPU: every line of it runs, and says what it measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPO


@pytest.mark.matrix  # four minutes, and nothing else runs the script
def test_the_script_for_a_gpu_runs_on_a_cpu_with_a_tiny_model() -> None:
    done = subprocess.run(
        ["bash", str(REPO / "benchmarks" / "gpu.sh")], capture_output=True, text=True, cwd=REPO,
        env=os.environ | {"SMALL": "1", "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    for name in ("stock-1", "ours-1", "stock-16", "ours-16"):
        assert re.search(r"[\d,]+ tokens/s, [\d.]+ s a step, estimate [\d.]+ GB, step 4, finished", lines[name]), name
    assert "Shared prefix: on" in lines["ours-16"]
    assert "Shared prefix" not in lines["stock-16"]
    assert "step 2" in lines["resumed interrupt"]
    assert "step 4, finished" in lines["resumed resume"]
    assert "error" not in lines["answers"]
    assert "times stock's tokens/s" in lines["batch 16"]
