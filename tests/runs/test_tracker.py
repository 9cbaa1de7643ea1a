"""A tracker is checked before a model is loaded for it, and never asks where nobody can answer."""

from __future__ import annotations

import io
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from helpers.core import SettingsError
from helpers.data.row_report import RowReport
from helpers.runs.curves import Curves
from helpers.runs.run import Run
from helpers.runs.start import prepare_tracker
from helpers.settings import TrainSettings


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))


def prepare(report_to: str, project: str = "") -> None:
    prepare_tracker(TrainSettings(report_to=report_to, wandb_project=project))


def test_wandb_goes_offline_without_a_key_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    prepare("none")
    assert "WANDB_MODE" not in os.environ
    prepare("wandb", "mine")
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_PROJECT"]) == ("offline", "mine")
    assert "WANDB_API_KEY is not set" in capsys.readouterr().out


def test_wandb_stays_online_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    prepare("wandb")
    assert "WANDB_MODE" not in os.environ
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0123456789' * 4}\n")
    prepare("wandb")
    assert "WANDB_MODE" not in os.environ


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"--report_to tensorbord: .*only .*tensorboard.* are supported"):
        prepare("tensorbord")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SettingsError, match="--report_to mlflow: MLflowCallback requires mlflow to be installed"):
        prepare("mlflow")


def test_the_table_of_rows_calls_each_count_by_its_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: dict[str, Any] = {}
    wandb = types.SimpleNamespace(
        run=types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *a, **k: None), summary={}),
        Table=lambda columns, rows: rows, Image=str, log=logged.update,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    report = RowReport(read=4, kept=3)
    report.count(report.dropped, ["tie"], [2])
    report.count(report.flagged, ["duplicate prompt"], [3])
    run = Run(tmp_path, {"data": report.as_dict(), "settings": {}, "sources": {}})
    Curves("mine", [{"step": 1, "loss": 1.0}], [], []).log_to_wandb(run)
    rows = dict(logged["rows"])
    assert (rows["dropped: tie"], rows["flagged: duplicate prompt"]) == (1, 1)
    assert "dropped: duplicate prompt" not in rows
