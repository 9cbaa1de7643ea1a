"""Publishing a folder: private unless told otherwise, only files that are named, and said before and after."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.credentials import hf_token
from helpers.errors import UserError
from helpers.hub_errors import reason
from helpers.paths import find_path

# What a model is made of. Checkpoints, optimizer states, logs, run.json and .env never travel; nor does TRL's
# README.md, which names folders of this machine.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
             "*.model", "*.py", "chat_template.jinja")  # fmt: skip


def files_to_push(folder: Path) -> list[Path]:
    """The files of `folder` that would be published, by name."""
    return sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if file.is_file()})


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a model's files in one commit; the address of the repository. Raises UserError.

    Without a `repo_id` it is the folder's name, under the token's account. A repository that exists keeps its
    visibility; one that is public is refused when `private` was meant. So is an adapter whose base is a folder here.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo_id = repo_id or folder.name
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and find_path(str(json.loads(adapter.read_text())["base_model_name_or_path"])):
        raise UserError(
            f"the base of {folder.name} is a folder here, which nobody else has: push it merged (--what merged)"
        )
    names = [file.name for file in files_to_push(folder)]
    api = HfApi(token=hf_token(f"pushing to {repo_id}"))
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            raise UserError(f"{repo_id} exists and is public: push with --no_private, or name another --hub_repo_id")
        print(f"Pushing {len(names)} files to {repo_id} ({'private' if is_private else 'public'}).")
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=f"Upload {folder.name}"
        )
        is_private = bool(api.model_info(repo_id).private)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"pushing to {repo_id} failed: {reason(error)}") from None
    print(f"Pushed: {api.endpoint}/{repo_id} is {'private' if is_private else 'public'}.")
    return f"{api.endpoint}/{repo_id}"
