"""The README's section on a GPU, walked with each prerequisite missing in turn: one line, and nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests import fake_hub as local
from tests.conftest import REPO, Project
from tests.models.test_memory import MISTRAL_7B
from tests.notebooks.test_errors import DRIVER

SECTION = (REPO / "README.md").read_text().partition("## On your own GPU")[2].partition("\n## ")[0]
COMMANDS = [line.split()[1:] for line in re.findall(r"^python notebooks/.*?(?=  |$)", SECTION, re.MULTILINE)]
MODELS = ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2")
GPU = "NVIDIA GeForce RTX 4090"
# A process on a machine with GPUs, of which PyTorch says what the machine's owner would see.
MACHINE = """
import torch
torch.version.cuda = {cuda!r}
torch.accelerator.is_available = lambda: {count} > 0
torch.accelerator.current_accelerator = lambda *args: torch.device("cuda")
torch.cuda.device_count = lambda: {count}
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def walk(
    project: Project, folder: Path, commands: list[list[str]], driver: str, cuda: str | None, count: int, **env: str
) -> list[str]:
    """The error line of each command, on a machine with this driver, this build of PyTorch and this many GPUs."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{GPU}, {driver}'\n" if driver else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    jobs = [[words[0].removeprefix("notebooks/"), *words[1:]] for words in commands]
    env["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = project.python("-c", MACHINE.format(cuda=cuda, count=count) + DRIVER, input=json.dumps(jobs), **env)
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    parts = re.split(r"^ENDED .*\n", done.stderr, flags=re.MULTILINE)[:-1]
    assert len(parts) == len(commands), done.stderr[-4000:]
    lines = [[line for line in part.splitlines() if line.startswith("error: ")] for part in parts]
    assert all(len(each) == 1 for each in lines), parts
    return [line for (line,) in lines]


@pytest.mark.long
def test_each_missing_prerequisite_is_one_line_and_nothing_is_downloaded(
    project: Project, hub: local.Hub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    if os.name != "posix":
        pytest.skip("needs a shell script")
    assert [Path(words[0]).name[:2] for words in COMMANDS] == ["01", "02", "03", "04", "05"]
    files = {"config.json": json.dumps(MISTRAL_7B).encode(), "model.safetensors": b"weights"}
    for name in MODELS:
        hub.add("models", name, files)
    train = [words for words in COMMANDS if "01" in words[0]] + [["notebooks/02_dpo.py"]]
    ready = {"driver": "580.65.06", "cuda": "13.0", "count": 1}
    missing: list[tuple[list[list[str]], dict[str, object], str]] = [
        (train, {"driver": "", "cuda": None, "count": 0},
         "needs a GPU (24 GB for the defaults), and this machine has none."),
        (train, {"driver": "580.65.06", "cuda": None, "count": 0}, f"so it cannot use the {GPU}. Install the build"),
        (train, {"driver": "535.183.01", "cuda": "13.0", "count": 0}, "needs 580 or newer. Update the driver"),
        (train, ready | {"count": 8}, "8 GPUs are visible to one process. Set CUDA_VISIBLE_DEVICES=0 to use one"),
        (COMMANDS[1:2], ready, "There is no finished sft run in outputs. Run `python notebooks/01_sft.py`"),
        (COMMANDS[2:4], ready, "There is no finished dpo run in outputs. Run `python notebooks/02_dpo.py`"),
        (COMMANDS[4:], ready, "Run `python notebooks/04_vibes.py`"),
    ]  # fmt: skip
    for commands, machine, message in missing:
        for words, line in zip(commands, walk(project, tmp_path, commands, **machine, **hub_env), strict=True):  # type: ignore[arg-type]
            assert message in line, (words, line)
    answers = tmp_path / "answers" / "model_answer"
    answers.mkdir(parents=True)
    (answers.parent / "question.jsonl").write_text('{"question_id": 1, "turns": ["Why?"]}\n')
    for name in ("before", "after"):
        row = {"question_id": 1, "model_id": name, "choices": [{"index": 0, "turns": [f"Because {name}."]}]}
        (answers / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    judge = [[*COMMANDS[4], "--answers_dir", str(answers.parent)]]
    (line,) = walk(project, tmp_path, judge, **ready, OPENAI_API_KEY="", **hub_env)  # type: ignore[arg-type]
    assert "set OPENAI_API_KEY in the environment or in .env" in line
    for name in MODELS:
        hub.fail[name] = 403, {"X_Error_Code": "GatedRepo"}
    for line in walk(project, tmp_path, train, **ready, **hub_env):  # type: ignore[arg-type]
        assert "HF_TOKEN" in line
    downloads = [request for request in hub.requests if "/resolve/" in request and not request.endswith(".json")]
    assert not downloads
    assert not (project.root / "outputs").exists()
