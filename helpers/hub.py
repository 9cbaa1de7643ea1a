"""Publishing a folder: private unless told otherwise, only files that are named, in one commit."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.credentials import hf_token
from helpers.errors import UserError
from helpers.hub_errors import patiently, reason
from helpers.model_card import base_of, lineage, write_card
from helpers.paths import find_path
from helpers.runs import read_run
from helpers.secret_scan import RECORDS, find_paths, find_secrets

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
            f"the base of {folder.name} is a folder here, which nobody else has: push it merged (--what merged)"
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
        repo_id = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        is_private = bool(patiently(lambda: api.model_info(repo_id)).private)
        if private and not is_private:
            raise UserError(f"{repo_id} exists and is public: push with --no_private, or name another --hub_repo_id")
        print(f"Pushing {len(files) + 1} files to {repo_id} ({'private' if is_private else 'public'}).")
        if revision:
            patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        adds = [CommitOperationAdd(file.name, file) for file in files]
        adds.append(CommitOperationAdd("README.md", card.encode()))
        message = f"Upload {folder.name}"
        done = patiently(lambda: api.create_commit(repo_id, adds, commit_message=message, revision=revision or None))
        if tag:
            patiently(lambda: api.create_tag(repo_id, tag=tag, revision=done.oid, exist_ok=True))
        is_private = bool(patiently(lambda: api.model_info(repo_id)).private)
    except (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"pushing to {repo_id} failed: {reason(error)}") from None
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
