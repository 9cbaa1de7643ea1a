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
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tenacity import RetryCallState, Retrying, stop_after_attempt

from helpers.core import REPO, SettingsError, UserError, find_path, is_main_process, printable
from helpers.hub.model_card import base_on_hub, complete_license, license_metadata, license_options, write_card
from helpers.models.adapters import describe_error, hf_token
from helpers.runs.checkpoints import check_model_folder
from helpers.runs.run import Run, find_parent, lineage, list_merges, read_run
from helpers.settings.secrets import find_secrets

T = TypeVar("T")
# What a model consists of. Checkpoints, optimizer states, logs, run.json and .env are never sent. Neither is TRL's
# README.md, which names local folders: the card is written from the run.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
             "*.model", "*.tiktoken", "vocab.*", "merges.txt", "added_tokens.json", "*.py", "chat_template.jinja",
             "curves.png", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "tekken.json")  # fmt: skip
# What loaders read from the top of a repository. A push replaces those of the model that was there before.
ADAPTER_FILE = re.compile(r"adapter_(model|config)[^/]*")
WEIGHTS_FILE = re.compile(
    r"(model|pytorch_model|consolidated|tf_model|flax_model)[^/]*\.(safetensors|bin|pth|pt|h5|msgpack)(\.index[^/]*json)?"
)
TOKENIZER_FILE = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|chat_template|vocab|generation_config|(pre)?processor_config"
    r"|tekken|params)\.json|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)[^/]*\.model[^/]*|vocab\.\w+|merges\.txt"
    r"|[^/]*\.tiktoken|chat_template\.jinja|chat_templates/[^/]+"
)
RECORDS = ("run.json", "*.jsonl", "*.log")  # not sent, but scanned: a secret in them may have leaked elsewhere too
ABSOLUTE_PATH = re.compile(rb':\s*"(?:/[\w.~ -]+){2,}/?"|:\s*"[A-Za-z]:(?:\\\\|/)[^"]*"')
MAX_TRIES, MAX_RETRY_WAIT = 5, 300.0  # the second in seconds
HUB_ERRORS = (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError)  # of huggingface_hub 2.4


def check_push(settings: Any, folder: Path | None = None) -> None:
    """Check before hours of work that the push at their end can succeed: the token, the license, the repositories, and
    the files of `folder`. `settings` are those of 02_dpo.py or 03_merge_push.py. Raises UserError."""
    token = hf_token("--push_to_hub")
    if not is_main_process():
        return
    api, license_args = HfApi(token=token), license_options(settings)
    license_metadata(**license_args)
    has_adapter = getattr(settings, "tuning", "") != "full" and not getattr(settings, "merge_adaptors", False)
    push = getattr(settings, "push", "adapter" if has_adapter else "merged")
    name = settings.hub_repo_id or hub_name(getattr(settings, "run_name", "") or "default")
    names = {name: push == "adapter"} | ({f"{name}-adapter": True} if push == "both" else {})
    try:
        for repo_id in names:
            validate_repo_id(repo_id)
        user = with_retries(api.whoami)
        for repo_id, is_adapter in names.items():
            full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
            _check_access(user, full_id)
            if settings.hub_repo_id:
                with contextlib.suppress(RepositoryNotFoundError):
                    _check_visibility(api, full_id, getattr(settings, "private", True))
                    stale_files(api, full_id, getattr(settings, "hub_revision", ""), is_adapter)
    except HFValidationError as error:
        raise SettingsError(f"--hub_repo_id {settings.hub_repo_id!r} is not a repository's name: {error}") from None
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub cannot work: {describe_error(error)}") from None
    if folder:
        prepare_push(folder, name, **license_args)


def _check_access(user: dict[str, Any], repo_id: str) -> None:
    """Raise UserError if the token may not write to `repo_id`, as far as the Hub's answer to whoami says that."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    roles = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or ()}
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    names = {(s.get("entity") or {}).get("name") for s in scopes if "repo.write" in (s.get("permissions") or ())}
    owner, is_limited = repo_id.partition("/")[0], token.get("role") == "fineGrained"
    if token.get("role") == "read" or (is_limited and not names & {owner, repo_id, None}):
        raise UserError(f"Your token may not write to {repo_id}. Set HF_TOKEN to a token with write access to it.")
    if not is_limited and roles.get(owner, "read") == "read":
        mine = " or ".join(name for name, role in roles.items() if role != "read")
        raise UserError(f"{repo_id} is not yours to write to: your token is of {mine}. Use another --hub_repo_id.")


def _check_visibility(api: HfApi, repo_id: str, private: bool) -> bool:
    """Whether the repository is private. Raises UserError if it is not, but has to be."""
    is_private = bool(with_retries(lambda: api.model_info(repo_id)).private)
    if private and not is_private:
        raise UserError(f"{repo_id} exists and is public. Use --no_private, or another --hub_repo_id.")
    return is_private


def stale_files(api: HfApi, repo_id: str, revision: str, is_adapter: bool, new: Iterable[str] = ()) -> list[str]:
    """The files of another model in the repository: weights, indexes and files of a tokenizer that are not among the
    `new` ones. Loaders would read them. All other files stay, such as those that you added.

    Raises UserError if the repository has an adapter, and a full model is pushed, or the other way round: loaders would
    apply the adapter to the model.
    """
    try:
        names = with_retries(lambda: api.list_repo_files(repo_id, revision=revision or None))
    except RevisionNotFoundError:  # a new branch begins with the files of main
        names = with_retries(lambda: api.list_repo_files(repo_id))
    adapters, weights = filter(ADAPTER_FILE.fullmatch, names), filter(WEIGHTS_FILE.fullmatch, names)
    if any(weights if is_adapter else adapters):
        there, pushed = ("a full model", "an adapter") if is_adapter else ("an adapter", "a full model")
        raise UserError(f"{repo_id} has {there}. Use another --hub_repo_id for {pushed}.")
    stale = (ADAPTER_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
    return [name for name in names if name not in new and any(pattern.fullmatch(name) for pattern in stale)]


def push_before_merge(settings: Any, folder: Path) -> bool:
    """Before a merge: preview the push (`--dry_run`), or publish the adapter in `folder` (`--push adapter`), or check
    that the later push can work. Returns whether the adapter was published, so that there is nothing to merge."""
    if settings.push_to_hub and settings.dry_run:
        preview_push(settings, folder)
    elif settings.push_to_hub and settings.push == "adapter":
        push_model(folder, settings)
        return True
    elif settings.push_to_hub:
        check_push(settings, folder if settings.push == "both" else None)
    return False


def push_model(folder: Path, settings: Any) -> None:
    """Publish a folder as the settings of 03_merge_push.py ask. `--push both` also publishes the adapter that a merge
    started from, as `<hub_repo_id>-adapter`. Raises UserError."""
    options = license_options(settings) | {"revision": settings.hub_revision, "tag": settings.hub_tag}
    name = settings.hub_repo_id or hub_name(folder.name)
    push_folder(folder, name, settings.private, **options)
    if settings.push == "both" and (adapter := find_parent(folder, read_run(folder))):
        push_folder(adapter, f"{name}-adapter", settings.private, **options)


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
        repo_id = (settings.hub_repo_id or hub_name(source.name)) + suffix
        print(f"Would push {source.name} to {repo_id}:")
        _, card = prepare_push(source, repo_id, **license_options(settings))
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


def prepare_push(
    folder: Path, repo_id: str, license_id: str = "", license_name: str = "", license_link: str = ""
) -> tuple[list[Path], str]:
    """Return the files that a push would send and the text of the card; print each file with its size.

    Raises UserError if there are no weights, a finished run's files have changed, the base is a local folder, or a
    file contains a secret or a local path.
    """
    if read_run(folder) or not (folder / "run.json").is_file():  # a broken run.json is only scanned
        check_model_folder(folder)
    adapter, files = folder / "adapter_config.json", files_to_push(folder)
    local = str(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.is_file() else ""
    if Path(local).is_absolute() or find_path(local):
        base = f"The base model of {folder.name} is a local folder, which others do not have."
        raise UserError(f"{base} Push the merged model (`--push merged`).")
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{folder.name} has no weights to push.")
    license_args = (license_id, license_name, license_link) if license_id else _base_license(folder)
    card = write_card(folder, repo_id or hub_name(folder.name), *license_args)
    records = [file for pattern in RECORDS for file in folder.glob(pattern)]
    if secrets := find_secrets([*files, *records], card):
        raise UserError(f"Nothing was pushed: {'; '.join(secrets)}. Remove it, revoke it, and create a new one.")
    if paths := find_paths(files, card):
        raise UserError(f"Nothing was pushed: {', '.join(paths)} contains a local path. Remove it.")
    sizes = {file.name: file.stat().st_size for file in files} | {"README.md": len(card.encode())}
    for name, size in sizes.items():
        print(f"{size / 1e6:10,.3f} MB  {name}")
    return files, card


def _base_license(folder: Path) -> tuple[str, str, str]:
    """The license in the card of the base model on the Hub with its name and link, or three times ""."""
    base = base_on_hub(folder, lineage(folder))
    with contextlib.suppress(*HUB_ERRORS):
        data = HfApi().model_info(base).card_data if base else None
        return complete_license(data, base) if data else ("", "", "")
    return "", "", ""


def push_folder(
    folder: Path, repo_id: str, private: bool, license_id: str = "", license_name: str = "", license_link: str = "",
    revision: str = "", tag: str = "",
) -> None:  # fmt: skip
    """Upload the files of a model and its card in one commit, which deletes those of the model that was there before.
    Files that the Hub already has are not sent again.

    `repo_id` defaults to the folder's name. An existing repository keeps its visibility; a public one is refused if
    `private`. `revision` is a branch, created if needed; `tag` names the commit. Raises UserError.
    """
    repo_id = repo_id or hub_name(folder.name)
    api = HfApi(token=hf_token(f"pushing to {repo_id}"))
    files, card = prepare_push(folder, repo_id, license_id, license_name, license_link)
    try:
        repo_id = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        is_private = _check_visibility(api, repo_id, private)
        is_adapter = (folder / "adapter_config.json").is_file()
        stale = stale_files(api, repo_id, revision, is_adapter, {file.name for file in files})
        if revision:
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        print(f"Pushing {len(files) + 1} files to {repo_id} ({'private' if is_private else 'public'}).")
        if stale:
            print(printable(f"Deleting {len(stale)} files of the model that was there: {', '.join(stale)}."))
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(file.name, file) for file in files]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        options: dict[str, Any] = dict(commit_message=f"Upload {folder.name}", revision=revision or None)
        commit = with_retries(lambda: api.create_commit(repo_id, operations, **options))
        if tag:
            with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True))
    except HUB_ERRORS as error:
        raise UserError(f"pushing to {repo_id} failed: {describe_error(error)}") from None
    print(f"Pushed: {api.endpoint}/{repo_id} is {'private' if is_private else 'public'}.")
    if is_private and not private:
        print("The repository existed and stays private. Change its visibility on its settings page on the Hub.")


def hub_name(name: str) -> str:
    """A folder's name as the Hub accepts names of repositories."""
    return re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", name)[:80].strip("-.") or "model"


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


def find_paths(files: Iterable[Path], text: str = "") -> list[str]:
    """Names of `files`, or README.md for `text`, that contain a local folder (a config: any absolute path)."""
    local = [str(path).encode() for path in (REPO, Path.home(), Path.cwd()) if len(path.parts) > 1]
    contents = {file.name: file.read_bytes() for file in files if file.suffix in (".json", ".jinja", ".py")}
    return [
        name for name, content in (contents | {"README.md": text.encode()}).items()
        if any(path in content for path in local) or (name.endswith("config.json") and ABSOLUTE_PATH.search(content))
    ]  # fmt: skip
