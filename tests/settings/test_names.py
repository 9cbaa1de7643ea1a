"""Fields of TRL's configs, and other names that are accepted for ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from helpers.core import REPO
from helpers.runs.start import settings_of
from helpers.settings import load_settings, sources
from helpers.settings.load import own_types, parse_value
from tests.settings.notebook import VibesSettings, load


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16"], {"bf16": True}),
        (["--no_bf16"], {"bf16": False}),
        (["--bf16", "False"], {"bf16": False}),
        (["--max_length", "None"], {"max_length": None}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--model_init_kwargs", '{"a": 1}'], {"model_init_kwargs": '{"a": 1}'}),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"], {"loss_weights": [1.0, 0.5]}),
        (["--warmup-steps", "5e-2"], {"warmup_steps": 0.05}),
    ],
)
def test_any_field_of_the_trl_config_is_a_flag(words: list[str], expected: dict[str, Any]) -> None:
    assert load(*words).trl == expected


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--training_args.learning_rate", "2e-5"], "learning_rate", 2e-5),
        (["--model_name", "org/other"], "model_id", "org/other"),
        (["--load_in_4bit"], "quantization", "4bit"),
        (["--use_peft", "False"], "tuning", "full"),
        (["--evaluation_strategy", "no"], "eval_strategy", "no"),
        (["--warmup_ratio", "0.03"], "warmup_steps", 0.03),
        (["--max_seq_length", "512"], "max_length", 512),
        (["--training_args.report_to", "None"], "report_to", "none"),
        (["--adam_8bit"], "optim", "paged_adamw_8bit"),
    ],
)
def test_older_names_keep_working_with_a_note(
    words: list[str], name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(*words).values()[name] == value
    assert capsys.readouterr().err.count(f"note: {words[0]}") == 1


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--beta", "0.2"], "dpo_beta", 0.2),
        (["--model_name_or_path", "org/other"], "model_id", "org/other"),
        (["--model_revision", "v1"], "revision", "v1"),
        (["--dataset_test_split", "test"], "eval_split", "test"),
        (["--chat_format", "chatml"], "chat_template", "chatml"),
        (["--attn_implementation", "eager"], "attn_implementation", "eager"),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "q_proj"], "lora_target_modules", "q_proj"),
        (["--load_in_4bit", "False"], "quantization", "auto"),
        (["--chat_template_path", "my.jinja"], "chat_template", "my.jinja"),
    ],
)
def test_spellings_of_trl_are_as_good_as_ours(
    words: list[str], name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(*words).values()[name] == value
    assert capsys.readouterr().err == ""


def test_the_template_of_trl_s_name_is_the_one_that_01_renders_with() -> None:
    settings = load_settings(settings_of(REPO / "notebooks" / "01_sft.py"), {}, ["--chat_template_path", "my.jinja"])
    assert (settings.chat_template, settings.trl) == ("my.jinja", {})


def test_use_peft_and_load_in_4bit_are_qlora_as_in_trl() -> None:
    settings = load("--use_peft", "--load_in_4bit")
    assert (settings.tuning, settings.quantization) == ("lora", "4bit")


def test_names_without_a_counterpart_say_so_and_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load("--rpo_alpha", "1.0", "--generate_during_eval", "--streaming", "True", "--hub_token", "hf_x")
    assert settings.trl == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--rpo_alpha has no effect: use --loss_type sigmoid sft --loss_weights 1 ALPHA; " in said
    assert "--streaming has no effect: all rows are read, to check, count and split them" in said
    assert "hf_x" not in said


def test_publishing_settings_never_reach_a_trl_config() -> None:
    names = sources.field_types("dpo").keys() | sources.field_types("sft").keys()
    assert {"learning_rate", "loss_type", "packing", "gradient_checkpointing"} <= names
    assert not any(name == "push_to_hub" or name.startswith("hub_") for name in names)
    assert sources.field_types("merge") == {}


def test_names_read_from_the_sources_are_those_of_the_configs() -> None:
    from trl import DPOConfig, SFTConfig

    for step, config in (("dpo", DPOConfig), ("sft", SFTConfig)):
        fields = {f.name for f in dataclasses.fields(config)}
        ours = {n for n in fields if n != "push_to_hub" and not n.startswith("hub_")}
        assert sources.field_types(step).keys() == ours


@pytest.mark.parametrize("flag", ["--dtype", "--torch_dtype"])
def test_a_dtype_is_that_of_a_merge_and_has_no_effect_on_training(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = settings_of(REPO / "notebooks" / "03_merge_push.py")
    assert load_settings(merge, {}, [flag, "float16"]).values()["merge_dtype"] == "float16"
    assert f"note: {flag} is now --merge_dtype" in capsys.readouterr().err
    load(flag, "float16")
    assert f"{flag} has no effect" in capsys.readouterr().err


def test_every_renamed_setting_leads_to_one_that_exists() -> None:
    known = sources.field_types("dpo").keys() | sources.field_types("sft").keys()
    for notebook in (REPO / "notebooks").glob("*.py"):
        known |= own_types(settings_of(notebook)).keys()
    values = [text.split()[0] for each in sources.NAMES["values"].values() for text in each.values() if text]
    assert {*sources.NAMES["aliases"].values(), *sources.NAMES["renamed"].values(), *values} <= known


def test_the_older_names_of_a_base_and_an_adapter_are_two_models_today(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_id", "org/base", "--peft_model_id", "me/adapter", "--max_length", "9"]
    settings = load_settings(VibesSettings, {}, words)
    assert (settings.models, settings.max_new_tokens) == (("org/base", "me/adapter"), 9)
    assert capsys.readouterr().err == (
        "note: --model_id is now --models; --peft_model_id is now --models; --max_length is now --max_new_tokens\n"
    )
    assert load_settings(VibesSettings, {}, ["--model_name_or_path", "org/base"]).models == ("org/base",)
    assert load_settings(VibesSettings, {}, ["--models", "a", "--models", "b"]).models == ("b",)


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_values_are_those_of_trl_s_own_parser(step: str) -> None:
    import trl
    from trl.scripts.utils import TrlParser

    parser = TrlParser([getattr(trl, sources.CONFIGS[step])])

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    same = 0
    for name, kind in sources.field_types(step).items():
        for words in (
            ["1"],
            ["0.5"],
            ["-1"],
            ["5e-2"],
            ["True"],
            ["no"],
            ["steps"],
            ["linear"],
            ["a", "b"],
            ['{"a": 1}'],
        ):
            try:
                expected = getattr(parser.parse_args([f"--{name}", *words]), name)
            except ValueError:
                continue
            value = parse_value(kind, name, words, "flag")
            assert (value, type(value)) == (expected, type(expected)), (name, words)
            same += 1
    assert same > 400
