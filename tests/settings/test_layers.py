"""Where a setting comes from, and which layer wins."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.core import REPO, SettingsError
from helpers.runs.start import settings_of
from helpers.settings import load_settings, sources
from helpers.settings.load import own_types
from tests.settings.notebook import MergeSettings, load

LAYERS = ("default", "recipe", ".env", "environment", "notebook", "flag")


@pytest.mark.parametrize(
    ("name", "variable", "default"), [("dpo_beta", "DPO_BETA", 0.1), ("max_grad_norm", "DPO_MAX_GRAD_NORM", None)]
)
@pytest.mark.parametrize("highest", range(len(LAYERS)))
def test_each_layer_beats_the_ones_below_it(
    highest: int, name: str, variable: str, default: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, bound = [], {}
    if highest >= 1:
        (tmp_path / "r.yaml").write_text(f"dpo:\n  {name}: 1e-1\nsft:\n  {name}: 9\n")
        words += ["--recipe", "r.yaml"]
    if highest >= 2:
        (tmp_path / ".env").write_text(f"{variable}=0.2\n")
    if highest >= 3:
        monkeypatch.setenv(variable, "0.3")
    if highest >= 4:
        bound = {name: 0.4}
    if highest >= 5:
        words += [f"--{name}", "0.5"]
    settings = load(*words, **bound)
    assert settings.values().get(name) == (default, 0.1, 0.2, 0.3, 0.4, 0.5)[highest]
    source = settings.sources.get(name, "default")
    assert source.split()[0] == LAYERS[highest]


def test_the_section_of_a_recipe_beats_its_top(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\nreport_to: none\nwandb_project:\ndpo:\n  seed: 2\n")
    assert load("--recipe", "r.yaml").seed == 2
    assert load_settings(MergeSettings, {}, ["--recipe", "r.yaml"]).seed == 1


def test_the_dataset_of_a_recipe_that_trains_holds_no_prompts(tmp_path: Path) -> None:
    top = "dataset_id: org/pairs\ndataset_split: train_prefs\nseed: 3\n"
    vibes = settings_of(REPO / "notebooks" / "04_vibes.py")

    def read(section: str) -> tuple[str, str, int]:
        (tmp_path / "r.yaml").write_text(top + section)
        settings = load_settings(vibes, {}, ["--recipe", "r.yaml"])
        return settings.dataset_id, settings.dataset_split, settings.seed

    assert read("dpo: {dpo_beta: 0.1}") == ("", "", 3)
    (tmp_path / "r.yaml").write_text("run_name: mine\nresume: never\nmerge_adaptors: true\n")
    merge = load_settings(settings_of(REPO / "notebooks" / "03_merge_push.py"), {}, ["--recipe", "r.yaml"])
    assert (merge.run_name, merge.resume) == ("", "auto")  # the run of 02
    assert read("sft: {}\nvibes: {dataset_id: org/prompts}") == ("org/prompts", "", 3)
    assert read("") == ("org/pairs", "train_prefs", 3)  # a recipe for 04 alone
    dpo = load_settings(settings_of(REPO / "notebooks" / "02_dpo.py"), {}, ["--recipe", "r.yaml"])
    assert dpo.values()["dataset_id"] == ("org/pairs",)


def test_what_differs_from_the_recipe_is_printed_and_the_rest_is_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(load().values())
    assert capsys.readouterr().out.split() == ["defaults", "see", "--help", str(count), "settings"]
    (tmp_path / "r.yaml").write_text("dpo: {lora_r: 4, max_steps: 2, dpo_beta: 0.2, model_id: org/x}")
    monkeypatch.setenv("DPO_SEED", "7")
    words = "--recipe r.yaml --dpo_beta 0.3 --max_grad_norm 1 --loss_type sigmoid sft --sft_run [b]x"
    load(*words.split())
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["recipe", "r.yaml", "2", "settings"],
        ["seed", "7", "environment", "DPO_SEED"],
        ["sft_run", "[b]x", "flag"],
        ["dpo_beta", "0.3", "flag"],
        ["loss_type", "sigmoid", "sft", "flag"],
        ["max_grad_norm", "1.0", "flag"],
        ["defaults", "see", "--help", str(count - 7), "settings"],
    ]


def test_an_unknown_name_in_dotenv_is_refused_and_in_the_environment_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_BATA", "1")
    monkeypatch.setenv("SFT_BATA", "1")
    monkeypatch.setattr("helpers.settings.load.show", lambda settings: print("the table", file=sys.stderr))
    assert load().dpo_beta == 0.1
    assert capsys.readouterr().err == (  # below the table, where it is seen
        "the table\nwarning: DPO_BATA is not a variable of this notebook; did you mean DPO_BETA?\n"
    )
    (tmp_path / ".env").write_text("DPO_BATA=1\n")
    with pytest.raises(SettingsError, match="did you mean DPO_BETA"):
        load()


def test_tokens_in_dotenv_are_exported_and_appear_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / ".env").write_text("HF_TOKEN=hf_secret\nOTHER=1\nDPO_LORA_R=4\n")
    settings = load()
    assert os.environ.pop("HF_TOKEN") == "hf_secret"
    assert "OTHER" not in os.environ
    assert settings.lora_r == 4
    said = capsys.readouterr()
    assert "hf_secret" not in said.out + said.err + repr(settings.values())


def test_several_words_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_LOSS_TYPE", "sigmoid sft")
    assert load().loss_type == ("sigmoid", "sft")
    monkeypatch.setenv("DPO_LOSS_TYPE", '["ipo", "sft"]')
    assert load().loss_type == ("ipo", "sft")
    monkeypatch.setenv("DPO_MODEL_ID", "it's one")
    assert load().model_id == "it's one"
    monkeypatch.setenv("DPO_LOSS_WEIGHTS", "1 0.5")
    assert load().trl == {"loss_weights": [1.0, 0.5]}


def test_a_mistyped_name_in_a_notebook_is_refused_as_a_mistyped_flag_is() -> None:
    assert load(model="org/model", rows=[1]).dpo_beta == 0.1  # names of a notebook's own
    with pytest.raises(SettingsError, match="the variable dpo_bet is not a setting; did you mean dpo_beta"):
        load(dpo_bet=0.3)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    bound = {
        "lora_r": np.int64(16),
        "dpo_beta": np.float32(0.5),
        "strict": np.bool_(False),
        "max_steps": torch.tensor(3),
    }
    settings = load(**bound, beta=np.float16(0.25))
    assert (settings.lora_r, settings.dpo_beta, settings.strict, settings.trl) == (16, 0.25, False, {"max_steps": 3})


@pytest.mark.parametrize("name", ["loss_type", "max_steps", "model_name_or_path"])
def test_a_variable_of_another_kind_that_has_the_name_of_a_setting_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"the variable {name} is a set\. Give a text, a number"):
        load(**{name: {"ipo"}})


def test_a_notebook_may_bind_functions_modules_and_classes_to_any_name_and_objects_to_other_names() -> None:
    assert load(tuning=load, seed=os, strict=Path, rows={1}, dtype=torch.float16, models=object()).seed == 42


def test_no_cell_of_a_notebook_binds_the_name_of_a_setting() -> None:
    """Its value would be taken for the setting's when the cell that calls `load_settings` runs again."""
    for notebook in sorted((REPO / "notebooks").glob("*.py")):
        cls = settings_of(notebook)
        body = ast.parse(notebook.read_text()).body
        nodes = [node for part in body if not isinstance(part, ast.ClassDef) for node in ast.walk(part)]
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not bound & {*own_types(cls), *sources.field_types(cls.step), *sources.NAMES["aliases"]}, notebook.name


def test_paths_by_hand_are_seen_from_here_and_others_from_the_repository(tmp_path: Path) -> None:
    assert load("--output_dir", "mine").output_dir == tmp_path / "mine"
    assert load().output_dir == REPO / "outputs"
    (tmp_path / "r.yaml").write_text("output_dir: theirs\n")
    assert load("--recipe", "r.yaml").output_dir == REPO / "theirs"


def test_naming_a_wandb_project_turns_wandb_on() -> None:
    assert load("--wandb_project", "mine").report_to == "wandb"
    assert load("--wandb_project", "mine", "--report_to", "none").report_to == "none"
    assert load().report_to == "none"


def test_the_digest_follows_what_a_run_is_and_not_where_it_is_kept() -> None:
    plain = load()
    assert plain.digest() == load("--output_dir", "x", "--run_name", "y", "--resume", "never").digest()
    assert plain.digest() == load("--local_rank", "1").digest()  # what DeepSpeed's launcher gives each process
    assert plain.digest() != load("--lora_r", "16").digest()
    assert plain.digest() != load("--max_grad_norm", "1").digest()
    assert plain.digest() != plain.digest("parent")
    assert len(plain.digest()) == 6


def test_two_settings_that_exclude_each_other_are_refused_in_one_layer() -> None:
    assert load("--model_id", "org/x").model_id == "org/x"
    with pytest.raises(SettingsError, match=r"--model_id org/x and --sft_run latest exclude each other\. Give one"):
        load("--model_id", "org/x", "--sft_run", "latest")


def test_a_section_of_a_recipe_replaces_what_its_top_excludes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model_id: org/base\ndpo:\n  sft_run: latest\n")
    settings = load("--recipe", "r.yaml")
    assert (settings.model_id, settings.sft_run) == ("", "latest")
    (tmp_path / "r.yaml").write_text("dpo:\n  model_id: org/base\n  sft_run: latest\n")
    with pytest.raises(SettingsError, match="exclude each other"):
        load("--recipe", "r.yaml")


@pytest.mark.parametrize("name", ["model_name_or_path", "model_name", "model-id"])
def test_a_section_of_a_recipe_replaces_other_names_of_what_its_top_excludes(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{name}: org/base\ndpo:\n  sft_run: latest\n")
    assert load("--recipe", "r.yaml").sft_run == "latest"


def test_of_settings_that_exclude_each_other_the_higher_layer_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text("dpo:\n  sft_run: latest\n")
    settings = load("--recipe", "r.yaml", "--model_id", "org/x")
    assert (settings.model_id, settings.sft_run) == ("org/x", "")
    assert settings.sources["sft_run"] == "recipe (but model_id wins)"
    settings = load("--recipe", "r.yaml", "--sft_run", "None", "--model_id", "org/x")
    assert (settings.model_id, settings.sft_run) == ("org/x", "")
    monkeypatch.setenv("DPO_MODEL_ID", "org/x")
    settings = load("--sft_run", "latest")
    assert (settings.model_id, settings.sft_run) == ("", "latest")
    assert settings.sources["sft_run"] == "flag"
