"""What the README says is so: its commands run, in their demo form, and its tree exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.runs.sweep import settings_of
from helpers.settings import load as settings
from tests.conftest import DPO, REPO, SFT, Project

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.partition("#")[0].split() for block in BLOCKS for line in block.splitlines()]
SMALL = {
    "01_sft.py": SFT,
    "02_dpo.py": [w for n, v in DPO.items() if n != "recipe" for w in (f"--{n}", str(v))],
    "03_merge_push.py": [],
    "04_vibes.py": ["--max_new_tokens", "4"],
    "05_judge.py": [],
}
NOT_IN_THE_DEMO = ("--sft_run", "latest", "--judge_model", "gpt-4.1")  # where the recipe has its own


def notebook_commands() -> list[tuple[str, ...]]:
    """Each `python notebooks/X ...` of the README once, in its demo form: name and flags."""
    demo = ("--recipe", "recipes/demo.yaml")
    found = [c[1:] for c in COMMANDS if len(c) > 1 and c[0].endswith("python") and c[1].startswith("notebooks/")]
    found = [[word for word in c if word not in NOT_IN_THE_DEMO] for c in found if "--help" not in c]
    return sorted({(c[0].removeprefix("notebooks/"), *(() if "--recipe" in c else demo), *c[1:]) for c in found})


def test_the_notebook_commands_of_the_readme_run(project: Project, sft_run: str, dpo_run: str) -> None:
    seen = set()
    for name, *flags in notebook_commands():
        seen.add(name)
        if "--help_trl" in flags:
            assert "--lr_scheduler_type" in project.run(name, "--help_trl").stdout
            continue
        done = project.run(name, *flags, *SMALL[name])
        if "--dry_run" in flags:
            assert "What would make it fit:" in done.stdout or "fits into 16 GB" in done.stdout
            continue
        assert "Next: python notebooks/" in done.stdout + done.stderr or name == "05_judge.py"
        assert (" --votes ~/Downloads/votes-" in done.stdout) == (name == "04_vibes.py")
    assert seen == set(SMALL)
    assert "480 comparisons by rules recipes.demo.questions" in done.stdout
    merges = {f: f.read_bytes() for f in (project.root / "outputs").glob("merge-*/model.safetensors")}
    project.run("03_merge_push.py", "--recipe", "recipes/demo.yaml", "--resume", "never")
    assert {f: f.read_bytes() for f in merges} == merges  # a merge made anew replaces the old one, whole
    answered = (project.root / "outputs").glob("vibes-*/model_answer/*.jsonl")
    assert 480 in [len(file.read_text().splitlines()) for file in answered]
    assert [f for f in (project.root / "outputs").glob("merge-*/model.safetensors") if f.stat().st_size > 1_000_000]


def test_the_module_commands_of_the_readme_run(project: Project, dpo_run: str, tmp_path: Path) -> None:
    runs = {"outputs/dpo-tiny-mistral-0b776e": f"outputs/{dpo_run}", "outputs/stiff": str(tmp_path / "stiff")}
    shutil.copytree(project.root / "outputs" / dpo_run, tmp_path / "stiff")
    modules = [[runs.get(w, w) for w in c[1:]] for c in COMMANDS if " ".join(c).startswith("python -m helpers.")]
    assert {"helpers.data_report", "helpers.curves"} <= {words[1] for words in modules}
    for words in modules:
        if "helpers.sweep" in words:  # tests/test_sweep.py runs it
            continue
        subprocess.run([sys.executable, *words], cwd=project.root, env=project.env, check=True, capture_output=True)
    assert (project.root / "outputs" / "demo-data" / "data_report.png").is_file()
    assert (project.root / "outputs" / "demo-and-stiff.png").stat().st_size > 20_000


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
        "01_sft.py --recipe recipes/demo.yaml --max_steps 9",
        "02_dpo.py --recipe recipes/demo.yaml --max_steps 9",
        "03_merge_push.py --recipe recipes/demo.yaml",
        "04_vibes.py --recipe recipes/demo.yaml",
        "05_judge.py --recipe recipes/demo.yaml",
    ]


def test_notebooks_are_built_with_a_kernel_and_without_outputs(project: Project) -> None:
    import nbformat

    sources = sorted(str(f) for f in (project.root / "notebooks").glob("*.py"))
    subprocess.run([sys.executable, "-m", "jupytext", "--to", "ipynb", *sources], check=True, capture_output=True)
    for source in sources:
        notebook = nbformat.read(source.replace(".py", ".ipynb"), as_version=4)
        assert notebook.metadata.kernelspec.name == "python3"
        assert not any(cell.get("outputs") for cell in notebook.cells)


def test_the_tree_of_the_readme_exists_and_is_whole() -> None:
    (tree,) = [block for block in BLOCKS if "notebooks/\n" in block]
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = name if not line.startswith(" ") else folder + name
        assert (REPO / path).exists(), path
        named.add(path)
    for kind in ("notebooks", "helpers"):
        files = {f"{kind}/{f.name}" for f in (REPO / kind).glob("*.py")} - {"helpers/__init__.py"}
        assert files <= named


def test_the_pictures_and_links_of_the_readme_exist() -> None:
    for path in re.findall(r"\]\((?!https://)([^)]+)\)", README):
        assert (REPO / path).is_file(), path
    picture = (REPO / "docs" / "pictures" / "answers.svg").read_text()
    assert "url(http" not in picture.replace("'", "").replace('"', "")
    assert "@font-face" not in picture


def test_the_demo_s_runs_are_named_as_the_readme_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that enters a run's identity by mistake renames them, and a user's runs are made again."""
    monkeypatch.setattr(settings, "run_prepare", lambda module: None)
    names = {}
    for step, notebook, start in (("sft", "01_sft.py", ""), ("dpo", "02_dpo.py", "c8a23605fc8d98f8")):
        cls = settings_of(REPO / "notebooks" / notebook)
        given = settings.load_settings(cls, {}, ["--recipe", "recipes/demo.yaml"])
        given.override("parent", model_id="outputs/demo/tiny-mistral")
        names[step] = f"{step}-tiny-mistral-{given.digest(start)}"
    assert set(re.findall(r"(?:sft|dpo)-tiny-mistral-[0-9a-f]{6}", README)) == set(names.values())
