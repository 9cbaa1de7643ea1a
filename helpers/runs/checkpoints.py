"""Checkpoints that can be trusted: a marker with every file's size and hash, written after all the rest."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.core import SettingsError, UserError, find_path, short_path

MANIFEST = "checkpoint_manifest.json"
DISK_FULL_ERRORS = ("no space left", "disk quota exceeded", "file write failed", "pytorchstreamwriter failed writing")


def write_manifest(checkpoint: Path) -> None:
    """Write the marker of a checkpoint whose files are all there."""
    files = {
        str(file.relative_to(checkpoint)): _file_digest(file)
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    draft = checkpoint / f".{MANIFEST}"
    draft.write_text(json.dumps(files, indent=1) + "\n")
    draft.replace(checkpoint / MANIFEST)


def checkpoint_error(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or "" where every file is what the marker says."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return "it was not written to its end"
    for name, seal in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != seal["bytes"] or _file_digest(file) != seal:
            return f"{name} is not what was saved"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N of a run, the newest first."""
    found = [f for f in folder.glob("checkpoint-*") if f.is_dir() and f.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step, reverse=True)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with a marker, which `set_broken_aside` has looked into."""
    return next((f for f in list_checkpoints(folder) if (f / MANIFEST).is_file()), None)


def quarantine_incomplete(folder: Path) -> None:
    """Rename each checkpoint newer than the newest whole one, and say why: it is not resumed from, nor counted."""
    for checkpoint in list_checkpoints(folder):
        if not (fault := checkpoint_error(checkpoint)):
            return
        aside = checkpoint.with_name(f"broken-{checkpoint.name}")
        remove_quarantined(folder)  # the last one is enough to look into
        checkpoint.rename(aside)
        print(f"{short_path(checkpoint)} is set aside as {aside.name}: {fault}.")


def remove_quarantined(folder: Path) -> None:
    """Remove what `set_broken_aside` has put aside."""
    for broken in folder.glob("broken-checkpoint-*"):
        shutil.rmtree(broken, ignore_errors=True)


def quarantine_later(folder: Path, named: Path) -> None:
    """Rename each checkpoint of the run that comes after `named`, one of its own: they belong to a road not taken."""
    for later in list_checkpoints(folder) if named.parent == folder.resolve() else ():
        if _step(later) > _step(named):
            aside = later.with_name(f"left-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
            print(f"{short_path(later)} is set aside as {aside.name}: it comes after {named.name}.")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def check_writable(folder: Path) -> None:
    """Raise UserError now, and not after a model has been fetched."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{short_path(there)} cannot be written: give another --output_dir, or mend its permissions")


def check_process_count(folder: Path, before: int | None, now: int, same_rows: bool) -> None:
    """Raise SettingsError where a run would go on with another number of processes, and other rows to a step."""
    if before and before != now and not same_rows and last_complete_checkpoint(folder):
        raise SettingsError(
            f"{short_path(folder)} was begun with {before} processes: with {now} a step would have other rows. Go on "
            f"with {before}, or anew with --resume never (--global_batch_size makes a step the same with any number)"
        )


def check_same_settings(folder: Path, record: dict[str, Any], identity: dict[str, Any], origin: str) -> None:
    """Raise SettingsError where the run whose record this is was made with other settings, or from something else."""
    before = record["identity"] | {"what it starts from": record.get("origin", origin)}
    now = json.loads(json.dumps(identity | {"what it starts from": origin}, default=str))
    other = [f"{n} {before.get(n)!r} → {now.get(n)!r}" for n in now | before if before.get(n) != now.get(n)]
    if other:
        raise SettingsError(
            f"{short_path(folder)} was made with other settings ({', '.join(other)}): "
            "give another --run_name, or --resume never to replace it"
        )


def resolve_checkpoint(name: str) -> Path:
    """The folder that --resume PATH names. Raises UserError where it is not a whole checkpoint."""
    path = find_path(name)
    if path is None or not path.is_dir():
        raise UserError(f"--resume {name!r} is neither auto nor never, nor the folder of a checkpoint")
    if fault := checkpoint_error(path):
        raise UserError(f"--resume {name!r} cannot be resumed from: {fault}")
    return path.resolve()


def patch_step_comparison() -> None:
    """Let transformers 5.23 (trainer.py, _init_training_state) compare what a checkpoint was made with as steps: it
    takes a share of all steps (save_steps 0.2) for another number than the steps that it came to, and warns."""
    from transformers import trainer, trainer_utils

    theirs: Callable[[Any, Any], None] = trainer_utils.compare_trainer_and_checkpoint_args

    def compare(args: Any, state: Any) -> None:
        same = copy.copy(args)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (share := getattr(args, name) or 0) < 1:
                setattr(same, name, math.ceil(state.max_steps * share))
        theirs(same, state)

    vars(trainer)["compare_trainer_and_checkpoint_args"] = compare


def explain_failure(error: BaseException, folder: Path) -> UserError | None:
    """`_explain`, as an error that one process of several may have alone."""
    explained = _explain(error, folder)
    if explained is not None:
        explained.everywhere = "WORLD_SIZE" not in os.environ
    return explained


def _explain(error: BaseException, folder: Path) -> UserError | None:
    """The one line for what ends long runs: a full disk, a folder that cannot be written, too little memory. None for
    what is not of these. What a full disk cut short is removed, so that its space is free again."""
    text = f"{type(error).__name__} {error}".lower()
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in DISK_FULL_ERRORS):
        for checkpoint in list_checkpoints(folder):
            if not (checkpoint / MANIFEST).is_file():
                shutil.rmtree(checkpoint, ignore_errors=True)
        remove_quarantined(folder)
        where = short_path(str(getattr(error, "filename", None) or folder))
        return UserError(f"the disk is full: free some space for {where}, then {_resume_hint(folder)}")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        what = getattr(error, "filename", None) or folder
        return UserError(
            f"{short_path(str(what))} cannot be written: give another --output_dir, or mend its permissions"
        )
    if (
        isinstance(error, MemoryError)
        or "outofmemory" in text
        or "out of memory" in text
        or "can't allocate memory" in text
    ):
        return UserError(
            "out of memory: lower --per_device_train_batch_size (and raise --gradient_accumulation_steps to match) or "
            f"--max_length, or give --gradient_checkpointing True or --tuning qlora; {_resume_hint(folder, changed=True)}"
        )
    return None


def _resume_hint(folder: Path, changed: bool = False) -> str:
    last = last_complete_checkpoint(folder)
    if changed:
        return f"{last.name} stays as it is" if last else "no checkpoint had been saved"
    return f"give the same command: it goes on from {last.name}" if last else "give the same command again"


def _file_digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return {"bytes": os.fstat(content.fileno()).st_size, "sha256": digest}
