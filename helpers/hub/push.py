"""Publish a model on the Hub: private by default, named files only, in one commit."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from httpx2 import TransportError
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tenacity import RetryCallState, Retrying, stop_after_attempt

from helpers.core import (
    REPO,
    CleanExit,
    SettingsError,
    UserError,
    describe_error,
    find_path,
    hf_token,
    is_main_process,
    printable,
)
from helpers.hub.model_card import base_on_hub, write_card
from helpers.runs.run import Run, find_parent, lineage, list_merges, read_run

T = TypeVar("T")
# What a model consists of. Checkpoints, optimizer states, logs, run.json and .env are never sent. Neither is TRL's
# README.md, which names local folders: the card is written from the run.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
             "*.model", "*.tiktoken", "vocab.*", "merges.txt", "added_tokens.json", "*.py", "chat_template.jinja",
             "curves.png")  # fmt: skip
RECORDS = ("run.json", "*.jsonl", "*.log")  # not sent, but scanned: a secret in them may have leaked elsewhere too
PATTERNS = {
    "a Hub token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b"),
    "an OpenAI key": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")  # of environment variables
ABSOLUTE_PATH = re.compile(rb':\s*"(?:/[\w.~ -]+){2,}/?"|:\s*"[A-Za-z]:(?:\\\\|/)[^"]*"')
WEIGHTS_SCAN_BYTES = 2**24  # of a file of weights only its header is scanned
MAX_TRIES, MAX_RETRY_WAIT = 5, 300.0  # the second in seconds
HUB_ERRORS = (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError)  # of huggingface_hub 2.4


def check_push(settings: Any, folder: Path | None = None) -> None:
    """Check the token, the repository's name and the files of `folder`, before hours of work. Raises UserError."""
    hf_token("--push_to_hub")
    try:
        validate_repo_id(settings.hub_repo_id or "default")
    except HFValidationError as error:
        raise SettingsError(f"--hub_repo_id {settings.hub_repo_id!r} is not a repository's name: {error}") from None
    if folder:
        prepare_push(folder, settings.hub_repo_id, settings.license)


def push_before_merge(settings: Any, folder: Path) -> None:
    """Before a merge: preview the push (`--dry_run`), or publish the adapter in `folder` and raise CleanExit
    (`--push adapter`), or check that the later push can work."""
    if settings.push_to_hub and settings.dry_run:
        preview_push(settings, folder)
    elif settings.push_to_hub and settings.push == "adapter":
        push_model(folder, settings)
        raise CleanExit("Pushed without merging.")
    elif settings.push_to_hub:
        check_push(settings, folder if settings.push == "both" else None)


def push_model(folder: Path, settings: Any) -> None:
    """Publish a folder as the settings of 03_merge_push.py ask. `--push both` also publishes the adapter that a merge
    started from, as `<hub_repo_id>-adapter`. Raises UserError."""
    options = dict(license_id=settings.license, revision=settings.hub_revision, tag=settings.hub_tag)
    push_folder(folder, settings.hub_repo_id, settings.private, **options)
    if settings.push == "both" and (adapter := find_parent(folder, read_run(folder))):
        push_folder(adapter, f"{settings.hub_repo_id or folder.name}-adapter", settings.private, **options)


def preview_push(settings: Any, folder: Path) -> None:
    """Print the files and the card that a push of the run in `folder` would send."""
    folders = [folder] if settings.push != "merged" else []
    merges = [run for run in list_merges(folder, settings.output_dir) if run.finished]
    if settings.push != "adapter":
        folders += [run.folder for run in merges[:1]]
    if settings.push != "adapter" and not merges:
        print(f"{folder.name} is not merged yet. Run the same command without --push_to_hub and --dry_run first.")
    for source in folders:
        suffix = "-adapter" if settings.push == "both" and source == folder else ""
        repo_id = (settings.hub_repo_id or source.name) + suffix
        print(f"Would push {source.name} to {repo_id}:")
        _, card = prepare_push(source, repo_id, settings.license)
        print(printable(f"\n{card}"))


def merge_and_push(run: Run, settings: Any) -> None:
    """Run 03_merge_push.py in a new process for a finished DPO run, if the settings of 02_dpo.py ask for it. An adapter
    is pushed unmerged without `--merge_adaptors`; a fully tuned model is pushed as it is. Raises UserError."""
    is_merged = settings.merge_adaptors and run.is_adapter
    if settings.merge_adaptors and not is_merged and is_main_process():
        print(f"{run.name} was fully tuned: there is no adapter to merge.")
    if not is_main_process() or not (is_merged or settings.push_to_hub):
        return
    flags = {"run": run.folder, "push": "merged" if is_merged else "adapter"}
    flags |= {n: getattr(settings, n) for n in ("output_dir", "push_to_hub", "hub_repo_id", "trust_remote_code")}
    command = [sys.executable, str(REPO / "notebooks" / "03_merge_push.py"), *(f"--{k}={v}" for k, v in flags.items())]
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    status = subprocess.run(command, env={k: v for k, v in os.environ.items() if k not in launcher}).returncode
    if status:
        raise UserError(f"03_merge_push.py failed with status {status}. See its messages above.")


def files_to_push(folder: Path) -> list[Path]:
    """The files of `folder` that would be published, sorted by name."""
    return sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if file.is_file()})


def prepare_push(folder: Path, repo_id: str, license_id: str = "") -> tuple[list[Path], str]:
    """Return the files that a push would send and the text of the card; print each file with its size.

    Raises UserError if there are no weights, the base is a local folder, or a file contains a secret or a local path.
    """
    adapter, files = folder / "adapter_config.json", files_to_push(folder)
    local = str(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.is_file() else ""
    if Path(local).is_absolute() or find_path(local):
        base = f"The base model of {folder.name} is a local folder, which others do not have."
        raise UserError(f"{base} Push the merged model (`--push merged`).")
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{folder.name} has no weights to push.")
    card = write_card(folder, repo_id or folder.name, license_id or _base_license(folder))
    records = [file for pattern in RECORDS for file in folder.glob(pattern)]
    if secrets := find_secrets([*files, *records], card):
        raise UserError(f"Nothing was pushed: {'; '.join(secrets)}. Remove it, revoke it, and create a new one.")
    if paths := find_paths(files, card):
        raise UserError(f"Nothing was pushed: {', '.join(paths)} contains a local path. Remove it.")
    sizes = {file.name: file.stat().st_size for file in files} | {"README.md": len(card.encode())}
    for name, size in sizes.items():
        print(f"{size / 1e6:10,.3f} MB  {name}")
    return files, card


def _base_license(folder: Path) -> str:
    """The license in the card of the base model on the Hub, or ""."""
    base = base_on_hub(folder, lineage(folder))
    with contextlib.suppress(*HUB_ERRORS):
        data = HfApi().model_info(base).card_data if base else None
        return str(data.get("license") or "") if data else ""
    return ""


def push_folder(
    folder: Path, repo_id: str, private: bool, license_id: str = "", revision: str = "", tag: str = ""
) -> None:
    """Upload the files of a model and its card in one commit. Files that the Hub already has are not sent again.

    `repo_id` defaults to the folder's name. An existing repository keeps its visibility; a public one is refused if
    `private`. `revision` is a branch, created if needed; `tag` names the commit. Raises UserError.
    """
    repo_id = repo_id or folder.name
    api = HfApi(token=hf_token(f"pushing to {repo_id}"))
    files, card = prepare_push(folder, repo_id, license_id)
    try:
        repo_id = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        is_private = bool(with_retries(lambda: api.model_info(repo_id)).private)
        if private and not is_private:
            raise UserError(f"{repo_id} exists and is public. Use --no_private, or another --hub_repo_id.")
        print(f"Pushing {len(files) + 1} files to {repo_id} ({'private' if is_private else 'public'}).")
        if revision:
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        adds = [CommitOperationAdd(file.name, file) for file in files]
        adds.append(CommitOperationAdd("README.md", card.encode()))
        options: dict[str, Any] = dict(commit_message=f"Upload {folder.name}", revision=revision or None)
        commit = with_retries(lambda: api.create_commit(repo_id, adds, **options))
        if tag:
            with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True))
    except HUB_ERRORS as error:
        raise UserError(f"pushing to {repo_id} failed: {describe_error(error)}") from None
    print(f"Pushed: {api.endpoint}/{repo_id} is {'private' if is_private else 'public'}.")
    if is_private and not private:
        print("The repository existed and stays private. Change its visibility on its settings page on the Hub.")


def with_retries(call: Callable[[], T]) -> T:
    """Call the Hub, up to 5 times if it is busy (429), fails (5xx) or hangs up. A longer Retry-After is an error."""
    return Retrying(
        retry=lambda state: _retry_wait(state) <= MAX_RETRY_WAIT,
        wait=_retry_wait,
        stop=stop_after_attempt(MAX_TRIES),
        before_sleep=lambda state: print(f"The Hub is busy or unreachable. Retrying in {_retry_wait(state):.0f} s."),
        reraise=True,
    )(call)


def _retry_wait(state: RetryCallState) -> float:
    """Seconds until the next try; infinite if another try cannot help."""
    error = state.outcome.exception() if state.outcome else None
    error = error.__cause__ if isinstance(error, RuntimeError) else error  # how an upload fails
    response = error.response if isinstance(error, HfHubHTTPError) else None
    is_busy = response is not None and (response.status_code == 429 or response.status_code >= 500)
    if not is_busy and not isinstance(error, TransportError):
        return math.inf
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else 2.0 ** (state.attempt_number - 1)


def env_secrets() -> dict[bytes, str]:
    """Values of the secrets in the environment and of the Hub token, with their names."""
    secrets = {v: n for n, v in os.environ.items() if SECRET_NAMES.search(n.upper()) and len(v) >= 16}
    secrets = {v: n for v, n in secrets.items() if not os.path.exists(v)} | {get_token() or "": "HF_TOKEN"}
    return {value.encode(): name for value, name in secrets.items() if value}


def find_secrets(files: Iterable[Path], text: str = "") -> list[str]:
    """What looks like a secret in `files` or in `text` (the card): "a Hub token in run.json", never the secret."""
    contents, findings = {"README.md": text.encode()}, []
    for file in files:
        with file.open("rb") as opened:
            contents[file.name] = opened.read(WEIGHTS_SCAN_BYTES if file.suffix == ".safetensors" else -1)
    secrets = env_secrets()
    for name, content in contents.items():
        findings += [f"{secret} in {name}" for value, secret in secrets.items() if value in content]
        findings += [f"{kind} in {name}" for kind, pattern in PATTERNS.items() if pattern.search(content)]
    return list(dict.fromkeys(findings))


def find_paths(files: Iterable[Path], text: str = "") -> list[str]:
    """Names of `files`, or README.md for `text`, that contain a local folder (a config: any absolute path)."""
    local = [str(path).encode() for path in (REPO, Path.home(), Path.cwd()) if len(path.parts) > 1]
    contents = {file.name: file.read_bytes() for file in files if file.suffix in (".json", ".jinja", ".py")}
    return [
        name for name, content in (contents | {"README.md": text.encode()}).items()
        if any(path in content for path in local) or (name.endswith("config.json") and ABSOLUTE_PATH.search(content))
    ]  # fmt: skip
