"""The run folder: what was asked, what was read, what came out, and where a stopped run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
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
    wait_for_everyone,
    write_json,
)
from helpers.runs.checkpoints import (
    check_process_count,
    check_same_settings,
    check_writable,
    explain_failure,
    last_complete_checkpoint,
    quarantine_incomplete,
    quarantine_later,
    remove_quarantined,
    resolve_checkpoint,
)
from helpers.settings.fields import RunSettings

NEXT = {"sft": "02_dpo.py --sft_run", "dpo": "03_merge_push.py --run", "merge": "04_vibes.py --models"}
WEIGHTS = "*.safetensors"


@dataclasses.dataclass
class Run:
    """One folder under outputs/ and its run.json."""

    folder: Path
    record: dict[str, Any]
    overwrite: bool = False  # the folder holds an older run, which goes when this one has something to write
    resume_from: Path | None = None  # a checkpoint that was named by hand
    restart: bool = False  # --resume never: the same command would not go on

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def base_model(self) -> str:
        """The model at the root of the lineage: a Hub id or a folder."""
        return str(self.record["base_model"])

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    def set(self, **fields: Any) -> None:
        """Add `fields` to the record; they are written with the next `update`."""
        self.record |= fields

    def save(self, **fields: Any) -> None:
        """Add `fields` to run.json, which is never seen half written."""
        self.set(**fields)
        if is_main_process():
            if self.overwrite:
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", self.record)
        self.overwrite = False

    @contextlib.contextmanager
    def training(self) -> Iterator[str | None]:
        """Mark what happens to the run; gives the checkpoint to resume from, if there is one.

        Raises UserError for what a user can mend: see `checkpoints.explain`.
        """
        main = threading.current_thread() is threading.main_thread()
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}
        try:
            before = self.record.get("resumed_from")
            named = self.resume_from if str(self.resume_from) != before else None  # it holds for its first start only
            # before anything else: a run that this one overwrite goes, and its checkpoints with it
            self.save(status="running", resumed_from=str(named) if named else before)
            if is_main_process():
                quarantine_later(self.folder, named) if named else quarantine_incomplete(self.folder)
            wait_for_everyone()
            checkpoint = named or last_complete_checkpoint(self.folder)
            if checkpoint:
                print(f"Going on from {short_path(checkpoint)}.")
            yield str(checkpoint) if checkpoint else None
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            explained = None if stopped else explain_failure(error, self.folder)
            told = explained or (error if isinstance(error, Interrupted) else None)
            if told and self.restart and last_complete_checkpoint(self.folder):
                told.args = (f"{told} (leave out --resume never, which would begin restart)",)
            with contextlib.suppress(OSError):  # a full disk has no room for this either
                if stopped:
                    self.save(status="interrupted")
                else:
                    self.save(status="failed", error=str(explained or f"{type(error).__name__}: {error}"))
            from helpers.runs.report import save_partial_report

            save_partial_report(self.folder)
            if explained:
                raise explained from None
            raise
        finally:
            for number, handler in handlers.items():  # whatever ended it
                signal.signal(number, handler)

    def finish(self, **fields: Any) -> None:
        """The run is whole: its weights are in the folder."""
        weights = hashlib.sha256()
        for file in sorted(self.folder.glob(WEIGHTS)) if is_main_process() else ():
            with file.open("rb") as content:
                weights.update(hashlib.file_digest(content, "sha256").digest())
        self.record.pop("error", None)
        if is_main_process():
            remove_quarantined(self.folder)
        self.save(status="finished", finished=_now(), fingerprint=weights.hexdigest()[:16], **fields)

    def next_command(self, recipe: str = "", place: str = "") -> str:
        """The command of the step that follows, ready to paste; `place` is how to name this run's folder in it."""
        words = f"python notebooks/{NEXT[self.record['step']]} "
        if self.record["step"] == "dpo" and not self.is_adapter:
            words = f"python notebooks/{NEXT['merge']} "  # a model tuned in full is whole already
        # what a merge changed shows beside its adapter
        merged = self.record["step"] == "merge" and self.record.get("parent_folder")
        words += place or short_path(self.record["parent_folder"] if merged else self.folder)
        return words + (f" --recipe {recipe}" if recipe else "")


def start_run(
    settings: RunSettings,
    base_model: str,
    parent: Run | None = None,
    origin: str = "",
    when_finished: Callable[[Run, Any], None] | None = None,
) -> Run:
    """The run that these settings name: a new one, or the one that stopped or finished under the same settings.

    Nothing is written, and nothing replaced, before the first `run.save`: a model or dataset that cannot be loaded
    leaves things as they were. `base_model` is the root of the lineage; `parent` the run this one starts from; else
    `origin` tells apart what the same settings may start from.
    A finished run raises Stop, after merging or pushing it where that is asked for. It is returned in a kernel, where
    its cells may be run again, and to 03 where it is to be pushed: `run.finished` says what not to repeat.
    Raises SettingsError where a name given by hand belongs to a run with other settings.
    """
    check_writable(settings.output_dir)
    short = re.sub(r"[^\w.-]", "-", re.split(r"[\\/]", base_model.rstrip("\\/"))[-1])
    origin = parent.record.get("fingerprint", "") if parent else origin
    digest = settings.digest(origin)
    folder = settings.output_dir / (settings.run_name or f"{settings.step}-{short}-{digest}")
    run = Run(folder, read_run(folder))
    if settings.resume not in ("auto", "never"):
        run.resume_from = resolve_checkpoint(settings.resume)
    start = short_path(parent.folder if parent else base_model)
    if settings.dry_run:
        begin = f" would start from {start}" if settings.step in NEXT else ""  # the others make nothing of a model
        raise CleanExit(f"Dry run: {short_path(folder)} ({run.record.get('status', 'new')}){begin}.")
    if run.record and settings.resume == "never":
        run = Run(folder, {}, overwrite=True)
    elif run.record:
        check_same_settings(folder, run.record, settings.hashed_settings(), origin)
    elif folder.is_dir() and any(folder.iterdir()):
        raise SettingsError(f"{short_path(folder)} is not empty and not a run: give another --run_name")
    if run.finished:
        message = f"{short_path(folder)} is finished: nothing to do. --resume never does it anew."
        push = getattr(settings, "push_to_hub", False)
        if settings.step == "merge" and push:
            return run
        if not is_notebook() and settings.step in NEXT:  # of others there are tables to look at
            if when_finished and (push or getattr(settings, "merge_adaptors", False)):
                when_finished(run, settings)
                message = f"{short_path(folder)} was finished before; it was not trained again."
            raise CleanExit(f"{message}\nNext: {run.next_command(settings.recipe)}")
        print(message)
        return run
    run.restart = settings.resume == "never"
    run.record = run.record or {"step": settings.step, "status": "running", "started": _now()}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = settings.rows_per_step()
    check_process_count(folder, run.record.get("processes"), processes, rows == run.record.get("rows_per_step"))
    run.record |= dict(
        settings=settings.values(),
        identity=settings.hashed_settings(),
        sources=settings.sources,
        base_model=base_model,
        parent=parent.name if parent else None,
        parent_folder=str(parent.folder) if parent else None,
        origin=origin,
        processes=processes,
        rows_per_step=rows,
        versions=package_versions(),
        commit=git_commit(),
    )
    print(f"Run: {short_path(folder)}" + (f"\nStarts from {start}" if rows else ""))
    return run


def find_run(output_dir: Path, which: str, step: str) -> Run:
    """A finished run of `step`: the newest for "latest", or the one in the folder `which`. Raises UserError."""
    if which == "latest":
        runs = [Run(f.parent, read_run(f.parent)) for f in output_dir.glob("[!.]*/run.json")]
        runs = [run for run in runs if run.finished and run.record["step"] == step]
        if runs:
            return max(runs, key=lambda run: str(run.record["finished"]))
        raise UserError(f"no finished {step} run in {short_path(output_dir)}: make one, or name its folder")
    folder = find_path(which) or find_path(str(output_dir / which))
    record = read_run(folder) if folder else {}
    if folder is None or not record:
        raise UserError(f"{which!r} is not the folder of a run: it has no run.json")
    if record.get("status") != "finished" or record["step"] != step:
        raise UserError(
            f"{which!r} is a {record['step']} run with status {record.get('status')}, not a finished {step} run"
        )
    return Run(folder.resolve(), record)


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says; {} where there is none, or none that can be read."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that decide on a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def git_commit() -> str:
    """The repository's commit, with "+" behind it when files differ from it."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=REPO, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip()


STEPS = {"sft": "instruction-tuned", "dpo": "aligned with DPO", "merge": "merged"}


def lineage(folder: Path) -> list[dict[str, Any]]:
    """Records of the runs that led to `folder`, the newest first; [] for a folder that is no run."""
    found: list[dict[str, Any]] = []
    place: Path | None = folder
    while place and (record := read_run(place)) and record not in found:
        found.append(record | {"folder": str(place)})
        place = parent_of(place, record)
    return found


def parent_of(folder: Path, record: dict[str, Any]) -> Path | None:
    """The folder of the run that this one started from: beside it, so that a copy of both keeps to itself, or else
    where it was then. None where it started from none."""
    beside = folder.resolve().parent / str(record["parent"]) if record.get("parent") else None
    if beside and read_run(beside):
        return beside
    return Path(record["parent_folder"]) if record.get("parent_folder") else None


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and find_path(name) is None


def dataset_names(run: dict[str, Any]) -> list[str]:
    """Names of a run's sets: Hub ids as they are, of files and folders the last part."""
    given = run.get("settings", {}).get("dataset_id", ())
    listed = [given] if isinstance(given, str) else given
    names = [str(each["id"] if isinstance(each, dict) else each) for each in listed]
    return [name if _is_hub_id(name) else Path(name).name for name in names]
