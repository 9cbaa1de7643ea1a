"""A sweep: which runs a command means, that each is made once whatever happens, and what is shown of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.core import SettingsError
from helpers.runs import start
from helpers.settings.load import load_settings
from tests.conftest import DPO, REPO, Project
from tests.docs.test_readme import COMMANDS
from tests.notebooks.test_three_ways import wait_for

STUB = REPO / "tests" / "stub.py"
posix = pytest.mark.skipif(os.name != "posix", reason="no signals that kill")


def points(*words: str) -> list[start.Point]:
    return start.plan_sweep(STUB, words)[0]


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "helpers", "sweep", str(STUB), "--output_dir", str(folder), *words]


def run_sweep(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "120"}
    done = subprocess.run(command(folder, *words), env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines()


def test_a_flag_of_several_values_is_an_axis_and_the_others_are_given_to_every_run() -> None:
    grid = points("--dpo_beta", "0.05", "0.1", "0.3", "--seed", "1", "2", "--strict=True")
    assert len(grid) == 6
    assert grid[1].values == {"dpo_beta": "0.05", "seed": "2"}
    assert grid[1].flags == ["--dpo_beta", "0.05", "--seed", "2", "--strict", "True"]
    assert grid[1].label == "dpo_beta 0.05, seed 2"


def test_a_setting_of_several_words_is_an_axis_where_it_is_given_again() -> None:
    grid = points("--loss_type", "sigmoid", "sft", "--loss_type", "ipo", "--dpo_beta", "0.1")
    assert [point.values for point in grid] == [{"loss_type": "sigmoid sft"}, {"loss_type": "ipo"}]
    assert grid[0].flags == ["--loss_type", "sigmoid", "sft", "--dpo_beta", "0.1"]


def test_what_is_no_sweep_is_refused_before_anything_runs() -> None:
    for words, said in (
        (["--dpo_beta", "0.1"], "No flag has several values"),
        (["--dpo_beta", "0.1", "0.3", "--run_name", "x"], "settings name the runs"),
        (["--dpo_beta", "0.1", "0.1"], "are the same run"),
        (["--report_to", "none", "wandb"], "flags that change no run"),
        (["--dpo_beta", "0.1", "high"], "--dpo_beta takes a number"),
        (["--dpo_bata", "0.1", "0.3"], "did you mean --dpo_beta"),
    ):
        with pytest.raises(SettingsError, match=said):
            points(*words)
    for argv in ([], ["--dpo_beta", "1", "2"], [str(REPO / "README.md")], ["notebooks/09.py"]):
        with pytest.raises(SettingsError, match="usage: python -m helpers"):
            start.main(argv)
    with pytest.raises(SettingsError, match="has no Settings in a cell"):
        start.settings_of(REPO / "helpers" / "core.py")


def test_dpo_keeps_the_reference_s_log_probabilities_unless_told_otherwise() -> None:
    notebook = REPO / "notebooks" / "02_dpo.py"
    betas = ["--dpo_beta", "0.1", "0.3"]
    assert start.plan_sweep(notebook, betas)[0][0].flags[-2:] == ["--precompute_ref_log_probs", "True"]
    one, _ = start.plan_sweep(notebook, betas)[0]
    cls = start.settings_of(notebook)
    digests = {load_settings(cls, {}, words).digest("start") for words in (one.flags, ["--dpo_beta", "0.1"])}
    assert len(digests) == 1  # a run that was made without a sweep is one of its runs
    own = start.plan_sweep(notebook, [*betas, "--precompute_ref_log_probs", "False"])[0][0].flags
    assert own == ["--dpo_beta", "0.1", "--precompute_ref_log_probs", "False"]


@pytest.mark.long
def test_a_failed_run_does_not_stop_the_rest_and_finished_ones_are_not_made_again(tmp_path: Path) -> None:
    words = ["--dpo_beta", "0.05", "2", "0.1"]
    done = run_sweep(tmp_path, *words, status=1)
    assert started(tmp_path) == ["0.05 sigmoid", "2.0 sigmoid", "0.1 sigmoid"]
    (folder,) = tmp_path.glob("sweep-*")
    (line,) = done.stderr.strip().splitlines()
    assert line == f"error: 1 of 3 runs failed: dpo_beta 2 (status 1). See {folder.name}/*.log."
    assert "[2/3] dpo_beta 2\n" in done.stdout
    assert "  step 10/10  loss 0.1\n" in done.stdout
    assert "ValueError: too stiff" in (folder / "2.log").read_text()
    table = [[cell.strip() for cell in row.split("│")[1:-1]] for row in done.stdout.splitlines() if "│" in row]
    assert [row[:2] for row in table] == [["0.05", "0.025"], ["2", "nan"], ["0.1", "0.05"]]
    assert table[1][-1].endswith("failed")
    assert [row[-2] for row in table] == ["-"] * 3  # diagnostics
    assert (folder / "curves.png").read_bytes()[1:4] == b"PNG"
    found = json.loads((folder / "sweep.json").read_text())
    assert [point["record"]["status"] for point in found] == ["finished", "failed", "finished"]
    assert found[2]["record"]["metrics"]["eval_loss"] == 0.05

    run_sweep(tmp_path, *words, status=1)
    assert started(tmp_path)[3:] == ["2.0 sigmoid"]


def test_no_line_of_a_run_is_lost_to_who_reads_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = tmp_path / "chatty.py"
    notebook.write_text("for i in range(20_000):\n    print(f'step {i}/20000', flush=True)\nprint('Run: outputs/x')\n")
    monkeypatch.setattr(start.time, "sleep", lambda seconds: None)
    point = start.Point({}, [], "")
    with (tmp_path / "lock").open("w") as lock:
        start._run(notebook, point, tmp_path / "1.log", lock)
    said = [*(f"step {i}/20000" for i in range(20_000)), "Run: outputs/x"]
    assert (tmp_path / "1.log").read_text().splitlines() == said
    assert capsys.readouterr().out.splitlines() == [f"  {line}" for line in said]
    assert (point.status, point.run) == (0, str(Path("outputs/x").absolute()))


@posix
@pytest.mark.long
def test_a_sweep_that_is_killed_half_way_does_only_what_is_missing(tmp_path: Path) -> None:
    words = ["--dpo_beta", "0.1", "0.3", "0.5", "--wait_for", str(tmp_path / "go")]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    first = subprocess.Popen(command(tmp_path, *words), env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(lambda: started(tmp_path) == ["0.1 sigmoid", "0.3 sigmoid"], first)
    first.kill()
    first.wait()

    again = subprocess.Popen(command(tmp_path, *words), env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    assert again.stdout.readline() == "Waiting for a run that an earlier start of this sweep has left running.\n"
    time.sleep(0.2)
    assert len(started(tmp_path)) == 2  # no second process in the folder of a run
    (tmp_path / "go").touch()
    said = again.stdout.read()
    assert again.wait() == 0
    assert started(tmp_path) == ["0.1 sigmoid", "0.3 sigmoid", "0.5 sigmoid"]
    assert said.count("Run: ") == 1
    (folder,) = tmp_path.glob("sweep-*")
    assert [point["record"]["status"] for point in json.loads((folder / "sweep.json").read_text())] == ["finished"] * 3


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_sweep_that_is_told_to_stop_tells_its_run_and_says_so_in_one_line(number: int, tmp_path: Path) -> None:
    words = ["--dpo_beta", "0.3", "0.5", "--wait_for", str(tmp_path / "never")]
    env = os.environ | {"PYTHONPATH": str(REPO)}

    def heard() -> None:  # a job in the background ignores SIGINT, and a run that ends early SIGTERM and SIGHUP
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    process = subprocess.Popen(
        command(tmp_path, *words), env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    wait_for(lambda: (tmp_path / "pid").read_text(), process)
    run = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == f"error: Stopped by {signal.Signals(number).name}. Run the same command again to resume.\n"
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)


@pytest.mark.long
def test_three_betas_on_the_demo_are_three_runs_one_figure_one_table(project: Project, sft_run: str) -> None:
    """And the reference's log-probabilities are computed once, by the first: the README's command, on fewer rows."""
    given: dict[str, Any] = {n: v for n, v in DPO.items() if n not in ("dpo_beta", "recipe")} | {
        "sft_run": f"outputs/{sft_run}"
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    (documented,) = [command for command in COMMANDS if command[1:4] == ["-m", "helpers", "sweep"]]
    assert documented[-4:] == ["--dpo_beta", "0.05", "0.1", "0.3"]
    words = [sys.executable, *documented[1:], *flags]
    cached = Path(os.environ["HF_HOME"]) / "datasets"
    before = set(cached.rglob("cache-*.arrow"))
    process = subprocess.Popen(words, cwd=project.root, env=project.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/3]"):
            break
    first = {file: file.stat().st_mtime for file in set(cached.rglob("cache-*.arrow")) - before}
    process.kill()
    process.wait()

    done = subprocess.run(words, cwd=project.root, env=project.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = project.root.glob("outputs/sweep-*")
    found = json.loads((folder / "sweep.json").read_text())
    assert [point["values"]["dpo_beta"] for point in found] == ["0.05", "0.1", "0.3"]
    assert len({point["run"] for point in found}) == 3
    margins = [point["record"]["metrics"]["eval_rewards/margins"] for point in found]
    assert len(set(margins)) == 3
    assert (folder / "curves.png").stat().st_size > 20_000
    assert "is already finished" in (folder / "1.log").read_text()
    assert first
    assert {file: file.stat().st_mtime for file in set(cached.rglob("cache-*.arrow")) - before} == first
