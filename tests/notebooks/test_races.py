"""Two starts of the same command: one finishes as if alone, and the other says so in one line (long)."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests import warm
from tests.conftest import Project, marks
from tests.notebooks.test_kills import FLAGS, contents
from tests.notebooks.test_signals import prepare


@pytest.fixture(scope="module")
def racers(project: Project) -> list[dict[str, str]]:
    """Two environments that differ, so that each start has a warm process of its own and neither waits for imports."""
    each = [{**project.env, "RACER": str(number)} for number in range(2)]
    for env in each:
        assert warm.run(["-c", ""], project.root, env).returncode == 0
    return each


@pytest.mark.parametrize(
    ("notebook", "apart"),
    [
        pytest.param(notebook, apart, marks=marks(False, (place + turn) % 2 == 0))
        for place, notebook in enumerate(FLAGS)
        for turn, apart in enumerate((0.0, 0.5, 2.0, 4.0))
    ],
)
def test_of_two_starts_one_finishes_as_if_alone_and_the_other_says_so(
    notebook: str, apart: float, project: Project, dpo_run: str, racers: list[dict[str, str]]
) -> None:
    alone, name = f"alone-{notebook[:2]}", f"raced-{notebook[:2]}-{1000 * apart:.0f}"
    if not (project.root / "outputs" / alone).exists():
        prepare(project, notebook)
        project.run(notebook, *FLAGS[notebook], "--run_name", alone)
    expected = contents(project, notebook, alone)
    prepare(project, notebook)
    done: list[Any] = []

    def start(env: dict[str, str], wait: float) -> None:
        threading.Event().wait(wait)
        command = project.command(notebook, *FLAGS[notebook], "--run_name", name)[1:]
        done.append(warm.run(command, project.root, env))

    threads = [threading.Thread(target=start, args=each) for each in zip(racers, (0.0, apart), strict=True)]
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
