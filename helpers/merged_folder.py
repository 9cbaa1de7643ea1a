"""A merged model's folder: not there until it is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.chat import end_tokens
from helpers.errors import UserError
from helpers.hub_errors import reason
from helpers.paths import find_path
from helpers.weight_files import is_whole, plan_shards, write_index, write_shard

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        where: Any = {"revision": revision or None, "ignore_patterns": ["*/*", "consolidated*"]}
        found = Path(snapshot_download(model, allow_patterns=ALL_OF_A_MODEL, **where))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, allow_patterns=[*ALL_OF_A_MODEL, "*.bin"], **where))
        return found
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{model!r} cannot be fetched: {reason(error)}") from None


def adapter_as_run(folder: Path) -> Run:
    """An adapter from elsewhere as what a merge starts from: another file in the same place makes another merge."""
    from helpers.runs import Run

    content = hashlib.sha256()
    for file in sorted([*folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")]):
        with file.open("rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    return Run(folder.resolve(), {"fingerprint": content.hexdigest()[:16]})


def draft_of(run: Run) -> Path:
    """Where a run's merged weights are written until they are whole, beside its folder and hidden."""
    return run.folder.with_name(f".{run.folder.name}.part")


def merge_into(folder: Path, merge: Merge, identity: dict[str, Any], largest: int, dtype: torch.dtype | None) -> None:
    """Write the merged weights into `folder`, which need not exist; one that a stopped merge left is gone on with.

    Each file is written beside its name and renamed when it is whole, so what stands there is not written again.
    `identity` tells one merge from another: a folder of another is emptied first. Raises UserError where the disk has
    no room for what is missing.
    """
    from tqdm import tqdm

    shards = plan_shards(merge.entries(dtype), largest)
    plan = identity | {"base": merge.base.stamp(), "adapter": merge.added.stamp()}
    plan |= {"shards": {file: [[e.name, e.shape, str(e.dtype)] for e in entries] for file, entries in shards.items()}}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
    mark = folder / "merge.digest"
    if folder.exists() and not (mark.is_file() and mark.read_text() == digest):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    for draft in folder.glob("*.part"):
        draft.unlink()
    sizes = {file: sum(entry.size for entry in entries) for file, entries in shards.items()}
    missing = {file: size for file, size in sizes.items() if not is_whole(folder / file, shards[file])}
    if (free := shutil.disk_usage(folder).free) < (need := sum(missing.values()) + 2**20):
        raise UserError(f"the merged weights need {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free")
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="merging", mininterval=1) as bar:
        bar.update(sum(sizes.values()) - sum(missing.values()))
        for file, entries in shards.items():
            try:
                if file in missing:
                    write_shard(folder / file, entries, merge.tensor, bar.update)
            except OSError as error:
                raise UserError(f"writing the merged weights failed: {error}; the same command goes on") from None
    write_index(folder, shards)


def merge_by_peft(
    folder: Path,
    base: Path,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
    largest: int,
    trust_remote_code: bool = False,
) -> None:
    """What `Merge` does not know, in the memory that PEFT needs: that of the whole model. Raises UserError."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from helpers.embeddings import fit_embeddings

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", trust_remote_code=trust_remote_code
        )
        fit_embeddings(model, tokenizer)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        shutil.rmtree(folder, ignore_errors=True)
        (merged.to(dtype) if dtype else merged).save_pretrained(folder, max_shard_size=largest)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"PEFT does not merge this adapter: {' '.join(str(error).split())[:300]}") from None


def complete(draft: Path, merge: Merge, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: Any) -> None:
    """All that stands beside the weights: configuration, tokenizer with its template, code of the base's own."""
    from transformers import GenerationConfig

    config = merge.config
    if dtype is not None:
        config.dtype = config.get_text_config().dtype = dtype
    config.save_pretrained(draft)
    for name in ("generation_config.json", *(file.name for file in base.glob("*.py"))):
        if (base / name).is_file():
            shutil.copyfile(base / name, draft / name)
    tokenizer.save_pretrained(draft)
    file = draft / "generation_config.json"
    known = GenerationConfig.from_pretrained(draft) if file.is_file() else GenerationConfig.from_model_config(config)
    ends = known.eos_token_id if isinstance(known.eos_token_id, list) else [known.eos_token_id]
    if tokenizer.eos_token_id not in ends:  # a chat format may end its answers with another token than the base
        known.eos_token_id = end_tokens(tokenizer, known)
        known.save_pretrained(draft)


def move_in(run: Run, draft: Path, **fields: Any) -> None:
    """Finish the run in its draft, `fields` going into run.json, and give that the run's name in one step.

    An older merge of that name is whole until then.
    """
    folder, run.folder, run.replaces = run.folder, draft, False
    curves = Path(run.record.get("parent_folder") or "") / "curves.png"  # of the training, for the card
    if curves.is_file():
        shutil.copyfile(curves, draft / "curves.png")
    run.finish(**fields)
    (draft / "merge.digest").unlink(missing_ok=True)  # last: until here a stopped run goes on with what is there
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    run.folder = folder
