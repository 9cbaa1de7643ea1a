"""Runs whose folder was moved: each notebook finds what a run came from, and compares what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.core import read_jsonl
from tests.conftest import Project


@pytest.mark.long
def test_every_notebook_goes_on_where_the_outputs_were_moved_to(
    project: Project, dpo_run: str, sft_run: str, tmp_path: Path
) -> None:
    old, moved = project.root / "outputs", tmp_path / "moved"
    for name in ("demo", sft_run, dpo_run):
        shutil.copytree(old / name, moved / name)
    for file in [*moved.glob("*/run.json"), *moved.glob("*/adapter_config.json")]:  # as if outputs/ was no more
        file.write_text(file.read_text().replace(str(project.root), "/gone").replace('"outputs/', '"gone/'))
    for name in (sft_run, dpo_run):  # whose adapter_config.json is not as it was
        assert project.python("-m", "helpers", "accept", str(moved / name)).returncode == 0
    demo = ["--recipe", "recipes/demo.yaml", "--output_dir", str(moved)]
    said = project.run("02_dpo.py", *demo, "--sft_run", sft_run, "--dry_run").stderr
    assert f"would start from {moved / sft_run}" in said
    said = project.run("03_merge_push.py", *demo, "--run_name", "merged").stdout
    assert "Merge verified" in said
    assert f"Report: {moved / dpo_run / 'report.html'}" in said
    again = project.run("03_merge_push.py", *demo, "--run_name", "merged").stderr
    assert "is already finished" in again
    flags = ["--push_to_hub", "--dry_run", "--hub_repo_id", "me/x"]
    assert "not merged yet" not in (said := project.run("03_merge_push.py", *demo, *flags, HF_TOKEN="hf_x").stdout)
    assert "Would push merged to me/x" in said
    asked = [*demo, "--rows", "20", "--models", dpo_run, "merged", "--run_name", "asked"]
    said = project.run("04_vibes.py", *asked).stdout
    assert f"20 prompts for {sft_run}, {dpo_run}, merged" in said
    loading = json.loads((moved / "asked" / "run.json").read_text())["loading"]
    assert [row["quantization"] for row in loading.values()] == ["4-bit NF4, double"] * 2 + ["none"]
    assert [row["chat template"] for row in loading.values()] == [f"mistral of {dpo_run}", "mistral", "mistral"]
    turns = [[row["choices"] for row in sorted(read_jsonl(moved / "asked" / "model_answer" / f"{name}.jsonl"),
             key=lambda row: row["question_id"])] for name in loading]  # fmt: skip
    assert turns[1] == turns[2]  # the merge of the dequantized weights is the policy
    assert turns[0] != turns[1]
    assert "4-bit NF4, double" in (moved / "asked" / "answers.html").read_text()
    said = project.run("05_judge.py", *demo, "--answers_dir", "asked", "--run_name", "judged").stdout
    assert said.rstrip().endswith(f"Report: {moved / dpo_run / 'report.html'}")
    page = (moved / dpo_run / "report.html").read_text()
    assert f"<td>{dpo_run}</td><td>weights float32, computed in float32, quantization 4-bit NF4" in page.replace(
        "\n", ""
    )
    card = project.run("03_merge_push.py", *demo, *flags, HF_TOKEN="hf_x").stdout
    assert f"- {dpo_run} answered with weights float32, computed in float32, quantization 4-bit NF4, double" in card
    assert str(tmp_path) not in card.split("Would push")[1].split("Base model:")[0]
    copied = Path(shutil.copytree(moved, tmp_path / "copied"))
    renamed = moved.rename(tmp_path / "renamed")
    for place in (renamed, copied):  # the judge's folder too, with the same results and report
        again = [*demo, "--output_dir", str(place)]
        assert "is already finished" in project.run("04_vibes.py", *asked, "--output_dir", str(place)).stdout
        judged = ["--answers_dir", "asked", "--run_name", "judged"]
        shown = project.run("05_judge.py", *again, *judged).stdout
        assert "is already finished" in shown
        assert results(shown) == results(said)
        assert "is already finished" in project.run("03_merge_push.py", *again, "--run_name", "merged").stderr
        (place / dpo_run / "report.html").unlink()
        done = project.python("-m", "helpers", "report", str(place / dpo_run))
        assert done.stdout == f"Report: {place / dpo_run / 'report.html'}\n"
        assert (place / dpo_run / "report.html").read_text() == page


def results(shown: str) -> list[str]:
    """The tables of 05, without what it says of folders."""
    return [line for line in shown.splitlines() if "%" in line]


@pytest.mark.long
def test_a_sweep_goes_on_where_its_outputs_were_moved_to(project: Project, sft_run: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(project.root / "outputs" / sft_run, old / sft_run)
    words = ["-m", "helpers", "sweep", "notebooks/02_dpo.py", "--recipe", "recipes/demo.yaml", "--sft_run", sft_run,
             "--dpo_beta", "0.1", "0.3", "--max_steps", "1", "--train_rows", "32", "--eval_rows", "8"]  # fmt: skip
    first = project.python(*words, "--output_dir", str(old))
    assert first.returncode == 0, first.stderr
    new = old.rename(tmp_path / "new")
    second = project.python(*words, "--output_dir", str(new))
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is already finished") == 0  # of its runs, whose lines go to their logs
    table = first.stdout.split("Held-out metrics")[1].replace(str(old), str(new))
    assert second.stdout.split("Held-out metrics")[1] == table
    assert all("is already finished" in log.read_text() for log in new.glob("sweep-*/*.log"))
