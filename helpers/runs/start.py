"""How a run starts, alone or as one of a sweep: its folder by its settings, what it may resume, and what it records."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.core import (
    REPO,
    CleanExit,
    Interrupted,
    SettingsError,
    UserError,
    find_path,
    fingerprint,
    is_main_process,
    is_notebook,
    short_path,
    show,
    write_json,
)
from helpers.runs import checkpoints
from helpers.runs.checkpoints import checkpoint_error, last_complete_checkpoint, list_checkpoints, read_run, shell_quote
from helpers.runs.curves import plot_runs, read_history
from helpers.runs.report import save_partial_report
from helpers.runs.run import NEXT, TRAINING_STEPS, Run, lineage, relative_place, utc_now
from helpers.settings.fields import RunSettings, TrainSettings
from helpers.settings.load import load_settings, own_types
from helpers.settings.sources import field_types, split_flags, takes_several

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
RUN_LINE = re.compile(r"Run: (.+)|(.+) (?:is already finished\.|was already finished)")  # printed by start_run
SHOWN_LINE = re.compile(r"step +\d+[:/]|Run: |Resuming|error: ")
# TRL 1.16 (dpo_trainer.py, _precompute_ref_logps) caches by the dataset's fingerprint and the policy's weights. These
# settings choose for themselves, or change what would be cached.
OWN_REFERENCE = {"precompute_ref_log_probs", "sync_ref_model", "ld_alpha"}
METRICS = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen")


def start_run(
    settings: RunSettings,
    base_model: str,
    parent: Run | None = None,
    origin: str = "",
    when_finished: Callable[[Run, Any], None] | None = None,
) -> Run:
    """The run that these settings name: new, to be resumed, or finished. Nothing is written before the first `save`.
    `base_model` is the root of the lineage, a Hub id or a folder. Without a `parent`, `origin` tells apart runs of the
    same settings. `when_finished` is called for a finished run, for a merge or a push. A finished run of 01, 02 or 03
    raises CleanExit, except in a notebook, and for a push by 03. Raises SettingsError if the name is another run's."""
    short = re.sub(r"[^\w.-]", "-", re.split(r"[\\/]", base_model.rstrip("\\/"))[-1])[:50]  # of a file name's 255 bytes
    checkpoints.check_writable(settings.output_dir)
    origin = parent.record.get("fingerprint", "") if parent else origin
    folder = settings.output_dir / (settings.run_name or f"{settings.step}-{short}-{settings.digest(origin)}")
    start = short_path(parent.folder if parent else base_model)
    with contextlib.ExitStack() as when_refused:
        if is_locked := folder.is_dir() and is_main_process() and not settings.dry_run:
            checkpoints.lock_folder(folder)
            when_refused.callback(checkpoints.unlock_folder, folder)
        record = read_run(folder)
        run = Run(folder, record, restart=settings.resume == "never", read=None if is_locked else dict(record))
        check_replaceable(folder, record, settings.step, parent)
        if settings.dry_run:
            begin = f" would start from {start}" if settings.step in NEXT else ""
            raise CleanExit(f"Dry run: {short_path(folder)} ({record.get('status', 'new')}){begin}.")
        if record and run.restart:
            run.record, run.overwrite = {}, True
        elif record:
            check_same_settings(folder, record, settings.hashed_settings(), origin, parent.name if parent else "")
        elif folder.is_dir() and any(folder.iterdir()):
            check_can_resume(folder, settings.resume == "always")
        files = checkpoints.hash_data_files(settings.values().get("dataset_id") or ()) if _trains(settings) else {}
        if run.finished:
            before = run.record.get("data_files", files)
            if changed := [Path(name).name for name in files if files[name] != before.get(name, files[name])]:
                print(f"note: {', '.join(changed)} has changed since {short_path(folder)} was trained on it.")
            checkpoints.unlock_folder(folder)
            return _open_finished(run, settings, when_finished)
        run.record = run.record or {"step": settings.step, "status": "running", "started": utc_now()}
        processes, rows = int(os.environ.get("WORLD_SIZE", "1")), settings.rows_per_step()
        is_same_batch = rows == run.record.get("rows_per_step")
        check_process_count(folder, run.record.get("processes"), processes, is_same_batch)
        if isinstance(settings, TrainSettings):
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
            versions={"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
            commit=_git_commit(),
        )
        when_refused.pop_all()
    print(f"Run: {short_path(folder)}" + (f"\nStarts from {start}" if rows else ""))
    return run


def _trains(settings: RunSettings) -> bool:
    return settings.step in TRAINING_STEPS


def _open_finished(run: Run, settings: RunSettings, when_finished: Callable[[Run, Any], None] | None) -> Run:
    """A finished run, for a notebook's cells or a push by 03; else raises CleanExit with the next command."""
    message = f"{short_path(run.folder)} is already finished. Use `--resume never` to run it again."
    if _trains(settings) and not (run.folder / "report.html").is_file():
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


def prepare_tracker(settings: TrainSettings) -> None:
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
            f"{short_path(folder)} was started with {before} processes. With {now}, the batch size would change. "
            f"Launch {before}, keep the batch size with `--global_batch_size`, or start over with `--resume never`."
        )


def check_replaceable(folder: Path, record: dict[str, Any], step: str, parent: Run | None) -> None:
    """Raise SettingsError if the run in `folder` is of another step, or one that this run starts from."""
    is_source = parent and folder.resolve() in {Path(each["folder"]).resolve() for each in lineage(parent.folder)}
    if is_source or record.get("step", step) != step:
        what = "the run that this one starts from" if is_source else f"a run of another step, {record['step']}"
        raise SettingsError(f"{short_path(folder)} is {what}. Use another --run_name.")


def check_same_settings(folder: Path, record: dict[str, Any], hashed: dict[str, Any], origin: str, parent: str) -> None:
    """Raise SettingsError if the run in `folder` has other settings, or started from another model or run."""
    before = record.get("hashed_settings", {}) | {"starting point": record.get("origin", origin)}
    now = json.loads(json.dumps(hashed | {"starting point": origin}, default=str))
    older, name = record.get("parent"), short_path(folder)
    if before["starting point"] != origin and older and parent:  # hashes of weights say nothing to a reader
        flag = {"dpo": "--sft_run", "merge": "--run"}.get(str(record.get("step")), "")
        keep = f" Use `{flag} {shell_quote(folder.parent / older)}` to keep the older one," if flag else " Use"
        again = " (trained again)" * (older == parent)
        raise SettingsError(f"{name} started from {older}, and this command starts from {parent}{again}.{keep} another "
                            "--run_name, or `--resume never` to replace it.")  # fmt: skip
    if differences := [f"{n} {before.get(n)!r} → {now.get(n)!r}" for n in now | before if before.get(n) != now.get(n)]:
        raise SettingsError(f"{name} was run with different settings ({', '.join(differences)}). Use another "
                            "--run_name, or `--resume never` to replace it.")  # fmt: skip


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


@dataclasses.dataclass
class Point:
    """One run of a sweep: its values on the axes, its flags, and its result."""

    values: dict[str, str]
    flags: list[str]
    digest: str
    run: str = ""
    status: int | None = None  # exit status of its process

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    def result(self) -> dict[str, Any]:
        """Status, metrics and diagnostics from run.json."""
        record = read_run(Path(self.run)) if self.run else {}
        return {name: record.get(name) for name in ("status", "metrics", "diagnostics")}


def main(argv: Sequence[str]) -> None:
    """Run one notebook over a grid of settings, then compare the runs in a plot and a table.

        python -m helpers sweep notebooks/02_dpo.py --dpo_beta 0.05 0.1 0.3 --recipe recipes/demo.yaml

    A flag with several values is an axis of the grid. A flag that itself takes several values (--loss_type sigmoid sft)
    is an axis if it is repeated: --loss_type sigmoid --loss_type sigmoid sft. Run the same command again to do what is
    missing: finished runs are kept, and a stopped run is resumed.

    DPO runs compute the reference's log-probabilities before training and cache them (--precompute_ref_log_probs).
    TRL's cache depends on the rows and on all weights, so runs share it along --dpo_beta, --loss_type and
    --learning_rate. Each value of --seed, --lora_r, --tuning or of a data setting computes them again.
    """
    notebook = find_path(argv[0]) if argv and not argv[0].startswith("-") else None
    if notebook is None or notebook.suffix != ".py":
        raise SettingsError("usage: python -m helpers sweep notebooks/02_dpo.py --dpo_beta 0.05 0.1 0.3 [flags]")
    points, output_dir = plan_sweep(notebook, argv[1:])
    folder = output_dir / f"sweep-{fingerprint(notebook.stem, *sorted(p.digest for p in points))[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        _lock_sweep(lock)
        checkpoints.remove_drafts(folder)
        for i, point in enumerate(points):
            print(f"[{i + 1}/{len(points)}] {point.label}", flush=True)
            _run(notebook, point, folder / f"{i + 1}.log", lock)
            results = [dataclasses.asdict(point) | {"record": point.result()} for point in points]
            write_json(folder / "sweep.json", results)
    summarize(folder, points)
    if failed := [f"{point.label} (status {point.status})" for point in points if point.status]:
        logs = f"{short_path(folder)}/*.log"
        raise UserError(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}. See {logs}.")


def plan_sweep(notebook: Path, argv: Sequence[str]) -> tuple[list[Point], Path]:
    """The points of the grid, each checked as by the notebook, and the folder of their runs. Raises SettingsError."""
    cls = settings_of(notebook)
    types = field_types(cls.step) | own_types(cls)
    axes: dict[str, list[list[str]]] = {}
    for name, words in split_flags(list(argv)):
        is_one_value = takes_several(types.get(name)) or len(words) < 2
        axes.setdefault(name, []).extend([words] if is_one_value else [[word] for word in words])
    if not any(len(values) > 1 for values in axes.values()):
        raise SettingsError("No flag has several values. Give at least one several, as in `--dpo_beta 0.05 0.1 0.3`.")
    if {"run_name", "dry_run"} & set(axes):
        raise SettingsError("--run_name and --dry_run do not work in a sweep. Omit them: settings name the runs.")
    points = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        flags = [word for name, words in chosen.items() for word in (f"--{name}", *words)]
        with contextlib.redirect_stdout(io.StringIO()):
            settings = load_settings(cls, {}, flags)
        if cls.step == "dpo" and not OWN_REFERENCE & set(settings.trl):
            flags += ["--precompute_ref_log_probs", "True"]
        values = {name: " ".join(words) for name, words in chosen.items() if len(axes[name]) > 1}
        points.append(Point(values, flags, settings.digest()))
    if len({point.digest for point in points}) < len(points):
        raise SettingsError(
            "Two points of the grid are the same run. Omit repeated values, and flags that change no run."
        )
    return points, settings.output_dir


def settings_of(notebook: Path) -> Any:
    """The Settings class in a notebook's cell tagged "parameters". Raises SettingsError."""
    import jupytext

    try:
        cells = [cell for cell in jupytext.read(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
        codes = [compile(cell.source, str(notebook), "exec", dont_inherit=True) for cell in cells]
    except (ValueError, SyntaxError) as error:
        raise SettingsError(f"{short_path(notebook)} is no notebook: {error}.") from None
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        if issubclass(names.get("Settings", object), RunSettings):
            return names["Settings"]
    raise SettingsError(f"{short_path(notebook)} has no Settings in a cell tagged parameters.")


def _run(notebook: Path, point: Point, log: Path, lock: Any) -> None:
    """One run in its own process, its output in `log`; prints the lines worth following."""
    command = [sys.executable, "-u", str(notebook), *point.flags]
    inherited: Any = {"pass_fds": [lock.fileno()]} if os.name == "posix" else {}
    # Two file objects: with one, reading would move the position at which the run writes.
    with log.open("wb") as file, log.open(encoding="utf-8", errors="replace") as lines:
        # In its own session Ctrl-C does not reach the run twice: it is told once, and saves a checkpoint.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **inherited)
        position = 0
        try:
            while True:
                point.status = process.poll()
                lines.seek(position)
                while (line := lines.readline()).endswith("\n"):
                    position = lines.tell()
                    if match := RUN_LINE.match(line):
                        point.run = str(Path(match[1] or match[2]).absolute())
                    if SHOWN_LINE.match(line):
                        print(f"  {line.rstrip()}", flush=True)
                if point.status is not None:
                    return
                time.sleep(0.2)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def _lock_sweep(lock: Any) -> None:
    """Lock a sweep's file. Its runs inherit the lock, so a run that outlives a killed sweep is waited for."""
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for a run that an earlier start of this sweep has left running.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)


def summarize(folder: Path, points: Sequence[Point]) -> None:
    """Plot the runs over one another in curves.png, and print a table of their held-out metrics."""
    from rich.table import Column, Table

    results = [point.result() for point in points]
    metrics = [name for name in METRICS if any(name in (r["metrics"] or {}) for r in results)]
    heads = [name.removeprefix("eval_") for name in metrics]
    table = Table(*points[0].values, *heads, "diagnostics", Column("run", overflow="fold"))
    table.title = "Held-out metrics at the end"
    for point, result in zip(points, results, strict=True):
        values = [f"{(result['metrics'] or {}).get(name, math.nan):.4g}" for name in metrics]
        diagnostics = ", ".join(diagnostic["name"] for diagnostic in result["diagnostics"] or []) or "-"
        status = result["status"] or "failed"
        run = Path(point.run).name + ("" if status == "finished" else f" {status}")
        table.add_row(*point.values.values(), *values, diagnostics, run)
    histories = {point.label: read_history(Path(point.run) / "metrics.jsonl") for point in points if point.run}
    logged = {name: history for name, history in histories.items() if history}
    show(plot_runs(logged, folder.name), save_as=folder / "curves.png")
    show(table, f"Wrote {short_path(folder / 'curves.png')}.")
