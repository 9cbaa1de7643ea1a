"""Publishing a folder: private unless told otherwise, only files that are named, and said before and after."""

from __future__ import annotations

from pathlib import Path

from helpers.credentials import hf_token
from helpers.errors import UserError

# What a model is made of. Checkpoints, optimizer states, logs, run.json and .env never travel.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
             "*.model", "chat_template.jinja", "README.md")  # fmt: skip


def files_to_push(folder: Path) -> list[Path]:
    """The files of `folder` that would be published, by name."""
    return sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if file.is_file()})


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a model's files in one commit; the address of the repository. Raises UserError.

    A repository that exists keeps its visibility; one that is public is refused when `private` was meant.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not repo_id:
        raise UserError("--push_to_hub needs --hub_repo_id name/model: the repository to push to")
    names = [file.name for file in files_to_push(folder)]
    api = HfApi(token=hf_token(f"pushing to {repo_id}"))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            raise UserError(f"{repo_id} exists and is public: push with --no_private, or name another --hub_repo_id")
        print(f"Pushing {len(names)} files to {repo_id} ({'private' if is_private else 'public'}).")
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=f"Upload {folder.name}"
        )
        is_private = bool(api.model_info(repo_id).private)
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"pushing to {repo_id} failed: {reason}") from None
    print(f"Pushed: {api.endpoint}/{repo_id} is {'private' if is_private else 'public'}.")
    return f"{api.endpoint}/{repo_id}"
