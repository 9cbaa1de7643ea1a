"""Publishing a folder: private unless told otherwise, only files that are named, in one commit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from helpers.core import REPO, UserError, describe_error, find_path, is_main_process
from helpers.hub.model_card import base_of, write_card
from helpers.runs.run import lineage, read_run
from helpers.settings.credentials import hf_token

if TYPE_CHECKING:
    from helpers.runs.run import Run


# What a model is made of. Checkpoints, optimizer states, logs, run.json and .env never travel; nor does TRL's
# README.md, which names folders of this machine: the card is written from the run.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
             "*.model", "*.tiktoken", "vocab.*", "merges.txt", "added_tokens.json", "*.py", "chat_template.jinja",
             "curves.png")  # fmt: skip


def files_to_push(folder: Path) -> list[Path]:
    """The files of `folder` that would be published, by name."""
    return sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if file.is_file()})


def file_line(name: str, size: int) -> str:
    """A file and its size, as a line of a list."""
    return f"{size / 1e3:10,.1f} kB  {name}" if size < 1e5 else f"{size / 1e6:10,.2f} MB  {name}"


def prepare_push(folder: Path, repo_id: str, licence: str = "") -> tuple[list[Path], str]:
    """What a push would send, printed with its size: files, and the card's text. Nothing is sent.

    Raises UserError where there is no whole model, where its base is a folder of this machine, or where a token or a
    path of this machine stands in what would be sent.
    """
    adapter, files = folder / "adapter_config.json", files_to_push(folder)
    if adapter.is_file() and find_path(str(json.loads(adapter.read_text())["base_model_name_or_path"])):
        raise UserError(
            f"the base of {folder.name} is a folder here, which nobody else has: push it merged (--push merged)"
        )
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{folder.name} has no weights to push")
    card = write_card(folder, repo_id or folder.name, licence or licence_of(base_of(folder, lineage(folder))))
    records = [file for pattern in RECORDS for file in folder.glob(pattern)]
    if found := find_secrets([*files, *records], card):
        raise UserError(f"nothing was sent: {'; '.join(found)}. Take it out, and make a new one: it has been written")
    if found := find_paths(files, card):
        raise UserError(f"nothing was sent: {', '.join(found)} names a folder of this machine")
    for file in files:
        print(file_line(file.name, file.stat().st_size))
    print(file_line("README.md", len(card.encode())))
    return files, card


def push_folder(folder: Path, repo_id: str, private: bool, licence: str = "", revision: str = "", tag: str = "") -> str:
    """Upload a model's files and its card in one commit; the address of the repository. Raises UserError.

    Without a `repo_id` it is the folder's name, under the token's account. A repository that exists keeps its
    visibility; one that is public is refused when `private` was meant. `revision` is a branch, made where it is not
    there; `tag` names the commit. Files that are there already are not sent again.
    """
    from httpx2 import TransportError
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo_id = repo_id or folder.name
    api = HfApi(token=hf_token(f"pushing to {repo_id}"))
    files, card = prepare_push(folder, repo_id, licence)
    try:
        repo_id = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        is_private = bool(with_retries(lambda: api.model_info(repo_id)).private)
        if private and not is_private:
            raise UserError(f"{repo_id} exists and is public: push with --no_private, or name another --hub_repo_id")
        print(f"Pushing {len(files) + 1} files to {repo_id} ({'private' if is_private else 'public'}).")
        if revision:
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        adds = [CommitOperationAdd(file.name, file) for file in files]
        adds.append(CommitOperationAdd("README.md", card.encode()))
        message = f"Upload {folder.name}"
        done = with_retries(lambda: api.create_commit(repo_id, adds, commit_message=message, revision=revision or None))
        if tag:
            with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=done.oid, exist_ok=True))
        is_private = bool(with_retries(lambda: api.model_info(repo_id)).private)
    except (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"pushing to {repo_id} failed: {describe_error(error)}") from None
    print(f"Pushed: {api.endpoint}/{repo_id} is {'private' if is_private else 'public'}.")
    if is_private and not private:
        print("It was private before, and stays so: its page on the Hub can change that.")
    return f"{api.endpoint}/{repo_id}"


def licence_of(base: str) -> str:
    """What the base's card on the Hub says; "" where that is nothing, or there is none."""
    from httpx2 import TransportError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = HfApi().model_info(base).card_data if base else None
    except (HfHubHTTPError, TransportError, OSError, ValueError):
        return ""
    return str(data.get("license") or "") if data else ""


def preview_push(folder: Path, output_dir: Path, what: str, repo_id: str, licence: str = "") -> None:
    """What --push_to_hub would send of the run in `folder`, and its card; nothing is sent.

    Of a run that has not been merged there is only the adapter to show yet.
    """
    found = [folder] if what != "merged" else []
    merges = [f.parent for f in output_dir.glob("[!.]*/run.json") if is_merge_of(f.parent, folder)]
    if what != "adapter" and merges:
        found.append(max(merges, key=lambda place: (place / "run.json").stat().st_mtime))
    elif what != "adapter":
        print(
            f"{folder.name} is not merged yet: merge it first, by the same command without --push_to_hub and --dry_run."
        )
    for place in found:
        to = repo_id or place.name
        to += "-adapter" if what == "both" and place == folder else ""
        print(f"Would go to {to}, from {place.name}:")
        _, card = prepare_push(place, to, licence)
        print(f"\n{card}")


def is_merge_of(place: Path, folder: Path) -> bool:
    """Whether the run in `place` is a finished merge of the run in `folder`."""
    record = read_run(place)
    parent = record.get("parent_folder") or ""
    return record.get("step") == "merge" and record.get("status") == "finished" and Path(parent) == folder


T = TypeVar("T")
LONGEST_RETRY_WAIT = 300.0  # seconds that are waited for a Hub that asks for it


def with_retries(call: Callable[[], T], tries: int = 5) -> T:
    """`call`, again where the Hub asks to slow down, fails, or hangs up; waits as long as it is told to.

    What was uploaded before is not sent again: the Hub knows it by its content.
    """
    import httpx2 as httpx  # what huggingface_hub speaks through
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(tries):
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError, RuntimeError) as error:  # an upload's is wrapped in the last
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            answer = cause.response if isinstance(cause, HfHubHTTPError) else None
            told = answer.headers.get("Retry-After", "") if answer is not None else ""
            wait = float(told) if re.fullmatch(r"\d+(\.\d+)?", told) else 2.0**attempt
            passing = isinstance(cause, httpx.TransportError)
            passing |= answer is not None and (answer.status_code == 429 or answer.status_code >= 500)
            if not passing or attempt == tries - 1 or wait > LONGEST_RETRY_WAIT:
                raise
            print(f"The Hub {'is busy' if answer is not None else 'hung up'}: trying again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("not reached")


PATTERNS = {
    "a Hub token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b"),
    "an OpenAI key": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
HEAD = 2**24  # bytes of a file of weights that are read: its header
RECORDS = ("run.json", "*.jsonl", "*.log")  # of a run: what stands in one of them is near to what is published


def env_secrets() -> dict[bytes, str]:
    """Values of this process's secrets, and what each is called."""
    from huggingface_hub import get_token

    known = {
        v: n for n, v in os.environ.items() if SECRET_NAMES.search(n.upper()) and len(v) >= 16 and not os.path.exists(v)
    }
    if token := get_token():
        known[token] = "HF_TOKEN"
    return {value.encode(): name for value, name in known.items()}


def find_secrets(files: Iterable[Path], text: str = "") -> list[str]:
    """What looks like a secret in `files`, or in `text` (the card): a line for each, without the secret itself."""
    contents = [("README.md", text.encode())]
    for file in files:
        with file.open("rb") as opened:
            contents.append((file.name, opened.read(HEAD if file.suffix == ".safetensors" else -1)))
    known, found = env_secrets(), []
    for name, content in contents:
        found += [f"{called} in {name}" for value, called in known.items() if value in content]
        found += [f"{kind} in {name}" for kind, shape in PATTERNS.items() if shape.search(content)]
    return list(dict.fromkeys(found))


def find_paths(files: Iterable[Path], text: str = "") -> list[str]:
    """Names of `files` (or README.md, for `text`) in which a folder of this machine is named: one that is known here,
    or, in a configuration, any value that is an absolute path."""
    homes = {str(path).encode() for path in (REPO, Path.home(), Path.cwd()) if len(path.parts) > 1}
    contents = [(file.name, file.read_bytes()) for file in files if file.suffix in (".json", ".jinja", ".py")]
    contents.append(("README.md", text.encode()))
    found = [name for name, content in contents if any(home in content for home in homes)]
    return found + [n for n, content in contents if n.endswith("config.json") and n not in found and _a_path(content)]


def _a_path(content: bytes) -> bool:
    return bool(re.search(rb':\s*"(?:/[\w.~ -]+){2,}/?"|:\s*"[A-Za-z]:(?:\\\\|/)[^"]*"', content))


def merge_and_push(run: Run, settings: Any) -> None:
    """Do for a DPO run what 03_merge_push.py does, in a process of its own: merge, push, or both, as its settings ask.

    What there is to push goes out as it is where merging is not asked for, or where nothing is to be merged.
    Raises UserError where it fails; what it says is on the screen.
    """
    if not is_main_process() or not (settings.merge_adaptors or settings.push_to_hub):
        return
    if settings.merge_adaptors and not run.is_adapter:
        print(f"{run.name} was tuned in full: there is nothing to merge.")
    flags = {
        "run": run.folder,
        "output_dir": settings.output_dir,
        "push": "merged" if settings.merge_adaptors and run.is_adapter else "adapter",
        "push_to_hub": settings.push_to_hub,
        "hub_repo_id": settings.hub_repo_id,
        "trust_remote_code": settings.trust_remote_code,
    }
    if flags["push"] == "adapter" and not settings.push_to_hub:
        return
    words = [sys.executable, str(REPO / "notebooks" / "03_merge_push.py"), *(f"--{k}={v}" for k, v in flags.items())]
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    status = subprocess.run(words, env={k: v for k, v in os.environ.items() if k not in launcher}).returncode
    if status:
        raise UserError(f"03_merge_push.py stopped with status {status}: what it says stands above")
