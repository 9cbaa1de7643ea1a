"""Files of models on disk and on the Hub, and adapters that fit their base (PEFT 0.21, transformers 5.23)."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from jinja2 import Environment, TemplateSyntaxError
from safetensors import SafetensorError, safe_open

from helpers.core import UserError, find_path, is_main_process, is_notebook, short_path, shorten, write_json
from helpers.runs.checkpoints import MODEL_PATTERNS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Place = Path | str  # a folder, or a Hub id
# Files of a model that its successors need too.
CARRIED_FILES = ("*.py", "*.model", "tokenizer.model*", "*.tiktoken", "tekken.json", "*processor_config.json",
                 "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # fmt: skip
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
LFS_POINTER = b"version https://git-lfs"  # the beginning of a file that `git clone` left for `git lfs pull`
GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # of transformers, unknown to jinja2
HUB_STATUS = {
    401: "the Hub does not accept your token (401). Set a valid HF_TOKEN, or unset it for public repositories",
    403: "your token may not do that (403). Set HF_TOKEN to a token with this permission",
    404: "it is not on the Hub, or your token may not see it (404)",
    429: "the Hub asks to slow down (429). Run the same command again in a few minutes",
}


@functools.cache
def check_hub() -> None:
    """Ask the Hub once whether it can be reached; if not, use its cache only, and say so: its clients would retry for
    every file, 24 seconds each in huggingface_hub 2.4."""
    import httpx2 as httpx  # the HTTP client of huggingface_hub
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError):
        constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):
            datasets.config.HF_HUB_OFFLINE = True
        print("The Hub cannot be reached: only its cache is used. HF_HUB_OFFLINE=1 skips this check.", file=sys.stderr)
    except httpx.HTTPError:  # slow or busy: the retries of huggingface_hub handle it
        pass


def describe_error(error: BaseException) -> str:
    """One line on an error of the Hub's client and its fix. For other errors, their own message."""
    from huggingface_hub import errors

    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {kind for e in chain for kind in type(e).__mro__}
    message = " ".join(str(error).split())[:300]
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), 0)
    lines = [line for e in chain for line in str(getattr(e, "server_message", "") or e).splitlines()]
    quota = next((line for line in lines if re.search(r"storage|quota", line, re.IGNORECASE)), "")
    if errors.RepositoryNotFoundError in kinds:
        return HUB_STATUS[404]  # without a token, the Hub answers 401 for a repository that does not exist
    if kinds & {errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError}:
        return message
    if status in (402, 403, 413) and quota:
        return f"the account's storage is full ({' '.join(quota.split())[:200]}). Free some, or use another account"
    if status >= 500:
        return f"the Hub fails ({status}). Run the same command again later"
    if status in HUB_STATUS:
        return HUB_STATUS[status]
    if kinds & {errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled}:
        if os.environ.get("HF_HUB_OFFLINE"):
            return "it is not in the cache, and HF_HUB_OFFLINE is set. Unset it once, or use a local folder"
        return "it is not in the cache, and the Hub cannot be reached. Connect, or use a local folder"
    return message


def hf_token(purpose: str) -> str:
    """The Hub token from HF_TOKEN, .env or `hf auth login`, or typed by the user if there is a terminal. Raises
    UserError without one; `purpose` begins the message, as in "pushing to me/model"."""
    from huggingface_hub import get_token

    token = get_token() or ""
    is_interactive = is_notebook() or (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty())
    if not token and is_interactive and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with contextlib.suppress(EOFError, RuntimeError, KeyboardInterrupt):  # RuntimeError: a kernel without stdin
            token = getpass.getpass("HF_TOKEN (not shown; press Enter to continue without): ").strip()
    if not token:
        raise UserError(
            f"{purpose} needs a Hub token. Set HF_TOKEN in the environment or in .env, or run `hf auth login`."
        )
    return token


def check_model_files(folder: Path) -> None:
    """Raise UserError for a broken file of the model or adapter in `folder`: JSON, text, a chat template, the header of
    weights, or an index that does not fit the shards that are there."""
    is_safe = any((folder / name).is_file() for name in SAFE_WEIGHTS)  # then no other format is read
    patterns = MODEL_PATTERNS if is_safe else (*MODEL_PATTERNS, "*.bin")
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    files = [file for file in found if not file.name.endswith("processor_config.json")]  # of images: only carried
    names = {file.name: check_model_file(file, file.suffix) for file in sorted(files)}
    if index := find_index(folder):
        check_model_file(index, ".json")
        shards = json.loads(index.read_text("utf-8")).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise _broken(index, "it has no weight_map of weights and their files")
        if lost := [name for name, shard in shards.items() if name not in (names.get(shard) or [name])]:
            raise _broken(index, f"{shards[lost[0]]} lacks {len(lost)} of the weights that it names ({lost[0]})")


def find_index(folder: Path) -> Path | None:
    """The index of the shards that transformers 5.23 reads; None if it reads a single file, or finds nothing."""
    names = (f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    return found if found and found.suffix == ".json" else None


def check_model_file(file: Path, kind: str) -> list[str]:
    """The names of the weights in a file, or [] for a file of another kind, which is a suffix. Raises UserError."""
    with file.open("rb") as opened:
        head = opened.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise UserError(f"{short_path(file)} is a pointer of Git LFS, not the file. Run `git lfs pull` in its folder.")
    try:
        if not head:
            raise ValueError("it is empty")
        if kind == ".safetensors":
            with safe_open(file, framework="numpy") as weights:
                return list(weights.keys())
        if kind == ".bin" and head.startswith(b"PK") and not zipfile.is_zipfile(file):
            raise ValueError("it is truncated")
        text: Any = file.read_text("utf-8") if kind in (".json", ".jinja", ".txt") else ""
        if kind == ".json":
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            text = content.get("chat_template")
        if isinstance(text, str) and kind != ".txt":
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAG.sub("", text))
    except (ValueError, RecursionError, SafetensorError, TemplateSyntaxError) as error:
        raise _broken(file, str(error)) from None
    return []


def _broken(file: Path, problem: str) -> UserError:
    problem = shorten(" ".join(problem.split())).rstrip(".")
    return UserError(f"{short_path(file)} is broken: {problem}. Restore it, or download the model again.")


def read_pretrained(kind: Any, name: Place, **options: Any) -> Any:
    """`kind.from_pretrained(name)`, of a configuration or a tokenizer. Raises UserError for files it cannot read."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # tokenizers 0.22 raises no other class
        if "trust_remote_code" in str(error) or isinstance(error, UserError | MemoryError):
            raise
        reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise UserError(
            f"{display_name(name)} is broken, or not supported: {kind.__name__} cannot read it ({reason}). Restore its "
            "files, or download it again."
        ) from None


def check_weights(model: Any) -> None:
    """Raise UserError if from_pretrained found no weight for a parameter of `model`, which it then drew at random. Not
    known for a model that is stored quantized, and under ZeRO-3."""
    quantization = getattr(model.config, "quantization_config", None)
    is_other = quantization and not hasattr(quantization, "load_in_4bit")  # not of bitsandbytes
    weights = list(model.named_parameters())
    if is_other or getattr(model, "_are_weights_checked", False) or hasattr(weights[0][1], "ds_id"):
        return
    known = {name for name, weight in weights if getattr(weight, "_is_hf_initialized", False)}  # transformers 5.23
    optional = "|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    lost = [name for name, _ in weights if name not in known and not (optional and re.search(optional, name))]
    if known and lost:
        what = f"{len(lost)} of its {len(weights)} weights are not in its files ({lost[0]})"
        raise UserError(f"{display_name(model.name_or_path)} is broken: {what}. Restore it, or download it again.")
    model._are_weights_checked = True


def load_adapter(model: PreTrainedModel, folder: Place, is_trainable: bool = False) -> Any:
    """Put the adapter in `folder` on `model`. Raises UserError if it does not fit: see `check_adapter_keys`."""
    from peft import PeftModel

    base = str(getattr(model.config, "name_or_path", ""))
    with adapter_errors(folder, base), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # all names; an error has the first
        policy = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
        # PEFT 0.21 drops keys that it does not know without a word. Loading again returns what was dropped or missing
        names = getattr(model, "_checkpoint_conversion_mapping", {})
        keys = policy.load_adapter(str(folder), "default", is_trainable=is_trainable, key_mapping=names)
    check_adapter_keys(policy, keys.missing_keys, keys.unexpected_keys, folder, base)
    return policy


def check_adapter_keys(policy: Any, missing: list[str], unexpected: list[str], folder: Place, base: Place) -> None:
    """Raise UserError unless every key of an adapter's file is used, and every layer that it wraps is filled, by the
    keys that PEFT reports for `policy`. Copies of the embeddings, which PEFT saves by itself, may be unused."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = policy.peft_config["default"]
    if config.is_prompt_learning:  # its weights are not in a layer
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    needed = {name for name in policy.state_dict() if prefix in name and ".default" in name}
    lacking = [name for name in missing if name in needed and "vblora_vector_bank" not in name]  # layers share that
    model = policy.get_base_model()
    layers = {id(each) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    embeddings = {name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in layers}
    unused = [name for name in unexpected if prefix in name or not embeddings & set(name.split("."))]
    problems = [f"{len(unused)} of its weights are not in that model ({unused[0]})"] if unused else []
    if lacking:
        problems.append(f"{len(lacking)} of {len(needed)} weights of its layers are missing ({lacking[0]})")
    if problems:
        raise adapter_error(folder, base, " and ".join(problems))


@contextlib.contextmanager
def adapter_errors(folder: Place, base: Place) -> Iterator[None]:
    """Raise UserError where PEFT 0.21 finds that an adapter does not fit its base: other layers, shapes or files."""
    try:
        yield
    except KeyError as error:
        raise adapter_error(folder, base, f"it lacks {error.args[0]}") from None
    except (ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):  # such as too little memory
            raise
        raise adapter_error(folder, base, str(error)) from None


def adapter_error(folder: Place, base: Place, problem: str) -> UserError:
    """Return the error of an adapter that does not fit its base."""
    problem, model = shorten(" ".join(problem.split()), 400), display_name(base)
    return UserError(
        f"The adapter {display_name(folder)} does not fit its base {model}: {problem}. Use the base that it was "
        "trained on: `--base_model_id` in 03_merge_push.py, or `base_model_name_or_path` in its adapter_config.json."
    )


def display_name(folder: Place) -> str:
    """A folder as the user would type it; for one in the cache of the Hub, its id."""
    cached = re.search(r"models--([^/\\]+)", str(folder))
    return cached[1].replace("--", "/") if cached else short_path(folder)


def follows_longest_row(config: Any) -> bool:
    """Whether rotary frequencies depend on the longest row of a forward (transformers, modeling_rope_utils.py), by a
    config of transformers, or by config.json, which may be of an older version."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {each.get("rope_type", each.get("type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    return not kinds.isdisjoint({"dynamic", "longrope"})


def save_model(trainer: Any, folder: Path) -> None:
    """Save the tokenizer, and the model or the trained adapter without the "ref" copy that TRL's save_model adds. Every
    process of a launch calls it: under ZeRO-3 and FSDP each holds a part of the weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "peft_config")
    if is_adapter:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        trainer.save_model(str(folder))  # and the tokenizer
    if not is_main_process():
        return
    if is_adapter:
        # the adapter has the rows of added tokens: PEFT need not save all embeddings for them
        layers = "auto" if model.peft_config["default"].trainable_token_indices is None else False
        names = ["default"]
        model.save_pretrained(str(folder), selected_adapters=names, state_dict=state, save_embedding_layers=layers)
        trainer.processing_class.save_pretrained(folder)
    else:
        copy_base_files(model.config._name_or_path, folder, getattr(model.config, "_commit_hash", None))
    (folder / "README.md").unlink(missing_ok=True)  # of TRL or PEFT, which do not know the base. 03 writes a card
    make_portable(folder)


def make_portable(folder: Path) -> None:
    """Rewrite the tokenizer_config.json that transformers 5.23 saves in the terms of transformers 4 and llama.cpp, and
    without how it was loaded."""
    file, tokens = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text())
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has names for them there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if tokens.is_file():
        added = json.loads(tokens.read_text())["added_tokens"]
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    write_json(file, config)


def copy_base_files(base: str, folder: Path, commit: str | None = None) -> None:
    """Copy what belongs to a base model and is not in its successor's folder: code, other tokenizers, licence. They are
    downloaded from the Hub; without a network they are left out."""
    source = find_path(base)
    with contextlib.suppress(OSError, ValueError):
        source = source or Path(snapshot_download(base, revision=commit, allow_patterns=list(CARRIED_FILES)))
    for file in {file for pattern in CARRIED_FILES for file in source.glob(pattern)} if source else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def upcast_adapter(model: torch.nn.Module) -> None:
    """Undo TRL's cast of QLoRA adapters to bfloat16, which would round small updates away (trl 1.16, dpo_trainer.py and
    sft_trainer.py, __init__). The frozen copy of an adapter, "ref", still has the exact values. In a new adapter,
    modules and token rows that are trained in full begin as those of the base: policy and reference are equal."""
    weights = dict(model.named_parameters())
    rows = {  # PEFT 0.21 keeps the rows of the base in a buffer
        f"{name}.trainable_tokens_delta.{adapter}": value
        for name, module in model.named_modules()
        for adapter, value in getattr(module, "trainable_tokens_original", {}).items()
    }
    for name, weight in weights.items():
        if weight.requires_grad:
            reference = weights.get(re.sub(r"\.default(?=\.|$)", ".ref", name))
            base = weights.get(name.replace(".modules_to_save.default.", ".original_module."))
            exact = next(each for each in (reference, rows.get(name), base, weight) if each is not None)
            weight.data = exact.data.float().clone()


def tensor_names(model: PreTrainedModel, file_names: Iterable[str]) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Match the tensors in a model's files with its weights, as transformers 5.23 does when it loads them
    (core_model_loading.py, convert_and_load_state_dict_in_model).

    Returns the weights' names by those in files, without what is not in the model (the vision part, for a text model);
    names in files by those of weights, which a tied weight would have there; and the names of weights that transformers
    makes from others, such as experts in one tensor.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    weights, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    names, converted = {}, set()
    for file_name in sorted(file_names, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(file_name, renamings, converters, model.base_model_prefix, weights)
        if name not in weights and file_name in weights:
            name, pattern = file_name, None
        if pattern is not None:
            parts = next(each.target_patterns for each in converters if pattern in each.source_patterns)
            converted |= {name.replace(parts[0], part) for part in parts}
        elif name in weights:
            names[file_name] = name
    in_files = {name: file_name for file_name, name in names.items()}
    for name in weights.keys() - in_files.keys() - converted:
        in_files[name] = next(iter(loading.revert_weight_conversion(model, {name: weights[name]})))
    return names, in_files, converted
