"""A program in a fork of the warm process prints and ends as it does in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import warm
from tests.conftest import Project

PROGRAMS = {
    "arguments": ["-c", "import sys; print(sys.argv, __name__, sys.path[:2])", "a", "--b"],
    "module": ["-m", "json.tool", "--help"],
    "traceback": ["-c", "def f(): 1 / 0\nf()"],
    "message": ["-c", "raise SystemExit('so it is')"],
    "status": ["-c", "import sys; sys.exit(3)"],
    "hook": ["-c", "import sys\nsys.excepthook = lambda *e: sys.exit(5)\nraise ValueError"],
    "input": ["-c", "print(input(), end='')"],
    "killed": ["-c", "import os; print('lost'); os.kill(os.getpid(), 9)"],
    "interrupted": ["-c", "raise KeyboardInterrupt"],
    "at the end": ["-c", "import atexit, os; atexit.register(print, os.getcwd()); print(os.environ['DPO_GIVEN'])"],
    "thread": ["-c", "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print(1))).start()"],
    "script": ["script.py", "a"],
    "script that fails": ["script.py"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_prints_and_ends_as_in_a_process_of_its_own(name: str, project: Project, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys, script\nprint(__file__, __name__, script.__name__, sys.path[0])\nsys.argv[1]\n"
    )
    env = project.env | {"DPO_GIVEN": "1"}
    real, forked = (warm.run(PROGRAMS[name], tmp_path, env, input="typed\n", real=real) for real in (True, False))
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


def test_it_has_the_libraries_and_none_of_ours(project: Project) -> None:
    code = "import sys; print({'torch', 'trl', 'helpers'} & set(sys.modules) == {'torch', 'trl'})"
    assert project.python("-c", code).stdout == "True\n"


def test_a_variable_that_libraries_read_at_import_is_seen_by_them(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started:
        def __init__(self, env: dict[str, str]) -> None:
            self.env, self.process = env, self

        def poll(self) -> None:
            return None

    monkeypatch.setattr(warm, "_servers", {})
    monkeypatch.setattr(warm, "Server", Started)
    other = [warm._server(project.env | changed) for changed in ({"HF_HOME": "/other"}, {"HF_ENDPOINT": "http://x"})]
    same = [warm._server(project.env | changed) for changed in ({"HF_TOKEN": "t"}, {"DPO_BETA": "1"}, {})]
    assert len({id(server) for server in other}) == 2
    assert len({id(server) for server in same}) == 1  # a token and a setting are read later
    assert other[0].env["HF_HOME"] == "/other"  # type: ignore[attr-defined]
