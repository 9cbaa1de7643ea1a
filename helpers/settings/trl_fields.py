"""The fields of TRL's SFTConfig and DPOConfig as settings, and the names that older scripts gave them.

Read in TRL 1.16 and transformers 5.23.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from helpers.core import unexpected_words

CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
FIELD_SOURCES = ("transformers/training_args.py", "trl/trainer/base_config.py")

# Older name → today's name, or the reason why there is none.
ALIASES = {
    "beta": "dpo_beta",
    "dataset_name": "dataset_id",
    "dataset_path": "dataset_id",
    "evaluation_strategy": "eval_strategy",
    "hub_model_id": "hub_repo_id",
    "hub_private_repo": "private",
    "max_seq_length": "max_length",
    "max_length": "max_new_tokens",
    "merge_adapters": "merge_adaptors",
    "model_id": "models",
    "model_name": "model_id",
    "model_name_or_path": "model_id",
    "no_cuda": "use_cpu",
    "peft_model_id": "models",
    "warmup_ratio": "warmup_steps",
}
REMOVED = {
    "generate_during_eval": "notebooks/04_vibes.py writes answers side by side",
    "hub_strategy": "notebooks/03_merge_push.py publishes, after training",
    "hub_token": "the token is read from HF_TOKEN, in the environment or .env",
    "is_encoder_decoder": "only decoder models are trained",
    "label_pad_token_id": "padding is never a label",
    "max_completion_length": "--max_length covers prompt and answer",
    "max_prompt_length": "--max_length covers prompt and answer",
    "max_target_length": "--max_length covers prompt and answer",
    "model_adapter_name": "TRL names the adapters",
    "overwrite_output_dir": "--resume never replaces a run",
    "padding_value": "padding is never a label",
    "push_to_hub": "notebooks/03_merge_push.py publishes",
    "ref_adapter_name": "TRL names the adapters",
    "reference_free": "TRL has no such mode any more",
    "resume_from_checkpoint": "--resume auto goes on from the newest checkpoint",
    "rpo_alpha": "--loss_type sigmoid sft --loss_weights 1 ALPHA",
    "save_safetensors": "weights are always safetensors",
    "torch_dtype": "the hardware decides: see helpers/models.py",
}
# Name and word → name and words, where a value changed its meaning with its name.
VALUE_ALIASES: dict[tuple[str, str], tuple[str | None, list[str]]] = {
    ("adam_8bit", "true"): ("optim", ["paged_adamw_8bit"]),
    ("group_by_length", "true"): ("train_sampling_strategy", ["group_by_length"]),
    ("load_in_4bit", "true"): ("quantization", ["4bit"]),
    ("load_in_8bit", "true"): ("quantization", ["8bit"]),
    ("report_to", "none"): ("report_to", ["none"]),
}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
LEGACY_NAMES = frozenset(ALIASES) | frozenset(REMOVED) | {name for name, _ in VALUE_ALIASES}


@functools.cache
def field_types(step: str) -> dict[str, str]:
    """Fields of the step's config and their annotations, read from the installed sources: importing TRL takes seconds.

    Publishing is ours, so push_to_hub and hub_* are not among them.
    """
    if step not in CONFIGS:
        return {}
    found: dict[str, str] = {}
    for source in (*FIELD_SOURCES, f"trl/trainer/{step}_config.py"):
        package, _, rest = source.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for node in ast.parse((Path(spec.origin).parent / rest).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in ("TrainingArguments", "_BaseConfig", CONFIGS[step]):
                fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
                found |= {ast.unparse(n.target): ast.unparse(n.annotation) for n in fields}
    ours = ("push_to_hub", "hub_", "_")
    return {name: kind for name, kind in found.items() if not name.startswith(ours)}


@functools.cache
def loss_names() -> frozenset[str]:
    """The losses that DPOTrainer knows: what its code compares `loss_type` with."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "dpo_trainer.py").read_text())
    compared = [n for n in ast.walk(tree) if isinstance(n, ast.Compare) and ast.unparse(n.left) == "loss_type"]
    return frozenset(str(c.value) for n in compared for c in n.comparators if isinstance(c, ast.Constant))


def field_names(step: str) -> frozenset[str]:
    """Field names of the step's config."""
    return frozenset(field_types(step))


def current_name(step: str, name: str, words: list[str], own: Collection[str]) -> tuple[str | None, list[str], str]:
    """What an older name means today: (name, words, note); no name where nothing is to be set, no note for a new name.

    `own` are the fields of the Settings cell: a name of theirs, or of today's TRL, is never older.
    """
    plain = name.removeprefix("training_args.")
    note = "" if plain == name else f"--{name} is now --{plain}"
    word = words[0].lower() if words else "true"
    if (plain, word) in VALUE_ALIASES:
        new, words_now = VALUE_ALIASES[plain, word]
        told = words and (new, words_now) == (plain, words)
        return new, words_now, note if told else f"--{name} {word} is now {_spell(new, words_now)}"
    if plain in own:
        return plain, words, note
    new = ALIASES.get(plain)
    if new in own or new in (field_names(step) if new else ()):
        return new, words, "" if plain == "beta" else f"--{name} is now --{new}"
    if plain in REMOVED and plain not in field_names(step):
        return None, words, f"--{name} has no effect: {REMOVED[plain]}"
    return plain, words, note


def _spell(name: str | None, words: list[str]) -> str:
    return f"--{name} {' '.join(words)}" if name else "how it always is"


def parse_fields(step: str, given: Mapping[str, tuple[list[str], str]], error: type[Exception]) -> dict[str, Any]:
    """Values of TRL fields, through TRL's own argument parser; `given` maps a name to its words and their source."""
    parser = _parser(step)
    actions = {action.dest: action for action in parser._actions}
    values: dict[str, Any] = {}
    for name, (words, source) in given.items():
        action = actions.get(name)
        if action is None:
            raise error(f"--{name} cannot be set from outside (from {source}): write it into the notebook's config")
        if words == ["None"] and "None" in field_types(step)[name]:
            values[name] = None  # argparse has no word for None
            continue
        if not words:
            if "bool" not in field_types(step)[name]:
                raise error(f"--{name} needs a value (from {source})")
            words = ["True"]  # a switch: HfArgumentParser refuses some without a word

        def fail(message: str, name: str = name, words: list[str] = words, source: str = source) -> None:
            if source == "flag" and message.startswith("unrecognized arguments"):
                raise unexpected_words(name, words)
            raise error(f"{message.replace('argument ', '')} (from {source})")

        parser.error = fail
        values[name] = getattr(parser.parse_args([f"--{name}", *words]), name)
    return values


@functools.cache
def enum_values(kind: str) -> list[str]:
    """The values of an annotation that is one of transformers' enums, from its sources; [] for any other."""
    spec = importlib.util.find_spec("transformers")
    for file in ("trainer_utils.py", "training_args.py") if spec and spec.origin else ():
        for node in ast.parse((Path(str(spec.origin)).parent / file).read_text()).body:  # type: ignore[union-attr]
            if isinstance(node, ast.ClassDef) and node.name == kind.removesuffix(" | str"):
                members = [n.value for n in node.body if isinstance(n, ast.Assign)]
                return [str(value.value) for value in members if isinstance(value, ast.Constant)]
    return []


def parse_fields_fast(step: str, given: Mapping[str, tuple[list[str], str]], error: type[Exception]) -> dict[str, Any]:
    """`parse` by the annotations alone, for a dry run, which has no time for importing TRL."""
    values: dict[str, Any] = {}
    for name, (words, source) in given.items():
        kind = field_types(step)[name]
        plain = {"float": float, "int": int}.get(kind.removesuffix(" | None"), str)
        word = words[0] if words else "True" if "bool" in kind else ""
        if source == "flag" and len(words) > 1 and "list[" not in kind:
            raise unexpected_words(name, words)
        try:
            if words == ["None"] and "None" in kind:
                values[name] = None
            elif "bool" in kind:
                values[name] = BOOLEANS[word.lower()]
            elif word not in (enum_values(kind) or [word]):
                raise ValueError
            elif kind.startswith("list["):
                values[name] = [float(w) if "float" in kind else w for w in words]
            else:
                values[name] = plain(word) if word else int(word)
        except (KeyError, ValueError):
            one = " or ".join(enum_values(kind)) or kind
            raise error(f"--{name} takes {one}, not {' '.join(words) or 'nothing'!r} (from {source})") from None
    return values


def trl_help(step: str, hide: Collection[str]) -> str:
    """argparse's help of every field that the Settings cell does not name."""
    if step not in CONFIGS:
        return "This notebook trains nothing: it has no TRL settings."
    parser = _parser(step)
    shown = field_names(step) - set(hide)
    groups = (*parser._action_groups, parser)
    for group in groups:
        group._group_actions = [a for a in group._group_actions if a.dest in shown] if group is not parser else []
    parser.usage = f"any field of trl.{CONFIGS[step]}, beside those that --help lists"
    parser.description = None
    return str(parser.format_help())


def _parser(step: str) -> Any:
    import trl
    from trl.scripts.utils import TrlParser

    return TrlParser([getattr(trl, CONFIGS[step])])
