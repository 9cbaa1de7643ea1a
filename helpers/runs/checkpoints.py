"""The lock of a run folder, checkpoints with a manifest, and one-line errors for what ends long runs."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import SettingsError, UserError, find_path, is_disk_full, short_path, write_json

MANIFEST = "checkpoint_manifest.json"
# What a resume reads, and the names of its files; DeepSpeed has the optimizer's and the scheduler's in global_stepN/.
RESUMED_FROM = {
    "trainer state": r"trainer_state\.json$",
    "weights": r".*\.(safetensors|bin|distcp)$|.*model_states\.pt$",
    "optimizer": r"optimizer|global_step",
    "scheduler": r"scheduler\.pt$|global_step",
    "random state": r"rng_state.*\.pth$",
}
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
        raise UserError(f"{short_path(folder)} is in use by {_owner(folder)}. Wait for its end, or stop it.") from None
    except OSError as error:
        raise explain_failure(error, folder) or error from None
    _locks[file] = lock
    for draft in folder.glob(".*"):  # that a killed process has left: see core.atomic_write
        if re.fullmatch(r"\..+\.\d+", draft.name):
            draft.unlink(missing_ok=True)
    return True


def unlock_folder(folder: Path) -> None:
    """Let other processes write to a run folder."""
    if lock := _locks.pop(_lock_file(folder), None):
        lock.release(force=True)


def _lock_file(folder: Path) -> Path:
    """Beside the folder, because a merge in `.NAME.part` replaces the folder NAME: both have the same lock."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name.removeprefix('.').removesuffix('.part')}.lock")


def _owner(folder: Path) -> str:
    """The process that its run.json names."""
    try:
        process = json.loads((folder / "run.json").read_text("utf-8"))["process"]
        return f"process {process['pid']} on {process['host']} since {process['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


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


def check_writable(folder: Path, is_dry: bool = False) -> None:
    """Raise UserError before a model is downloaded for a folder that cannot be written; try it, unless `is_dry`."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _not_writable(existing)
    try:  # root may write anywhere, says os.access, but not in /proc
        if not is_dry:
            tempfile.TemporaryDirectory(dir=existing, prefix=".").cleanup()
    except OSError as error:
        raise explain_failure(error, existing) or _not_writable(existing) from None


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


def _not_writable(path: Any) -> UserError:
    return UserError(f"{short_path(str(path))} is not writable. Use another --output_dir, or fix its permissions.")


def check_process_count(folder: Path, before: int | None, now: int, is_same_batch: bool) -> None:
    """Raise SettingsError if a resumed run would get other rows per step from another number of processes."""
    if before and before != now and not is_same_batch and last_complete_checkpoint(folder):
        raise SettingsError(
            f"{short_path(folder)} was started with {before} processes. With {now}, a step would have other rows. "
            f"Launch {before}, or start over with `--resume never`. --global_batch_size keeps a step's rows the same."
        )


def check_same_settings(
    folder: Path, record: dict[str, Any], hashed: dict[str, Any], origin: str, parent: str = ""
) -> None:
    """Raise SettingsError if the run in `folder` has other settings, or started from another model or run."""
    before = record.get("hashed_settings", {}) | {"starting point": record.get("origin", origin)}
    now = json.loads(json.dumps(hashed | {"starting point": origin}, default=str))
    older = record.get("parent")
    if before["starting point"] != origin and older and parent:  # hashes of weights say nothing to a reader
        flag = {"dpo": "--sft_run", "merge": "--run"}.get(str(record.get("step")), "")
        keep = f" Use `{flag} {shlex.quote(short_path(folder.parent / older))}` to keep the older one," if flag else ""
        what = f"started from {older}, and this command starts from {parent}" + " (trained again)" * (older == parent)
        raise SettingsError(
            f"{short_path(folder)} {what}.{keep or ' Use'} another --run_name, or `--resume never` to replace it."
        )
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


def hash_files(files: Iterable[Path]) -> str:
    """Sixteen hex digits of a hash over the content of files, whose order does not matter."""
    digests = [_sha256(file).digest() for file in sorted(files)]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _file_digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file).hexdigest()}


def _sha256(file: Path) -> Any:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256")
