"""A copy of the repository to run notebooks in, so that no test reads or writes anybody's outputs/ or caches."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fake_hub, warm
from tests.browser import browser as browser  # a fixture for whichever test asks for it

REPO = Path(__file__).resolve().parents[1]
FROZEN: set[str] = set()  # modules whose objects no collection of garbage looks at
SFT = ["--max_steps", "3", "--train_rows", "64", "--eval_rows", "8", "--save_steps", "3", "--eval_steps", "3"]
# Enough to see a curve and three checkpoints; seconds long.
DPO = {
    "recipe": "recipes/demo.yaml",
    "sft_run": "outputs/sft",  # that of the fixture, whatever other tests have trained since
    "dpo_beta": 0.3,
    "max_steps": 6,
    "train_rows": 64,
    "eval_rows": 8,
    "save_steps": 2,
    "eval_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
}


def marks(is_quick: bool, is_long: bool = True) -> list[pytest.MarkDecorator]:
    """The marks of a case of a matrix: quick tests run some, long ones more, and `make test-matrix` the rest."""
    return [] if is_quick else [pytest.mark.long if is_long else pytest.mark.matrix]


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin keep other processes' from running
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on a machine with a GPU
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in [n for n in os.environ if n.startswith(("SFT_", "DPO_", "MERGE_", "VIBES_", "JUDGE_", "PAIRS_"))]:
        del os.environ[name]
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
    ):  # ignored in a job of a shell in the background, and so in its children
        if signal.getsignal(number) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Collections of garbage leave alone what has been imported: each would take most of a second."""
    if len(sys.modules) > len(FROZEN) + 200:
        FROZEN.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hugging Face's, IPython's, Jupyter's and torch's folders, and no token of whoever runs the tests.

    DeepSpeed builds an extension with torch, and waits for ever for a lock that a killed build has left.
    """
    home = tmp_path_factory.mktemp("home")
    for name in ("HF_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                 "TORCH_EXTENSIONS_DIR"):  # fmt: skip
        (home / name).mkdir()
        os.environ[name] = str(home / name)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def warm_processes(request: pytest.FixtureRequest, own_caches: None) -> Iterator[None]:
    """Stop them in the end; start one now, while the first tests run, where a test is going to need it."""
    if any("project" in getattr(item, "fixturenames", ()) for item in request.session.items):
        warm.start(os.environ)
    yield
    warm.stop_all()


@pytest.fixture(autouse=True)
def forget_the_hub() -> Iterator[None]:
    """A test that has no Hub does not send those after it to the cache."""
    yield
    from helpers.models.adapters import check_hub

    if check_hub.cache_info().currsize:
        from huggingface_hub import constants

        check_hub.cache_clear()
        constants.HF_HUB_OFFLINE = False
        if datasets := sys.modules.get("datasets"):
            datasets.config.HF_HUB_OFFLINE = False


@pytest.fixture(scope="session")
def hub_server() -> Iterator[fake_hub.Hub]:
    with fake_hub.serve() as server:
        yield server


@pytest.fixture
def hub(hub_server: fake_hub.Hub) -> fake_hub.Hub:
    """An empty Hub; its address is the same in all tests, so that they share a warm process."""
    hub_server.forget()
    return hub_server


@pytest.fixture(scope="session")
def hub_env(hub_server: fake_hub.Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program that talks to `hub`, with a cache that is empty at the start of the session."""
    home = str(tmp_path_factory.mktemp("hub-home"))
    return {"HF_ENDPOINT": hub_server.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model and data, written once; no test changes it."""
    from recipes.demo import write_demo

    folder = tmp_path_factory.mktemp("demo") / "made" / "demo"
    assert write_demo(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, converted once in the repository; `make test-all` installs the packages that have it."""
    from filelock import FileLock

    from helpers.core import UserError
    from recipes.smollm2 import FOLDER, write_real_model

    folder = REPO / FOLDER
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):  # another process may convert it
        try:
            write_real_model(folder)
        except UserError as missing:
            pytest.skip(str(missing))
    return folder


class Project:
    """A copy of notebooks/, helpers/ and recipes/ in which notebooks are run as a user runs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("notebooks", "helpers", "recipes"):
            shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("*.ipynb"))  # compiled, too
        self.env = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "120"}

    def command(self, notebook: str, *flags: str) -> list[str]:
        return [sys.executable, str(self.root / "notebooks" / notebook), *flags]

    def run(
        self, notebook: str, *flags: str, status: int = 0, real: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a notebook as a command, and check its exit status; `real`: in a process that starts from nothing."""
        words = self.command(notebook, *flags)[1:]
        done = warm.run(words, self.root, self.env | env, real=real)
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def python(
        self, *words: str, input: str | None = None, real: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` (a script, -c CODE or -m MODULE) in the project's folder, whatever its exit status."""
        return warm.run(list(words), self.root, self.env | env, input, real)

    def record(self, run: str) -> dict[str, Any]:
        return json.loads((self.root / "outputs" / run / "run.json").read_text())


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    shutil.copytree(demo_folder, project.root / "outputs" / "demo")  # a notebook finds it there, and does not write it
    return project


def run_once(project: Project, shared: Path, notebook: str, *flags: str, name: str) -> str:
    """Make a finished run in the first process that needs it. The others copy it: runs may be moved and copied."""
    from filelock import FileLock

    there, here = shared / name, project.root / "outputs" / name
    with FileLock(f"{there}.lock"):
        if there.exists():
            shutil.copytree(there, here)
        else:
            project.run(notebook, *flags, "--run_name", name)
            shutil.copytree(here, there)
    return name


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that run these tests together."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "runs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sft_run(project: Project, shared_runs: Path) -> str:
    """The name of a finished, short run of 01_sft.py on the demo."""
    return run_once(project, shared_runs, "01_sft.py", "--recipe", "recipes/demo.yaml", *SFT, name="sft")


@pytest.fixture(scope="session")
def dpo_run(project: Project, shared_runs: Path, sft_run: str) -> str:
    """The name of a finished, short run of 02_dpo.py on the demo, as a command."""
    flags = [word for name, value in DPO.items() for word in (f"--{name}", str(value))]
    return run_once(project, shared_runs, "02_dpo.py", *flags, name="command")


def run_demo(project: Project) -> str:
    """`make demo`, and what 05 printed."""
    for notebook in ("01_sft.py", "02_dpo.py", "03_merge_push.py", "04_vibes.py", "05_judge.py"):
        shown = project.run(notebook, "--recipe", "recipes/demo.yaml").stdout
    return shown


@pytest.fixture(scope="session")
def full_demo(tmp_path_factory: pytest.TempPathFactory, shared_runs: Path) -> tuple[Project, str]:
    """A project with the runs of `run_demo`, and what that printed. Minutes long, and made once, as by `run_once`."""
    from filelock import FileLock

    project, there = Project(tmp_path_factory.mktemp("full-demo")), shared_runs / "demo"
    with FileLock(f"{there}.lock"):
        if there.exists():
            shutil.copytree(there, project.root / "outputs")
        else:
            there.with_suffix(".txt").write_text(run_demo(project))
            shutil.copytree(project.root / "outputs", there)
    return project, there.with_suffix(".txt").read_text()


def code_cells(notebook: Path) -> list[Any]:
    """The code cells of a percent-format notebook."""
    import jupytext

    return [cell for cell in jupytext.read(notebook).cells if cell.cell_type == "code"]
