"""A merged model's folder: not there until it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import UserError
from helpers.hub_errors import reason
from helpers.paths import find_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpers.merging import Merge
    from helpers.runs import Run

ALL_OF_A_MODEL = ["*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "LICENSE*"]


def local_folder(model: str, revision: str = "") -> Path:
    """A model's or adapter's folder here: its own, or that in the Hub's cache once it is fetched. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if path := find_path(model):
        return path
    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=ALL_OF_A_MODEL))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{model!r} cannot be fetched: {reason(error)}") from None


def draft_of(run: Run) -> Path:
    """Where a run's merged weights are written until they are whole, beside its folder and hidden."""
    return run.folder.with_name(f".{run.folder.name}.part")


def complete(draft: Path, merge: Merge, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: Any) -> None:
    """All that stands beside the weights: configuration, tokenizer with its template, code of the base's own."""
    config = merge.config
    if dtype is not None:
        config.dtype = config.get_text_config().dtype = dtype
    config.save_pretrained(draft)
    for name in ("generation_config.json", *(file.name for file in base.glob("*.py"))):
        if (base / name).is_file():
            shutil.copyfile(base / name, draft / name)
    tokenizer.save_pretrained(draft)


def move_in(run: Run, draft: Path, **fields: Any) -> None:
    """Finish the run in its draft, `fields` going into run.json, and give that the run's name in one step.

    An older merge of that name is whole until then.
    """
    folder, run.folder, run.replaces = run.folder, draft, False
    (draft / "merge.digest").unlink(missing_ok=True)
    curves = Path(run.record.get("parent_folder") or "") / "curves.png"  # of the training, for the card
    if curves.is_file():
        shutil.copyfile(curves, draft / "curves.png")
    run.finish(**fields)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    run.folder = folder
