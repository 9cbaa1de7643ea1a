"""Which values are refused, and how."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from trl import DPOConfig

from helpers.core import SettingsError
from helpers.settings import RunSettings, load_settings
from tests.settings.notebook import Settings, load


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--push_to_hub"], True),
        (["--push_to_hub", "True"], True),
        (["--push_to_hub", "true"], True),
        (["--push_to_hub=1"], True),
        (["--push-to-hub"], True),
        ([], False),
        (["--push_to_hub", "False"], False),
        (["--push_to_hub=False"], False),
        (["--push_to_hub", "no"], False),
        (["--no_push_to_hub"], False),
        (["--no-push-to-hub"], False),
        (["--push_to_hub", "--no_push_to_hub"], False),
    ],
)
def test_a_switch_means_what_it_says(words: list[str], expected: bool) -> None:
    settings = load(*words)
    assert settings.push_to_hub is expected
    assert settings.strict is True
    assert "push_to_hub" not in settings.trl


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dpo_bata", "1"], "unknown setting --dpo_bata: did you mean --dpo_beta?"),
        (["--max_grad_nrm", "1"], "unknown setting --max_grad_nrm: did you mean --max_grad_norm?"),
        (["--xyzzyplugh", "1"], "unknown setting --xyzzyplugh: see --help and --help_trl"),
        (["--dpo_beta", "high"], "--dpo_beta takes a number, not 'high' (from flag)"),
        (["--dpo_beta"], "--dpo_beta takes a number, not nothing (from flag)"),
        (
            ["--lora_r", "8", "16"],
            "--lora_r takes one value, not '8 16'. Give each setting as --name value",
        ),
        (["--recipe", "r.yaml", "dpo_beta", "0.3"], "--recipe takes one value, not 'r.yaml dpo_beta 0.3'"),
        (["--max_steps", "1", "2", "--dry_run"], "--max_steps takes one value, not '1 2'"),
        (["--tuning", "half"], "--tuning takes full or lora, not 'half' (from flag)"),
        (["--push_to_hub", "maybe"], "--push_to_hub takes True or False, not 'maybe' (from flag)"),
        (["--no_strict", "False"], "unknown setting --no_strict"),
        (["word"], "'word' is not a setting. Give each setting as --name value"),
        (["-f", "kernel.json"], "'-f' is not a setting"),
        (["--max_grad_norm", "high"], "--max_grad_norm takes a number, not 'high' (from flag)"),
        (["--optim"], "--optim takes adamw_torch or adamw_torch_fused or "),
        (["--max_steps", "1", "2"], "--max_steps takes one value, not '1 2'"),
        (
            ["--liger_kernel_config", "{}"],
            "--liger_kernel_config cannot be set from outside (from flag). Set it in `config`",
        ),
        (["--ddp_backend", "best"], "--ddp_backend takes nccl or gloo or mpi or "),
        (["--log_level", "loud"], "--log_level takes detail or debug or info or "),
        (["--lora_r", "0"], "--lora_r 0 is out of range. Use at least 1."),
        (["--global_batch_size", "-8"], "--global_batch_size -8 is out of range. Use at least 0."),
        (["--tuning", "full", "--quantization", "4bit"], "--tuning full cannot train 4bit weights. Use --tuning qlora"),
        (["--sync_ref_model"], "--sync_ref_model cannot update the reference of an adapter"),
        (["--lora_target_modules", ".*(q_proj|lm_head)"], "includes the LM head, but TRL's loss ignores an adapter"),
        (["--lora_target_modules", ".*"], "--lora_target_modules '.*' includes the LM head"),
        (["--lora_target_modules", "q_proj", "lm_head"], "--lora_target_modules ['q_proj', 'lm_head'] includes the LM"),
        (
            ["--lora_target_modules", "(q_proj"],
            "--lora_target_modules '(q_proj' is not a regular expression: missing )",
        ),
        (["--recipe", "nowhere.yaml"], "recipe 'nowhere.yaml' is not a file. Use one of recipes/demo.yaml"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(*words)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.status == 2


def test_workers_are_refused_where_a_worker_would_run_the_notebook_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    assert load("--dataloader_num_workers", "2").trl == {"dataloader_num_workers": 2}
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(SettingsError, match=r"starts the notebook again in each worker on this system\. Use 0"):
        load("--dataloader_num_workers", "2")
    assert load("--dataloader_num_workers", "0").trl == {"dataloader_num_workers": 0}


def test_what_tuning_in_full_may_do_an_adapter_may_not() -> None:
    assert load("--tuning", "full", "--sync_ref_model").trl == {"sync_ref_model": True}
    assert load("--tuning", "full", "--lora_target_modules", ".*").lora_target_modules == ".*"
    assert load("--lora_modules_to_save", "lm_head", "embed_tokens").lora_modules_to_save == ("lm_head", "embed_tokens")


def test_a_global_batch_is_made_of_processes_and_batches_by_the_highest_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass
    class Train(Settings):
        per_device_train_batch_size: int = 2  # rows
        gradient_accumulation_steps: int = 16  # batches

    def accumulation_steps(*words: str) -> int:
        settings = load_settings(Train, {}, list(words))
        assert settings.accumulation_steps() == settings.accumulation_steps()  # its cell may be run again
        return settings.accumulation_steps()

    assert accumulation_steps() == 16
    assert accumulation_steps("--global_batch_size", "32") == 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert accumulation_steps("--global_batch_size", "32") == 4
    with pytest.raises(SettingsError, match="32 is not a multiple of --per_device_train_batch_size 3 x 4 processes"):
        accumulation_steps("--global_batch_size", "32", "--per_device_train_batch_size", "3")
    (tmp_path / "r.yaml").write_text("dpo: {global_batch_size: 32}")
    assert accumulation_steps("--recipe", "r.yaml") == 4
    assert accumulation_steps("--recipe", "r.yaml", "--gradient_accumulation_steps", "5") == 5
    with pytest.raises(SettingsError, match="Give one of them"):
        accumulation_steps("--global_batch_size", "32", "--gradient_accumulation_steps", "5")


def test_early_stopping_saves_when_it_evaluates() -> None:
    assert load().early_stopping() == {}
    given = load("--early_stopping_patience", "2", "--save_steps", "50").early_stopping()
    assert (given["load_best_model_at_end"], given["eval_steps"], given["save_steps"]) == (True, 50, 50)
    for metric, is_better in ((given["metric_for_best_model"], False), ("eval_rewards/margins", True)):
        args = DPOConfig(**given | {"metric_for_best_model": metric, "eval_strategy": "steps", "bf16": False})
        assert args.greater_is_better == is_better


def test_a_notebook_that_does_not_train_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Merging(RunSettings):
        step: ClassVar[str] = "merge"

    load_settings(Merging, {}, [])
    monkeypatch.setenv("WORLD_SIZE", "1")
    load_settings(Merging, {}, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"runs in one process\. Start it with `python`, without a launcher"):
        load_settings(Merging, {}, [])


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments are for Linux")
@pytest.mark.parametrize(("name", "expected"), [
    ("", "expandable_segments:True"), ("PYTORCH_CUDA_ALLOC_CONF", None), ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"),
])  # fmt: skip
def test_memory_on_a_gpu_is_in_segments_that_grow(
    name: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(each, "")  # restored after the test
        monkeypatch.delenv(each)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    load()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize(("given", "expected"), [(None, "20000"), ("passive", None)])
def test_threads_that_wait_give_their_core_away_unless_the_user_has_decided(
    given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(each, "")  # restored after the test
        monkeypatch.delenv(each)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    load()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
