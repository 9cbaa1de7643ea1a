"""Checkpoints with a manifest of sizes and hashes, hashes of a finished run's files, and errors that end long runs."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from helpers.core import (
    SettingsError,
    UserError,
    find_path,
    is_main_process,
    print_help_if_asked,
    short_path,
    write_json,
)

MANIFEST = "checkpoint_manifest.json"
# The files of a finished run that make its model; run.json has their hashes.
MODEL_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
                  "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "*.py")  # fmt: skip
SLOW_BYTES = 2e9  # to hash; that takes seconds
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


def hash_model_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of every file of the model in `folder`, by name."""
    return {file.name: _file_digest(file) for file in _model_files(folder)}


def changed_model_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What differs in `folder` from `files` (of `hash_model_files`), such as "config.json has changed". Sizes are
    compared first; each file is hashed once in a process."""
    now = {file.name: file.stat().st_size for file in _model_files(folder)}
    changes = [f"{name} is missing" for name in files if name not in now]
    changes += [f"{name} was added" for name in now if name not in files]
    changes += [f"{name} has changed" for name in now if name in files and files[name]["bytes"] != now[name]]
    if not changes:
        if (total := sum(now.values())) > SLOW_BYTES and is_main_process():
            print(f"Comparing {total / 1e9:.1f} GB in {short_path(folder)} with the hashes in its run.json.")
        changes = [f"{name} has changed" for name in now if _file_digest(folder / name) != files[name]]
    return changes


def main(argv: Sequence[str]) -> None:
    """Accept files of a finished run that were changed on purpose: python -m helpers accept outputs/<run>"""
    print_help_if_asked(argv, main.__doc__)
    folder = find_path(argv[0]) if len(argv) == 1 else None
    if folder is None or not (folder / "run.json").is_file():
        raise SettingsError("usage: python -m helpers accept outputs/<run>")
    record = read_run(folder)
    changes = changed_model_files(folder, record.get("files") or {}) if record.get("status") == "finished" else []
    if changes:  # another fingerprint: what was merged, answered or judged before was another model's
        files = hash_model_files(folder)
        record |= {"files": files, "fingerprint": hash_files(map(folder.joinpath, files))}
        write_json(folder / "run.json", record)
    print(f"{short_path(folder)}: {', '.join(changes)}. Accepted." if changes else "Nothing has changed.")


def check_model_folder(folder: Path) -> None:
    """Raise UserError for a checkpoint, which is not the result of its run, and for files of a finished run that have
    changed since. Does nothing for a folder from elsewhere."""
    for each in (folder, folder.parent):  # a checkpoint may have an adapter in a subfolder
        of = read_run(each.parent) if re.fullmatch(r"(broken-)?checkpoint-\d+", each.name) else {}
        if of:
            place = short_path(each.parent)
            fix = f"Use {place}" if of.get("status") == "finished" else f"Finish that run, then use {place}"
            what = f"{short_path(folder)} is a checkpoint of the run {place} ({of.get('status')})"
            raise UserError(f"{what}. {fix}. To use the checkpoint itself, copy it to another folder.")
    record = read_run(folder)
    files = record.get("files") if record.get("status") == "finished" else None
    if files and (changes := changed_model_files(folder, files)):
        place = short_path(folder)
        raise UserError(
            f"{place} is not as its run finished: {', '.join(changes)}. Restore it, or repeat that run with `--resume "
            f"never`. If you changed it on purpose, run `python -m helpers accept {shlex.quote(place)}`."
        )


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; {} if it is missing or not readable."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def _model_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in MODEL_PATTERNS for file in folder.glob(pattern) if file.is_file()})


def hash_files(files: Iterable[Path]) -> str:
    """Sixteen hex digits of a hash over the content of files, whose order does not matter."""
    digests = [bytes.fromhex(_file_digest(file)["sha256"]) for file in sorted(files)]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _file_digest(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"bytes": stat.st_size, "sha256": _sha256(file.absolute(), stat.st_size, stat.st_mtime_ns)}


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Hash a file. Its size and time are only for the cache: a file is read again when they have changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
