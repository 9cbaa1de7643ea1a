"""A notebook in real JupyterLab, in headless Chromium: opened by a double click, run, saved.

`make pictures` runs this with DOCS_PICTURES set, for the demo's full length: its screenshots are in docs/pictures.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest

from helpers.runs.run import find_run
from helpers.settings.sources import env_name
from tests.browser import give_up
from tests.conftest import DPO, REPO, Project, code_cells
from tests.notebooks.test_three_ways import results

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VIEWER = ["set-default-viewer", "python"]
PICTURES = os.environ.get("DOCS_PICTURES", "")
FOR_TESTS = {  # no question about news, which would be fetched, and every cell in the page
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


@contextmanager
def jupyterlab(project: Project, home: Path, **env: str) -> Iterator[str]:
    """JupyterLab on `project`, with the default that `make` gives it; yields its address, with a token."""
    if find_spec("jupyterlab") is None:
        give_up("jupyterlab is not installed: it comes with requirements-dev.txt")
    settings = home / "settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(json.dumps(FOR_TESTS))
    defaults = home / "JUPYTER_CONFIG_DIR" / "labconfig" / "default_setting_overrides.json"
    subprocess.run(
        [Path(sys.executable).with_name("jupytext-config"), "--settings-file", defaults, *VIEWER], check=True
    )
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "npm_config_cache")
    own = {name: str(home / name) for name in folders}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), home / "lab.log"
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
         f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
         f"--LabApp.app_settings_dir={settings}"],
        cwd=project.root, env=project.env | own | env, stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/lab?token={token}"
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                urlopen(address).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()  # which ends its kernels first
        server.wait(30)


def press(page: Page, kind: str, label: str) -> None:
    """Click the menu or menu item that says `label`."""
    page.locator(kind).filter(has=page.get_by_text(label, exact=True)).first.click()


@pytest.mark.long
def test_a_notebook_runs_in_jupyterlab_and_gives_the_numbers_of_the_command(
    project: Project, dpo_run: str, browser: Browser, tmp_path: Path
) -> None:
    notebook = project.root / "notebooks" / "02_dpo.py"
    source, opened = notebook.read_bytes(), notebook.stat().st_mtime_ns
    exported = set(notebook.parent.rglob("*.ipynb"))  # by other tests
    given = {env_name("dpo", name): str(value) for name, value in DPO.items()} | {"DPO_RUN_NAME": "lab"}
    if PICTURES:
        sft_run = find_run(REPO / "outputs", "latest", "sft").folder
        shutil.copytree(sft_run, project.root / "outputs" / "demo-sft")
        given = {"DPO_RECIPE": "recipes/demo.yaml", "DPO_SFT_RUN": "outputs/demo-sft"}
    with jupyterlab(project, tmp_path, **given) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        for name in ("notebooks", "02_dpo.py"):
            page.locator(".jp-DirListing-item").filter(has=page.get_by_text(name, exact=True)).dblclick()
        cells = page.locator(".jp-NotebookPanel .jp-CodeCell")
        cells.first.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that Run All Cells does nothing
        cells.first.locator(".cm-line").first.wait_for()
        page.screenshot(path=tmp_path / "jupyterlab.png")

        press(page, ".lm-MenuBar-item", "Run")
        press(page, ".lm-Menu-item", "Run All Cells")
        last = cells.last.locator(".jp-OutputArea-output")
        last.wait_for(timeout=900_000 if PICTURES else 300_000)
        assert "Next: python notebooks/03_merge_push.py" in last.inner_text()

        code = [cell.source for cell in code_cells(notebook)]
        assert page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts() == [
            f"[{i + 1}]:" for i in range(len(code))
        ]
        kinds = {x.get_attribute("data-mime-type") for x in page.locator(".jp-OutputArea-output").all()}
        assert not {kind for kind in kinds if kind and kind.endswith(("error", "stderr"))}
        pictures = [cell.locator(".jp-OutputArea-output img") for cell in cells.all()]
        drawn = {i: picture.count() for i, picture in enumerate(pictures) if picture.count()}
        report, training, curves = (
            next(i for i, text in enumerate(code) if words in text)
            for words in ("DataReport.from_datasets(", "trainer.train(", "Curves.read(")
        )
        assert drawn == {report: 1, training: 1, curves: 1}  # the live curves are one output, drawn anew in its place
        for i in drawn:
            pictures[i].scroll_into_view_if_needed()
            assert pictures[i].is_visible()
            assert pictures[i].evaluate("image => image.naturalWidth") > 300
        cells.nth(curves).locator(".jp-InputArea").scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / "jupyterlab_curves.png")

        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-DirListing-item", state="attached")
        while notebook.stat().st_mtime_ns == opened:
            page.wait_for_timeout(100)
        page.wait_for_timeout(500)
        page.close()
    assert notebook.read_bytes() == source  # saved, and as it was
    assert set(notebook.parent.rglob("*.ipynb")) == exported
    assert not [url for url in asked if not url.startswith((address.partition("/lab")[0], "data:", "blob:"))]
    if PICTURES:
        for name in ("jupyterlab.png", "jupyterlab_curves.png"):
            shutil.copy(tmp_path / name, REPO / PICTURES / name)
    else:
        assert results(project, "lab") == results(project, dpo_run)


def test_make_lets_jupyterlab_of_its_environment_open_notebooks() -> None:
    makefile = (REPO / "Makefile").read_text()
    assert "jupytext-config --settings-file $(LAB_DEFAULTS) " + " ".join(VIEWER) in makefile
    assert "LAB_DEFAULTS := $(VENV)/etc/jupyter/labconfig/default_setting_overrides.json" in makefile


def test_a_file_that_jupyterlab_saves_is_as_it_was(project: Project) -> None:
    """A notebook has the header that Jupytext writes, and a helper, opened by the same double click, is given none."""
    pytest.importorskip("jupyter_server", reason="it comes with requirements-dev.txt")
    from jupytext import TextFileContentsManager

    manager = TextFileContentsManager(root_dir=str(project.root))
    files = [*sorted((project.root / "notebooks").glob("*.py")), project.root / "helpers" / "models" / "chat.py"]
    assert len(files) == 7
    for file in files:
        source, path = file.read_bytes(), str(file.relative_to(project.root))
        model = manager.get(path, type="notebook")
        kernel = json.loads(Path(sys.prefix, "share/jupyter/kernels/python3/kernel.json").read_text())
        model["content"].metadata["kernelspec"] = {
            "name": "python3", "display_name": kernel["display_name"], "language": kernel["language"]
        }  # fmt: skip
        model["content"].metadata["language_info"] = {"name": "python", "version": "3.11"}
        for cell in model["content"].cells:
            if cell.cell_type == "code":
                cell.outputs, cell.metadata["execution"] = [], {"iopub.status.busy": "now"}
        file.write_text("")
        manager.save(model, path)
        assert file.read_bytes() == source, file.name
