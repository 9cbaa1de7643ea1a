"""Where a setting comes from, what beats what, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from helpers.core import REPO, SettingsError, UserError, is_notebook
from helpers.settings import trl_fields
from helpers.settings.load import RunSettings, TrainSettings, load_settings, one_of, silence_warnings
from tests.conftest import Project


@dataclasses.dataclass
class Settings(TrainSettings):
    """A notebook's settings."""

    step: ClassVar[str] = "dpo"

    model_id: str = "org/model"  # the model
    sft_run: str = ""  # a run
    dpo_beta: float = 0.1  # beta
    lora_r: int = 8  # rank
    loss_type: tuple[str, ...] = ("sigmoid",)  # losses
    tuning: Literal["full", "lora"] = "lora"  # what is trained
    push_to_hub: bool = False  # publish
    strict: bool = True  # refuse


@dataclasses.dataclass
class MergeSettings(RunSettings):
    """Settings of a notebook that trains nothing."""

    step: ClassVar[str] = "merge"

    private: bool = True  # visibility


@dataclasses.dataclass
class VibesSettings(RunSettings):
    """Settings of a notebook that compares models."""

    step: ClassVar[str] = "vibes"

    models: tuple[str, ...] = ("latest",)  # models
    max_new_tokens: int = 256  # tokens


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own, so that its .env and recipe are found first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def load(*words: str, **bound: Any) -> Settings:
    return load_settings(Settings, bound, list(words))


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
        (["--dpo_beta", "high"], "--dpo_beta takes float, not 'high' (from flag)"),
        (["--dpo_beta"], "--dpo_beta takes float, not 'nothing' (from flag)"),
        (["--lora_r", "8", "16"], "'16' after --lora_r 8 stands alone: a setting is given as --name value; see --help"),
        (["--recipe", "r.yaml", "dpo_beta", "0.3"], "'dpo_beta 0.3' after --recipe r.yaml stands alone"),
        (["--max_steps", "1", "2", "--dry_run"], "'2' after --max_steps 1 stands alone"),
        (["--tuning", "half"], "--tuning takes full or lora, not 'half' (from flag)"),
        (["--push_to_hub", "maybe"], "--push_to_hub takes bool, not 'maybe' (from flag)"),
        (["--no_strict", "False"], "unknown setting --no_strict"),
        (["word"], "'word' stands alone"),
        (["-f", "kernel.json"], "'-f' stands alone"),
        (["--max_grad_norm", "high"], "--max_grad_norm: invalid float value: 'high' (from flag)"),
        (["--optim"], "--optim needs a value (from flag)"),
        (["--max_steps", "1", "2"], "'2' after --max_steps 1 stands alone"),
        (["--streaming", "True"], "--streaming True: rows that are read as training goes cannot be counted"),
        (["--lora_r", "0"], "--lora_r 0 cannot be: 1 is the least"),
        (["--global_batch_size", "-8"], "--global_batch_size -8 cannot be: 0 is the least"),
        (["--tuning", "full", "--quantization", "4bit"], "--tuning full cannot train 4bit weights: use --tuning qlora"),
        (["--sync_ref_model"], "--sync_ref_model: the reference of an adapter is the base without it"),
        (["--lora_target_modules", ".*(q_proj|lm_head)"], "takes in the LM head, whose weight TRL's loss reads"),
        (["--lora_target_modules", ".*"], "--lora_target_modules '.*' takes in the LM head"),
        (
            ["--lora_target_modules", "(q_proj"],
            "--lora_target_modules '(q_proj' is not a regular expression: missing )",
        ),
        (["--recipe", "nowhere.yaml"], "recipe 'nowhere.yaml' is not a file; there are recipes/demo.yaml"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(*words)
    assert said in str(raised.value).replace("/--max-grad-norm", "")
    assert "\n" not in str(raised.value)
    assert raised.value.status == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16"], {"bf16": True}),
        (["--no_bf16"], {"bf16": False}),
        (["--bf16", "False"], {"bf16": False}),
        (["--max_length", "None"], {"max_length": None}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--model_init_kwargs", '{"a": 1}'], {"model_init_kwargs": '{"a": 1}'}),
        (["--loss_weights", "1", "0.5"], {"loss_weights": [1.0, 0.5]}),
        (["--warmup-steps", "5e-2"], {"warmup_steps": 0.05}),
    ],
)
def test_any_field_of_the_trl_config_is_a_flag(words: list[str], expected: dict[str, Any]) -> None:
    assert load(*words).trl == expected


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--beta", "0.2"], "dpo_beta", 0.2),
        (["--training_args.learning_rate", "2e-5"], "learning_rate", 2e-5),
        (["--model_name_or_path", "org/other"], "model_id", "org/other"),
        (["--evaluation_strategy", "no"], "eval_strategy", "no"),
        (["--warmup_ratio", "0.03"], "warmup_steps", 0.03),
        (["--max_seq_length", "512"], "max_length", 512),
        (["--training_args.report_to", "None"], "report_to", "none"),
        (["--adam_8bit"], "optim", "paged_adamw_8bit"),
        (["--group_by_length", "True"], "train_sampling_strategy", "group_by_length"),
    ],
)
def test_older_names_keep_working_with_a_note(
    words: list[str], name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(*words).values()[name] == value
    assert capsys.readouterr().err.count("note:") == (0 if words[0] == "--beta" else 1)


def test_names_without_a_counterpart_say_so_and_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load("--rpo_alpha", "1.0", "--generate_during_eval", "--streaming", "False", "--hub_token", "hf_x")
    assert settings.trl == {}
    said = capsys.readouterr().err
    assert "--rpo_alpha has no effect: --loss_type sigmoid sft --loss_weights 1 ALPHA" in said
    assert "hf_x" not in said


def test_the_table_has_what_was_given_and_counts_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    count = len(load().values())
    assert capsys.readouterr().out == f"{count} settings are at their defaults: see --help\n"
    load("--dpo_beta", "0.3", "--max_grad_norm", "1")
    heading, *rows, rest = capsys.readouterr().out.splitlines()
    assert [line.split() for line in (heading, *rows)] == [
        ["setting", "value", "from"], ["dpo_beta", "0.3", "flag"], ["max_grad_norm", "1.0", "flag"],
    ]  # fmt: skip
    assert rest == f"{count - 1} settings are at their defaults: see --help"


def test_help_for_a_reader_that_stops_reading_ends_without_a_word(project: Project) -> None:
    for words in (["notebooks/02_dpo.py", "--help"], ["-m", "helpers", "data", "--help"]):
        asked = subprocess.Popen(
            [sys.executable, *words], cwd=project.root, env=project.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert asked.stdout
        asked.stdout.close()
        assert asked.communicate()[1] == b""
        assert asked.returncode == 0


def test_a_python_without_the_requirements_is_one_line(project: Project) -> None:
    for words in (["notebooks/04_vibes.py"], ["-m", "helpers", "data"]):
        done = subprocess.run(
            [sys.executable, "-S", *words], cwd=project.root, env=project.env, capture_output=True, text=True
        )
        assert done.stderr.startswith("error: the requirements are not installed for this Python: use .venv/bin/python")
        assert (done.stderr.count("\n"), done.returncode) == (1, 1)


def test_deepspeed_is_silent_about_gpus_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    silence_warnings()
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "propagate", False)  # as deepspeed has it
    logger.addHandler(caplog.handler)
    cpu = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
    logger.warning(cpu)
    logger.warning("Something else.")
    assert caplog.messages == ["Something else."]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    logger.warning(cpu)
    logger.removeHandler(caplog.handler)
    assert caplog.messages == ["Something else.", cpu]


def test_publishing_settings_never_reach_a_trl_config() -> None:
    names = trl_fields.field_names("dpo") | trl_fields.field_names("sft")
    assert {"learning_rate", "loss_type", "packing", "gradient_checkpointing"} <= names
    assert not any(name == "push_to_hub" or name.startswith("hub_") for name in names)
    assert trl_fields.field_names("merge") == frozenset()


def test_names_read_from_the_sources_are_those_of_the_configs() -> None:
    from trl import DPOConfig, SFTConfig

    for step, config in (("dpo", DPOConfig), ("sft", SFTConfig)):
        fields = {f.name for f in dataclasses.fields(config)}
        ours = {n for n in fields if n != "push_to_hub" and not n.startswith("hub_")}
        assert trl_fields.field_names(step) == ours


def test_every_renamed_setting_leads_to_one_that_exists() -> None:
    known = trl_fields.field_names("dpo") | trl_fields.field_names("sft")
    for notebook in ("01_sft", "02_dpo", "03_merge_push", "04_vibes", "05_judge"):
        known |= set((REPO / "notebooks" / f"{notebook}.py").read_text().replace(":", " ").split())
    assert set(trl_fields.ALIASES.values()) <= known


def test_the_older_names_of_a_base_and_an_adapter_are_two_models_today(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_id", "org/base", "--peft_model_id", "me/adapter", "--max_length", "9"]
    settings = load_settings(VibesSettings, {}, words)
    assert (settings.models, settings.max_new_tokens) == (("org/base", "me/adapter"), 9)
    assert capsys.readouterr().err.splitlines() == [
        "note: --model_id is now --models",
        "note: --peft_model_id is now --models",
        "note: --max_length is now --max_new_tokens",
    ]
    assert load_settings(VibesSettings, {}, ["--models", "a", "--models", "b"]).models == ("b",)


def test_an_unknown_name_in_dotenv_is_refused_and_in_the_environment_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_BATA", "1")
    monkeypatch.setenv("SFT_BATA", "1")
    monkeypatch.setattr("helpers.settings._show", lambda settings: print("the table", file=sys.stderr))
    assert load().dpo_beta == 0.1
    assert capsys.readouterr().err == (  # below the table, where it is seen
        "the table\nwarning: DPO_BATA is no variable of this notebook: did you mean DPO_BETA?\n"
    )
    (tmp_path / ".env").write_text("DPO_BATA=1\n")
    with pytest.raises(SettingsError, match="did you mean DPO_BETA"):
        load()


def test_tokens_in_dotenv_are_exported_and_appear_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

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


def test_a_name_close_to_a_setting_in_a_notebook_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(dpo_bet=0.3, model="org/model", rows=[1]).dpo_beta == 0.1
    assert capsys.readouterr().err == "warning: dpo_bet is no setting; did you mean dpo_beta?\n"


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


def test_workers_are_refused_where_a_worker_would_run_the_notebook_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    assert load("--dataloader_num_workers", "2").trl == {"dataloader_num_workers": 2}
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(SettingsError, match="starts a worker by running the notebook again: leave it at 0"):
        load("--dataloader_num_workers", "2")
    assert load("--dataloader_num_workers", "0").trl == {"dataloader_num_workers": 0}


def test_what_tuning_in_full_may_do_an_adapter_may_not() -> None:
    assert load("--tuning", "full", "--sync_ref_model").trl == {"sync_ref_model": True}
    assert load("--tuning", "full", "--lora_target_modules", ".*").lora_target_modules == ".*"
    assert load("--lora_modules_to_save", "lm_head", "embed_tokens").modules_to_save == ("lm_head", "embed_tokens")


def test_two_ways_to_say_one_thing_contradict_each_other() -> None:
    one_of(load("--model_id", "org/x"), "model_id", "sft_run")
    with pytest.raises(SettingsError, match="--model_id org/x and --sft_run latest contradict"):
        one_of(load("--model_id", "org/x", "--sft_run", "latest"), "model_id", "sft_run")


def test_of_two_ways_to_say_one_thing_the_higher_layer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text("dpo:\n  sft_run: latest\n")
    settings = load("--recipe", "r.yaml", "--model_id", "org/x")
    one_of(settings, "model_id", "sft_run")
    assert (settings.model_id, settings.sft_run) == ("org/x", "")
    settings = load("--recipe", "r.yaml", "--sft_run", "None", "--model_id", "org/x")
    one_of(settings, "model_id", "sft_run")
    assert (settings.model_id, settings.sft_run) == ("org/x", "")
    monkeypatch.setenv("DPO_MODEL_ID", "org/x")
    settings = load("--sft_run", "latest")
    one_of(settings, "model_id", "sft_run")
    assert settings.sft_run == "latest"
    assert settings.sources["sft_run"] == "flag"


def test_this_is_no_kernel_and_a_user_error_shows_one_line_in_one() -> None:
    assert not is_notebook()
    assert UserError("do this")._render_traceback_() == ["UserError: do this"]


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
    with pytest.raises(SettingsError, match="give one of them"):
        accumulation_steps("--global_batch_size", "32", "--gradient_accumulation_steps", "5")


def test_early_stopping_saves_when_it_evaluates() -> None:
    assert load().early_stopping() == {}
    given = load("--early_stopping_patience", "2", "--save_steps", "50").early_stopping()
    assert (given["load_best_model_at_end"], given["eval_steps"], given["save_steps"]) == (True, 50, 50)
