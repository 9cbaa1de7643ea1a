"""The files of a run folder: its lock, hashes, checkpoints with a manifest, and errors that end long runs."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.core import (
    SettingsError,
    UserError,
    find_path,
    is_disk_full,
    is_main_process,
    short_path,
    write_json,
)

MANIFEST = "checkpoint_manifest.json"
# What a resume reads, and the names of its files; DeepSpeed has the optimizer's and the scheduler's in global_stepN/.
RESUMED_FROM = {
    "trainer state": r"trainer_state\.json$",
    "weights": r".*\.(safetensors|bin|distcp)$|.*model_states\.pt$",
    "optimizer": r"optimizer|global_step",
    "scheduler": r"scheduler\.pt$|global_step",
    "random state": r"rng_state.*\.pth$",
}
# The files of a finished run that make its model; run.json has their hashes.
MODEL_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
                  "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "*.py")  # fmt: skip
# Keys of run.json that are read of other runs; a value of another type means that the file is broken.
RECORD: dict[str, Any] = {
    "step": "", "status": "", "finished": "", "order": 0, "base_model": "", "settings": {}, "hashed_settings": {},
    "metrics": {}, "data": {}, "fingerprint": "", "files": {}, "plan": {}, "models": [], "loading": {}, "page": "",
    "tokens_per_microbatch": 0,
}  # fmt: skip
SLOW_BYTES = 2e9  # to hash; that takes seconds
OUT_OF_MEMORY_ERRORS = ("memoryerror", "outofmemory", "out of memory", "can't allocate memory")
BATCH_FLAGS = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps to match) or --max_length, or use "
    "--gradient_checkpointing True or --tuning qlora"
)


_locks: dict[Path, Any] = {}  # held by this process, by their files


def lock_folder(folder: Path) -> bool:
    """Keep other processes from locking a run folder until `unlock_folder`, or the end of this process. Returns whether
    this call has locked it. Raises UserError if another process has."""
    import filelock

    file = _lock_file(folder)
    if file in _locks:
        return False
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        who = ""
        with contextlib.suppress(OSError):  # Windows lets no other process read it
            who = file.read_text(errors="replace")
        who = who or "another process"
        raise UserError(f"{short_path(folder)} is in use by {who}. Wait until it finishes, or stop it.") from None
    except OSError as error:
        raise explain_failure(error, folder) or error from None
    _locks[file] = lock
    with contextlib.suppress(OSError):
        file.write_text(f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%F %T} UTC")
    remove_drafts(folder)
    remove_drafts(folder.with_name(f".{folder.name}.part"))  # of a merge
    return True


def remove_drafts(folder: Path) -> None:
    """Delete what a killed process has left of files that it was writing: see `core.atomic_write`."""
    for draft in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", draft.name):
            draft.unlink(missing_ok=True)


def unlock_folder(folder: Path) -> None:
    """Let other processes write to a run folder."""
    if lock := _locks.pop(_lock_file(folder), None):
        lock.release(force=True)


def _lock_file(folder: Path) -> Path:
    """Next to the folder, because a merge in `.NAME.part` replaces the folder NAME: both have the same lock."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name.removeprefix('.').removesuffix('.part')}.lock")


def write_manifest(checkpoint: Path) -> None:
    """Write the size and SHA-256 of every file of a checkpoint; the last step of saving it."""
    files = {str(f.relative_to(checkpoint)): _file_digest(f) for f in sorted(checkpoint.rglob("*")) if f.is_file()}
    write_json(checkpoint / MANIFEST, files)


def checkpoint_error(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; "" if all that a resume reads is there and matches its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
        names = list(files)
        for name, expected in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"] or _file_digest(file) != expected:
                return f"{name} differs from what was saved"
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return f"no complete {MANIFEST}"
    absent = [part for part, pattern in RESUMED_FROM.items() if not any(re.match(pattern, name) for name in names)]
    return f"no {' and no '.join(absent)}" if absent else ""


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
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(dir=existing, prefix=".").cleanup()
    except OSError as error:
        is_full = is_disk_full(error)
        raise (explain_failure(error, existing) if is_full else None) or _not_writable(existing) from None


def _not_writable(path: Any) -> UserError:
    return UserError(f"{short_path(str(path))} is not writable. Use another --output_dir, or fix its permissions.")


def explain_failure(error: BaseException, folder: Path) -> UserError | None:
    """A one-line error for a full disk, a path that is not writable or too little memory; None for anything else. On a
    full disk, incomplete checkpoints are deleted."""
    text = f"{type(error).__name__} {error}".lower()
    code = error.errno if isinstance(error, OSError) else None
    path = getattr(error, "filename", None) or folder
    last = last_complete_checkpoint(folder)
    if is_disk_full(error):
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
    return {file.name: _file_digest(file) for file in find_files(folder)}


def changed_model_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What differs in `folder` from `files` (of `hash_model_files`), such as "config.json has changed"."""
    if (total := sum(file.stat().st_size for file in find_files(folder))) > SLOW_BYTES and is_main_process():
        print(f"Comparing {format_size(total)} in {short_path(folder)} with the hashes in its run.json.")
    now = hash_model_files(folder)
    changes = [f"{name} is missing" for name in files if name not in now]
    changes += [f"{name} was added" for name in now if name not in files]
    return changes + [f"{name} has changed" for name in now if files.get(name, now[name]) != now[name]]


def main(argv: Sequence[str]) -> None:
    """Accept files of a finished run that were changed on purpose: python -m helpers accept outputs/<run>"""
    folder = find_path(argv[0]) if len(argv) == 1 else None
    if folder is None or not (folder / "run.json").is_file():
        raise SettingsError("usage: python -m helpers accept outputs/<run>")
    record = load_record(folder)
    changes = changed_model_files(folder, record.get("files") or {}) if record.get("status") == "finished" else []
    if changes:  # another fingerprint: what was merged, answered or judged before was another model's
        files = hash_model_files(folder)
        record |= {"files": files, "fingerprint": hash_files(map(folder.joinpath, files))}
        write_json(folder / "run.json", record)
    print(f"{short_path(folder)}: {', '.join(changes)}. Accepted." if changes else "Nothing has changed.")


def hash_data_files(names: Iterable[str]) -> dict[str, str]:
    """The local files of --dataset_id and a hash of each; Hub datasets are cached by revision."""
    hashes: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(json.JSONDecodeError):
            name = json.loads(name).get("id", "") if name.startswith("{") else name
        path = find_path(name)
        paths = [path] if path else [Path(file) for file in glob.glob(name, recursive=True)]
        files = [(p.parent, f) for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
        hashes |= {str(file.relative_to(folder)): _file_digest(file)["sha256"][:16] for folder, file in files}
    return hashes


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
    record = load_record(folder)
    files = record.get("files") if record.get("status") == "finished" else None
    if files and (changes := changed_model_files(folder, files)):
        place = short_path(folder)
        raise UserError(
            f"{place} has changed since its run finished: {', '.join(changes)}. Restore it, or repeat that run with "
            f"`--resume never`. If you changed it on purpose, run `python -m helpers accept {shell_quote(folder)}`."
        )


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; {} if it is missing or broken."""
    try:
        record = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    is_whole = isinstance(record, dict) and all(isinstance(record.get(k, v), type(v)) for k, v in RECORD.items())
    return record if is_whole else {}


def load_record(folder: Path) -> dict[str, Any]:
    """As `read_run`; raises UserError for a run.json that is broken."""
    if not (record := read_run(folder)) and os.path.lexists(folder / "run.json"):
        raise UserError(
            f"{short_path(folder / 'run.json')} is broken. Restore it, or repeat that run with another --run_name. "
            "Or delete it: the folder is then a model without a run."
        )
    return record


def format_size(count: float) -> str:
    """A number of bytes, such as 1.25 GB or 125 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def shell_quote(path: Path | str) -> str:
    """`path` as a word of a command; on Windows, of one of PowerShell."""
    text = short_path(path)
    return shlex.quote(text) if os.name == "posix" else "'" + text.replace("'", "''") + "'"


def find_files(folder: Path, patterns: Iterable[str] = MODEL_PATTERNS) -> list[Path]:
    """The files of `folder` with one of the patterns, by default those of a model, sorted by name."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


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
