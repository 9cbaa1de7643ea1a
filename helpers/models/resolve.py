"""What a name refers to: a model or an adapter, in a folder, on the Hub or behind an endpoint, and where it is from."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError, check_hub, describe_error, find_path, fingerprint, hf_token
from helpers.models.chat import set_chat_template
from helpers.runs.run import Run, find_parent, find_run, read_run
from helpers.settings.fields import SOURCE_ORDER, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Families whose positions are rows of a table; others compute them.
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "openai-gpt", "xglm", "biogpt", "imagegpt", "ctrl")
BASE_KEEPING_INITS = ("gaussian", "orthogonal", "eva")  # ways to initialize an adapter that do not change its base
# The weights that a folder needs besides its configuration.
WEIGHT_PATTERNS = {
    "config.json": ("*.safetensors", "pytorch_model*.bin"),
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training starts from: a model, a finished run of 01_sft.py, or that run's adapter on its base."""

    model: str  # the weights: a folder or a Hub id, as it was named
    revision: str | None  # branch, tag or commit of `model` on the Hub
    base_model: str  # the model at the root of the lineage
    parent: Run | None = None
    adapter: Path | None = None  # folder of an adapter that is trained further

    @functools.cached_property
    def path(self) -> str:
        """`model`, ready for from_pretrained. Checked when first used: a finished run does not need the Hub."""
        return resolve_model(self.model, self.revision)

    @property
    def tokenizer(self) -> str:
        return str(self.parent.folder) if self.parent else self.path


def resolve_start(settings: RunSettings) -> Start:
    """Find what `settings` start from: `model_id`, or a run of 01_sft.py, whose model_id and adapter settings are used.

    Raises UserError if there is no such run, or if settings given by hand contradict its adapter.
    """
    values = settings.values()
    revision = values["revision"] or None
    folder = find_path(values["model_id"]) if not values.get("sft_run") else None
    step = read_run(folder).get("step") if folder else ""
    if folder and step == "sft" and "sft_run" in values:
        print(f"{values['model_id']} is a run of 01_sft.py, taken as --sft_run.")
        settings.override(settings.sources["model_id"], sft_run=str(folder), model_id="")
        values = settings.values()
    elif folder and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        what = "the adapter of a run of 02_dpo.py" if step == "dpo" else "an adapter"
        raise SettingsError(
            f"--model_id {values['model_id']} is {what}, not a model. Merge it with `python notebooks/03_merge_push.py "
            f"{'--run' if step == 'dpo' else '--adapter'} {values['model_id']}`, and start from the merged folder."
        )
    if not values.get("sft_run"):
        return Start(values["model_id"], revision, values["model_id"])
    parent = find_run(settings.output_dir, values["sft_run"], "sft")
    settings.override("parent", model_id=parent.base_model)
    if not parent.is_adapter:
        return Start(str(parent.folder), revision, parent.base_model, parent)
    config = adopt_adapter_settings(parent.folder, settings)
    revision = config.get("revision") or None
    return Start(config["base_model_name_or_path"], revision, parent.base_model, parent, parent.folder)


def adopt_adapter_settings(folder: Path, settings: RunSettings) -> dict[str, Any]:
    """Take over rank, scale and targets of an adapter that is trained further, and return its adapter_config.json.

    Raises SettingsError if a setting given by hand differs. A recipe's may: they are for the adapters it creates.
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    values = settings.values()
    if values["tuning"] == "full":
        raise SettingsError(f"`--tuning full` cannot train the adapter in {folder.name}. Use `--tuning lora` or qlora.")
    dora, run = config.get("use_dora", False), read_run(folder).get("settings", {})
    adopted = {
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_target_modules": run.get("lora_target_modules", config["target_modules"]),
        "use_rslora": config.get("use_rslora", False),
        "lora_modules_to_save": tuple(config.get("modules_to_save") or ()),
    }
    if (values["tuning"] == "dora") != dora and values["tuning"] != "qlora":  # on 4-bit weights, qlora is either
        adopted["tuning"] = "dora" if dora else "lora"
    for name, value in adopted.items():
        by_hand = settings.layer(name) > SOURCE_ORDER.index("recipe")
        # `--tuning lora` is right for a DoRA adapter: it means that the base is not quantized
        if by_hand and values[name] != value and not (name == "tuning" and dora):
            raise SettingsError(
                f"`--{name} {values[name]}` contradicts the adapter in {folder.name}, which has {value}. "
                f"Remove `--{name}`."
            )
    settings.override("parent", **adopted)
    return config


def check_positions(config: Mapping[str, Any], max_length: int) -> None:
    """Check `max_length` against the config.json of a model. Raise SettingsError if it is beyond a table of learned
    positions, which has no row for more; warn if it is beyond the length that another model was trained for."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or text.get("n_positions") or 0
    if limit and config.get("model_type") in LEARNED_POSITIONS and not 0 < max_length <= limit:
        given = f"--max_length {max_length}" + " (no limit)" * (not max_length)
        raise SettingsError(f"{given} is beyond the {limit} learned positions of this model. Use at most {limit}.")
    if 0 < limit < max_length:
        print(f"warning: --max_length {max_length} is beyond the {limit} positions that this model was trained for.")


def load_tokenizer(start: Start, settings: RunSettings) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Load the tokenizer and set `--chat_template`; returns it and the tokens added for the template.

    Raises SettingsError if the adapter that `start` trains further has no rows for these tokens.
    """
    from transformers import AutoTokenizer

    values = settings.values()
    loading = {"revision": start.revision or "main", "trust_remote_code": values["trust_remote_code"]}
    check_positions(
        json.loads(fetch_file(start.model, start.revision, "config.json").read_text()), values.get("max_length", 0)
    )
    tokenizer = AutoTokenizer.from_pretrained(start.tokenizer, **loading)
    for field in ("eos_token", "pad_token"):
        token = settings.trl.get(field)
        if token and token not in tokenizer.get_vocab():
            raise SettingsError(f"--{field} {token!r} is not in the tokenizer's vocabulary. Use one of its tokens.")
        if token:
            setattr(tokenizer, field, token)
    name, new_tokens = set_chat_template(tokenizer, values["chat_template"])
    if new_tokens and start.adapter:
        raise SettingsError(
            f"`--chat_template {name}` needs {', '.join(new_tokens)}, which the adapter in {start.adapter.name} was "
            f"trained without. Train 01_sft.py with `--chat_template {name}`."
        )
    print("Chat template:", name, *new_tokens)
    return tokenizer, new_tokens


def resolve_model(model_id: str, revision: str | None = None, file: str = "config.json") -> str:
    """Return a folder's path, as seen from here, or the Hub id. Raises UserError if files or weights are missing."""
    fetch_file(model_id, revision, file)
    folder = find_path(model_id)
    if folder and (missing := missing_weights(folder, file)):
        raise UserError(f"{model_id!r} {missing}")
    return str(folder or model_id)


def fetch_file(model_id: str, revision: str | None, file: str) -> Path:
    """Find a folder's file, or download it from the Hub. Asks for a token if the model is gated. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    fetch = functools.partial(hf_hub_download, model_id, file, revision=revision or None)
    try:
        if folder := find_path(model_id):
            if (folder / file).is_file():
                return folder / file
            raise FileNotFoundError(f"the folder has no {file}")
        validate_repo_id(model_id)
        check_hub()
        try:
            return Path(fetch())
        except GatedRepoError:
            os.environ["HF_TOKEN"] = hf_token(f"{model_id} is gated (its page asks to accept terms), and reading it")
            return Path(fetch())
    except HFValidationError:
        raise UserError(f"{model_id!r} is neither a folder here nor a Hub id") from None
    except GatedRepoError:
        raise UserError(f"{model_id} is gated and your token may not read it. Accept its terms on its page.") from None
    except (OSError, HfHubHTTPError) as error:
        raise UserError(f"{model_id!r} cannot be loaded: {describe_error(error)}") from None


def missing_weights(folder: Path, file: str = "config.json") -> str:
    """Describe missing weights, as "has ... and no weights" or "lacks ..."; "" if none are missing."""
    patterns = WEIGHT_PATTERNS.get(file, ("*",))
    if not any(list(folder.glob(pattern)) for pattern in patterns):
        return f"has a {file} and no weights ({' or '.join(patterns)})"
    for index in folder.glob("*.index.json"):
        names = set(json.loads(index.read_text()).get("weight_map", {}).values())
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            return f"lacks {', '.join(missing)}, which its {index.name} names"
    return ""


def tensor_names(model: PreTrainedModel, file_names: Iterable[str]) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Match the tensors in a model's files with its weights, as in convert_and_load_state_dict_in_model of transformers
    5.23 (core_model_loading.py).

    Returns the weights' names by those in files, without what is not in the model (the vision part, for a text model);
    names in files by those of weights, which a tied weight would have there; and the names of weights that transformers
    makes from others, such as experts in one tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )

    weights, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    names, converted = {}, set()
    for file_name in sorted(file_names, key=dot_natural_key):
        name, pattern = rename_source_key(file_name, renamings, converters, model.base_model_prefix, weights)
        if name not in weights and file_name in weights:
            name, pattern = file_name, None
        if pattern is not None:
            parts = next(each.target_patterns for each in converters if pattern in each.source_patterns)
            converted |= {name.replace(parts[0], part) for part in parts}
        elif name in weights:
            names[file_name] = name
    in_files = {name: file_name for file_name, name in names.items()}
    for name in weights.keys() - in_files.keys() - converted:
        in_files[name] = next(iter(revert_weight_conversion(model, {name: weights[name]})))
    return names, in_files, converted


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """A model that answers: a full model, an adapter on its base, or the model `base` behind an endpoint."""

    name: str = dataclasses.field(compare=False)
    base: str
    adapter: str | None = None
    revision: str = ""  # of the base; "" means main
    # loading the adapter changes the base's weights: it must be loaded again afterwards
    mutates_base: bool = dataclasses.field(default=False, compare=False)
    base_url: str = ""

    @property
    def fingerprint(self) -> str:
        """Identifies the weights of a run (wherever its folder is) or a folder; a Hub id or endpoint model by name."""
        parts: list[object] = [self.revision]  # without the address, which may change
        for name in (self.base, self.adapter or ""):
            folder = None if self.base_url else find_path(name)
            files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) if folder else []
            known = folder and read_run(folder).get("fingerprint")
            parts.append(known or [name, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)])
        return fingerprint(parts)

    @property
    def tokenizer(self) -> str:
        """The folder or Hub id of its tokenizer: the adapter's, or else the base's."""
        return self.adapter if self.adapter and Path(self.adapter, "tokenizer_config.json").is_file() else self.base


def resolve_adapter(name: str, base_model_id: str | None = None) -> ModelRef:
    """Resolve an adapter and its base: `base_model_id`, or else the one it names. None if there is no such flag."""
    from peft import PeftConfig

    try:
        adapter = resolve_model(name, file="adapter_config.json")
    except UserError as error:
        raise UserError(f"there is no adapter to merge: {error}") from None
    config = PeftConfig.from_pretrained(adapter)
    revision = "" if base_model_id else config.revision or ""
    try:
        base = resolve_model(base_model_id or str(config.base_model_name_or_path), revision)
    except UserError as error:
        fix = "Restore it, or repeat that run." if base_model_id is None else "Use `--base_model_id` for another base."
        raise UserError(f"the base of the adapter in {name!r} is missing: {error}. {fix}") from None
    init = getattr(config, "init_lora_weights", True)
    mutates_base = not isinstance(init, bool) and init not in BASE_KEEPING_INITS
    return ModelRef(Path(name).name, base, adapter, revision, mutates_base)


def resolve_models(names: tuple[str, ...], output_dir: Path, base_url: str = "") -> list[ModelRef]:
    """Resolve runs, adapters, models and "latest", each after the model it was trained from, each model once.

    NAME@http://... is the model NAME behind that endpoint; with `base_url`, so is every name. Equal names are numbered.
    """
    models = list(dict.fromkeys(ref for name in names for ref in _resolve_with_start(name, output_dir, base_url)))
    used = [model.name for model in models]
    if "tie" in used:
        raise UserError("a model is called 'tie', which is also a verdict. Rename its folder.")
    return [
        dataclasses.replace(m, name=f"{m.name} ({used[: i + 1].count(m.name)})") if used.count(m.name) > 1 else m
        for i, m in enumerate(models)
    ]


def _resolve_with_start(name: str, output_dir: Path, base_url: str) -> list[ModelRef]:
    """The model `name`, after the one that it was trained from, if that is known."""
    model, separator, url = (name, "@", base_url) if base_url else name.partition("@http")
    if separator:
        return [ModelRef(Path(model).name, model, base_url=base_url or f"http{url}")]
    folder = find_run(output_dir, "latest", "dpo").folder if name == "latest" else find_path(name)
    folder = folder or find_path(str(output_dir / name))
    parent = find_parent(folder, read_run(folder)) if folder else None
    name = str(folder or name)
    if _is_adapter(name):
        adapter = resolve_adapter(name)
        start = dataclasses.replace(adapter, name=Path(adapter.base).name, adapter=None, mutates_base=False)
        if parent and (parent / "adapter_config.json").is_file():
            start = dataclasses.replace(start, name=parent.name, adapter=str(parent))
        return [start, adapter]
    start_of_full = [ModelRef(parent.name, str(parent))] if parent and (parent / "config.json").is_file() else []
    return [*start_of_full, ModelRef(Path(name).name, name)]


def _is_adapter(name: str) -> bool:
    """Whether a folder or Hub id is an adapter's. False if that is unknown: loading the model will report why."""
    try:
        return fetch_file(name, None, "adapter_config.json").is_file()
    except UserError:  # no such file or repository, no network
        return False
