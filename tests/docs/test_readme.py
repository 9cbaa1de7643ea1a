"""What the README says is so: its commands run, in their demo form, and its tree exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jupytext.cli import jupytext

from helpers.runs.start import settings_of
from helpers.settings import load as settings
from tests.conftest import DPO, REPO, SFT, Project

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line.partition("#")[0].split() for line in LINES]
# What is added to a command of the README where it does not say it itself: the demo, and few steps.
SMALL = {
    "01_sft.py": SFT,
    "02_dpo.py": [w for n, v in DPO.items() if n not in ("recipe", "sft_run", "dpo_beta") for w in (f"--{n}", str(v))],
    "03_merge_push.py": [],
    "04_vibes.py": ["--max_new_tokens", "4"],
    "05_judge.py": [],
}
NOT_IN_THE_DEMO = ("--sft_run", "latest", "--judge_model", "gpt-4.1")  # where the recipe has its own
ELSEWHERE = {"sweep": "tests/runs/test_sweep.py"}  # commands of `python -m helpers` that another test runs


def in_demo_form() -> list[list[str]]:
    """Each `python notebooks/X` and `python -m helpers X` of the README once, in its order: what follows `python`."""
    found = []
    for first, *words in filter(None, COMMANDS):
        if Path(first).name != "python" or (words[0] == "-m" and words[1] != "helpers"):
            continue
        if words[0].startswith("notebooks/"):
            name = words[0].removeprefix("notebooks/")
            words = [word for word in words if word not in NOT_IN_THE_DEMO]
            if not {"--help", "--help_trl"} & set(words):
                recipe = [] if "--recipe" in words else ["--recipe", "recipes/demo.yaml"]
                given = {word for word in words if word.startswith("--")}
                small = [SMALL[name][i : i + 2] for i in range(0, len(SMALL[name]), 2) if SMALL[name][i] not in given]
                words += [*recipe, *(word for pair in small for word in pair)]
                if name == "02_dpo.py" and not {"--run_name", "--dry_run"} & given:
                    words += ["--run_name", "demo-dpo"]  # as `make demo` names it, for the commands that follow
        if words not in found:
            found.append(words)
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, str]]:
    """A project in which every command of the README has run, one after another; and what each printed."""
    project = Project(tmp_path_factory.mktemp("project"))
    printed: dict[str, str] = {}
    for words in in_demo_form():
        if words[0] == "-m" and words[2] in ELSEWHERE:
            assert (REPO / ELSEWHERE[words[2]]).is_file()
            continue
        first_of_its_notebook = not any(command.startswith(words[0]) for command in printed)
        done = project.python(*words, real=first_of_its_notebook)  # imports and all, as a user starts it
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        printed[" ".join(words)] = done.stdout + done.stderr
    return project, printed


@pytest.mark.long
def test_the_notebook_commands_of_the_readme_run(ran: tuple[Project, dict[str, str]]) -> None:
    project, printed = ran
    notebooks = {command.split()[0] for command in printed if not command.startswith("-m")}
    assert notebooks == {f"notebooks/{name}" for name in SMALL}
    for command, text in printed.items():
        if "--help_trl" in command:
            assert "--lr_scheduler_type" in text
        elif "--dry_run" in command:
            assert "What would make it fit:" in text or "fits into 16 GB" in text
        elif command.startswith("notebooks/") and "--help" not in command:
            assert "Next: python notebooks/" in text or "05_judge" in command, command
            assert (" --votes ~/Downloads/votes-" in text) == ("04_vibes" in command)
    judged = [text for command, text in printed.items() if "05_judge" in command]
    assert "480 comparisons by rules recipes.demo.questions" in judged[-1]
    answered = (project.root / "outputs").glob("vibes-*/model_answer/*.jsonl")
    assert 480 in [len(file.read_text().splitlines()) for file in answered]
    merges = {f: f.read_bytes() for f in (project.root / "outputs").glob("merge-*/model.safetensors")}
    assert any(len(content) > 1_000_000 for content in merges.values())
    project.run("03_merge_push.py", "--recipe", "recipes/demo.yaml", "--resume", "never")
    assert {f: f.read_bytes() for f in merges} == merges  # a new merge replaces the old one


@pytest.mark.long
def test_the_module_commands_of_the_readme_run(ran: tuple[Project, dict[str, str]]) -> None:
    project, printed = ran
    commands = [command.split() for command in printed if command.startswith("-m helpers")]
    assert {"data", "curves"} <= {words[2] for words in commands}
    for words in commands:
        if "--out" in words:
            out = project.root / words[words.index("--out") + 1]
            assert (out / "data_report.png" if words[2] == "data" else out).stat().st_size > 20_000


def test_the_environment_is_activated_before_a_command_needs_it() -> None:
    activates, runs = COMMANDS.index(["source", ".venv/bin/activate"]), ["python", "notebooks/01_sft.py"]
    assert activates < min(i for i, words in enumerate(COMMANDS) if words[:2] == runs)
    assert COMMANDS.count(["source", ".venv/bin/activate"]) == 2  # behind make, and without it


def test_the_make_targets_of_the_readme_exist() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    targets = {w for c in COMMANDS if c and c[0] == "make" for w in c[1:]}
    assert {"demo", "test", "notebooks"} <= targets
    listed = subprocess.run(["make", "help"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for target in targets:
        assert f"make {target} " in listed
        subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, check=True)
    demo = ["make", "-n", "demo", "FLAGS=--max_steps 9"]
    made = subprocess.run(demo, cwd=REPO, capture_output=True, text=True, check=True).stdout
    lines = [line.partition("notebooks/")[2].strip() for line in made.splitlines() if "notebooks/" in line]
    assert lines == [  # --resume never would throw away what a stopped one has made
        "01_sft.py --recipe recipes/demo.yaml --run_name demo-sft --max_steps 9",
        "02_dpo.py --recipe recipes/demo.yaml --run_name demo-dpo --max_steps 9",
        "03_merge_push.py --recipe recipes/demo.yaml --run_name demo-merged",
        "04_vibes.py --recipe recipes/demo.yaml --run_name demo-answers",
        "05_judge.py --recipe recipes/demo.yaml --run_name demo-judged",
    ]


def test_notebooks_are_built_with_a_kernel_and_without_outputs(project: Project) -> None:
    import nbformat

    sources = sorted(str(f) for f in (project.root / "notebooks").glob("*.py"))
    assert jupytext(["--to", "ipynb", *sources]) == 0
    for source in sources:
        notebook = nbformat.read(source.replace(".py", ".ipynb"), as_version=4)
        assert notebook.metadata.kernelspec.name == "python3"
        assert not any(cell.get("outputs") for cell in notebook.cells)


def test_the_tree_of_the_readme_is_short_and_exists() -> None:
    (tree,) = [block for block in BLOCKS if re.search(r"^notebooks/", block, re.MULTILINE) and "python" not in block]
    lines = tree.splitlines()
    assert len(lines) <= 24
    folder, named = "", set()
    for line in lines:
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = name if not line.startswith(" ") else folder + name
        assert (REPO / path).exists(), path
        named.add(path)
    assert {"notebooks/", "helpers/", "recipes/", "tests/"} <= named


def test_the_readme_is_short_and_names_no_run_by_its_hash() -> None:
    assert len(README.splitlines()) <= 200
    assert re.findall(r"(?:sft|dpo|merge|vibes|judge)-[\w.-]*-[0-9a-f]{6}", README) == []


def test_the_pictures_and_links_of_the_readme_exist() -> None:
    for path in re.findall(r"\]\((?!https://|#)([^)]+)\)", README):
        assert (REPO / path).is_file(), path
    picture = (REPO / "docs" / "pictures" / "answers.svg").read_text()
    assert "url(http" not in picture.replace("'", "").replace('"', "")
    assert "@font-face" not in picture


RUN_NAMES = {"sft": "sft-tiny-mistral-a94b49", "dpo": "dpo-tiny-mistral-3935a8"}  # of the demo recipe


def test_the_demo_s_runs_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that enters a run's identity by mistake renames them, and a user's runs are made again."""
    monkeypatch.setattr(settings, "run_setup_module", lambda module: None)
    names = {}
    for step, notebook, start in (("sft", "01_sft.py", ""), ("dpo", "02_dpo.py", "c8a23605fc8d98f8")):
        cls = settings_of(REPO / "notebooks" / notebook)
        given = settings.load_settings(cls, {}, ["--recipe", "recipes/demo.yaml"])
        given.override("parent", model_id="outputs/demo/tiny-mistral")
        names[step] = f"{step}-tiny-mistral-{given.digest(start)}"
    assert names == RUN_NAMES
