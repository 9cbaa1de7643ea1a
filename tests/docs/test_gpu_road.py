"""The README's section on a GPU, walked with each prerequisite missing in turn: one line, and nothing is downloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests import fake_hub as local
from tests.conftest import REPO, Project
from tests.models.test_memory import MISTRAL_7B
from tests.notebooks.test_errors import DRIVER

SECTION = (REPO / "README.md").read_text().partition("## On your own GPU")[2].partition("\n## ")[0]
COMMANDS = [line.split()[1:] for line in re.findall(r"^python notebooks/.*?(?=  |$)", SECTION, re.MULTILINE)]
MODELS = ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2")
# A process on a machine with GPUs, of which PyTorch says what the machine's owner would see.
MACHINE = """
import torch
def init():
    raise RuntimeError({reason!r})
torch.cuda.init = init
torch.accelerator.is_available = lambda: {count} > 0
torch.accelerator.current_accelerator = lambda *args: torch.device("cuda")
torch.cuda.device_count = lambda: {count}
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def walk(project: Project, commands: list[list[str]], count: int = 1, reason: str = "", **env: str) -> list[str]:
    """The error line of each command, on a machine with this many GPUs, and PyTorch's reason if it has none."""
    jobs = [[words[0].removeprefix("notebooks/"), *words[1:]] for words in commands]
    done = project.python("-c", MACHINE.format(reason=reason, count=count) + DRIVER, input=json.dumps(jobs), **env)
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
    assert [Path(words[0]).name[:2] for words in COMMANDS] == ["01", "02", "03", "04", "05"]
    files = {"config.json": json.dumps(MISTRAL_7B).encode(), "model.safetensors": b"weights"}
    for name in MODELS:
        hub.add("models", name, files)
    train = [words for words in COMMANDS if "01" in words[0]] + [["notebooks/02_dpo.py"]]
    missing: list[tuple[list[list[str]], int, str, str]] = [
        (train, 0, "Torch not compiled with CUDA enabled",
         "needs a GPU (24 GB for the defaults), and PyTorch "
         f"{torch.__version__} finds none here (Torch not compiled with CUDA enabled). "),
        (train, 0, "The NVIDIA driver on your system is too old.", "too old). Without a GPU, use `--recipe recipes/"),
        (train, 8, "", "8 GPUs are visible to one process. Set CUDA_VISIBLE_DEVICES=0 to use one"),
        (COMMANDS[1:2], 1, "", "There is no finished sft run in outputs. Run `python notebooks/01_sft.py`"),
        (COMMANDS[2:4], 1, "", "There is no finished dpo run in outputs. Run `python notebooks/02_dpo.py`"),
        (COMMANDS[4:], 1, "", "Run `python notebooks/04_vibes.py`"),
    ]  # fmt: skip
    for commands, count, reason, message in missing:
        for words, line in zip(commands, walk(project, commands, count, reason, **hub_env), strict=True):
            assert message in line, (words, line)
    answers = tmp_path / "answers" / "model_answer"
    answers.mkdir(parents=True)
    (answers.parent / "question.jsonl").write_text('{"question_id": 1, "turns": ["Why?"]}\n')
    for name in ("before", "after"):
        row = {"question_id": 1, "model_id": name, "choices": [{"index": 0, "turns": [f"Because {name}."]}]}
        (answers / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    judge = [[*COMMANDS[4], "--answers_dir", str(answers.parent)]]
    (line,) = walk(project, judge, OPENAI_API_KEY="", **hub_env)
    assert "set OPENAI_API_KEY in the environment or in .env" in line
    for name in MODELS:
        hub.fail[name] = 403, {"X_Error_Code": "GatedRepo"}
    for line in walk(project, train, **hub_env):
        assert "HF_TOKEN" in line
    downloads = [request for request in hub.requests if "/resolve/" in request and not request.endswith(".json")]
    assert not downloads
    assert not (project.root / "outputs").exists()
