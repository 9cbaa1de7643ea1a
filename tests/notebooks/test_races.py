"""Two starts of the same command: one finishes as if alone, and the other says so in one line (long)."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest

from tests.conftest import Project
from tests.notebooks.test_kills import FLAGS, contents
from tests.notebooks.test_signals import prepare

pytestmark = pytest.mark.long


@pytest.mark.parametrize("apart", [0.0, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("notebook", FLAGS)
def test_of_two_starts_one_finishes_as_if_alone_and_the_other_says_so(
    notebook: str, apart: float, project: Project, dpo_run: str
) -> None:
    alone, name = f"alone-{notebook[:2]}", f"raced-{notebook[:2]}-{apart:.0f}"
    if not (project.root / "outputs" / alone).exists():
        prepare(project, notebook)
        project.run(notebook, *FLAGS[notebook], "--run_name", alone)
    expected = contents(project, notebook, alone)
    prepare(project, notebook)
    done: list[Any] = []

    def start(wait: float) -> None:
        threading.Event().wait(wait)
        command = project.command(notebook, *FLAGS[notebook], "--run_name", name)
        done.append(subprocess.run(command, cwd=project.root, env=project.env, capture_output=True, text=True))

    threads = [threading.Thread(target=start, args=(wait,)) for wait in (0.0, apart)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    printed = "\n\n".join(each.stderr[-2000:] for each in done)
    assert contents(project, notebook, name) == expected, printed
    assert "Traceback" not in printed
    refused = [each for each in done if each.returncode]
    assert len(refused) <= 1, printed
    if refused:
        assert refused[0].returncode == 1
        (line,) = [line for line in refused[0].stderr.splitlines() if line.startswith("error: ")]
        assert "is in use by process" in line or "was written by another process meanwhile" in line
    else:  # the first had finished when the second came
        assert sum("is already finished" in each.stdout + each.stderr for each in done) == 1, printed
