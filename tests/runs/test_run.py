"""Starting, resuming, finishing and finding runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.core import REPO, CleanExit, SettingsError, UserError, show
from helpers.runs import checkpoints, start
from helpers.runs import run as runs
from helpers.settings import load_settings
from tests.tiny import settings_of


def test_the_same_settings_find_the_same_run_and_others_another(tmp_path: Path) -> None:
    first = start.start_run(settings_of(tmp_path), "org/Some-7B")
    assert first.name == f"dpo-Some-7B-{settings_of(tmp_path).digest('')}"
    assert not first.folder.exists()  # nothing is written before there is something to write
    first.save(data={"read": 1})
    assert start.start_run(settings_of(tmp_path), "org/Some-7B").folder == first.folder
    assert start.start_run(settings_of(tmp_path, "--lora_r", "4"), "org/Some-7B").folder != first.folder
    record = json.loads((first.folder / "run.json").read_text())
    assert record["status"] == "running"
    assert (record["base_model"], record["parent"]) == ("org/Some-7B", None)
    assert record["settings"]["lora_r"] == 8
    assert record["sources"]["lora_r"] == "default"
    assert record["versions"]["trl"] == "1.16.0"


def test_a_finished_run_is_not_started_again_unless_told(tmp_path: Path) -> None:
    run = start.start_run(settings_of(tmp_path), "org/m")
    run.save()
    (run.folder / "adapter_model.safetensors").write_bytes(b"weights")
    run.finish(metrics={"eval_loss": 1.0})
    with pytest.raises(CleanExit, match=r"is already finished\. Use `--resume never`"):
        start.start_run(settings_of(tmp_path), "org/m")
    again = start.start_run(settings_of(tmp_path, "--resume", "never"), "org/m")
    assert (run.folder / "adapter_model.safetensors").exists()  # until the new run has something to write
    again.save()
    assert not (run.folder / "adapter_model.safetensors").exists()


def test_a_name_by_hand_with_other_settings_is_refused_with_the_differences(tmp_path: Path) -> None:
    start.start_run(settings_of(tmp_path, "--run_name", "mine"), "org/m").save()
    start.start_run(settings_of(tmp_path, "--run_name", "mine", "--report_to", "tensorboard"), "org/m")
    with pytest.raises(SettingsError, match="lora_r 8 → 4"):
        start.start_run(settings_of(tmp_path, "--run_name", "mine", "--lora_r", "4"), "org/m")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    for more in ([], ["--resume", "never"]):
        with pytest.raises(SettingsError, match="is not empty, and it is not a run"):
            start.start_run(settings_of(tmp_path, "--run_name", "thesis", *more), "org/m")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CleanExit, match=r"Dry run: .*\(new\) would start from org/m"):
        start.start_run(settings_of(tmp_path, "--dry_run"), "org/m")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_trains_says_what_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = runs.Run(tmp_path / "sft-x", {"fingerprint": "f"})
    settings = settings_of(tmp_path, "--run_name", "a")
    start.start_run(settings, "org/m")
    assert capsys.readouterr().out.splitlines()[-1] == f"Run: {tmp_path / 'a'}"
    monkeypatch.setattr(settings, "rows_per_step", lambda: 8)
    start.start_run(settings, "org/m")
    assert capsys.readouterr().out.splitlines() == [f"Run: {tmp_path / 'a'}", "Starts from org/m"]
    start.start_run(settings, "org/m", parent)
    assert capsys.readouterr().out.splitlines()[-1] == f"Starts from {tmp_path / 'sft-x'}"
    monkeypatch.setattr(settings, "dry_run", True)
    monkeypatch.setattr(type(settings), "step", "judge")
    with pytest.raises(CleanExit, match=r"Dry run: .*a \(new\)\.$"):
        start.start_run(settings, "gpt-4")


def test_latest_is_the_newest_finished_run_of_the_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no finished dpo run in .* Run `python notebooks/02_dpo.py`"):
        runs.find_run(tmp_path, "latest", "dpo")
    for name, status in (("a", "finished"), ("b", "finished"), ("c", "running")):
        run = start.start_run(settings_of(tmp_path, "--run_name", name), "org/m")
        run.save()
        if status == "finished":
            run.finish()
    assert runs.find_run(tmp_path, "latest", "dpo").name == "b"
    assert runs.find_run(tmp_path, "a", "dpo").name == "a"
    assert runs.find_run(tmp_path, str(tmp_path / "a"), "dpo").name == "a"
    with pytest.raises(UserError, match="'c' is a dpo run with status running, not a finished dpo run"):
        runs.find_run(tmp_path, "c", "dpo")
    with pytest.raises(UserError, match="'x' is not the folder of a run"):
        runs.find_run(tmp_path, "x", "dpo")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "failed")])
def test_what_ends_a_training_is_written_down(tmp_path: Path, error: type[BaseException], status: str) -> None:
    run = start.start_run(settings_of(tmp_path), "org/m")
    with pytest.raises(error), run.training() as checkpoint:  # noqa: PT012
        assert checkpoint is None
        raise error
    assert runs.read_run(run.folder)["status"] == status


def test_a_run_that_replaces_another_does_not_go_on_from_its_checkpoints(tmp_path: Path) -> None:
    run = start.start_run(settings_of(tmp_path), "org/m")
    run.save()
    (run.folder / "checkpoint-2").mkdir()
    (run.folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    with start.start_run(settings_of(tmp_path, "--resume", "never"), "org/m").training() as checkpoint:
        assert checkpoint is None
    assert not (run.folder / "checkpoint-2").exists()


def test_the_tracker_is_settled_before_a_run_trains_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(start, "prepare_tracker", lambda settings: asked.append(settings.report_to))
    flags = ["--output_dir", str(tmp_path), "--wandb_project", "mine"]
    training = load_settings(start.settings_of(REPO / "notebooks" / "02_dpo.py"), {}, flags)
    start.start_run(training, "org/m").finish()
    with pytest.raises(CleanExit):
        start.start_run(training, "org/m")
    settings = settings_of(tmp_path, "--run_name", "judged")
    monkeypatch.setattr(type(settings), "step", "judge")
    start.start_run(settings, "gpt")
    assert asked == ["wandb"]


def test_metrics_are_a_table_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(runs.Run(tmp_path, {"metrics": {"train_loss": 0.123456789, "eval_loss": 2.0}}).metrics_table())
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["metric", "value"], ["train_loss", "0.123457"], ["eval_loss", "2"],
    ]  # fmt: skip


def test_after_a_merge_the_next_command_names_what_there_is_to_compare(tmp_path: Path) -> None:
    record = {"step": "merge", "base_model": "org/base", "parent": "trained", "parent_folder": str(tmp_path / "gone")}
    merge, trained = runs.Run(tmp_path / "merged", record), tmp_path / "trained"
    trained.mkdir()
    for step in ("dpo", "sft", ""):  # a run of 02, one of 01, and an adapter that no run here has trained
        (trained / "run.json").write_text(json.dumps({"step": step} if step else {}))
        models = f"{trained}" if step == "dpo" else f"org/base {merge.folder}"
        assert merge.next_command() == f"python notebooks/04_vibes.py --models {models}"


def test_a_run_is_not_resumed_on_other_rows_and_a_finished_one_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"hash": "a", "read": 40, "kept": 38, "train": 30, "eval": 8}
    run = start.start_run(settings_of(tmp_path), "org/m")
    run.save(data=rows)
    again = start.start_run(settings_of(tmp_path), "org/m")
    again.set(data=rows)
    with pytest.raises(SettingsError, match=r"on different rows: read 40 → 41, kept 38 → 39, train 30 → 31\. Use"):
        again.set(data=rows | {"hash": "b", "read": 41, "kept": 39, "train": 31})
    with pytest.raises(SettingsError, match="trained on different rows: their texts differ"):
        again.set(data=rows | {"hash": "b"})
    run.finish()
    run.set(data=rows | {"hash": "b"})  # as a cell of a notebook does
    assert "trained on different rows" in capsys.readouterr().out
    assert run.record["data"]["hash"] == "a"


def test_a_finished_run_names_files_of_data_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(tmp_path / "outputs", "--run_name", "mine")
    data = tmp_path / "data.jsonl"
    data.write_text("one")

    class Training(type(settings)):  # type: ignore[misc]
        def values(self) -> dict[str, object]:
            return super().values() | {"dataset_id": (str(data), json.dumps({"id": str(data)}), "org/set")}

    settings.__class__ = Training
    start.start_run(settings, "org/m").finish()
    with pytest.raises(CleanExit):
        start.start_run(settings, "org/m")
    assert "has changed" not in capsys.readouterr().out
    data.write_text("two")
    with pytest.raises(CleanExit):
        start.start_run(settings, "org/m")
    assert "note: data.jsonl has changed since" in capsys.readouterr().out


def test_after_a_merge_from_02_the_next_command_compares(tmp_path: Path) -> None:
    run = runs.Run(tmp_path / "dpo-x", {"step": "dpo", "status": "finished"})
    run.save()
    (run.folder / "adapter_config.json").write_text("{}")
    assert run.next_command() == f"python notebooks/03_merge_push.py --run {run.folder}"
    merge = runs.Run(tmp_path / "merge-x", {"step": "merge", "parent": "dpo-x"})
    merge.finish()
    assert run.next_command() == f"python notebooks/04_vibes.py --models {run.folder}"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe{\x00", b"[" * 100_000, b'{"step": 3}', b'{"step": "dpo", "status": null}',
     b"nul\x00l", b'{"step": "dpo", "status": "finished", "hashed_settings": []}'],
)  # fmt: skip
def test_a_broken_run_does_not_stop_others_and_is_named_itself(tmp_path: Path, content: bytes) -> None:
    good = start.start_run(settings_of(tmp_path, "--run_name", "good"), "org/m")
    good.save()
    good.finish()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_bytes(content)
    assert runs.find_run(tmp_path, "latest", "dpo").name == "good"
    with pytest.raises(UserError, match=r"bad/run\.json is broken\. Restore it, or repeat that run"):
        runs.find_run(tmp_path, "bad", "dpo")
    with pytest.raises(SettingsError, match=r"bad is not empty, and its run\.json is broken\. Use another --run_name"):
        start.start_run(settings_of(tmp_path, "--run_name", "bad"), "org/m")
    assert (tmp_path / "bad" / "run.json").read_bytes() == content


def test_checkpoints_without_their_record_are_resumed_when_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "orphan"
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "global_step").mkdir(parents=True)
        for name in ("trainer_state.json", "model.safetensors", "rng_state.pth", "optimizer.pt", "scheduler.pt"):
            (folder / f"checkpoint-{step}" / name).write_text(name)
        checkpoints.write_manifest(folder / f"checkpoint-{step}")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    message = (
        r"orphan has checkpoints, but its run\.json is missing\. Add `--resume always` to resume from checkpoint-2 "
    )
    with pytest.raises(SettingsError, match=message):
        start.start_run(settings_of(tmp_path, "--run_name", "orphan"), "org/m")
    run = start.start_run(settings_of(tmp_path, "--run_name", "orphan", "--resume", "always"), "org/m")
    with run.training() as checkpoint:
        assert checkpoint == str(folder / "checkpoint-2")
    assert runs.read_run(folder)["hashed_settings"]["lora_r"] == 8


def test_latest_goes_by_the_order_of_finishing_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, time in (("a", "2026-05-01"), ("b", "2026-01-01"), ("c", "2025-01-01")):
        monkeypatch.setattr(runs, "utc_now", lambda time=time: time)
        run = start.start_run(settings_of(tmp_path, "--run_name", name), "org/m")
        run.save()
        run.finish()
    assert [run.name for run in runs.list_runs(tmp_path, "dpo")] == ["c", "b", "a"]


def test_a_run_from_another_start_is_refused_with_both_names(tmp_path: Path) -> None:
    old, new = (runs.Run(tmp_path / f"sft {name}", {"fingerprint": name}) for name in "ab")
    start.start_run(settings_of(tmp_path, "--run_name", "mine"), "org/m", old).save()
    with pytest.raises(SettingsError) as refused:
        start.start_run(settings_of(tmp_path, "--run_name", "mine"), "org/m", new)
    assert str(refused.value) == (
        f"{tmp_path}/mine started from sft a, and this command starts from sft b. "
        f"Use `--sft_run '{tmp_path}/sft a'` to keep the older one, another --run_name, or `--resume never` to "
        "replace it."
    )


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_is_not_replaced_by_one_that_starts_from_it_or_is_of_another_step(resume: str, tmp_path: Path) -> None:
    root = runs.Run(tmp_path / "root", {"step": "sft", "status": "finished", "fingerprint": "a"})
    root.save()
    middle = runs.Run(tmp_path / "middle", {"step": "dpo", "parent": "root", "parent_folder": "root", "origin": "a"})
    middle.save()
    for name, parent, what in (
        ("middle", middle, "the run that this one starts from"),
        ("root", middle, "the run that this one starts from"),
        ("root", None, "a run of another step, sft"),
    ):
        settings = settings_of(tmp_path, "--run_name", name, "--resume", resume)
        with pytest.raises(SettingsError, match=f"{name} is {what}. Use another --run_name"):
            start.start_run(settings, "org/m", parent)
        assert (tmp_path / name / "run.json").is_file()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_an_output_folder_that_only_seems_writable_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/proc is not writable\. Use another --output_dir"):
        start.start_run(settings_of(Path("/proc/no-such-folder")), "org/m")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dangling is not writable\. Use another --output_dir"):
        start.start_run(settings_of(tmp_path / "dangling"), "org/m")


@pytest.mark.parametrize("exists", [True, False], ids=["link", "dangling"])
def test_a_run_folder_that_is_a_link_is_replaced_where_it_points_to(exists: bool, tmp_path: Path) -> None:
    target, flags = tmp_path / "disk" / "mine", ["--run_name", "mine", "--resume", "never"]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "mine").symlink_to(target)
    if exists:
        target.mkdir(parents=True)
        (target / "old.txt").touch()
        (target / "run.json").write_text('{"step": "dpo", "status": "finished"}')
    run = start.start_run(settings_of(tmp_path / "outputs", *flags), "org/m")
    run.save()
    run.finish()
    assert (tmp_path / "outputs" / "mine").is_symlink()
    assert json.loads((target / "run.json").read_text())["status"] == "finished"
    assert sorted(file.name for file in target.iterdir()) == ["run.json"]


def test_a_run_may_go_on_with_the_same_optimizer_in_other_memory(tmp_path: Path) -> None:
    def settings(optim: str) -> Any:
        return settings_of(tmp_path, "--run_name", "mine", "--optim", optim)

    start.start_run(settings("paged_adamw_8bit"), "org/m").save()
    start.start_run(settings("adamw_8bit"), "org/m")
    assert settings("adamw_8bit").digest() == settings("paged_adamw_8bit").digest()
    with pytest.raises(SettingsError, match=r"different settings \(optim 'adamw_8bit' → 'adamw_torch'\)"):
        start.start_run(settings("adamw_torch"), "org/m")


def test_a_printed_path_is_one_word_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoints.shell_quote("a b/it's") == """'a b/it'"'"'s'"""
    monkeypatch.setattr(checkpoints.os, "name", "nt")
    monkeypatch.setattr(checkpoints, "short_path", str)
    assert checkpoints.shell_quote(r"C:\it's") == r"'C:\it''s'"
