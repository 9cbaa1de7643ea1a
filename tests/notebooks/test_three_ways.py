"""The notebooks themselves: their form, and that one file gives one set of numbers however it is run."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from jupytext.cli import jupytext as jupytext_command
from nbclient import NotebookClient
from papermill.cli import papermill
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.settings import sources
from tests.conftest import DPO, REPO, Project, code_cells

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.py"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)


@each_notebook
def test_notebook_survives_the_round_trip_to_ipynb(notebook: Path) -> None:
    assert jupytext_command(["--to", "ipynb", "--test", str(notebook)]) == 0
    assert jupytext.read(notebook).metadata["kernelspec"]["name"] == "python3"


@each_notebook
def test_no_cell_binds_a_name_that_is_a_setting(notebook: Path) -> None:
    cells = code_cells(notebook)
    settings = _settings_class(cells)
    names = {f.name for f in dataclasses.fields(settings)} | sources.field_types(settings.step).keys()
    names |= sources.LEGACY_NAMES
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            bound = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
            # an imported function is no value of a setting: load_settings reads plain values only
            if "parameters" not in cell.metadata.get("tags", []):
                assert not bound & names, f"{bound & names} in {cell.source}"


def _settings_class(cells: list[Any]) -> Any:
    names: dict[str, Any] = {}
    (parameters,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    exec(compile(parameters.source, "Settings", "exec", dont_inherit=True), names)
    return names["Settings"]


@pytest.mark.parametrize("words", [["--help"], ["--dpo_bata", "0.1"], ["--max_grad_nrom", "1"]])
def test_help_and_typing_mistakes_answer_without_torch(project: Project, words: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['02_dpo.py', *{words!r}]\n"
        "try:\n    runpy.run_path('notebooks/02_dpo.py', run_name='__main__')\n"
        "except BaseException as error:\n    print(type(error).__name__, error)\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, env=project.env, capture_output=True, text=True
    )
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    if words[0] != "--help":
        assert "SettingsError unknown setting" in done.stdout


def test_a_mistyped_flag_is_one_line_with_the_nearest_name(project: Project) -> None:
    done = project.run("02_dpo.py", "--dpo_bata", "0.1", status=2)
    assert done.stderr.strip() == "error: unknown setting --dpo_bata: did you mean --dpo_beta?"


def test_without_a_gpu_the_default_model_is_refused_in_one_line(project: Project) -> None:
    done = project.run("02_dpo.py", status=1)
    (line,) = done.stderr.strip().splitlines()
    assert "Mistral-7B-Instruct-v0.2 needs a GPU" in line
    assert "--recipe recipes/demo.yaml" in line


def results(project: Project, run: str) -> dict[str, float]:
    """Final metrics that do not measure time."""
    record = project.record(run)
    assert record["status"] == "finished"
    return {k: v for k, v in record["metrics"].items() if not k.endswith(("runtime", "per_second"))}


def test_cells_run_twice_in_a_kernel_give_the_numbers_of_the_command(project: Project, dpo_run: str) -> None:
    expected = results(project, dpo_run)
    assert {"train_loss", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= set(expected)
    history = (project.root / "outputs" / dpo_run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history if '"loss"' in line] == [1, 2, 3, 4, 5, 6]

    first, second = run_cells_twice_in_a_kernel(project, DPO | {"run_name": "cells", "report_to": "tensorboard"})
    assert results(project, "cells") == expected
    (board,) = (project.root / "outputs" / "cells" / "runs").iterdir()
    logged = EventAccumulator(str(board)).Reload().Scalars("train/loss")
    losses = {log["step"]: log["loss"] for log in map(json.loads, history) if "loss" in log}
    assert {event.step: event.value for event in logged} == pytest.approx(losses)
    assert first == second
    assert first["max_steps"] == 6


@dataclass
class Milled:
    """02 exported to .ipynb and executed by papermill, with Weights & Biases offline and tokens in the environment."""

    tokens: dict[str, str]
    file: Path  # the executed notebook
    updates: int  # how often a picture replaced another
    printed: str  # by papermill

    @property
    def cells(self) -> list[Any]:
        return [cell for cell in nbformat.read(self.file, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def milled(project: Project) -> Milled:
    exported = project.root / "notebooks" / "02_dpo.ipynb"
    jupytext_command(["--to", "ipynb", "--output", str(exported), str(exported.with_suffix(".py"))])
    parameters = [w for n, v in (DPO | {"run_name": "mill", "report_to": "wandb"}).items() for w in ("-p", n, str(v))]
    tokens = {"HF_TOKEN": "hf_" + "aB3" * 12, "WANDB_API_KEY": "0f" * 20, "OPENAI_API_KEY": "sk-" + "c4D" * 14}
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(project.root / "tracked")}
    (project.root / "tracked").mkdir()
    updates = []
    process_message = NotebookClient.process_message

    def count(self: Any, message: Any, *args: Any) -> Any:
        if message["msg_type"] == "update_display_data" and "image/png" in message["content"]["data"]:
            updates.append(message)
        return process_message(self, message, *args)

    out, printed = project.root / "out.ipynb", io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.chdir(project.root)
        for name, value in (project.env | tokens | offline).items():  # the kernel's environment is this process's
            patch.setenv(name, value)
        patch.setattr(NotebookClient, "process_message", count)
        papermill.main([str(exported), str(out), *parameters], standalone_mode=False)
    return Milled(tokens, out, len(updates), printed.getvalue())


@pytest.mark.long
def test_papermill_parameters_equal_flags(project: Project, dpo_run: str, milled: Milled) -> None:
    record, command = project.record("mill"), project.record(dpo_run)
    assert (record["sources"]["dpo_beta"], command["sources"]["dpo_beta"]) == ("notebook", "flag")
    assert record["settings"]["dpo_beta"] == command["settings"]["dpo_beta"] == 0.3
    assert results(project, "mill") == results(project, dpo_run)


@pytest.mark.long
def test_an_executed_notebook_shows_its_pictures_and_replaces_the_live_one(milled: Milled) -> None:
    shown = [output["data"] for cell in milled.cells for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 3  # the data report, the live curves, and the final ones
    (training,) = [cell for cell in milled.cells if "trainer.train(" in cell.source]
    pictures = [o for o in training.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1  # updated in place
    assert milled.updates >= 1
    assert "sampled answers have" in "".join(o["text"] for o in training.outputs if o.output_type == "stream")
    (curves,) = [cell for cell in milled.cells if "Curves.read(" in cell.source]
    assert "held-out prompt" in "".join(str(o.get("data", "")) for o in curves.outputs)
    (account,) = [data["text/html"] for data in shown if "example rows" in data.get("text/html", "")]
    assert "3,000" in account


@pytest.mark.long
def test_weights_and_biases_gets_rows_settings_samples_and_curves_and_no_token(
    project: Project, milled: Milled
) -> None:
    record = project.record("mill")
    (files,) = (project.root / "tracked").glob("wandb/offline-run-*/files")
    media = {file.name.partition("_")[0]: file for file in (files / "media").rglob("*") if file.is_file()}
    assert {"settings", "rows", "samples", "curves"} <= set(media)
    assert media["curves"].read_bytes() == (project.root / "outputs" / "mill" / "curves.png").read_bytes()
    rows = dict(json.loads(media["rows"].read_text())["data"])
    assert {name: rows[name] for name in ("read", "kept", "train")} == {
        name: record["data"][name] for name in ("read", "kept", "train")
    }
    assert ["dpo_beta", "0.3", "notebook"] in json.loads(media["settings"].read_text())["data"]
    sampled = [json.loads(line) for line in (project.root / "outputs" / "mill" / "samples.jsonl").open()]
    assert json.loads(media["samples"].read_text())["data"] == [list(row.values()) for row in sampled]
    kept = [milled.file]
    kept += [
        file for name in ("outputs/mill", "tracked") for file in (project.root / name).rglob("*") if file.is_file()
    ]
    assert any(file.suffix == ".wandb" for file in kept)
    for file in kept:
        content = file.read_bytes()
        assert not [name for name, token in milled.tokens.items() if token.encode() in content], file
    assert not [name for name, token in milled.tokens.items() if token in milled.printed]


CLEAN_END = """\
import dataclasses
import sys
from typing import ClassVar
sys.path.insert(0, {repo!r})
from helpers.core import CleanExit
from helpers.settings import RunSettings, load_settings

@dataclasses.dataclass
class Settings(RunSettings):
    step: ClassVar[str] = "dpo"

settings = load_settings(Settings, globals())
print("one")
----
raise CleanExit("Dry run: nothing.") if {is_clean} else ValueError("two")
print("two")
----
print("three")
1 / 0
"""


@pytest.mark.parametrize("by", ["nbclient", "papermill"])
def test_a_clean_end_of_a_notebook_that_nobody_types_into_is_no_error(by: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.ipynb", tmp_path / "out.ipynb"

    def run(is_clean: bool) -> list[Any]:
        texts = CLEAN_END.format(repo=str(REPO), is_clean=is_clean).split("----\n")
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        if by == "nbclient":
            NotebookClient(notebook, timeout=60).execute()
            return list(notebook.cells)
        nbformat.write(notebook, source)
        papermill.main([str(source), str(out), "--no-progress-bar"], standalone_mode=False)
        return list(nbformat.read(out, as_version=4).cells)

    outputs = [[(o["output_type"], o.get("text", "")) for o in cell.outputs] for cell in run(is_clean=True)]
    assert outputs[0][-1][1].endswith("one\n")
    assert outputs[1:] == [[("stream", "Dry run: nothing.\n")], []]
    with pytest.raises(Exception, match="ValueError"):
        run(is_clean=False)


@pytest.mark.long
@pytest.mark.parametrize("name", ["02_dpo.py", "04_vibes.py"])
def test_a_dry_run_by_nbclient_is_no_error(name: str, project: Project, dpo_run: str) -> None:
    given = DPO if name == "02_dpo.py" else {"models": [f"outputs/{dpo_run}"]}
    notebook = execute_exported(project, name, given | {"dry_run": True})
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "Dry run: " in text
    assert not any(o["output_type"] == "error" for cell in notebook.cells for o in cell.get("outputs", ()))


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(project: Project, dpo_run: str) -> None:
    flags = [word for name, value in DPO.items() for word in (f"--{name}", str(value))] + ["--run_name", "killed"]
    folder = project.root / "outputs" / "killed"
    process = subprocess.Popen(
        project.command("02_dpo.py", *flags), cwd=project.root, env=project.env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:  # between checkpoint 2 and checkpoint 4
        wait_for(lambda: '"step": 3' in (folder / "metrics.jsonl").read_text(), process)
    finally:
        process.kill()
        process.wait()
    assert project.record("killed")["status"] == "running"
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-2"}

    done = project.run("02_dpo.py", *flags)
    assert "Resuming from outputs/killed/checkpoint-2" in done.stdout
    ended, expected = results(project, "killed"), results(project, dpo_run)
    for counted in ("train_loss", "eval_num_tokens"):  # the Trainer's mean and TRL's counter begin at the resume
        del ended[counted], expected[counted]
    assert ended == expected
    steps = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert steps == [1, 2, 3, 4, 5, 6]

    again = project.run("02_dpo.py", *flags)
    assert "outputs/killed is already finished" in again.stderr
    assert "Next: python notebooks/03_merge_push.py --run outputs/killed" in again.stderr


def wait_for(condition: Any, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the process ended by itself"
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.002)
    raise AssertionError(f"nothing happened in {seconds} s")


@contextmanager
def vscode_kernel(project: Project) -> Iterator[Callable[[str], str]]:
    """A kernel that starts in notebooks/, as VS Code's does without settings; yields what executes a cell and returns
    what it printed."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(project.root / "notebooks"), env=project.env)
    client = manager.client()
    client.start_channels()

    def execute(source: str) -> str:
        said: list[str] = []
        reply = client.execute_interactive(
            source, timeout=300, allow_stdin=False,
            output_hook=lambda m: said.append(m["content"]["text"]) if m["msg_type"] == "stream" else None,
        )  # fmt: skip
        assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
        return "".join(said)

    try:
        client.wait_for_ready(timeout=60)
        yield execute
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run_cells_twice_in_a_kernel(project: Project, typed: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send the cells to a kernel, as VS Code does; `typed` are lines typed in a cell.

    Returns the settings after the first time through and after the second.
    """
    seen = []
    with vscode_kernel(project) as execute:
        for _ in range(2):
            cells = code_cells(project.root / "notebooks" / "02_dpo.py")
            execute(cells[0].source)
            execute("\n".join(f"{name} = {value!r}" for name, value in typed.items()))
            for cell in cells[1:]:
                execute(cell.source)
            said = execute("import json; print('SETTINGS', json.dumps(settings.values()))")
            seen.append(json.loads(said.partition("SETTINGS ")[2]))
    return seen[0], seen[1]


def execute_exported(project: Project, name: str, typed: dict[str, Any]) -> Any:
    """Export a notebook to .ipynb and execute it by nbclient, with a cell of values after the Settings."""
    notebook = jupytext.read(project.root / "notebooks" / name)
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    lines = "\n".join(f"{name} = {value!r}" for name, value in typed.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    notebook = nbformat.reads(jupytext.writes(notebook, fmt="ipynb"), as_version=4)
    before = dict(os.environ)
    os.environ.update(project.env)
    try:
        resources = {"metadata": {"path": str(project.root / "notebooks")}}
        NotebookClient(notebook, timeout=300, resources=resources).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return notebook
