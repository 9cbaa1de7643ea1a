"""--help, .env.example, and what is printed before anything is read."""

from __future__ import annotations

import dataclasses
import logging
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.core import REPO
from helpers.runs.start import settings_of
from helpers.settings import sources
from helpers.settings.load import COMMENT, format_help, load_settings, own_types, silence_warnings
from tests.conftest import Project
from tests.settings.env_example import env_example
from tests.settings.notebook import MergeSettings, Settings

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.py"))


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
        assert done.stderr.startswith("error: the requirements are not installed for this Python. Use .venv/bin/python")
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


def test_help_is_grouped_and_each_setting_has_its_comment_default_and_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = format_help(Settings)
    groups = {part.split(":")[0]: part for part in text.split("\n\n")[2:]}
    assert list(groups) == ["model", "data", "dpo", "training", "LoRA", "output", "advanced"]
    assert "Any field of trl.DPOConfig is also a flag" in text
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  --")}
    assert lines.keys() == {f"--{name}" for name in own_types(Settings)}
    assert lines["--dpo_beta"] == "FLOAT beta (default: 0.1; DPO_BETA)"
    assert lines["--tuning"] == "{full,lora} what is trained, in 100 % of the layers (default: lora; DPO_TUNING)"
    assert lines["--sft_run"] == "STR a run (DPO_SFT_RUN)"
    assert lines["--loss_type"] == "STR ... losses (default: sigmoid; DPO_LOSS_TYPE)"
    assert lines["--notes"] == "STR (DPO_NOTES)"
    assert lines["--strict"] == "refuse (default: True; DPO_STRICT)"
    assert "--lora_r" in groups["LoRA"]
    assert "--notes" in groups["dpo"]
    titles = re.findall(r"^\w+:", format_help(MergeSettings), re.MULTILINE)
    assert titles == ["usage:", "model:", "output:", "advanced:"]


def test_a_comment_may_be_on_a_line_that_continues_its_field() -> None:
    source = (
        'class A:\n    a: str = (\n        "x"  # one\n    )\n    b: int = 1\n    c: int = (\n        2\n    )  # two\n'
    )
    assert COMMENT.findall(source) == [("a", "one"), ("c", "two")]


def test_every_setting_of_a_training_notebook_has_a_group_and_a_comment() -> None:
    for notebook in NOTEBOOKS:
        cls = settings_of(notebook)
        comments = dict(COMMENT.findall(notebook.read_text()))
        assert all(comments.get(name) for name in cls.__annotations__ if name not in ("step", "exclusive")), (
            notebook.name
        )
        if cls.step in ("sft", "dpo"):
            grouped = " ".join(sources.NAMES["groups"].values()).split()
            assert not [name for name in own_types(cls) if name not in grouped]


def test_help_takes_less_than_0_6_seconds(project: Project) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = project.run("02_dpo.py", "--help", real=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6
    assert set(re.findall(r"^  (--\w+)", shown, re.MULTILINE)) == {
        f"--{name}" for name in own_types(settings_of(REPO / "notebooks" / "02_dpo.py"))
    }


def test_the_example_of_env_has_every_variable_with_its_comment_and_default() -> None:
    """Run `python -m tests.settings.env_example` after a change of a Settings cell."""
    assert (REPO / ".env.example").read_text() == env_example(), "run `python -m tests.settings.env_example`"


def test_every_line_of_the_example_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (REPO / ".env.example").read_text().splitlines()
    prefixes = r"# ((?:SFT|DPO|MERGE|VIBES|JUDGE|PAIRS)_[A-Z0-9_]+=.+)"
    (tmp_path / ".env").write_text("\n".join(found[1] for line in lines if (found := re.fullmatch(prefixes, line))))
    monkeypatch.chdir(tmp_path)
    for notebook in sorted((REPO / "notebooks").glob("*.py")):
        cls = settings_of(notebook)
        settings = load_settings(cls, {}, [])
        assert {source.split()[0] for source in settings.sources.values()} == {"default", ".env"}
        assert {n: v for n, v in settings.values().items() if n != "output_dir"} == {
            field.name: getattr(cls, field.name) for field in dataclasses.fields(cls)
            if field.init and field.name != "output_dir"
        }  # fmt: skip


def test_the_help_of_trl_s_fields_has_the_defaults_of_the_notebook() -> None:
    source = (REPO / "notebooks" / "02_dpo.py").read_text()
    defaults = sources.notebook_defaults(source, "dpo")
    assert defaults["max_grad_norm"] == 0.3
    assert defaults["lr_scheduler_type"] == "cosine"
    assert defaults["warmup_steps"] == 0.1
    assert defaults["eval_strategy"] == "steps"
    text = " ".join(sources.trl_help("dpo", (), source).split())
    assert "Set to 0 to disable. (default: 0.3)" in text


def test_the_help_of_trl_s_fields_leaves_out_other_names_of_settings() -> None:
    assert "--chat_template_path" not in sources.trl_help("sft", ["chat_template"])
    assert "--chat_template_path" in sources.trl_help("sft", [])
