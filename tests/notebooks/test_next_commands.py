"""What a notebook prints as the next command works, and a run that has changed since it finished is not used."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import SFT, Project

SHORT = {"04_vibes.py": ("--prompts", "What is 2 plus 3?", "--max_new_tokens", "4"), "02_dpo.py": ("--dry_run",)}


def next_command(text: str) -> list[str]:
    """The words after `python notebooks/` of the command that a notebook printed."""
    (line,) = [line for line in text.splitlines() if line.startswith("Next: python notebooks/")]
    return shlex.split(line.removeprefix("Next: python notebooks/"))


def follow(project: Project, text: str) -> str:
    notebook, *flags = next_command(text)
    return project.run(notebook, *flags, *SHORT.get(notebook, ())).stdout


@pytest.mark.long
def test_each_next_command_works(project: Project, sft_run: str, dpo_run: str) -> None:
    again = project.run("01_sft.py", "--recipe", "recipes/demo.yaml", "--run_name", sft_run, *SFT).stderr
    assert "Dry run: " in project.run(*next_command(again), "--dry_run").stderr  # 02
    merged = project.run("03_merge_push.py", "--run", f"outputs/{dpo_run}", "--run_name", "by run").stdout
    assert f"1 prompts for {sft_run}, {dpo_run}" in follow(project, merged)

    folder = project.root / "an adapter" / "mine"
    folder.parent.mkdir()
    shutil.copytree(project.root / "outputs" / dpo_run, folder, ignore=shutil.ignore_patterns("run.json", "check*"))
    elsewhere = project.run("03_merge_push.py", "--adapter", str(folder), "--run_name", "by adapter").stdout
    assert f"1 prompts for {sft_run}, by adapter" in follow(project, elsewhere)

    as_run = project.run("03_merge_push.py", "--adapter", f"outputs/{dpo_run}", "--run_name", "by folder").stdout
    assert "into the dequantized weights" in as_run  # it was trained on 4 bits, which its run.json knows
    assert f"1 prompts for {sft_run}, {dpo_run}" in follow(project, as_run)

    own_base = project.root / "an adapter" / "base"
    shutil.copytree(project.root / "outputs" / "demo" / "tiny-mistral", own_base)
    flags = ("--base_model_id", str(own_base), "--max_kl", "9", "--trust_remote_code")
    other = project.run("03_merge_push.py", "--adapter", str(folder), *flags, "--run_name", "on another base").stdout
    assert "--trust_remote_code" in next_command(other)
    assert "1 prompts for base, on another base" in follow(project, other)


def test_a_run_that_was_changed_is_refused_until_that_is_accepted(project: Project, dpo_run: str) -> None:
    run, place = project.root / "outputs" / "changed", "outputs/changed"
    shutil.copytree(project.root / "outputs" / dpo_run, run)
    file = run / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    fix = f"If you changed it on purpose, run `python -m helpers accept {place}`."
    for flags in (["03_merge_push.py", "--run", place], ["04_vibes.py", "--models", place, *SHORT["04_vibes.py"]]):
        (line,) = project.run(*flags, status=1).stderr.strip().splitlines()
        assert line.startswith(
            f"error: {place} has changed since its run finished: adapter_model.safetensors has changed. "
        )
        assert line.endswith(fix)
    shutil.copy(project.root / "outputs" / dpo_run / file.name, file)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}, indent=2))
    (line,) = project.run("03_merge_push.py", "--run", place, status=1).stderr.strip().splitlines()
    assert "adapter_config.json has changed" in line
    assert not list(project.root.glob("outputs/*merge-*changed*"))
    done = project.python("-m", "helpers", "accept", place)
    assert done.stdout == f"{place}: adapter_config.json has changed. Accepted.\n", done.stderr
    assert "Merge verified" in project.run("03_merge_push.py", "--run", place, "--run_name", "as changed").stdout


def test_a_model_that_was_changed_is_not_trained_further(project: Project, sft_run: str) -> None:
    run = project.root / "outputs" / "changed-sft"
    shutil.copytree(project.root / "outputs" / sft_run, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    flags = ("--recipe", "recipes/demo.yaml", "--sft_run", "outputs/changed-sft", "--max_steps", "1")
    error = project.run("02_dpo.py", *flags, status=1).stderr.strip().splitlines()[-1]
    assert error.startswith(
        "error: outputs/changed-sft has changed since its run finished: config.json has changed. Restore it"
    )
    assert not [file for file in Path(project.root, "outputs").glob("dpo-*") if "changed" in file.name]
