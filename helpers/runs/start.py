"""How a run starts: its folder by its settings, what it may resume, and what it records of itself."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.core import (
    REPO,
    CleanExit,
    Interrupted,
    SettingsError,
    UserError,
    find_path,
    is_main_process,
    is_notebook,
    short_path,
)
from helpers.runs import checkpoints
from helpers.runs.checkpoints import checkpoint_error, last_complete_checkpoint, list_checkpoints, quoted, read_run
from helpers.runs.report import save_partial_report
from helpers.runs.run import NEXT, TRAINING_STEPS, Run, relative_place, utc_now
from helpers.settings.fields import RunSettings

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def start_run(
    settings: RunSettings,
    base_model: str,
    parent: Run | None = None,
    origin: str = "",
    when_finished: Callable[[Run, Any], None] | None = None,
) -> Run:
    """The run that these settings name: new, to be resumed, or finished. Nothing is written before the first `save`.

    `base_model` is the root of the lineage, a Hub id or a folder. Without a `parent`, `origin` tells apart runs of the
    same settings. `when_finished` is called for a finished run if the settings ask for a merge or a push.
    A finished run of 01, 02 or 03 raises CleanExit, except in a notebook, where cells may be run again, and for a push
    by 03. Raises SettingsError if the run's name belongs to a run with other settings.
    """
    short = re.sub(r"[^\w.-]", "-", re.split(r"[\\/]", base_model.rstrip("\\/"))[-1])[:50]  # of a file name's 255 bytes
    checkpoints.check_writable(settings.output_dir, is_dry=settings.dry_run)
    origin = parent.record.get("fingerprint", "") if parent else origin
    folder = settings.output_dir / (settings.run_name or f"{settings.step}-{short}-{settings.digest(origin)}")
    if is_locked := folder.is_dir() and is_main_process() and not settings.dry_run:
        checkpoints.lock_folder(folder)
    record = read_run(folder)
    run = Run(folder, record, restart=settings.resume == "never", read=None if is_locked else dict(record))
    try:
        return _enter(run, settings, base_model, parent, origin, when_finished)
    except BaseException:
        checkpoints.unlock_folder(folder)
        raise


def _enter(
    run: Run,
    settings: RunSettings,
    base_model: str,
    parent: Run | None,
    origin: str,
    when_finished: Callable[[Run, Any], None] | None,
) -> Run:
    """What `start_run` does once the folder is locked."""
    folder = run.folder
    start = short_path(parent.folder if parent else base_model)
    if settings.dry_run:
        begin = f" would start from {start}" if settings.step in NEXT else ""
        raise CleanExit(f"Dry run: {short_path(folder)} ({run.record.get('status', 'new')}){begin}.")
    if run.record and run.restart:
        run.record, run.overwrite = {}, True
    elif run.record:
        hashed, name = settings.hashed_settings(), parent.name if parent else ""
        check_same_settings(folder, run.record, hashed, origin, name)
    elif folder.is_dir() and any(folder.iterdir()):
        check_can_resume(folder, settings.resume == "always")
    names = settings.values().get("dataset_id") or () if settings.step in TRAINING_STEPS else ()
    files = hash_data_files(names)
    if run.finished:
        before = run.record.get("data_files", files)
        changed = [Path(name).name for name in files if files[name] != before.get(name, files[name])]
        if changed:
            print(f"note: {', '.join(changed)} has changed since {short_path(folder)} was trained on it.")
        checkpoints.unlock_folder(folder)
        return _open_finished(run, settings, when_finished)
    run.record = run.record or {"step": settings.step, "status": "running", "started": utc_now()}
    processes, rows = int(os.environ.get("WORLD_SIZE", "1")), settings.rows_per_step()
    is_same_batch = rows == run.record.get("rows_per_step")
    check_process_count(folder, run.record.get("processes"), processes, is_same_batch)
    if settings.step in TRAINING_STEPS:
        prepare_tracker(settings)
    run.set(
        settings=settings.values(),
        hashed_settings=settings.hashed_settings(),
        sources=settings.sources,
        base_model=base_model,
        parent=parent.name if parent else None,
        parent_folder=relative_place(settings.output_dir, parent.folder if parent else None),
        base_folder=relative_place(settings.output_dir, find_path(base_model)),
        origin=origin,
        processes=processes,
        rows_per_step=rows,
        data_files=files,
        versions=_package_versions(),
        commit=_git_commit(),
    )
    print(f"Run: {short_path(folder)}" + (f"\nStarts from {start}" if rows else ""))
    return run


def _open_finished(run: Run, settings: RunSettings, when_finished: Callable[[Run, Any], None] | None) -> Run:
    """A finished run, for a notebook's cells or a push by 03; else raises CleanExit with the next command."""
    message = f"{short_path(run.folder)} is already finished. Use `--resume never` to run it again."
    if settings.step in TRAINING_STEPS and not (run.folder / "report.html").is_file():
        save_partial_report(run.folder)  # the run was killed after it had finished
    has_push = getattr(settings, "push_to_hub", False)
    if settings.step == "merge" and has_push:
        return run
    if is_notebook() or settings.step not in NEXT:  # later steps print their tables again
        print(message)
        return run
    if when_finished and (has_push or getattr(settings, "merge_adaptors", False)):
        when_finished(run, settings)
        message = f"{short_path(run.folder)} was already finished and was not retrained."
    raise CleanExit(f"{message}\nNext: {run.next_command(settings.recipe)}")


def prepare_tracker(settings: RunSettings) -> None:
    """Check --report_to before a model is loaded. Without a key, wandb runs offline instead of asking for one. Raises
    SettingsError for a tracker that is unknown or not installed."""
    name = settings.report_to
    if name == "none":
        return
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(name):
            callback()  # checks whether its package is installed
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingsError(f"--report_to {name}: {' '.join(str(error).split())}") from None
    if name not in ("wandb", "all"):
        return
    import wandb

    if settings.wandb_project:
        os.environ["WANDB_PROJECT"] = settings.wandb_project
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.api.api_key:  # a variable, or netrc
        os.environ["WANDB_MODE"] = "offline"
        print("wandb: WANDB_API_KEY is not set, so this run is kept offline. Use `wandb sync` to upload it.")


def _package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine a run's numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _git_commit() -> str:
    """The repository's commit; a "+" follows if files differ from it."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(describe, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_can_resume(folder: Path, is_asked: bool) -> None:
    """Raise SettingsError for a folder without a readable run.json, unless its checkpoints are asked for."""
    has_record = os.path.lexists(folder / "run.json")
    last = next((each for each in list_checkpoints(folder) if not checkpoint_error(each)), None)
    if last and not is_asked:
        raise SettingsError(
            f"{short_path(folder)} has checkpoints, but its run.json is {'broken' if has_record else 'missing'}. Add "
            f"`--resume always` to resume from {last.name} with these settings, or use another --run_name."
        )
    if not last:
        fault = "its run.json is broken" if has_record else "it is not a run"
        raise SettingsError(f"{short_path(folder)} is not empty, and {fault}. Use another --run_name, or delete it.")


def check_process_count(folder: Path, before: int | None, now: int, is_same_batch: bool) -> None:
    """Raise SettingsError if a resumed run would get other rows per step from another number of processes."""
    if before and before != now and not is_same_batch and last_complete_checkpoint(folder):
        raise SettingsError(
            f"{short_path(folder)} was started with {before} processes. With {now}, a step would have other rows. "
            f"Launch {before}, or start over with `--resume never`. --global_batch_size keeps a step's rows the same."
        )


def check_same_settings(
    folder: Path, record: dict[str, Any], hashed: dict[str, Any], origin: str, parent: str = ""
) -> None:
    """Raise SettingsError if the run in `folder` has other settings, or started from another model or run."""
    before = record.get("hashed_settings", {}) | {"starting point": record.get("origin", origin)}
    now = json.loads(json.dumps(hashed | {"starting point": origin}, default=str))
    older = record.get("parent")
    if before["starting point"] != origin and older and parent:  # hashes of weights say nothing to a reader
        flag = {"dpo": "--sft_run", "merge": "--run"}.get(str(record.get("step")), "")
        keep = f" Use `{flag} {quoted(folder.parent / older)}` to keep the older one," if flag else ""
        what = f"started from {older}, and this command starts from {parent}" + " (trained again)" * (older == parent)
        raise SettingsError(
            f"{short_path(folder)} {what}.{keep or ' Use'} another --run_name, or `--resume never` to replace it."
        )
    differences = [f"{n} {before.get(n)!r} → {now.get(n)!r}" for n in now | before if before.get(n) != now.get(n)]
    if differences:
        raise SettingsError(
            f"{short_path(folder)} has other settings ({', '.join(differences)}). "
            "Use another --run_name, or `--resume never` to replace it."
        )


def hash_data_files(names: Iterable[str]) -> dict[str, str]:
    """The local files of --dataset_id and a hash of each; Hub datasets are cached by revision."""
    hashes = {}
    for name in names:
        with contextlib.suppress(json.JSONDecodeError):
            name = json.loads(name).get("id", "") if name.startswith("{") else name
        path = find_path(name)
        paths = [path] if path else [Path(file) for file in glob.glob(name, recursive=True)]
        files = [(p.parent, f) for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
        for folder, file in files:
            with file.open("rb") as content:
                hashes[str(file.relative_to(folder))] = hashlib.file_digest(content, "sha256").hexdigest()[:16]
    return hashes


@contextlib.contextmanager
def resumable(run: Run) -> Iterator[None]:
    """Work that the same command resumes after an interruption: rows in a JsonlStore are kept."""
    finished = run.finished
    try:
        if not finished:
            run.save(status="running")
        yield
    except BaseException as error:
        is_stopped = isinstance(error, KeyboardInterrupt | Interrupted | CleanExit)
        with contextlib.suppress(OSError):  # the disk may be full
            if not finished:
                run.save(status="interrupted" if is_stopped else "failed", error=f"{type(error).__name__}: {error}")
        hint = f"Finished parts are saved in {short_path(run.folder)}. Run the same command again to resume."
        if isinstance(error, KeyboardInterrupt):
            number = getattr(error, "number", signal.SIGINT)
            raise Interrupted(f"Stopped by {signal.Signals(number).name}. {hint}", 128 + number) from None
        if type(error) is UserError and hint not in str(error):
            error.args = (f"{error} ({hint})",)
        raise
