"""Where settings come from, as the words of flags: flags, a notebook, the environment, .env and recipes. And what they
are called: the fields of TRL's SFTConfig and DPOConfig, as in TRL 1.16 and transformers 5.23, and other accepted names.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from helpers.core import REPO, SettingsError, find_path, shorten
from helpers.settings.secrets import ADDRESS_VARIABLES, refuse_secrets

SECTIONS = ("sft", "dpo", "merge", "vibes", "judge", "pairs")  # of a recipe
EXPORTED = ("HF_", "WANDB_", "OPENAI_")  # variables in .env that libraries read
BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), "True") | dict.fromkeys(("false", "0", "no", "off"), "False")
PLAIN = (str, int, float, bool, list, tuple, dict, Path, type(None))
OF_TRAINING = ("dataset_id", "dataset_split", "run_name", "resume")  # at the top of a recipe that trains
TRAINS = {"sft", "dpo", "tuning", "merge_adaptors"}  # one of these at the top makes it such a recipe
CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
FIELD_SOURCES = ("transformers/training_args.py", "trl/trainer/base_config.py")
ENUM_SOURCES = ("transformers/trainer_utils.py", "transformers/training_args.py")
# groups, aliases, renamed, values, removed: see the comments of the file. All keys are texts: `true` is "true".
NAMES: dict[str, dict[str, Any]] = yaml.load((Path(__file__).parent / "names.yaml").read_text(), yaml.BaseLoader)
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")

SHARES = str(NAMES["shares"]).split()  # fields that are numbers of steps, or below 1 shares of a run
LEGACY_NAMES = frozenset(name for part in ("aliases", "renamed", "values", "removed") for name in NAMES[part])
Words = dict[str, list[str]]  # what is typed after the flag of each setting


def split_flags(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """`--name value ...`, `--name=value` and `--name`, in order, with underscores for hyphens."""
    name, words = "", list[str]()
    for word in argv:
        flag = word.partition("=")[0] if word.startswith("--") else f"--{name}" if name else "the command line"
        refuse_secrets(shorten(flag, 60), [word])
        if word.startswith("--") and len(word) > 2:
            if name:
                yield name, words
            name, equals, value = word[2:].partition("=")
            name, words = name.replace("-", "_"), [value] if equals else []
        elif not name or (word.startswith("-") and not re.match(r"-[\d.]", word)):
            raise SettingsError(f"{word!r} is not a setting. Give each setting as --name value; see --help.")
        else:
            words.append(word)
    if name:
        yield name, words


def from_namespace(types: Mapping[str, Any], namespace: Mapping[str, Any]) -> Words:
    """Values that a line of a cell, or papermill, binds to the name of a setting. Raises SettingsError."""
    names = {**types, **dict.fromkeys(LEGACY_NAMES)}
    public = {n: v for n, v in namespace.items() if not n.startswith("_")}
    for name in public.keys() & names.keys():
        if getattr(public[name], "ndim", None) == 0:  # a number of numpy or torch
            public[name] = public[name].item()
        value, setting = public[name], NAMES["aliases"].get(name, name)
        is_ours = type(value).__module__.startswith("helpers.")  # such as `run`, of another notebook
        if setting in types and not (isinstance(value, PLAIN) or is_ours or callable(value) or inspect.ismodule(value)):
            raise SettingsError(
                f"the variable {name} is a {type(value).__name__}. Give a text, a number, True or False, a list, "
                "a dict or a path. If it is not the setting, give it another name."
            )
    plain = {n: v for n, v in public.items() if isinstance(v, PLAIN)}
    for name in plain.keys() - names.keys():
        if hint := suggest(name, names, cutoff=0.88):
            raise SettingsError(f"the variable {name} is not a setting; {hint} If not, give it another name.")
    result = {name: to_cli_tokens(value) for name, value in plain.items() if name in names}
    for name, words in result.items():
        refuse_secrets(f"the variable {name}", words)
    return result


def read_dotenv() -> dict[str, str]:
    """Read .env of the current folder, or else of the repository, and export what libraries read of it."""
    from dotenv import dotenv_values

    file = next((f for f in (Path.cwd() / ".env", REPO / ".env") if f.is_file()), None)
    try:
        values = {k: v for k, v in dotenv_values(file, encoding="utf-8-sig").items() if v} if file else {}
    except UnicodeDecodeError as error:
        raise SettingsError(f".env is not UTF-8: {error.reason}. Save it as UTF-8.") from None
    if file and b"\0" in file.read_bytes():
        raise SettingsError(".env contains NUL bytes, so it is binary or truncated. Save it as UTF-8 text.")
    for name, value in values.items():
        if name.startswith(EXPORTED):
            os.environ.setdefault(name, value)
    for name in ADDRESS_VARIABLES:
        refuse_secrets(name, [os.environ.get(name, "")])
    return values


def env_name(step: str, name: str) -> str:
    """The environment variable of a setting: its name in capitals after the prefix of the step, written once."""
    return name.upper() if name.startswith(f"{step}_") else f"{step}_{name}".upper()


def from_variables(step: str, types: Mapping[str, Any], variables: Mapping[str, str]) -> tuple[Words, list[str]]:
    """Variables with the prefix of the step, by the name of their setting, and a message on each unknown one."""
    names = {env_name(step, name): name for name in (*sorted(LEGACY_NAMES - types.keys()), *types)}
    result, unknown = Words(), []
    for key in sorted(key for key in variables if key.startswith(f"{step.upper()}_")):
        if key not in names:
            unknown.append(f"{key} is not a variable of this notebook; {suggest(key, names) or 'see --help'}")
            continue
        name, text = names[key], variables[key]
        refuse_secrets(key, [text])
        try:
            items = json.loads(text) if text.startswith("[") else None
        except json.JSONDecodeError:
            items = None
        # prompts and paths of datasets may hold spaces
        is_list = takes_several(types.get(name)) and name not in ("prompts", "dataset_id") and not text.startswith("{")
        result[name] = to_cli_tokens(items) if items else text.split() if is_list else [text]
    return result, unknown


def from_recipe(step: str, name: str, exclusive: Sequence[Sequence[str]] = (), types: Collection[str] = ()) -> Words:
    """The keys at the top of a recipe, and those of the step's section, which win: a key of an `exclusive` group in the
    section also replaces the others of its group at the top. Of the keys at the top, a step that does not train leaves
    out those that are not in `types`, and the dataset and run of a recipe that trains."""
    file = find_path(name)
    if file is None or not file.is_file():
        names = sorted(f"recipes/{f.name}" for f in (REPO / "recipes").glob("*.yaml"))
        raise SettingsError(f"recipe {name!r} is not a file. Use one of {', '.join(names)}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        refuse_secrets(f"recipe {name!r}", [text])
        content = yaml.load(text, RecipeLoader)
        json.dumps(content, default=str)
    except UnicodeDecodeError as error:
        raise SettingsError(f"recipe {name!r} is not UTF-8: {error.reason}. Save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # ValueError: an alias of itself
        raise SettingsError(f"recipe {name!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(s) or {}, dict) for s in SECTIONS):
        raise SettingsError(
            f"recipe {name!r} is no mapping of settings. Write `name: value` at the top level, or in a section: "
            f"{', '.join(SECTIONS)}."
        )

    def current(key: Any) -> str:
        name = str(key).replace("-", "_")
        return name if name in types else NAMES["aliases"].get(name, NAMES["renamed"].get(name, name))

    section, trains = content.get(step) or {}, TRAINS & content.keys()
    given = set(map(current, section))
    replaced = {key for key in content for group in exclusive if current(key) in group and given & set(group)}
    used = set(types) - set(OF_TRAINING if trains else ())
    left_out = {key for key in content if step not in CONFIGS and str(key).replace("-", "_") not in used}
    values = {k: v for k, v in content.items() if k not in {*SECTIONS, *replaced, *left_out}} | section
    return {str(key).replace("-", "_"): to_cli_tokens(value) for key, value in values.items()}


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e-6 as a number, as YAML 1.2 does and PyYAML 6 does not. The value of a
    setting, or of a list, keeps its text (1.10, off, 2024_11_29), which is read later as the setting's type."""

    def construct_document(self, node: yaml.Node) -> Any:
        return super().construct_document(self._keep_texts(node, SECTIONS))

    def _keep_texts(self, node: yaml.Node, sections: Sequence[str] = ()) -> yaml.Node:
        if not isinstance(node, yaml.MappingNode):
            return node
        names = [key.value for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"the key {twice} is given twice", problem_mark=node.start_mark)
        self.flatten_mapping(node)
        pairs = [(key, self._keep_texts(v) if key.value in sections else _as_text(v)) for key, v in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _as_text(node: yaml.Node, in_list: bool = False) -> yaml.Node:
    if isinstance(node, yaml.SequenceNode) and not in_list:
        return yaml.SequenceNode(node.tag, [_as_text(n, True) for n in node.value], node.start_mark, node.end_mark)
    is_resolved = node.tag.rpartition(":")[2] in ("bool", "int", "float", "timestamp")
    return yaml.ScalarNode("tag:yaml.org,2002:str", node.value) if is_resolved else node


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def to_cli_tokens(value: Any) -> list[str]:
    """A value of a recipe or a notebook, as it would be typed after its flag."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in to_cli_tokens(item)]
    if isinstance(value, dict):
        return [json.dumps(value, default=lambda each: each.item() if hasattr(each, "item") else str(each))]
    return [str(value)]


def takes_several(kind: Any) -> bool:
    """Whether a setting of this type takes several words."""
    return any(get_origin(each) in (tuple, list) for each in (kind, *get_args(kind)))


def suggest(name: str, names: Mapping[str, Any], prefix: str = "", cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {prefix}{close[0]}?" if close else ""


def current_name(step: str, name: str, words: list[str], own: Collection[str]) -> tuple[str | None, list[str], str]:
    """Translate an accepted name into ours: (name, words, note). The name is None if nothing is to be set. `own` are
    the fields of the Settings cell. A name of theirs, or of today's TRL, is never translated."""
    plain, word = name.removeprefix("training_args."), words[0].lower() if words else "true"
    word = BOOLEANS.get(word, word).lower()
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
    """The fields of the step's config and the types of their values; NoneType for one that cannot be typed. They are
    read from the installed sources, because importing TRL takes seconds. push_to_hub and hub_* are ours."""
    files = (*FIELD_SOURCES, f"trl/trainer/{step}_config.py") if step in CONFIGS else ()
    classes = [node for file in files for node in _classes(file, "TrainingArguments", "_BaseConfig", CONFIGS[step])]
    fields = [field for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    types = {ast.unparse(field.target): _field_type(field) for field in fields}
    return {name: kind for name, kind in types.items() if not name.startswith(("push_to_hub", "hub_", "_"))}


def _field_type(field: ast.AnnAssign) -> Any:
    """What TRL's parser (HfArgumentParser) reads a field as. transformers reads JSON in a text itself."""
    parts = ast.unparse(field.annotation).split(" | ")
    metadata = [node for node in ast.walk(field) if isinstance(node, ast.Dict)]
    pairs = [pair for node in metadata for pair in zip(node.keys, node.values, strict=True)]
    choices = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "choices"]
    kind: Any = {"int": int, "float": float}.get(parts[0], type(None))
    if choices and isinstance(choices[0], ast.List):
        kind = Literal[tuple(ast.literal_eval(choices[0]))]
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
    for branch in (node for node in ast.walk(_tree("trl/trainer/dpo_trainer.py")) if isinstance(node, ast.If)):
        loss = re.fullmatch(r"loss_type == '(\w+)'", ast.unparse(branch.test))
        if loss and any(re.search(rf"\bself\.(args\.)?{field}\b", ast.unparse(line)) for line in branch.body):
            found.add(loss[1])
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
        shown = [name for name in field_types(step) if NAMES["aliases"].get(name, name) not in hide]
        group._group_actions = [action for action in group._group_actions if action.dest in shown]
    parser.set_defaults(**notebook_defaults(notebook, step))
    parser.usage, parser.description = f"any field of trl.{CONFIGS[step]} that --help does not list", None
    return str(parser.format_help())
