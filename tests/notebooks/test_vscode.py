"""The folder opened in VS Code: its settings, and a helper that is edited while a kernel runs."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.conftest import REPO, Project, code_cells
from tests.notebooks.test_three_ways import vscode_kernel


def vscode(name: str) -> dict[str, Any]:
    """A file of .vscode, which is JSON with comments."""
    lines = (REPO / ".vscode" / f"{name}.json").read_text().splitlines()
    return json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))


def test_cells_run_with_the_kernel_of_the_environment_that_make_fills() -> None:
    makefile = (REPO / "Makefile").read_text()
    assert re.search(r"^VENV := \.venv$", makefile, re.MULTILINE)
    settings = vscode("settings")
    assert settings["python.defaultInterpreterPath"] == "${workspaceFolder}/.venv/bin/python"
    assert settings["jupyter.notebookFileRoot"] == "${workspaceFolder}"  # whose helpers/ is imported
    assert settings["jupyter.interactiveWindow.textEditor.executeSelection"] is True
    assert settings["python.testing.pytestEnabled"] is True


def test_the_extensions_that_the_settings_speak_of_are_offered() -> None:
    offered = vscode("extensions")["recommendations"]
    assert {"ms-python.python", "ms-toolsai.jupyter"} <= set(offered)
    assert vscode("settings")["[python]"]["editor.defaultFormatter"] in offered


def test_no_setting_is_one_that_vscode_takes_from_its_user_only() -> None:
    """jupyter.runStartupCommands has the scope "application": in a project's file it is greyed out and ignored."""
    assert "jupyter.runStartupCommands" not in vscode("settings")


def test_tables_in_a_notebook_fit_beside_the_file_browser_of_jupyterlab(project: Project) -> None:
    with vscode_kernel(project) as execute:
        execute("from helpers.settings.load import configure_kernel; configure_kernel()")
        assert execute("from rich.console import Console; print(Console().width)") == "100\n"


def test_an_edited_helper_is_used_by_the_next_cell(project: Project) -> None:
    helper = project.root / "helpers" / "core.py"
    source = helper.read_text()
    settings = code_cells(project.root / "notebooks" / "02_dpo.py")[0].source
    try:
        with vscode_kernel(project) as execute:
            execute(f"{settings}\nrecipe = 'recipes/demo.yaml'")
            execute("settings = load_settings(Settings, globals())")
            assert execute("from helpers.core import short_path\nprint(short_path('here'))") == "here\n"
            helper.write_text(source.replace("else str(path)", "else 'edited: ' + str(path)"))
            assert execute("print(short_path('here'))") == "edited: here\n"
            assert execute("print(load_settings(Settings, globals()) == settings)").endswith("True\n")

            execute("%autoreload 0")  # stays off when the settings cell is run again
            execute("settings = load_settings(Settings, globals())")
            helper.write_text(source)
            assert execute("print(short_path('here'))") == "edited: here\n"
    finally:
        helper.write_text(source)
