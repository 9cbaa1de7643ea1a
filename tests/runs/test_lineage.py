"""Which run a run came from, after outputs/ was moved, renamed or copied, and after a parent is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.core import UserError
from helpers.hub.push import write_card
from helpers.models import resolve_models, resolve_start
from helpers.runs.report import show_report
from helpers.runs.run import Run, find_parent, lineage, list_merges, read_run
from helpers.runs.start import start_run
from tests.tiny import settings_of, weights

BASE = {"config.json": "{}", "model.safetensors": weights()}


def make(outputs: Path, name: str, step: str, base: str, parent: Run | None = None, full: bool = False) -> Run:
    """A finished run as `start_run` records it."""
    settings = settings_of(outputs, "--run_name", name)
    settings.step = step
    run = start_run(settings, base, parent=parent)
    run.save()
    files = BASE if full else {"adapter_model.safetensors": weights(name)}
    if not full:
        trained_on = str(parent.folder) if parent and not parent.is_adapter else base
        config = {"base_model_name_or_path": trained_on, "peft_type": "LORA", "r": 8, "lora_alpha": 16,
                  "target_modules": ["q_proj"]}  # fmt: skip
        files |= {"adapter_config.json": json.dumps(config)}
    for file, text in files.items():
        (run.folder / file).write_text(text)
    (run.folder / "weights.safetensors").write_text(weights(name))
    run.finish(metrics={"eval_loss": 0.5}, data={"read": 4, "kept": 4, "dropped": 0, "train": 3, "eval": 1})
    return run


@pytest.fixture(params=["full", "adapter"])
def outputs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """sft on a model inside of outputs/, dpo on sft, and a merge of dpo."""
    outputs = tmp_path / "outputs"
    base = outputs / "models" / "tiny"
    base.mkdir(parents=True)
    for file, text in BASE.items():
        (base / file).write_text(text)
    sft = make(outputs, "sft", "sft", str(base), full=request.param == "full")
    dpo = make(outputs, "dpo", "dpo", str(base), parent=sft)
    make(outputs, "merge", "merge", str(base), parent=dpo, full=True)
    return outputs


def relocate(outputs: Path, how: str) -> Path:
    if how == "copied":
        return Path(shutil.copytree(outputs, outputs.parent / "copy"))
    new = outputs.parent / {"moved": "elsewhere/deep/outputs", "renamed": "old", "in place": "outputs"}[how]
    new.parent.mkdir(parents=True, exist_ok=True)
    return outputs.rename(new) if new != outputs else outputs


@pytest.mark.parametrize("how", ["in place", "moved", "renamed", "copied"])
@pytest.mark.parametrize("is_older", [False, True])
def test_every_run_finds_what_it_came_from(outputs: Path, how: str, is_older: bool) -> None:
    if is_older:  # paths were absolute, and a base's place was not recorded
        for name, parent in (("sft", None), ("dpo", "sft"), ("merge", "dpo")):
            record = read_run(outputs / name) | {"parent_folder": str(outputs / parent) if parent else None}
            del record["base_folder"]
            (outputs / name / "run.json").write_text(json.dumps(record))
    else:
        text = "".join(json.dumps(read_run(outputs / name) | {"settings": {}}) for name in ("sft", "dpo", "merge"))
        assert text.count(str(outputs)) == text.count('"base_model"')  # as it was named; all else is relative
    is_full = (outputs / "sft" / "config.json").is_file()
    new = relocate(outputs, how)
    assert [Path(record["folder"]) for record in lineage(new / "merge")] == [new / n for n in ("merge", "dpo", "sft")]
    assert [run.folder for run in list_merges(new / "dpo")] == [new / "merge"]
    assert Run(new / "dpo", read_run(new / "dpo")).next_command().endswith(f"04_vibes.py --models {new / 'dpo'}")
    before, after = resolve_models(("latest",), new)
    base = new / "sft" if is_full else new / "models" / "tiny"
    assert (before.name, before.base, before.adapter) == ("sft", str(base), None if is_full else str(new / "sft"))
    assert (after.name, after.base, after.adapter) == ("dpo", str(base), str(new / "dpo"))
    start = resolve_start(settings_of(new, "--sft_run", "sft"))
    assert start.path == str(base)
    if not is_older or how == "in place":
        assert start.base_model == str((outputs if how == "copied" else new) / "models" / "tiny")
    show_report(new / "merge")
    page = (new / "dpo" / "report.html").read_text()
    assert "could not be rendered" not in page
    assert 'href="../sft/report.html"' not in page  # not written yet
    assert "gone" not in page
    assert "Merged" in page


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_models_that_are_compared_are_known_again_after_a_move(outputs: Path, how: str) -> None:
    before = [ref.fingerprint for ref in resolve_models(("latest",), outputs)]
    new = outputs.rename(outputs.parent / "new") if how == "moved" else shutil.copytree(outputs, outputs.parent / "new")
    assert [ref.fingerprint for ref in resolve_models(("latest",), Path(new))] == before


def test_a_renamed_parent_is_known_by_its_weights(outputs: Path) -> None:
    (outputs / "sft").rename(outputs / "first")
    (outputs / "dpo").rename(outputs / "second")
    assert [Path(record["folder"]).name for record in lineage(outputs / "merge")] == ["merge", "second", "first"]
    assert [run.name for run in list_merges(outputs / "second")] == ["merge"]
    assert resolve_models(("second",), outputs)[0].name == "first"


def test_a_parent_that_is_gone_is_said_in_a_line(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    is_full = (outputs / "sft" / "config.json").is_file()
    shutil.rmtree(outputs / "sft")
    assert find_parent(outputs / "dpo", read_run(outputs / "dpo")) is None
    note = "note: sft, which dpo started from, is gone. Restore it to compare with it.\n"
    capsys.readouterr()
    if is_full:
        with pytest.raises(UserError, match=r"the base of the adapter in .* is missing"):
            resolve_models(("dpo",), outputs)
    else:
        assert [ref.name for ref in resolve_models(("dpo",), outputs)] == ["tiny", "dpo"]
    assert capsys.readouterr().out == note
    show_report(outputs / "dpo")
    page = (outputs / "dpo" / "report.html").read_text()
    assert "<td>sft</td>" in page
    assert "<td>gone</td>" in page
    capsys.readouterr()
    if not is_full:
        assert "by way of another model: aligned with DPO" in write_card(outputs / "dpo", "me/x")
        assert "note: sft, which dpo started from, is gone. The card does not show it.\n" in capsys.readouterr().out


def test_a_run_is_not_its_own_parent_and_no_walk_is_endless(tmp_path: Path) -> None:
    base = str(tmp_path / "tiny")
    first = make(tmp_path / "a", "same", "sft", base)
    make(tmp_path / "b", "same", "dpo", base, parent=first)
    folders = [Path(record["folder"]) for record in lineage(tmp_path / "b" / "same")]
    assert folders == [tmp_path / "b" / "same", tmp_path / "a" / "same"]
    shutil.move(tmp_path / "b", tmp_path / "c")  # the parent stays where it was
    assert [Path(record["folder"]) for record in lineage(tmp_path / "c" / "same")][1] == tmp_path / "a" / "same"
    (tmp_path / "new").mkdir()
    for name in "ac":  # both are moved
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    assert [record["step"] for record in lineage(tmp_path / "new" / "c" / "same")] == ["dpo", "sft"]
    shutil.rmtree(tmp_path / "new" / "a")
    alone = lineage(tmp_path / "new" / "c" / "same")
    assert [(record["step"], record["parent_gone"]) for record in alone] == [("dpo", "same")]
    for name, parent in (("x", "y"), ("y", "x"), ("z", "z")):  # as a hand may write them
        record: dict[str, Any] = {"step": "dpo", "parent": parent, "parent_folder": parent}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    assert [Path(record["folder"]).name for record in lineage(tmp_path / "x")] == ["x", "y"]
    assert [Path(record["folder"]).name for record in lineage(tmp_path / "z")] == ["z"]


def test_a_run_beside_with_the_parent_s_name_is_not_the_parent_from_elsewhere(tmp_path: Path) -> None:
    base = str(tmp_path / "tiny")
    parent = make(tmp_path / "a", "sft", "sft", base)
    make(tmp_path / "b", "sft", "sft", base)
    make(tmp_path / "b", "dpo", "dpo", base, parent=parent)
    assert lineage(tmp_path / "b" / "dpo")[1]["folder"] == str(tmp_path / "a" / "sft")


def test_a_local_base_that_is_gone_is_no_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    make(tmp_path / "outputs", "sft", "sft", "models/tiny", full=True)
    shutil.rmtree(tmp_path / "models")
    assert "base_model" not in write_card(tmp_path / "outputs" / "sft", "me/x")
