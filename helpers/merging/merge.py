"""Merge an adapter into its base: which adapter, into which weights, and the folder of the result."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from helpers.core import SettingsError, UserError, find_path, short_path, write_json
from helpers.merging.weights import StreamingMerger, UnsupportedAdapter, write_merged
from helpers.models.adapters import (
    CARRIED_FILES,
    check_model_files,
    copy_base_files,
    describe_error,
    load_adapter,
    make_portable,
    read_pretrained,
)
from helpers.models.chat import eos_token_ids, set_chat_template
from helpers.models.plan import prepare_model, quantization_config
from helpers.models.resolve import ModelRef, resolve_adapter
from helpers.runs.checkpoints import format_size, hash_files, read_run, shell_quote
from helpers.runs.run import Run, find_parent, find_run, lineage, recorded_variables, serve_options

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "vocab.txt", "merges.txt", *CARRIED_FILES]


@dataclasses.dataclass(frozen=True)
class LoadPrecision:
    """How a run loaded its base: the dtype of the weights, and their quantization."""

    dtype: Any = "auto"
    quantization: BitsAndBytesConfig | None = None

    @classmethod
    def from_run(cls, run: Run, merge_base: str = "auto") -> LoadPrecision:
        """Read it from run.json. An adapter from elsewhere has none: with `merge_base` dequantized, the usual NF4 of
        QLoRA with double quantization, computed in bfloat16, is assumed."""
        plan = run.record.get("plan", {})
        if not plan and merge_base == "dequantized":
            plan = {"weights": "bfloat16", "computed in": "bfloat16", "quantization": "4-bit"}
        if not plan:
            return cls()
        bits = plan["quantization"][:1]  # of "4-bit NF4, double", "8-bit" or "none"
        return cls(getattr(torch, plan["weights"]), quantization_config(bits, getattr(torch, plan["computed in"])))


@dataclasses.dataclass
class Adapter:
    """An adapter to merge. Its base is looked up, and fetched, when it is first used."""

    source: Path  # folder of its run, or its own
    run: Run  # that trained it; for an adapter from elsewhere only its fingerprint is known
    base_model_id: str = ""
    trust_remote_code: bool = False
    attn_implementation: str = "auto"

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments for `from_pretrained` of a model that is compared."""
        attention = {} if self.attn_implementation == "auto" else {"attn_implementation": self.attn_implementation}
        return attention | {"trust_remote_code": self.trust_remote_code}

    @functools.cached_property
    def ref(self) -> ModelRef:
        return resolve_adapter(str(self.source), self.base_model_id)

    @property
    def folder(self) -> Path:
        return Path(str(self.ref.adapter))

    @property
    def base_model(self) -> str:
        """The model at the root of the lineage. Raises UserError if there is no adapter, or no base of it."""
        base = self.ref.base
        return self.run.base_model if "base_model" in self.run.record else base

    @functools.cached_property
    def base_folder(self) -> Path:
        folder = local_folder(self.ref.base, self.ref.revision)
        check_model_files(folder)
        return folder

    @functools.cached_property
    def base_config(self) -> Any:
        return read_pretrained(AutoConfig, self.base_folder, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def tokenizer(self) -> Any:
        has_tokenizer = (self.folder / "tokenizer_config.json").is_file()
        folder, code = self.folder if has_tokenizer else self.base_folder, self.trust_remote_code
        tokenizer = read_pretrained(AutoTokenizer, folder, trust_remote_code=code)
        set_chat_template(tokenizer, "auto", is_of_run=has_tokenizer and "step" in self.run.record)
        return tokenizer

    def merger(self, precision: LoadPrecision, merge_base: str) -> StreamingMerger:
        """Adds the adapter to "original" or "dequantized" weights. Raises UnsupportedAdapter."""
        quantization = precision.quantization if merge_base == "dequantized" else None
        stored = torch.float32 if precision.dtype == "auto" else precision.dtype
        code, size = self.trust_remote_code, len(self.tokenizer)
        return StreamingMerger(self.base_folder, self.folder, size, quantization, stored, code)

    def load_policy(self, precision: LoadPrecision, device: str, dequantize: bool = False) -> Any:
        """Load the base as in training, or dequantized after that, with the adapter on it."""
        options = {"dtype": precision.dtype, "quantization_config": precision.quantization, "device_map": {"": device}}
        base = AutoModelForCausalLM.from_pretrained(self.base_folder, **self.loading, **options)
        prepare_model(base, self.tokenizer, self.folder)  # rows for tokens that the chat template added
        if dequantize and precision.quantization:
            base = base.dequantize(precision.dtype)
        return load_adapter(base, self.folder).eval()


def find_adapter(settings: Any) -> Adapter:
    """Find the adapter that the settings of 03_merge_push.py name: of a finished run, or from elsewhere (`--adapter`).
    Raises SettingsError for a size that cannot be used, UserError for a run or adapter that is not found."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=settings.max_shard_size)
    except ValueError:
        text = f"--max_shard_size {settings.max_shard_size!r} is not a size. Use a size such as 2GB or 500MB."
        raise SettingsError(text) from None
    if settings.adapter:
        source = local_folder(settings.adapter)
        run = Run(source.resolve(), read_run(source))  # of 01 or 02: it knows how its base was quantized
        run = run if run.finished else adapter_as_run(source)
    else:
        run = find_run(settings.output_dir, settings.run, "dpo")
        source = run.folder
    return Adapter(source, run, settings.base_model_id, settings.trust_remote_code, settings.attn_implementation)


def local_folder(model: str, revision: str = "") -> Path:
    """The folder of a model or adapter, downloaded from the Hub if it is there. Raises UserError."""
    if path := find_path(model):
        return path
    options: Any = {"revision": revision or None, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        folder = Path(snapshot_download(model, allow_patterns=MODEL_FILES, **options))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, allow_patterns=[*MODEL_FILES, "*.bin"], **options))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{model!r} cannot be downloaded: {describe_error(error)}") from None
    return folder


def adapter_as_run(folder: Path) -> Run:
    """An adapter from elsewhere as the parent of a merge. Its fingerprint changes with its files."""
    files = [*folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")]
    return Run(folder.resolve(), {"fingerprint": hash_files(files)})


@dataclasses.dataclass
class MergedModel:
    """A merged model: in a staging folder until `finalize`, then in the folder of its run."""

    run: Run
    folder: Path
    merge_base: str  # "original" or "dequantized" weights, with the adapter added
    precision: LoadPrecision  # of training
    is_text_part: bool = False  # of a base that also has others, such as a vision part

    def serve_commands(self) -> str:
        """Commands that start a server; none for a part of a model, for which servers look for the others."""
        if self.is_text_part:
            return "not possible: this is the text part of a model that also has others"
        options = serve_options(recorded_variables(lineage(self.run.folder)))
        return f"vllm serve {shell_quote(self.folder)}{options}\n{'':15}transformers serve {shell_quote(self.folder)}"

    def finalize(self, verification: Any) -> None:
        """Finish the run, and rename the staging folder to the run's in one step; an older merge there is complete
        until then. A finished run stays as it is. Raises UserError, and deletes the merge, if it is not verified."""
        if self.run.finished:
            return
        if problem := verification.problem:
            shutil.rmtree(self.folder)
            raise UserError(f"The merge was deleted: {problem}")
        final, self.run.folder, self.run.overwrite = self.run.folder, self.folder, False
        parent = find_parent(final, self.run.record)
        if parent and (parent / "curves.png").is_file():  # of the training, for the model card
            shutil.copyfile(parent / "curves.png", self.folder / "curves.png")
        fields = {"metrics": verification.metrics, "verification": verification.rows}
        self.run.finish(merge_base=self.merge_base, is_text_part=self.is_text_part, **fields)
        (self.folder / "merge.digest").unlink(missing_ok=True)  # last: an interrupted run resumes until here
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        self.folder.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        self.folder = self.run.folder = final


def staging_dir(run: Run) -> Path:
    """The hidden folder next to a run's in which a model is merged."""
    return run.folder.with_name(f".{run.folder.name}.part")


def merge_adapter(
    adapter: Adapter, output: Run, base: str = "auto", dtype: str = "auto", max_shard_size: str = "2GB"
) -> MergedModel:
    """Merge an adapter into its base, one tensor at a time. An interrupted merge resumes; a finished one is returned.

    `base` is "original" weights, "dequantized" weights as 4-bit training saw them, or "auto" for those of training.
    `dtype` is that of the merged weights; "auto" is the base's. PEFT merges what `StreamingMerger` does not support, in
    the memory of the full model. Raises UserError for an adapter that cannot be merged, and if the disk is full.
    """
    precision = LoadPrecision.from_run(adapter.run, base)
    if base == "dequantized" and not precision.quantization:
        raise UserError("`--merge_base dequantized` needs a run on quantized weights. Use `--merge_base original`.")
    if base == "auto":
        base = "dequantized" if precision.quantization else "original"
    if output.finished:
        is_text_part = output.record.get("is_text_part", False)
        return MergedModel(output, output.folder, output.record["merge_base"], precision, is_text_part)
    _ = adapter.base_config, adapter.tokenizer  # raise for broken files before anything is written
    output.lock()
    print(f"Merging {short_path(adapter.folder)} into the {base} weights of {short_path(adapter.ref.base)}.")
    merged = MergedModel(output, staging_dir(output), base, precision)
    kind = None if dtype == "auto" else getattr(torch, dtype)
    try:
        merger = adapter.merger(precision, base)
        write_merged(merged.folder, merger, max_shard_size, kind)
        merger.config.save_pretrained(merged.folder)
    except UnsupportedAdapter as reason:
        print(f"PEFT merges {reason}.")
        merge_with_peft(merged.folder, adapter, max_shard_size, kind, precision if base == "dequantized" else None)
    save_config(merged.folder, adapter)
    config = json.loads((merged.folder / "config.json").read_text())
    merged.is_text_part = config["model_type"] != adapter.base_config.model_type
    return merged


def save_config(folder: Path, adapter: Adapter) -> None:
    """Save what a model has besides weights and configuration: the tokenizer with its template, files of the base, and
    its generation settings as they are, with every token that ends an answer."""
    adapter.tokenizer.save_pretrained(folder)
    make_portable(folder)
    copy_base_files(str(adapter.base_folder), folder)
    config, file = adapter.base_config, adapter.base_folder / "generation_config.json"
    text = file.read_text() if file.is_file() else GenerationConfig.from_model_config(config).to_json_string()
    values = json.loads(text)
    before = values.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    ends = eos_token_ids(adapter.tokenizer, SimpleNamespace(eos_token_id=before))
    if file.is_file() or ends not in ([before], before):
        write_json(folder / file.name, values | {"eos_token_id": before if ends == [before] else ends})


def merge_with_peft(
    folder: Path,
    adapter: Adapter,
    max_shard_size: str,
    dtype: torch.dtype | None = None,
    precision: LoadPrecision | None = None,
) -> None:
    """Merge with PEFT's merge_and_unload, into the base as it is, or loaded in `precision` and dequantized. Raises
    UserError if PEFT cannot do it either, or the model does not fit into memory."""
    shutil.rmtree(folder, ignore_errors=True)
    stored = adapter.base_config.dtype or torch.float32
    files = [*adapter.base_folder.glob("*.safetensors")] or [*adapter.base_folder.glob("*.bin")]
    ratio = precision.dtype.itemsize / stored.itemsize if precision else 1
    size, free = ratio * sum(file.stat().st_size for file in files), psutil.virtual_memory().available
    needs = f"{format_size(size)} of memory"
    print(f"The full model is loaded for that. It takes {needs}, and saving it up to as much again.")
    if size > free:
        raise UserError(f"The model needs {needs}, and {format_size(free)} are free. Use a machine with more memory.")
    try:
        merged = adapter.load_policy(precision or LoadPrecision(), "cpu", dequantize=True).merge_and_unload()
        if kind := dtype or (stored if precision else None):
            merged = merged.to(kind)
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"PEFT cannot merge this adapter: {' '.join(str(error).split())[:300]}") from None
