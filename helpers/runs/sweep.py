"""Run one notebook over a grid of settings, then compare the runs in a plot and a table.

    python -m helpers sweep notebooks/02_dpo.py --dpo_beta 0.05 0.1 0.3 --recipe recipes/demo.yaml

A flag with several values is an axis of the grid. A flag that itself takes several values (--loss_type sigmoid sft) is
an axis if it is repeated: --loss_type sigmoid --loss_type sigmoid sft. Run the same command again to do what is
missing: finished runs are kept, and a stopped run is resumed.

DPO runs compute the reference's log-probabilities before training and cache them (--precompute_ref_log_probs). TRL's
cache depends on the rows and on all weights, so runs share it along --dpo_beta, --loss_type and --learning_rate. Each
value of --seed, --lora_r, --tuning or of a data setting computes them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.core import (
    Interrupted,
    SettingsError,
    UserError,
    find_path,
    fingerprint,
    handle_signals,
    print_help_if_asked,
    short_path,
    show,
    write_json,
)
from helpers.runs.checkpoints import remove_drafts
from helpers.runs.curves import plot_runs, read_history
from helpers.runs.run import read_run
from helpers.settings import trl_fields
from helpers.settings.fields import RunSettings
from helpers.settings.load import load_settings, own_types
from helpers.settings.sources import split_flags, takes_several

RUN_LINE = re.compile(r"Run: (.+)|(.+) (?:is already finished\.|was already finished)")  # printed by start_run
SHOWN_LINE = re.compile(r"step +\d+[:/]|Run: |Resuming|error: ")
# TRL 1.16 (dpo_trainer.py, _precompute_ref_logps) caches by the dataset's fingerprint and the policy's weights. These
# settings choose for themselves, or change what would be cached.
OWN_REFERENCE = {"precompute_ref_log_probs", "sync_ref_model", "ld_alpha"}
METRICS = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen")


@dataclasses.dataclass
class Point:
    """One run of the grid: its values on the axes, its flags, and its result."""

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
    """Run the grid. Raises SettingsError before the first run, and UserError after the last one if a run failed."""
    print_help_if_asked(argv, __doc__)
    notebook = find_path(argv[0]) if argv and not argv[0].startswith("-") else None
    if notebook is None or notebook.suffix != ".py":
        raise SettingsError("usage: python -m helpers sweep notebooks/02_dpo.py --dpo_beta 0.05 0.1 0.3 [flags]")
    points, output_dir = plan(notebook, argv[1:])
    folder = output_dir / f"sweep-{fingerprint(notebook.stem, *sorted(p.digest for p in points))[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        for i, point in enumerate(points):
            print(f"[{i + 1}/{len(points)}] {point.label}", flush=True)
            _run(notebook, point, folder / f"{i + 1}.log", lock)
            results = [dataclasses.asdict(point) | {"record": point.result()} for point in points]
            write_json(folder / "sweep.json", results)
    summarize(folder, points)
    if failed := [f"{point.label} (status {point.status})" for point in points if point.status]:
        logs = f"{short_path(folder)}/*.log"
        raise UserError(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}. See {logs}.")


def plan(notebook: Path, argv: Sequence[str]) -> tuple[list[Point], Path]:
    """The points of the grid, each checked as by the notebook, and the folder of their runs. Raises SettingsError."""
    cls = settings_of(notebook)
    types = trl_fields.field_types(cls.step) | own_types(cls)
    lists = {name for name, kind in types.items() if takes_several(kind)}
    axes: dict[str, list[list[str]]] = {}
    for name, words in split_flags(list(argv)):
        is_one_value = name in lists or len(words) < 2
        axes.setdefault(name, []).extend([words] if is_one_value else [[word] for word in words])
    if not any(len(values) > 1 for values in axes.values()):
        raise SettingsError("No flag has several values. Give one several, as in `--dpo_beta 0.05 0.1 0.3`.")
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
        except Interrupted:
            process.terminate()
            process.wait()
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Any]:
    """Hold the sweep's lock. Its runs inherit it, so a run that outlives a killed sweep is waited for."""

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"Stopped by {name}. Run the same command again to resume.", 128 + number)

    handle_signals(stop)
    with (folder / ".lock").open("w") as lock:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Waiting for a run that an earlier start of this sweep has left running.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        remove_drafts(folder)
        yield lock


def summarize(folder: Path, points: Sequence[Point]) -> None:
    """Plot the runs over one another in curves.png, and print a table of their held-out metrics."""
    from rich.table import Column, Table

    histories = {point.label: read_history(Path(point.run) / "metrics.jsonl") for point in points if point.run}
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
    logged = {name: history for name, history in histories.items() if history}
    show(plot_runs(logged, folder.name), save_as=folder / "curves.png")
    show(table, f"Wrote {short_path(folder / 'curves.png')}.")
