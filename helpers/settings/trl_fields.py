"""The fields of TRL's SFTConfig and DPOConfig as settings, and other names that are accepted for ours.

Read in TRL 1.16 and transformers 5.23.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
FIELD_SOURCES = ("transformers/training_args.py", "trl/trainer/base_config.py")
ENUM_SOURCES = ("transformers/trainer_utils.py", "transformers/training_args.py")
# groups, aliases, renamed, values, removed: see the comments of the file. All keys are texts: `true` is "true".
NAMES: dict[str, dict[str, Any]] = yaml.load((Path(__file__).parent / "names.yaml").read_text(), yaml.BaseLoader)
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")

SHARES = str(NAMES["shares"]).split()  # fields that are numbers of steps, or below 1 shares of a run
LEGACY_NAMES = frozenset(name for part in ("aliases", "renamed", "values", "removed") for name in NAMES[part])


def current_name(step: str, name: str, words: list[str], own: Collection[str]) -> tuple[str | None, list[str], str]:
    """Translate an accepted name into ours: (name, words, note). The name is None if nothing is to be set.

    `own` are the fields of the Settings cell. A name of theirs, or of today's TRL, is never translated.
    """
    plain, word = name.removeprefix("training_args."), words[0].lower() if words else "true"
    note = "" if plain == name else f"--{name} is now --{plain}"
    if word in NAMES["values"].get(plain, {}):
        new, *new_words = NAMES["values"][plain][word].split() or [None]
        is_same = words and new == plain
        return new, new_words, note if is_same or not new else f"--{name} {word} is now --{new} {' '.join(new_words)}"
    known, new = {*own, *field_types(step)}, NAMES["aliases"].get(plain, plain)
    if plain in own or new in known:
        return plain if plain in own else new, words, note
    if NAMES["renamed"].get(new) in known:
        return NAMES["renamed"][new], words, f"--{name} is now --{NAMES['renamed'][new]}"
    if plain in NAMES["removed"]:
        return None, words, f"--{name} has no effect: {NAMES['removed'][plain]}"
    return plain, words, note


@functools.cache
def field_types(step: str) -> dict[str, Any]:
    """The fields of the step's config and the types of their values; NoneType for one that cannot be typed.

    They are read from the installed sources, because importing TRL takes seconds. push_to_hub and hub_* are excluded:
    publishing is ours.
    """
    types: dict[str, Any] = {}
    for source in (*FIELD_SOURCES, f"trl/trainer/{step}_config.py") if step in CONFIGS else ():
        for node in _classes(source, "TrainingArguments", "_BaseConfig", CONFIGS[step]):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    types[field.target.id] = _field_type(field)
    return {name: kind for name, kind in types.items() if not name.startswith(("push_to_hub", "hub_", "_"))}


def _field_type(field: ast.AnnAssign) -> Any:
    """What TRL's parser (HfArgumentParser) reads a field as. transformers reads JSON in a text itself."""
    parts = ast.unparse(field.annotation).split(" | ")
    keys = [node for node in ast.walk(field) if isinstance(node, ast.Dict)]
    metadata = {ast.unparse(k): v for node in keys for k, v in zip(node.keys, node.values, strict=True) if k}
    choices = metadata.get("'choices'")
    kind: Any
    if isinstance(choices, ast.List):
        kind = Literal[tuple(ast.literal_eval(choices))]
    elif ast.unparse(field.target).startswith("log_level"):
        kind = Literal[LOG_LEVELS]
    elif values := _enum_values(parts[0]):
        kind = Literal[values]
    elif "bool" in parts:
        kind = bool
    elif parts[0].startswith("list["):
        kind = list[float] if "float" in parts[0] else list[str]
    elif "str" in parts:
        kind = str
    else:
        kind = {"int": int, "float": float}.get(parts[0], type(None))
    return kind | None if "None" in parts else kind


@functools.cache
def _enum_values(name: str) -> tuple[str, ...]:
    """The values of one of transformers' enums; () for any other name."""
    nodes = [node for source in ENUM_SOURCES for cls in _classes(source, name) for node in cls.body]
    members = [node.value for node in nodes if isinstance(node, ast.Assign)]
    return tuple(str(value.value) for value in members if isinstance(value, ast.Constant))


@functools.cache
def compared_values(variable: str) -> frozenset[str]:
    """The texts that DPOTrainer's code compares `variable` with: the losses for "loss_type"."""
    compared = [n for n in ast.walk(_tree("trl/trainer/dpo_trainer.py")) if isinstance(n, ast.Compare)]
    values = [value for node in compared if ast.unparse(node.left) == variable for value in node.comparators]
    return frozenset(str(value.value) for value in values if isinstance(value, ast.Constant))


@functools.cache
def losses_that_read(field: str) -> frozenset[str]:
    """The losses in whose branch DPOTrainer's code uses a field of DPOConfig; the others ignore it."""
    found = set()
    for node in ast.walk(_tree("trl/trainer/dpo_trainer.py")):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Compare)
            and ast.unparse(node.test.left) == "loss_type"
        ):
            names = {ast.unparse(n) for line in node.body for n in ast.walk(line) if isinstance(n, ast.Attribute)}
            value = node.test.comparators[0]
            if names & {f"self.{field}", f"self.args.{field}"} and isinstance(value, ast.Constant):
                found.add(str(value.value))
    return frozenset(found)


def _classes(source: str, *names: str) -> Iterator[ast.ClassDef]:
    return (node for node in _tree(source).body if isinstance(node, ast.ClassDef) and node.name in names)


@functools.cache
def _tree(source: str) -> ast.Module:
    """The syntax tree of a file of an installed package, which is not imported; empty if it is not installed."""
    package, _, rest = source.partition("/")
    spec = importlib.util.find_spec(package)
    return ast.parse((Path(spec.origin).parent / rest).read_text()) if spec and spec.origin else ast.parse("")


def notebook_defaults(source: str, step: str) -> dict[str, Any]:
    """The fields of TRL's config to which a notebook's own cells give a value, and that value."""
    fields, defaults = field_types(step), dict[str, Any]()
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, ast.Assign) else None
        for word in call.keywords if isinstance(call, ast.Call) and ast.unparse(call.func) == "dict" else ():
            if word.arg in fields and isinstance(word.value, ast.Constant):
                defaults[word.arg] = word.value.value
    return defaults


def trl_help(step: str, hide: Collection[str], notebook: str = "") -> str:
    """The help of TRL's parser for every field that the Settings cell does not name, with the defaults of the text of
    the notebook."""
    if step not in CONFIGS:
        return "This notebook trains nothing: it has no TRL settings."
    import trl
    from trl.scripts.utils import TrlParser

    parser = TrlParser([getattr(trl, CONFIGS[step])])
    for group in parser._action_groups:
        shown = field_types(step).keys() - set(hide)
        group._group_actions = [action for action in group._group_actions if action.dest in shown]
    parser.set_defaults(**notebook_defaults(notebook, step))
    parser.usage, parser.description = f"any field of trl.{CONFIGS[step]} that --help does not list", None
    return str(parser.format_help())
