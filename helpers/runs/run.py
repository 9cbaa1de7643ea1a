"""Run folders: run.json, how a run starts, resumes and finishes, and which run it came from."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
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
from helpers.runs import checkpoints
from helpers.settings.fields import RunSettings

STEPS = {"sft": "instruction-tuned", "dpo": "aligned with DPO", "merge": "merged"}
TRAINING_STEPS = ("sft", "dpo")
NOTEBOOKS = {"sft": "01_sft.py", "dpo": "02_dpo.py", "merge": "03_merge_push.py", "vibes": "04_vibes.py"}
NEXT = {"sft": "02_dpo.py --sft_run", "dpo": "03_merge_push.py --run", "merge": "04_vibes.py --models"}
COUNTS = ("read", "kept", "train", "eval")  # of rows, in a run's `data`
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


@dataclasses.dataclass
class Run:
    """One folder under outputs/ and its run.json."""

    folder: Path
    record: dict[str, Any]
    overwrite: bool = False  # delete the older run in the folder with the first `save`
    restart: bool = False  # --resume never: the same command would start over
    when_stopped: Callable[[Path], None] | None = None  # called before an error of `training` is raised

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def base_model(self) -> str:
        """The model at the root of the lineage: a Hub id, or a folder as it was named or where it has moved to."""
        name, place = str(self.record["base_model"]), self.record.get("base_folder")
        return str((None if find_path(name) else find_recorded(place, self.folder, self.record)) or name)

    @property
    def loading(self) -> dict[str, dict[str, str]]:
        """How each model was loaded that 04_vibes.py asked; for a run of 05_judge.py, those of its answers."""
        answers = Path(str(self.record.get("answers_dir") or "-")).name
        return self.record.get("loading") or read_run(self.folder.parent / answers).get("loading") or {}

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    def set(self, **fields: Any) -> None:
        """Add `fields` to the record; the next `save` writes them. Raises SettingsError for `data` of other rows than
        those that the run has trained on; for a finished run, only prints a line."""
        before, data = self.record.get("data") or {}, fields.get("data") or {}
        if before.get("hash", data.get("hash")) != data.get("hash", before.get("hash")):
            changes = [f"{n} {before[n]} → {data[n]}" for n in COUNTS if before.get(n) != data.get(n)]
            message = f"{short_path(self.folder)} trained on other rows: {', '.join(changes) or 'their texts differ'}."
            if not self.finished:
                raise SettingsError(f"{message} Use another --run_name, or `--resume never` to replace it.")
            print(f"note: {message}")
            return
        self.record |= fields

    def save(self, **fields: Any) -> None:
        """Add `fields` to the record and write run.json atomically."""
        self.set(**fields)
        if is_main_process():
            if self.overwrite:
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", self.record)
        self.overwrite = False

    @contextlib.contextmanager
    def training(self) -> Iterator[str | None]:
        """Record the status of the training inside; yields the checkpoint to resume from, or None. Raises UserError for
        what the user can fix: see `checkpoints.explain_failure`."""
        main = threading.current_thread() is threading.main_thread()
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}
        try:
            self.save(status="running")  # first: it may delete a run
            if is_main_process():
                checkpoints.quarantine_incomplete(self.folder)
            wait_for_everyone()
            if checkpoint := checkpoints.last_complete_checkpoint(self.folder):
                print(f"Resuming from {short_path(checkpoint)}.")
            yield str(checkpoint) if checkpoint else None
        except BaseException as error:
            is_stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            explained = None if is_stopped else checkpoints.explain_failure(error, self.folder)
            message = explained or (error if isinstance(error, Interrupted) else None)
            if message and self.restart and checkpoints.last_complete_checkpoint(self.folder):
                message.args = (f"{str(message).rstrip('.')}. Omit `--resume never`: it would start over.",)
            with contextlib.suppress(OSError):  # a full disk has no room for this either
                if is_stopped:
                    self.save(status="interrupted")
                else:
                    self.save(status="failed", error=str(explained or f"{type(error).__name__}: {error}"))
            if self.when_stopped:
                self.when_stopped(self.folder)
            if explained:
                raise explained from None
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def finish(self, **fields: Any) -> None:
        """Mark the run as finished, with a fingerprint of the weights in its folder."""
        self.record.pop("error", None)
        weights: list[Path] = []
        if is_main_process():
            checkpoints.remove_quarantined(self.folder)
            weights = list(self.folder.glob("*.safetensors"))
        self.save(status="finished", finished=_now(), fingerprint=checkpoints.hash_files(weights), **fields)

    def next_command(self, recipe: str = "", place: str = "") -> str:
        """The command of the next step; `place` is how it names this run's folder."""
        step, folder = self.record["step"], self.folder
        weights = self.record.get("fingerprint")
        is_merged = any(run.finished and run.record.get("origin") == weights for run in list_merges(folder))
        if step == "dpo" and (not self.is_adapter or is_merged):
            step = "merge"  # a fully tuned model needs no merge, and another one is merged already
        models = place or short_path(folder)
        if self.record["step"] == "merge":  # 04 compares a run of 02 with what it started from, and else two models
            parent = find_parent(folder, self.record) or folder
            is_of_dpo = read_run(parent).get("step") == "dpo"
            models = short_path(parent) if is_of_dpo else f"{short_path(self.base_model)} {models}"
        command = f"python notebooks/{NEXT[step]} {models}"
        return command + (f" --recipe {recipe}" if recipe else "")

    def metrics_table(self) -> Any:
        """The run's metrics as a table for `show`."""
        from rich.table import Column, Table

        table = Table("metric", Column("value", justify="right"), box=None, pad_edge=False)
        for name, value in self.record.get("metrics", {}).items():
            table.add_row(name, f"{value:.6g}")
        return table


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
    checkpoints.check_writable(settings.output_dir)
    short = re.sub(r"[^\w.-]", "-", re.split(r"[\\/]", base_model.rstrip("\\/"))[-1])[:50]  # of a file name's 255 bytes
    origin = parent.record.get("fingerprint", "") if parent else origin
    folder = settings.output_dir / (settings.run_name or f"{settings.step}-{short}-{settings.digest(origin)}")
    run = Run(folder, read_run(folder), restart=settings.resume == "never")
    start = short_path(parent.folder if parent else base_model)
    if settings.dry_run:
        begin = f" would start from {start}" if settings.step in NEXT else ""
        raise CleanExit(f"Dry run: {short_path(folder)} ({run.record.get('status', 'new')}){begin}.")
    if run.record and run.restart:
        run.record, run.overwrite = {}, True
    elif run.record:
        checkpoints.check_same_settings(folder, run.record, settings.hashed_settings(), origin)
    elif folder.is_dir() and any(folder.iterdir()):
        raise SettingsError(f"{short_path(folder)} is not empty and not a run. Use another --run_name.")
    names = settings.values().get("dataset_id") or () if settings.step in TRAINING_STEPS else ()
    files = checkpoints.hash_data_files(names)
    if run.finished:
        before = run.record.get("data_files", files)
        changed = [Path(name).name for name in files if files[name] != before.get(name, files[name])]
        if changed:
            print(f"note: {', '.join(changed)} has changed since {short_path(folder)} was trained on it.")
        return _open_finished(run, settings, when_finished)
    run.record = run.record or {"step": settings.step, "status": "running", "started": _now()}
    processes, rows = int(os.environ.get("WORLD_SIZE", "1")), settings.rows_per_step()
    is_same_batch = rows == run.record.get("rows_per_step")
    checkpoints.check_process_count(folder, run.record.get("processes"), processes, is_same_batch)
    if settings.step in TRAINING_STEPS:
        prepare_tracker(settings)
    run.set(
        settings=settings.values(),
        hashed_settings=settings.hashed_settings(),
        sources=settings.sources,
        base_model=base_model,
        parent=parent.name if parent else None,
        parent_folder=_relative_to(settings.output_dir, parent.folder if parent else None),
        base_folder=_relative_to(settings.output_dir, find_path(base_model)),
        origin=origin,
        processes=processes,
        rows_per_step=rows,
        data_files=files,
        versions=_package_versions(),
        commit=_git_commit(),
    )
    print(f"Run: {short_path(folder)}" + (f"\nStarts from {start}" if rows else ""))
    return run


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


def _open_finished(run: Run, settings: RunSettings, when_finished: Callable[[Run, Any], None] | None) -> Run:
    """A finished run, for a notebook's cells or a push by 03; else raises CleanExit with the next command."""
    message = f"{short_path(run.folder)} is already finished. Use `--resume never` to run it again."
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


def find_run(output_dir: Path, which: str, step: str) -> Run:
    """A finished run of `step`: the newest for "latest", or the one in the folder `which`. Raises UserError."""
    if which == "latest":
        if finished := [run for run in list_runs(output_dir, step) if run.finished]:
            return finished[0]
        make = f"Run `python notebooks/{NOTEBOOKS[step]}`" if step in NOTEBOOKS else "Make one"
        raise UserError(f"There is no finished {step} run in {short_path(output_dir)}. {make}, or name a run's folder.")
    folder = find_path(which) or find_path(str(output_dir / which))
    record = read_run(folder) if folder else {}
    if folder is None or not record:
        raise UserError(f"{which!r} is not the folder of a run: it has no run.json.")
    status = record.get("status")
    if status != "finished" or record["step"] != step:
        raise UserError(f"{which!r} is a {record['step']} run with status {status}, not a finished {step} run.")
    return Run(folder.resolve(), record)


def list_runs(output_dir: Path, step: str) -> list[Run]:
    """The runs of `step` in a folder: the one that finished last first, unfinished ones at the end."""
    runs = [Run(file.parent, read_run(file.parent)) for file in output_dir.glob("[!.]*/run.json")]
    matching = [run for run in runs if run.record.get("step") == step]
    return sorted(matching, key=lambda run: str(run.record.get("finished") or ""), reverse=True)


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; {} if it is missing or not readable."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def lineage(folder: Path) -> list[dict[str, Any]]:
    """The records of a run and its ancestors, newest first, each with its "folder"; [] if `folder` is not a run."""
    records: list[dict[str, Any]] = []
    seen: set[Path] = set()
    parent: Path | None = folder
    while parent and parent.resolve() not in seen and (record := read_run(parent)):
        seen.add(parent.resolve())
        records.append(record | {"folder": str(parent), "parent_gone": missing_parent(parent, record)})
        parent = find_parent(parent, record)
    return records


def find_parent(folder: Path, record: dict[str, Any]) -> Path | None:
    """The folder of the run that this one started from, also after outputs/ was moved, renamed or copied, or after the
    parent was renamed. None without a parent, or if it is gone."""
    here, name, origin = folder.resolve(), record.get("parent"), record.get("origin")
    recorded = find_recorded(record.get("parent_folder"), folder, record)
    sibling = here.parent / str(name) if name else here
    if sibling.resolve() != here and read_run(sibling) and not (recorded and record.get("settings")):
        return sibling  # an older record does not know where outputs/ was
    if recorded or not (name and origin):
        return recorded
    runs = [run for step in NEXT for run in list_runs(here.parent, step) if run.folder.resolve() != here]
    return next((run.folder for run in runs if run.record.get("fingerprint") == origin), None)


def missing_parent(folder: Path, record: dict[str, Any]) -> str:
    """The name of the run that this one started from, if it is gone; otherwise ""."""
    return str(record["parent"]) if record.get("parent") and not find_parent(folder, record) else ""


def find_recorded(name: str | None, folder: Path, record: dict[str, Any]) -> Path | None:
    """Where a folder is now that the run in `folder` recorded as `name`, absolute or relative to outputs/. What was in
    outputs/ is looked for next to the run first: it has been moved or copied too. None if it is gone."""
    here = folder.resolve().parent
    there = Path(os.path.realpath((record.get("settings") or {}).get("output_dir") or here))
    before = Path(os.path.normpath(there / (name or ".")))
    places = [Path(os.path.normpath(here / os.path.relpath(before, there))), before]
    if not before.is_relative_to(there):
        places.reverse()
    return next((p for p in places if name and p.is_dir() and p.resolve() != folder.resolve()), None)


def _relative_to(output_dir: Path, path: Path | None) -> str | None:
    return os.path.relpath(path.resolve(), output_dir.resolve()) if path else None


def list_merges(folder: Path, output_dir: Path | None = None) -> list[Run]:
    """The merges of the run in `folder`, newest first; those in `output_dir`, by default next to the run."""
    here = folder.resolve()
    parents = [(run, find_parent(run.folder, run.record)) for run in list_runs(output_dir or here.parent, "merge")]
    return [run for run, parent in parents if parent and parent.resolve() == here]


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and find_path(name) is None


def dataset_names(record: dict[str, Any]) -> list[str]:
    """The datasets of a run: Hub ids in full, of files and folders the last part of the path."""
    value = record.get("settings", {}).get("dataset_id", ())
    specs = [value] if isinstance(value, str) else value
    names = [str(spec["id"] if isinstance(spec, dict) else spec) for spec in specs]
    return [name if is_hub_id(name) else Path(name).name for name in names]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


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
