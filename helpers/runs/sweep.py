"""One notebook over a grid of settings, one run after another, then their curves over one another and a table.

    python -m helpers sweep notebooks/02_dpo.py --dpo_beta 0.05 0.1 0.3 --recipe recipes/demo.yaml

A flag with several values is an axis of the grid. One that takes several values itself (--loss_type sigmoid sft) is an
axis where it is given several times, an alternative each: --loss_type sigmoid --loss_type sigmoid sft. Given again, the
same command does what is missing: finished runs are left alone, and a run that was stopped goes on.

DPO's runs compute the reference's log-probabilities before they train, and keep them for later runs
(--precompute_ref_log_probs). TRL keeps them by the rows and by all weights of the policy, those of its new adapter too:
runs share them along --dpo_beta, --loss_type, --learning_rate and whatever else leaves both alone. Each value of
--seed, --lora_r, --tuning or of a setting of the data computes them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from helpers.core import (
    Interrupted,
    SettingsError,
    UserError,
    find_path,
    install_error_hook,
    print_help_if_asked,
    short_path,
    show,
    write_json,
)
from helpers.runs.curves import Curves, plot_runs
from helpers.runs.run import read_run
from helpers.settings import load as layers
from helpers.settings import trl_fields
from helpers.settings.fields import RunSettings
from helpers.settings.load import load_settings

NAMED = re.compile(r"Run: (.+)|(.+) (?:is finished: nothing to do|was finished before)")  # what start_run says
# TRL 1.16 (dpo_trainer.py, _precompute_ref_logps) keeps the reference's log-probabilities by the data set's fingerprint
# and a hash of the policy's state_dict. Not where one of these says how they are to be computed, or that they change.
OWN_REFERENCE = {"precompute_ref_log_probs", "sync_ref_model", "ld_alpha"}
FOLLOWED = re.compile(r"step +\d+[:/]|Run: |Going on|error: ")
METRICS = {
    "eval_loss": "loss",
    "eval_rewards/margins": "margin",
    "eval_rewards/accuracies": "accuracy",
    "eval_logps/chosen": "chosen logp",
}


@dataclasses.dataclass
class Point:
    """One run of the grid: what sets it apart, its flags, and what became of it."""

    values: dict[str, str]
    flags: list[str]
    digest: str
    run: str = ""
    status: int | None = None  # of its process

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values.items())


def main(argv: Sequence[str]) -> None:
    """Run the grid. Raises UserError where a run failed, after all the others, and SettingsError before any."""
    install_error_hook()
    print_help_if_asked(argv, __doc__)
    notebook = find_path(argv[0]) if argv and not argv[0].startswith("-") else None
    if notebook is None or notebook.suffix != ".py":
        raise SettingsError("usage: python -m helpers sweep notebooks/02_dpo.py --dpo_beta 0.05 0.1 0.3 [flags]")
    points, output_dir = plan(notebook, argv[1:])
    digest = hashlib.sha256(json.dumps([notebook.stem, *sorted(p.digest for p in points)]).encode()).hexdigest()[:6]
    folder = output_dir / f"sweep-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        for i, point in enumerate(points):
            print(f"[{i + 1}/{len(points)}] {point.label}", flush=True)
            _run(notebook, point, folder / f"{i + 1}.log", lock)
            _write(folder, points)
    summarise(folder, points)
    if failed := [f"{point.label} (status {point.status})" for point in points if point.status]:
        where = short_path(folder)
        raise UserError(f"{len(failed)} of {len(points)} runs did not finish: {'; '.join(failed)}; see {where}/*.log")


def plan(notebook: Path, argv: Sequence[str]) -> tuple[list[Point], Path]:
    """The points of the grid, each checked as the notebook would, and the folder that its runs go to."""
    cls = settings_of(notebook)
    kinds = trl_fields.field_types(cls.step) | {name: str(hint) for name, hint in get_type_hints(cls).items()}
    lists = {name for name, kind in kinds.items() if "list[" in kind or "dict" in kind or "tuple" in kind}
    given: dict[str, list[list[str]]] = {}
    for name, words in layers.split_flags(list(argv)):
        one = name in lists or len(words) < 2
        given.setdefault(name, []).extend([words] if one else [[word] for word in words])
    if not any(len(values) > 1 for values in given.values()):
        raise SettingsError("nothing varies: give a flag several values, as in --dpo_beta 0.05 0.1 0.3")
    if {"run_name", "dry_run"} & set(given):
        raise SettingsError("--run_name and --dry_run are not for a sweep: a run's name follows from its settings")
    points = []
    for chosen in itertools.product(*given.values()):
        given_here = dict(zip(given, chosen, strict=True))
        flags = [word for name, words in given_here.items() for word in (f"--{name}", *words)]
        with contextlib.redirect_stdout(io.StringIO()):
            settings = load_settings(cls, {}, flags)
        if cls.step == "dpo" and not OWN_REFERENCE & set(settings.trl):
            flags += ["--precompute_ref_log_probs", "True"]
        values = {name: " ".join(words) for name, words in given_here.items() if len(given[name]) > 1}
        points.append(Point(values, flags, settings.digest()))
    if len({point.digest for point in points}) < len(points):
        raise SettingsError("two points of the grid are one run: a value stands twice, or it changes no run")
    return points, settings.output_dir


def settings_of(notebook: Path) -> Any:
    """The Settings of a notebook: the class that its cell tagged "parameters" defines. Raises SettingsError."""
    import jupytext

    for cell in jupytext.read(notebook).cells:
        if "parameters" in cell.metadata.get("tags", []):
            names: dict[str, Any] = {}
            exec(compile(cell.source, str(notebook), "exec", dont_inherit=True), names)
            if issubclass(names.get("Settings", object), RunSettings):
                return names["Settings"]
    raise SettingsError(f"{short_path(notebook)} has no cell of Settings, tagged parameters")


def _run(notebook: Path, point: Point, log: Path, lock: Any) -> None:
    """One run in a process of its own, its output in `log`; the lines that one follows are shown."""
    command = [sys.executable, "-u", str(notebook), *point.flags]
    held: Any = {"pass_fds": [lock.fileno()]} if os.name == "posix" else {}
    # Read from a file of its own: in a shared one, moving to what is unread would move where the run writes.
    with log.open("wb") as file, log.open(encoding="utf-8", errors="replace") as lines:
        # in a session of its own Ctrl-C does not reach it twice: it is told once, and saves a checkpoint
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **held)
        position = 0
        try:
            while True:
                point.status = process.poll()
                lines.seek(position)
                while (line := lines.readline()).endswith("\n"):
                    position = lines.tell()
                    _follow(point, line.rstrip())
                if point.status is not None:
                    return
                time.sleep(0.2)
        except Interrupted:
            process.terminate()
            process.wait()
            raise


def _follow(point: Point, line: str) -> None:
    if named := NAMED.match(line):
        point.run = str(Path(named[1] or named[2]).absolute())
    if FOLLOWED.match(line):
        print(f"  {line}", flush=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Any]:
    """Hold the sweep's lock. Its runs inherit it, so that one that outlives a killed sweep is waited for."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}: the same command goes on", 128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with (folder / ".lock").open("w") as lock:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Waiting for a run that an earlier start of this sweep has left.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _write(folder: Path, points: Sequence[Point]) -> None:
    write_json(folder / "sweep.json", [dataclasses.asdict(point) | {"record": _result(point)} for point in points])


def _result(point: Point) -> dict[str, Any]:
    """Status, metrics and diagnostics of a point's run, as run.json has them."""
    record = read_run(Path(point.run)) if point.run else {}
    return {name: record.get(name) for name in ("status", "metrics", "diagnostics")}


def summarise(folder: Path, points: Sequence[Point]) -> None:
    """Draw the runs over one another, and print their table: curves.png and sweep.json of the sweep's folder."""
    from rich.table import Column, Table

    histories = {}
    for point in points:
        with contextlib.suppress(UserError):  # a run that failed before its first log
            histories[point.label] = Curves.read(Path(point.run)).history if point.run else []
    results = [_result(point) for point in points]
    metrics = {name: head for name, head in METRICS.items() if any(name in (r["metrics"] or {}) for r in results)}
    table = Table(*points[0].values, *metrics.values(), "diagnostics", Column("run", overflow="fold"))
    table.title = "held out, at the end"
    for point, result in zip(points, results, strict=True):
        values = [f"{(result['metrics'] or {}).get(name, math.nan):.4g}" for name in metrics]
        found = ", ".join(diagnostic["name"] for diagnostic in result["diagnostics"] or [])
        name, status = Path(point.run).name, result["status"] or "failed"
        table.add_row(
            *point.values.values(), *values, found or "-", name if status == "finished" else f"{name} {status}"
        )
    show(plot_runs({name: h for name, h in histories.items() if h}, folder.name), save_as=folder / "curves.png")
    show(table, f"Drawn: {short_path(folder / 'curves.png')}")
