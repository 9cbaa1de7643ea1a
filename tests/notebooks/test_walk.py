"""The whole demo, as the README promises it, with prompts shared and without; and a road by adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.core import read_jsonl
from tests.conftest import DPO, SFT, Project, run_demo
from tests.runs.test_report import SECTIONS
from tests.training.pairs import check_same_logs


@pytest.mark.long
def test_an_adapter_of_sft_is_trained_further_against_its_frozen_copy(project: Project) -> None:
    project.run(
        "01_sft.py", "--recipe", "recipes/demo.yaml", "--tuning", "qlora", "--lora_r", "4", "--run_name", "lora", *SFT
    )
    refused = project.run("02_dpo.py", "--recipe", "recipes/demo.yaml", "--sft_run", "lora", "--lora_r", "8", status=2)
    assert refused.stderr.strip().endswith(
        "error: `--lora_r 8` contradicts the adapter in lora, which has 4. Remove `--lora_r`."
    )

    small = {name: value for name, value in DPO.items() if name not in ("recipe", "sft_run")}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    project.run("02_dpo.py", "--recipe", "recipes/demo.yaml", "--sft_run", "lora", "--run_name", "further", *flags)

    folder = project.root / "outputs" / "further"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], Path(config["base_model_name_or_path"]).name) == (4, "tiny-mistral")
    assert not (folder / "ref").exists()
    before = load_file(project.root / "outputs" / "lora" / "adapter_model.safetensors")
    after = load_file(folder / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.float32 for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [log for log in logs if "eval_rewards/margins" in log]
    assert (evaluated[0]["step"], evaluated[0]["eval_rewards/margins"]) == (0, 0.0)  # before the first step
    logs = [log for log in logs if "loss" in log]
    assert logs[0]["rewards/margins"] == 0.0  # policy and reference start as one
    assert logs[5]["rewards/margins"] != 0.0
    record = project.record("further")
    assert (record["parent"], record["base_model"]) == ("lora", "outputs/demo/tiny-mistral")

    shown = project.run(
        "04_vibes.py", "--models", "outputs/further", "--prompts", "What is 2 plus 3?", "--max_new_tokens", "4"
    )
    assert "1 prompts for lora, further" in shown.stdout


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_full_demo_keeps_the_readme_s_promise_twice(full_demo: tuple[Project, str], tmp_path: Path) -> None:
    runs = []
    for project, shown in (full_demo, (again := Project(tmp_path / "project"), run_demo(again))):
        (record,) = [json.loads(f.read_text()) for f in project.root.glob("outputs/judge-*/run.json")]
        verdicts = record["metrics"]
        assert "480 comparisons by rules recipes.demo.questions" in shown
        (page,) = project.root.glob("outputs/vibes-*/answers.html")
        assert f"Page: {page.relative_to(project.root)}" in shown
        report = project.root / "outputs" / verdicts["candidate"] / "report.html"
        assert shown.splitlines()[-1] == f"Report: {report.relative_to(project.root)}"
        assert re.findall(r'data-section="([\w-]+)"', text := report.read_text()) == SECTIONS
        assert "could not be rendered" not in text
        assert "Merged and compared." in text
        before, after = verdicts["baseline"], verdicts["candidate"]
        assert verdicts["win"] + verdicts["tie"] + verdicts["loss"] >= 400
        assert verdicts["win"] / (verdicts["win"] + verdicts["loss"]) >= 0.90
        assert verdicts["interval"][0] > 0.5
        assert verdicts["scores"][after]["correct"] >= verdicts["scores"][before]["correct"] - 0.02
        assert verdicts["scores"][before]["correct"] > 0.9
        (dpo,) = [json.loads(f.read_text()) for f in project.root.glob("outputs/dpo-*/run.json")]
        assert dpo["diagnostics"] == []
        timeless = {k: v for k, v in dpo["metrics"].items() if not k.endswith(("runtime", "per_second"))}
        runs.append((verdicts, timeless))
    assert runs[0] == runs[1]


@pytest.mark.long
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
