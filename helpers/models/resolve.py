"""What a name refers to: a model or an adapter, in a folder, on the Hub or behind an endpoint, and where it is from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError, find_path, fingerprint
from helpers.models.adapters import check_hub, check_model_files, describe_error, find_index, hf_token, read_pretrained
from helpers.models.chat import set_chat_template
from helpers.runs.checkpoints import check_model_folder, shell_quote
from helpers.runs.run import Run, find_parent, find_recorded, find_run, missing_parent, read_run, resolve_pairs
from helpers.settings.fields import SOURCE_ORDER, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Families whose positions are rows of a table; others compute them.
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "openai-gpt", "xglm", "biogpt", "imagegpt", "ctrl")
LATEST = {"latest": "dpo", "latest-sft": "sft"}  # names of models, and the step of their run
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
        if self.parent:
            _check_folder(str(self.parent.folder))
        return resolve_model(self.model, self.revision)

    @property
    def tokenizer(self) -> str:
        return str(self.parent.folder) if self.parent else self.path


def resolve_start(settings: RunSettings) -> Start:
    """Find what `settings` start from: `model_id`, or a run of 01_sft.py or, for another round, of 02_dpo.py, whose
    model_id and adapter settings are used. Raises UserError if there is no such run, or settings contradict it."""
    resolve_pairs(settings)
    values = settings.values()
    folder = find_path(values["model_id"]) if not values.get("sft_run") else None
    step = read_run(folder).get("step") if folder else ""
    if folder and step == "sft" and "sft_run" in values:
        print(f"{values['model_id']} is a run of 01_sft.py, taken as --sft_run.")
        settings.override(settings.sources["model_id"], sft_run=str(folder), model_id="")
        values = settings.values()
    elif folder and (folder / "adapter_config.json").is_file():
        raise SettingsError(f"--model_id {values['model_id']} {_is_no_model(values['model_id'])}")
    if not values.get("sft_run"):
        _check_folder(values["model_id"])
        merged = Run(folder, read_run(folder)) if folder and step == "merge" else None
        return Start(values["model_id"], values["revision"] or None, values["model_id"], merged)
    parent = find_run(settings.output_dir, values["sft_run"], "sft", "dpo")
    check_model_files(parent.folder)  # its hashes are compared when `path` is used
    settings.override("parent", model_id=parent.record["base_model"])  # as it was named: the run's name depends on it
    if not parent.is_adapter:
        return Start(str(parent.folder), values["revision"] or None, parent.base_model, parent)
    config = adopt_adapter_settings(parent.folder, settings)
    base, revision = base_of_adapter(parent.folder, config), config.get("revision") or None
    return Start(base, revision, parent.base_model, parent, parent.folder)


def adopt_adapter_settings(folder: Path, settings: RunSettings) -> dict[str, Any]:
    """Take over rank, scale and targets of an adapter that is trained further, and return its adapter_config.json.
    Raises SettingsError if a setting given by hand differs. A recipe's may: they are for the adapters it creates."""
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
    positions; warn if it is beyond the length that another model was trained for."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or text.get("n_positions") or 0
    if limit and config.get("model_type") in LEARNED_POSITIONS and not 0 < max_length <= limit:
        given = f"--max_length {max_length}" + " (no limit)" * (not max_length)
        raise SettingsError(f"{given} is beyond the {limit} learned positions of this model. Use at most {limit}.")
    if 0 < limit < max_length:
        print(f"warning: --max_length {max_length} is beyond the {limit} positions that this model was trained for.")


def load_tokenizer(start: Start, settings: RunSettings) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Load the tokenizer and set `--chat_template`; returns it and the tokens added for the template. Raises
    SettingsError if the adapter that `start` trains further has no rows for these tokens."""
    from transformers import AutoConfig, AutoTokenizer

    values = settings.values()
    loading = {"revision": start.revision or "main", "trust_remote_code": values["trust_remote_code"]}
    config = json.loads(fetch_file(start.path, start.revision, "config.json").read_text())
    check_positions(config, values.get("max_length", 0))
    read_pretrained(AutoConfig, start.path, **loading)
    tokenizer = read_pretrained(AutoTokenizer, start.tokenizer, **loading)
    with contextlib.suppress(UserError):  # a model need not have one
        generation = json.loads(fetch_file(start.path, start.revision, "generation_config.json").read_text())
        tokenizer.model_eos_token_id = generation.get("eos_token_id")
    name, new_tokens = set_chat_template(tokenizer, values["chat_template"], is_of_run=bool(start.parent))
    for field in ("eos_token", "pad_token"):
        token = values.get(field)
        if token and token not in tokenizer.get_vocab():
            raise SettingsError(f"--{field} {token!r} is not in the tokenizer's vocabulary. Use one of its tokens.")
        if token:
            setattr(tokenizer, field, token)
    if new_tokens and start.adapter:
        raise SettingsError(
            f"`--chat_template {name}` needs {', '.join(new_tokens)}, which the adapter in {start.adapter.name} was "
            f"trained without. Train 01_sft.py with `--chat_template {name}`."
        )
    print("Chat template:", name, *new_tokens)
    return tokenizer, new_tokens


def resolve_model(model_id: str, revision: str | None = None, file: str = "config.json") -> str:
    """Return a folder's path, as seen from here, or the Hub id. Raises UserError if files or weights are missing, and
    for a folder that is an adapter, a checkpoint of a run, or a finished run whose files have changed."""
    _check_folder(model_id)
    fetch_file(model_id, revision, file)
    folder = find_path(model_id)
    if folder and file == "config.json" and (folder / "adapter_config.json").is_file():
        raise UserError(f"{model_id!r} {_is_no_model(model_id)}")  # transformers would load the adapter's base instead
    if folder and (missing := missing_weights(folder, file)):
        raise UserError(f"{model_id!r} {missing}")
    return str(folder or model_id)


def _check_folder(name: str) -> None:
    if folder := find_path(name):
        check_model_folder(folder.resolve())
        check_model_files(folder)


def _is_no_model(adapter: str) -> str:
    return f"is an adapter, not a model. Merge it with {_merge_command(adapter)}, and use the merged folder."


def _merge_command(adapter: str) -> str:
    return f"`python notebooks/03_merge_push.py --adapter {shell_quote(adapter)}`"


def fetch_file(model_id: str, revision: str | None, file: str) -> Path:
    """Find a folder's file, or download it from the Hub. Asks for a token if the model is gated. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError
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
        is_missing = file == "config.json" and isinstance(error, FileNotFoundError | EntryNotFoundError)
        if is_missing and _has_file(model_id, "adapter_config.json"):
            raise UserError(f"{model_id!r} {_is_no_model(model_id)}") from None
        raise UserError(f"{model_id!r} cannot be loaded: {describe_error(error)}") from None


def missing_weights(folder: Path, file: str = "config.json") -> str:
    """Describe missing weights, as "has ... and no weights" or "lacks ..."; "" if none are missing."""
    patterns = WEIGHT_PATTERNS.get(file, ("*",))
    if not any(list(folder.glob(pattern)) for pattern in patterns):
        return f"has a {file} and no weights ({' or '.join(patterns)})"
    if index := find_index(folder):
        names = set(json.loads(index.read_text()).get("weight_map", {}).values())
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            return f"lacks {', '.join(missing)}, which its {index.name} names"
    return ""


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
    policy: str = dataclasses.field(default="", compare=False)  # trained from it: its plan and tokenizer are used

    @property
    def fingerprint(self) -> str:
        """Identifies the weights of a run or a folder, wherever it is; a Hub id or endpoint model by name."""
        parts: list[object] = [self.revision]  # without the address, which may change
        for name in (self.base, self.adapter or ""):
            folder = None if self.base_url else find_path(name)
            files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) if folder else []
            known = folder and read_run(folder).get("fingerprint")
            parts.append(known or [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files] or name)
        return fingerprint(parts)

    @property
    def tokenizer(self) -> str:
        """The folder or Hub id of its tokenizer: the policy's or adapter's, or else the base's."""
        names = [name for name in (self.policy, self.adapter) if name]
        return next((name for name in names if _has_file(name, "tokenizer_config.json")), self.base)

    @property
    def plan(self) -> dict[str, str]:
        """How its run, or that of its policy, loaded it (LoadPlan.as_dict); a merge, in the dtype of its files. {} if
        that is not known."""
        folder = find_path(self.policy or self.adapter or self.base)
        record = read_run(folder) if folder and not self.base_url else {}
        plan: dict[str, str] = record.get("plan") or {}
        if folder and record.get("step") == "merge" and not self.policy and (file := folder / "config.json").is_file():
            config = json.loads(file.read_text())
            dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
            return {"weights": dtype, "computed in": dtype}
        is_full = folder and not (folder / "adapter_config.json").is_file()
        return plan | {"weights": plan["computed in"]} if plan and is_full else plan  # autocast rounded its float32

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this model from others: where it is, how it is loaded, and its chat template."""
        file = Path(self.tokenizer, "chat_template.jinja")
        template = file.read_text(encoding="utf-8") if file.is_file() else ""
        adapter = self.adapter and _place(self.adapter)
        return _place(self.base), adapter, self.revision, self.base_url, *sorted(self.plan.items()), template


def base_of_adapter(folder: Path, config: Mapping[str, Any]) -> str:
    """The base that an adapter was trained on: a Hub id, or a folder, where outputs/ may have moved with the run."""
    record, name = read_run(folder), str(config["base_model_name_or_path"])
    parent = find_parent(folder, record)
    if parent and record.get("step") == "dpo" and (parent / "config.json").is_file():  # 01_sft.py trained all of it
        return str(parent)
    return str((find_recorded(name, folder, record) if Path(name).is_absolute() else None) or name)


def resolve_adapter(name: str, base_model_id: str | None = None) -> ModelRef:
    """Resolve an adapter and its base: `base_model_id`, or else the one it names. None if there is no such flag."""
    from peft import PeftConfig

    adapter = resolve_model(name, file="adapter_config.json")
    config = read_pretrained(PeftConfig, adapter)
    revision = "" if base_model_id else config.revision or ""
    base = base_model_id or base_of_adapter(Path(adapter), vars(config))
    _check_folder(base)
    try:
        base = resolve_model(base, revision)
    except UserError as error:
        if _has_file(base, "adapter_config.json"):
            what = f"{name!r} is an adapter on another adapter, {base!r}. Merge that one first"
            fix = f"with {_merge_command(base)}, then this one with the merged folder as `--base_model_id`."
            raise UserError(f"{what} {fix}") from None
        fix = "Restore it, or repeat that run." if base_model_id is None else "Use `--base_model_id` for another base."
        raise UserError(f"the base of the adapter in {name!r} is missing: {error}. {fix}") from None
    init = getattr(config, "init_lora_weights", True)
    mutates_base = not isinstance(init, bool) and init not in BASE_KEEPING_INITS
    return ModelRef(Path(name).name, base, adapter, revision, mutates_base)


def resolve_models(names: tuple[str, ...], output_dir: Path, base_url: str = "") -> list[ModelRef]:
    """Resolve runs, adapters, models and "latest", each after the model it was trained from, each model once. A base is
    loaded and asked like the first of its policies here. NAME@http://... is the model NAME behind that endpoint; with
    `base_url`, so is every name. Equal names are numbered."""
    refs = [ref for name in names for ref in _resolve_with_start(name, output_dir, base_url)]
    refs = [dataclasses.replace(ref, policy=ref.policy or _find_policy(ref, refs)) for ref in refs]
    for name in {name for ref in refs if not ref.base_url for name in (ref.base, ref.adapter or "")}:
        _check_folder(name)
    models: dict[tuple[object, ...], ModelRef] = {}
    for ref in refs:
        models.setdefault(ref.key, ref)
    used = [model.name for model in models.values()]
    if reserved := {"tie", "error"} & {*used}:
        raise UserError(f"a model is called {reserved.pop()!r}, which is also a verdict. Rename its folder.")
    while len({*used}) < len(used):  # again if another model is called `NAME (1)`
        used = [f"{n} ({used[: i + 1].count(n)})" if used.count(n) > 1 else n for i, n in enumerate(used)]
    return [dataclasses.replace(model, name=name) for model, name in zip(models.values(), used, strict=True)]


def _find_policy(base: ModelRef, refs: list[ModelRef]) -> str:
    """The folder of the first of `refs` that was trained from `base`; "" if there is none."""
    for ref in refs if not base.adapter and not base.base_url else []:
        folder = None if ref.adapter or ref.base_url else find_path(ref.policy or ref.base)
        record = read_run(folder) if folder else {}
        root = ref.base if ref.policy else Run(Path(folder or "."), record).base_model if "base_model" in record else ""
        if root and _place(root) == _place(base.base):
            return str(folder)
    return ""


def _place(name: str) -> str:
    """One spelling of a folder's path, or of a Hub id."""
    return os.path.realpath(find_path(name) or name)


def _resolve_with_start(name: str, output_dir: Path, base_url: str) -> list[ModelRef]:
    """The model `name`, after the one that it was trained from, if that is known."""
    model, separator, url = (name, "@", base_url) if base_url else name.partition("@http")
    if separator:
        return [ModelRef(Path(model).name, model, base_url=base_url or f"http{url}")]
    folder = find_run(output_dir, "latest", LATEST[name]).folder if name in LATEST else find_path(name)
    folder = folder or find_path(str(output_dir / name))
    record = read_run(folder) if folder else {}
    parent = find_parent(folder, record) if folder else None
    if folder and (gone := missing_parent(folder, record)):
        print(f"note: {gone}, which {folder.name} started from, is gone. Restore it to compare with it.")
    name = str(folder or name)
    if _has_file(name, "adapter_config.json"):
        adapter = resolve_adapter(name)
        if parent and (parent / "adapter_config.json").is_file():
            start = dataclasses.replace(adapter, name=parent.name, adapter=str(parent))
        else:
            base = adapter.base
            start = ModelRef(Path(base).name, base, revision=adapter.revision, policy=adapter.adapter or "")
        return [start, adapter]
    start_of_full = [ModelRef(parent.name, str(parent))] if parent and (parent / "config.json").is_file() else []
    return [*start_of_full, ModelRef(Path(name).name, name)]


def _has_file(name: str, file: str) -> bool:
    """Whether a folder or Hub id has a file. False if that is unknown: loading the model will report why."""
    try:
        return fetch_file(name, None, file).is_file()
    except UserError:  # no such file or repository, no network
        return False
