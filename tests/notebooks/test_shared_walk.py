"""The whole of the demo's alignment with prompts shared and without: the same curves, and the same answers."""

from __future__ import annotations

import json

import pytest

from helpers.core import read_jsonl
from tests.conftest import Project
from tests.training.pairs import check_same_logs

pytestmark = pytest.mark.long


def test_the_demo_is_the_same_with_prompts_shared_and_without(full_demo: tuple[Project, str]) -> None:
    demo = ["--recipe", "recipes/demo.yaml"]
    project, _ = full_demo
    (sft_run,) = (folder.name for folder in project.root.glob("outputs/sft-*"))
    histories, answers, verdicts = {}, {}, {}
    for mode in ("on", "off"):
        flags = ["--sft_run", sft_run, "--shared_prefix", mode, "--run_name", f"walk-{mode}"]
        said = project.run("02_dpo.py", *demo, *flags).stdout
        assert ("Shared prefix: on" in said) == (mode == "on")
        lines = (project.root / "outputs" / f"walk-{mode}" / "metrics.jsonl").read_text().splitlines()
        histories[mode] = [json.loads(line) for line in lines]
        project.run("04_vibes.py", *demo, "--models", f"outputs/walk-{mode}", "--run_name", f"answers-{mode}")
        vibes = project.root / "outputs" / f"answers-{mode}"
        project.run("05_judge.py", *demo, "--answers_dir", f"outputs/answers-{mode}", "--run_name", f"verdicts-{mode}")
        verdicts[mode] = project.record(f"verdicts-{mode}")["metrics"]
        rows = read_jsonl(vibes / "model_answer" / f"walk-{mode}.jsonl")
        answers[mode] = [row["choices"][0]["turns"] for row in sorted(rows, key=lambda row: row["question_id"])]
    assert len(histories["on"]) > 30
    assert check_same_logs(histories["on"], histories["off"], 1e-3) > 300
    for name in ("win", "tie", "loss", "win_rate"):
        assert verdicts["on"][name] == verdicts["off"][name]
    same = sum(a == b for a, b in zip(answers["on"], answers["off"], strict=True))
    assert same > 0.99 * len(answers["on"]) > 400
