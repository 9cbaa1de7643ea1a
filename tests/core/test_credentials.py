"""Tokens are asked for only where someone can answer; nothing ever hangs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.core import SettingsError, UserError
from helpers.settings import credentials


@pytest.fixture(autouse=True)
def nobody_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))


def test_without_a_terminal_nothing_is_asked() -> None:
    with pytest.raises(UserError, match="pushing needs a Hub token: set HF_TOKEN"):
        credentials.hf_token("pushing")


def test_the_environment_s_token_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert credentials.hf_token("pushing") == "hf_mine"


def test_someone_at_a_terminal_is_asked() -> None:
    pty = pytest.importorskip("pty", reason="terminals of POSIX only")
    code = "from helpers.credentials import hf_token; print('GOT', hf_token('pushing'))"
    parent, child = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    said = b""
    while b"HF_TOKEN (not shown" not in said:
        said += os.read(parent, 1000)
    os.write(parent, b"hf_typed\n")
    while b"GOT" not in said or not said.endswith(b"\n"):
        said += os.read(parent, 1000)
    process.wait(30)
    os.close(parent)
    assert b"GOT hf_typed" in said
    assert said.count(b"hf_typed") == 1  # not shown while typed


def test_wandb_goes_offline_without_a_key_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    credentials.prepare_tracker("none", "")
    assert "WANDB_MODE" not in os.environ
    credentials.prepare_tracker("wandb", "mine")
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_PROJECT"]) == ("offline", "mine")
    assert "no WANDB_API_KEY" in capsys.readouterr().out


def test_wandb_stays_online_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    credentials.prepare_tracker("wandb", "")
    assert "WANDB_MODE" not in os.environ
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    credentials.prepare_tracker("wandb", "")
    assert "WANDB_MODE" not in os.environ


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"--report_to tensorbord: .*only .*tensorboard.* are supported"):
        credentials.prepare_tracker("tensorbord", "")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SettingsError, match="--report_to mlflow: MLflowCallback requires mlflow to be installed"):
        credentials.prepare_tracker("mlflow", "")
