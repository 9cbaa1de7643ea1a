"""Run folders: run.json, how a run starts, resumes and finishes, and which run it came from."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.core import (
    REPO,
    SIGNALS,
    Interrupted,
    SettingsError,
    UserError,
    find_path,
    is_main_process,
    short_path,
    wait_for_everyone,
    write_json,
)
from helpers.runs import checkpoints
from helpers.runs.checkpoints import check_model_folder, load_record, shell_quote
from helpers.runs.checkpoints import read_run as read_run

STEPS = {"sft": "instruction-tuned", "dpo": "aligned with DPO", "merge": "merged"}
TRAINING_STEPS = ("sft", "dpo")
NOTEBOOKS = {"sft": "01_sft.py", "dpo": "02_dpo.py", "merge": "03_merge_push.py", "vibes": "04_vibes.py",
             "pairs": "06_pairs.py"}  # fmt: skip
NEXT = {"sft": "02_dpo.py --sft_run", "dpo": "03_merge_push.py --run", "merge": "04_vibes.py --models"}
PAIR_FILES = ("preferences.jsonl", "control.jsonl")  # of a run of 06_pairs.py
COUNTS = ("read", "kept", "train", "eval")  # of rows, in a run's `data`


@dataclasses.dataclass
class Run:
    """One folder under outputs/ and its run.json."""

    folder: Path
    record: dict[str, Any]
    overwrite: bool = False  # delete the older run in the folder with the first `save`
    restart: bool = False  # --resume never: the same command would start over
    read: dict[str, Any] | None = None  # the record in the folder when the run was started, until it is locked
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
        return self._of_answers("loading")

    def _of_answers(self, key: str) -> dict[str, Any]:
        answers = Path(str(self.record.get("answers_dir") or "-")).name
        return self.record.get(key) or read_run(self.folder.parent / answers).get(key) or {}

    def matches_model(self, name: str, runs: list[Run]) -> bool:
        """Whether the model `name` of this comparison is one of `runs`, which may have been renamed since, or trained
        again. Its weights tell, or the name if they were not recorded."""
        weights, judged = self._of_answers("weights").get(name), str(self.record.get("finished", ""))
        same = [run for run in runs if weights and weights == run.record.get("fingerprint")]
        named = [run.record for run in runs if run.name == name]
        return bool(same) or any(not weights or judged < str(record.get("finished", "")) for record in named)

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    def set(self, **fields: Any) -> None:
        """Add `fields` to the record; the next `save` writes them. Raises SettingsError for `data` of other rows than
        those that the run has trained on; for a finished run, only prints a line."""
        before, data = self.record.get("data") or {}, fields.get("data") or {}
        if before.get("hash", data.get("hash")) != data.get("hash", before.get("hash")):
            changes = [f"{n} {before[n]} → {data[n]}" for n in COUNTS if before.get(n) != data.get(n)]
            message = (
                f"{short_path(self.folder)} trained on different rows: {', '.join(changes) or 'their texts differ'}."
            )
            if not self.finished:
                raise SettingsError(f"{message} Use another --run_name, or `--resume never` to replace it.")
            print(f"note: {message}")
            return
        self.record |= fields

    def save(self, **fields: Any) -> None:
        """Add `fields` to the record and write run.json atomically."""
        self.set(**fields)
        if is_main_process():
            self.lock()
            place = self.folder.resolve()  # of a link to a folder, what it points to is replaced
            if self.overwrite:
                shutil.rmtree(place)
            place.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", self.record)
        self.overwrite = False

    def lock(self) -> None:
        """Keep other processes from writing to the folder. Raises UserError if one does, or did since `start_run`."""
        self.folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        is_new = checkpoints.lock_folder(self.folder)
        if is_new and self.read is not None and self.read != read_run(self.folder):
            checkpoints.unlock_folder(self.folder)
            raise UserError(
                f"{short_path(self.folder)} was written by another process meanwhile. Run the same command again."
            )
        self.read = None

    @contextlib.contextmanager
    def training(self) -> Iterator[str | None]:
        """Record the status of the training inside; yields the checkpoint to resume from, or None. Raises UserError for
        what the user can fix: see `checkpoints.explain_failure`."""
        main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
        if is_main_process():
            self.lock()
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
            failure = {} if is_stopped else {"error": str(explained or f"{type(error).__name__}: {error}")}
            with contextlib.suppress(OSError):  # a full disk has no room for this either
                self.save(status="interrupted" if is_stopped else "failed", **failure)
            if self.when_stopped:
                self.when_stopped(self.folder)
            checkpoints.unlock_folder(self.folder)
            if explained:
                raise explained from None
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def finish(self, **fields: Any) -> None:
        """Mark the run as finished, with a fingerprint of the weights in its folder and hashes of a model's files."""
        self.record.pop("error", None)
        if is_main_process():
            checkpoints.remove_quarantined(self.folder)
            others = [read_run(file.parent) for file in self.folder.parent.glob("[!.]*/run.json")]
            fields["order"] = 1 + max((other.get("order", 0) for other in others), default=0)
            fields["fingerprint"] = checkpoints.hash_files(self.folder.glob("*.safetensors"))
            if self.record.get("step") in STEPS:
                fields["files"] = checkpoints.hash_model_files(self.folder)
        self.save(status="finished", finished=utc_now(), **fields)
        checkpoints.unlock_folder(self.folder)

    def next_command(self, recipe: str = "", place: str = "") -> str:
        """The command of the next step; `place` is how it names this run's folder."""
        step, folder = self.record["step"], self.folder
        weights = self.record.get("fingerprint")
        is_merged = any(run.finished and run.record.get("origin") == weights for run in list_merges(folder))
        if step == "dpo" and (not self.is_adapter or is_merged):
            step = "merge"  # a fully tuned model needs no merge, and another one is merged already
        models = place or shell_quote(folder)
        if self.record["step"] == "merge":  # 04 compares a run of 02 with what it started from, and else two models
            parent = find_parent(folder, self.record) or folder
            is_of_dpo = read_run(parent).get("step") == "dpo"
            models = shell_quote(parent) if is_of_dpo else f"{shell_quote(self.base_model)} {models}"
        code = " --trust_remote_code" if (self.record.get("settings") or {}).get("trust_remote_code") else ""
        return f"python notebooks/{NEXT[step]} {models}{code}" + (f" --recipe {shell_quote(recipe)}" if recipe else "")

    def metrics_table(self) -> Any:
        """The run's metrics as a table for `show`."""
        from rich.table import Column, Table

        table = Table("metric", Column("value", justify="right"), box=None, pad_edge=False)
        for name, value in self.record.get("metrics", {}).items():
            table.add_row(name, f"{value:.6g}")
        return table


def find_run(output_dir: Path, which: str, step: str, *others: str) -> Run:
    """A finished run of `step`: the newest for "latest", or the one in the folder `which`, which may also be of one of
    the `others`. Raises UserError."""
    if which == "latest":
        if finished := [run for run in list_runs(output_dir, step) if run.finished]:
            return finished[0]
        make = f"Run `python notebooks/{NOTEBOOKS[step]}`" if step in NOTEBOOKS else "Make one"
        raise UserError(f"There is no finished {step} run in {short_path(output_dir)}. {make}, or name a run's folder.")
    folder = find_path(which) or find_path(str(output_dir / which))
    record = load_record(folder) if folder else {}
    if folder and not record:
        check_model_folder(folder.resolve())
    if folder is None or not record:
        raise UserError(f"{which!r} is not the folder of a run: it has no run.json.")
    status = record.get("status")
    if status != "finished" or record.get("step") not in (step, *others):
        raise UserError(f"{which!r} is a {record.get('step')} run with status {status}, not a finished {step} run.")
    return Run(folder.resolve(), record)


def resolve_pairs(settings: Any) -> None:
    """Replace latest-pairs and folders of 06_pairs.py in --dataset_id by the file of pairs, in one spelling: the name
    of a run depends on it. Raises UserError if there is no such run."""
    words, before = [], settings.values().get("dataset_id", ())
    for word in before:
        entry: dict[str, Any] = {"id": word}
        with contextlib.suppress(ValueError):
            entry = json.loads(word) if word.startswith("{") else entry
        path = find_path(str(entry.get("id")))
        if entry.get("id") == "latest-pairs":
            path = find_run(settings.output_dir, "latest", "pairs").folder
        file = path / PAIR_FILES[0] if path and path.is_dir() else path
        if file and file.name in PAIR_FILES and file.is_file() and read_run(file.parent).get("step") == "pairs":
            file = file.resolve()
            entry |= {"id": str(file.relative_to(REPO) if file.is_relative_to(REPO) else file)}
            word = entry["id"] if entry.keys() == {"id"} else json.dumps(entry)
        words.append(word)
    if words != [*before]:
        settings.override(settings.sources["dataset_id"], dataset_id=tuple(words))


def list_runs(output_dir: Path, step: str) -> list[Run]:
    """The runs of `step` in a folder: the one that finished last first, unfinished ones at the end."""
    runs = [Run(file.parent, read_run(file.parent)) for file in output_dir.glob("[!.]*/run.json")]
    matching = [run for run in runs if run.record.get("step") == step]
    matching.sort(key=lambda r: (r.record.get("order", 0), r.record.get("finished", ""), r.name), reverse=True)
    return matching  # by `order`, because a clock may be set back


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


def recorded_variables(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The variables of the chat template that the rows of a training were rendered with, by its `lineage`: those of all
    rows, or where rows differ, those of the settings."""
    run = next((run for run in runs if run.get("data")), {})
    kinds = [name for name in (run.get("data") or {}).get("rendered_with", {}) if name.startswith("{")]
    text = kinds[0] if len(kinds) == 1 else (run.get("settings") or {}).get("chat_template_kwargs")
    return dict(json.loads(text or "{}"))


def serve_options(variables: dict[str, Any]) -> str:
    """The option of `vllm serve` that sets variables of the chat template for all requests; "" without any."""
    return f" --default-chat-template-kwargs {shlex.quote(json.dumps(variables))}" if variables else ""


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


def relative_place(output_dir: Path, path: Path | None) -> str | None:
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
    kept = {name: 2 if Path(name).name in PAIR_FILES else 1 for name in names}  # with the run that made them
    return [name if is_hub_id(name) else "/".join(Path(name).parts[-kept[name] :]) for name in names]


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
