"""Values as people write them: what is taken, and the one line for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.core import SettingsError
from helpers.runs.start import settings_of
from helpers.settings import sources
from helpers.settings.load import load_settings
from tests.conftest import REPO, code_cells
from tests.notebooks.test_three_ways import _settings_class

DPO: Any = _settings_class(code_cells(REPO / "notebooks" / "02_dpo.py"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "maybe"], "--lora_r takes an integer, not 'maybe' (from flag)."),
        (["--dpo_beta", "maybe"], "--dpo_beta takes a number, not 'maybe' (from flag)."),
        (["--dry_run", "maybe"], "--dry_run takes True or False, not 'maybe' (from flag)."),
        (["--loss_weights", "a"], "--loss_weights takes numbers, not 'a' (from flag)."),
        (["--tuning", "half"], "--tuning takes full or lora or qlora or dora, not 'half' (from flag)."),
        (["--max_length", "None"], "--max_length takes an integer, not 'None' (from flag). Use 0 for no limit."),
        (["--loss_type"], "--loss_type needs at least one loss."),
        (["--lora_target_modules"], "--lora_target_modules is empty."),
        (["--loss_weights"], "--loss_weights has 0 values for 1 losses."),
        *[
            (["--run_name", name], "cannot name a folder")
            for name in ("../x", "/tmp/x", "a/b", ".hidden", "..", "a\x00b", "a\nb", "x" * 201, "ä" * 101)
        ],
        (["--output_dir", ""], "--output_dir '' cannot hold runs (from flag). Use a folder such as outputs."),
        (["--output_dir", "."], "--output_dir '.' cannot hold runs (from flag)."),
        (["--run_name", "x" * 5000], "cannot name a folder"),
        (["--run_name", "a\x1b[2J"], "cannot name a folder"),
    ],
)
def test_a_value_of_another_kind_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(DPO, {}, flags)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_lists_take_spaces_and_commas() -> None:
    for flags in ("--loss_type sigmoid sft --loss_weights 1 0.5", "--loss_type sigmoid,sft --loss_weights 1,0.5"):
        settings = load_settings(DPO, {}, flags.split())
        assert (settings.loss_type, settings.trl["loss_weights"]) == (("sigmoid", "sft"), [1.0, 0.5])
    assert load_settings(DPO, {}, ["--lora_target_modules", "q_proj,v_proj"]).lora_target_modules == [
        "q_proj",
        "v_proj",
    ]
    assert load_settings(DPO, {}, ["--dataset_id", "a,b.csv"]).dataset_id == ("a,b.csv",)
    assert load_settings(DPO, {}, ["--lora_target_modules", r".*\.[qv]_proj{1,2}"]).lora_target_modules == (
        r".*\.[qv]_proj{1,2}"
    )


def recipe(tmp_path: Path, content: bytes) -> list[str]:
    (tmp_path / "recipe.yaml").write_bytes(content)
    return ["--recipe", str(tmp_path / "recipe.yaml")]


def test_numbers_in_a_recipe_s_mapping_stay_numbers(tmp_path: Path) -> None:
    flags = recipe(tmp_path, b"dpo:\n  lr_scheduler_kwargs: {min_lr: 1e-6, num_cycles: 2}\n  learning_rate: 5e-6\n")
    settings = load_settings(DPO, {}, flags)
    assert settings.trl["lr_scheduler_kwargs"] == '{"min_lr": 1e-06, "num_cycles": 2}'
    assert settings.learning_rate == 5e-6


def test_words_of_a_recipe_are_taken_as_they_are_written(tmp_path: Path) -> None:
    content = b"""
seed: &seed 0755
run_name: 2024_11_29
system_prompt: 1.10
dpo:
  shared_prefix: off
  model_id: 2024-11-29
  dataset_id: [{id: a, fraction: 0.5, split: train}, 1.10]
  stop_on_diagnostic: [nan, no_learning]
  loss_type: &loss
    - sigmoid
  gradient_checkpointing: on
  adam_8bit: yes
  load_in_4bit: yes
  strict: no
  bf16: true
  learning_rate: 1e-6
  dpo_beta: .5
  wandb_project: "0x10"
  max_grad_norm: 1
  lr_scheduler_kwargs: {min_lr: 1e-6, seed: *seed}
  revision: ~
  dataset_revision: null
  dataset_config:
  eval_split: ""
"""
    settings = load_settings(DPO, {}, recipe(tmp_path, content))
    expected = {
        "seed": 755, "run_name": "2024_11_29", "system_prompt": "1.10", "shared_prefix": "off",
        "model_id": "2024-11-29",
        "dataset_id": ('{"id": "a", "fraction": 0.5, "split": "train"}', "1.10"), "loss_type": ("sigmoid",),
        "stop_on_diagnostic": ("nan", "no_learning"), "gradient_checkpointing": True, "quantization": "4bit",
        "optim": "paged_adamw_8bit", "strict": False, "bf16": True, "learning_rate": 1e-6,
        "dpo_beta": 0.5, "wandb_project": "0x10", "max_grad_norm": 1.0, "revision": "", "dataset_revision": "",
        "dataset_config": "", "eval_split": "", "lr_scheduler_kwargs": '{"min_lr": 1e-06, "seed": 493}',
    }  # fmt: skip
    assert {name: settings.values()[name] for name in expected} == expected


def test_a_date_or_a_path_in_a_mapping_is_a_text(tmp_path: Path) -> None:
    flags = recipe(tmp_path, b"dpo:\n  dataset_id: [{id: a, revision: 2024-11-29}]\n")
    assert load_settings(DPO, {}, flags).dataset_id == ('{"id": "a", "revision": "2024-11-29"}',)
    bound = {"dataset_id": [{"id": Path("a"), "fraction": np.float32(0.5)}]}
    assert load_settings(DPO, bound, []).dataset_id == ('{"id": "a", "fraction": 0.5}',)


def test_a_mapping_that_is_merged_into_a_section_gives_its_words_too(tmp_path: Path) -> None:
    content = b"vibes: &common {run_name: 1.10, seed: 1}\ndpo:\n  <<: *common\n  seed: 2\n"
    settings = load_settings(DPO, {}, recipe(tmp_path, content))
    assert (settings.run_name, settings.seed) == ("1.10", 2)


@pytest.mark.parametrize("notebook", [*(REPO / "notebooks").glob("*.py")], ids=lambda file: file.stem)
def test_recipes_give_what_their_values_in_yaml_do(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = settings_of(notebook)

    def read(loader: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(sources, "RecipeLoader", loader)
        settings = [load_settings(cls, {}, ["--recipe", str(file), "--dry_run"]) for file in recipes]
        return [each.values() for each in settings]

    class Resolving(sources.RecipeLoader):  # also the scalars of settings, as YAML 1.1 has them
        construct_document = yaml.SafeLoader.construct_document

    recipes = sorted((REPO / "recipes").glob("*.yaml"))
    assert len(recipes) > 10
    assert read(sources.RecipeLoader) == read(Resolving)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dpo:\n  run_name: \xe9\n", "is not UTF-8"),
        (b"a: &a [*a]\n", "is not YAML: Circular reference"),
        (b"a: [1\n", "is not YAML"),
        (b"dpo: {seed: 1}\ndpo: {lora_r: 2}\n", "is not YAML: the key dpo is given twice"),
        (b"dpo:\n  seed: 1\n  seed: 2\n", "is not YAML: the key seed is given twice"),
        (b"- 1\n", "is no mapping of settings"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(DPO, {}, recipe(tmp_path, content))


@pytest.mark.parametrize("variable", ["DPO_SETUP_MODULE=recipes.demo", "DPO_TRUST_REMOTE_CODE=true"])
def test_env_file_cannot_run_code(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"{variable}\n")
    with pytest.raises(SettingsError, match=r"cannot be set in \.env, because it runs code"):
        load_settings(DPO, {}, [])


def test_an_env_file_that_is_not_utf_8_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes("DPO_DPO_BETA=0.1 # β".encode("utf-16"))
    with pytest.raises(SettingsError, match=r"\.env is not UTF-8"):
        load_settings(DPO, {}, [])


def test_a_dry_run_runs_no_setup_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "makes_a_file.py").write_text("open('made', 'w').close()\n")
    load_settings(DPO, {}, ["--setup_module", "makes_a_file", "--dry_run"])
    assert "--setup_module makes_a_file is not run" in capsys.readouterr().out
    assert not (tmp_path / "made").exists()
    load_settings(DPO, {}, ["--setup_module", "makes_a_file"])
    assert (tmp_path / "made").exists()


def test_wandb_project_in_the_environment_turns_tracking_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    settings = load_settings(DPO, {}, [])
    assert (settings.report_to, settings.sources["report_to"]) == ("wandb", "environment WANDB_PROJECT")
    assert load_settings(DPO, {}, ["--report_to", "none"]).report_to == "none"
