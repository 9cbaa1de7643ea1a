"""Checkpoints with a manifest of sizes and hashes, and one-line errors for what ends long runs."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import SettingsError, UserError, find_path, short_path, write_json

MANIFEST = "checkpoint_manifest.json"
DISK_FULL_ERRORS = ("no space left", "disk quota exceeded", "file write failed", "pytorchstreamwriter failed writing")
OUT_OF_MEMORY_ERRORS = ("memoryerror", "outofmemory", "out of memory", "can't allocate memory")
BATCH_FLAGS = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps to match) or --max_length, or use "
    "--gradient_checkpointing True or --tuning qlora"
)


def write_manifest(checkpoint: Path) -> None:
    """Write the size and SHA-256 of every file of a checkpoint; the last step of saving it."""
    files = {str(f.relative_to(checkpoint)): _file_digest(f) for f in sorted(checkpoint.rglob("*")) if f.is_file()}
    write_json(checkpoint / MANIFEST, files)


def checkpoint_error(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; "" if every file matches its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"no complete {MANIFEST}"
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or _file_digest(file) != expected:
            return f"{name} differs from what was saved"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-N folders of a run, newest first."""
    checkpoints = [f for f in folder.glob("checkpoint-*") if f.is_dir() and f.name.rpartition("-")[2].isdigit()]
    return sorted(checkpoints, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with a manifest. `quarantine_incomplete` has verified the files."""
    return next((f for f in list_checkpoints(folder) if (f / MANIFEST).is_file()), None)


def quarantine_incomplete(folder: Path) -> None:
    """Rename and report each checkpoint newer than the newest complete one, so that none is resumed from or counted."""
    for checkpoint in list_checkpoints(folder):
        if not (error := checkpoint_error(checkpoint)):
            return
        remove_quarantined(folder)  # one is enough to inspect
        renamed = checkpoint.rename(checkpoint.with_name(f"broken-{checkpoint.name}"))
        print(f"{short_path(checkpoint)} is incomplete ({error}). Renamed to {renamed.name}.")


def remove_quarantined(folder: Path) -> None:
    """Delete what `quarantine_incomplete` has renamed."""
    for broken in folder.glob("broken-checkpoint-*"):
        shutil.rmtree(broken, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise UserError before a model is downloaded for a folder that cannot be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _not_writable(existing)


def _not_writable(path: Any) -> UserError:
    return UserError(f"{short_path(str(path))} is not writable. Use another --output_dir, or fix its permissions.")


def check_process_count(folder: Path, before: int | None, now: int, is_same_batch: bool) -> None:
    """Raise SettingsError if a resumed run would get other rows per step from another number of processes."""
    if before and before != now and not is_same_batch and last_complete_checkpoint(folder):
        raise SettingsError(
            f"{short_path(folder)} was started with {before} processes. With {now}, a step would have other rows. "
            f"Launch {before}, or start over with `--resume never`. --global_batch_size keeps a step's rows the same."
        )


def check_same_settings(folder: Path, record: dict[str, Any], hashed: dict[str, Any], origin: str) -> None:
    """Raise SettingsError if the run in `folder` has other settings, or started from another model."""
    before = record["hashed_settings"] | {"starting point": record.get("origin", origin)}
    now = json.loads(json.dumps(hashed | {"starting point": origin}, default=str))
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


def explain_failure(error: BaseException, folder: Path) -> UserError | None:
    """A one-line error for a full disk, a path that is not writable or too little memory; None for anything else. On a
    full disk, incomplete checkpoints are deleted."""
    text = f"{type(error).__name__} {error}".lower()
    code = error.errno if isinstance(error, OSError) else None
    path = getattr(error, "filename", None) or folder
    last = last_complete_checkpoint(folder)
    if code in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in DISK_FULL_ERRORS):
        for checkpoint in list_checkpoints(folder):
            if not (checkpoint / MANIFEST).is_file():
                shutil.rmtree(checkpoint, ignore_errors=True)
        remove_quarantined(folder)
        resume = f"to resume from {last.name}" if last else "again"
        explained = UserError(
            f"The disk is full. Free some space for {short_path(str(path))}, then run the same command {resume}."
        )
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        explained = _not_writable(path)
    elif any(words in text for words in OUT_OF_MEMORY_ERRORS):
        kept = f"{last.name} is kept" if last else "No checkpoint was saved"
        explained = UserError(f"Out of memory. To fix it, {BATCH_FLAGS}. {kept}.")
    else:
        return None
    explained.everywhere = "WORLD_SIZE" not in os.environ  # one process of several may fail alone
    return explained


def hash_files(files: Iterable[Path]) -> str:
    """Sixteen hex digits of a hash over the content of files, whose order does not matter."""
    digests = [_sha256(file).digest() for file in sorted(files)]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _file_digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file).hexdigest()}


def _sha256(file: Path) -> Any:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256")
