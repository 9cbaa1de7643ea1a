"""`python -m helpers data` reads its settings as the notebook does that it speaks for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.core import SettingsError
from helpers.data import report
from tests import fake_hub
from tests.conftest import REPO, Project

Read = Callable[..., Any]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The settings with which the command begins, for the text of a recipe and further words."""
    seen: list[Any] = []

    def begin(settings: Any) -> Any:
        seen.append(settings)
        raise InterruptedError

    monkeypatch.setattr(report, "resolve_model", lambda *arguments: "")
    monkeypatch.setattr(report, "resolve_start", begin)

    def settings_of_command(recipe: str, *words: str) -> Any:
        (tmp_path / "r.yaml").write_text(recipe)
        with pytest.raises(InterruptedError):
            report.main(["--recipe", "r.yaml", *words])
        return seen[-1]

    return settings_of_command


def test_names_of_trl_in_a_recipe_are_read(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (
        "model_name_or_path: org/base\nchat_template_path: my.jinja\nmax_steps: 3\ndpo:\n  dataset_name: pairs.jsonl\n"
    )
    settings = read(f"{recipe}  max_seq_length: 77\n  beta: 0.3\n  load_in_4bit: true\n")
    assert (settings.model_id, settings.chat_template) == ("org/base", "my.jinja")
    assert (settings.dataset_id, settings.max_length) == (("pairs.jsonl",), 77)
    assert "note: --max_seq_length is now --max_length" in capsys.readouterr().err


def test_flag_environment_dotenv_and_recipe_are_layers_as_in_a_notebook(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "max_length: 300\nsft: {dataset_id: talks}\ndpo: {dataset_id: pairs, max_length: 500}"
    assert (read(recipe).max_length, read(recipe).dataset_id) == (500, ("pairs",))
    (tmp_path / ".env").write_text("DATA_REPORT_MAX_LENGTH=200\n")
    assert read(recipe).max_length == 200
    monkeypatch.setenv("DATA_REPORT_MAX_LENGTH", "100")
    assert read(recipe).max_length == 100
    assert read(recipe, "--max-length", "50").max_length == 50
    monkeypatch.delenv("DATA_REPORT_MAX_LENGTH")
    (tmp_path / ".env").write_text("DATA_REPORT_SFT=true\n")
    assert (read(recipe).max_length, read(recipe).dataset_id) == (300, ("talks",))
    assert read(recipe, "--sft", "False").dataset_id == ("pairs",)


def test_a_run_of_01_has_the_model_and_the_template_of_its_section(read: Read) -> None:
    sft = "sft: {model_id: org/base, chat_template: vicuna, eos_token: <end>, system_prompt: Be brief, max_length: 9}\n"
    settings = read(sft + "dpo: {sft_run: latest, dpo_beta: 0.3}")
    assert (settings.model_id, settings.chat_template, settings.eos_token) == ("org/base", "vicuna", "<end>")
    assert (settings.system_prompt, settings.max_length) == ("", 1512)  # 02 takes neither from the run
    assert read(sft + "dpo: {sft_run: latest, chat_template: hh}").chat_template == "hh"
    assert read("model_id: org/top\n" + sft + "dpo: {sft_run: latest}").model_id == "org/base"
    chosen = read(sft + "dpo: {model_id: org/chat}")
    assert (chosen.model_id, chosen.chat_template) == ("org/chat", "auto")
    chosen = read(sft + "dpo: {sft_run: latest}", "--model_id", "org/flag")
    assert (chosen.model_id, chosen.chat_template) == ("org/flag", "auto")
    assert read("sft_run: outputs/sft\ndpo_beta: 0.3").max_length == 1512  # a recipe for 02 alone


def test_settings_without_a_use_are_left_out_of_a_recipe_and_refused_as_flags(read: Read) -> None:
    settings = read("global_batch_size: 64\nlearning_rate: 1e-4\nrun_name: x\ndpo: {eval_rows: 3}")
    assert (settings.eval_rows, settings.global_batch_size, settings.run_name) == (3, 0, "")
    with pytest.raises(SettingsError, match="unknown setting --global_batch_size"):
        report.main(["--global_batch_size", "8"])


@pytest.mark.parametrize("file", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_read(file: Path, read: Read) -> None:
    text = re.sub("^setup_module: .*", "", file.read_text(), flags=re.MULTILINE)
    for section, words in (("sft", ["--sft"]), ("dpo", [])):
        if f"{section}:" in text:
            assert read(text, *words).sources["dataset_id"] == "recipe"


def test_a_recipe_with_an_unknown_name_or_no_file_is_refused(read: Read) -> None:
    with pytest.raises(SettingsError, match=r"unknown setting max_lenght \(recipe\): did you mean --max_length"):
        read("dpo: {max_lenght: 9}")
    with pytest.raises(SettingsError, match=r"--recipe takes a text, not nothing \(from flag\)"):
        report.main(["--recipe"])


def test_the_address_of_the_hub_in_dotenv_is_used(project: Project, hub: fake_hub.Hub, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"HF_ENDPOINT={hub.url}\nHF_HOME={tmp_path / 'home'}\n")
    env = {name: value for name, value in project.env.items() if not name.startswith("HF_")}
    words = [sys.executable, "-m", "helpers", "data", "--model_id", "org/none"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr.endswith("it is not on the Hub, or your token may not see it (404)\n")
    assert hub.requests
