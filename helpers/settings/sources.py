"""Where settings come from: flags, a notebook's namespace, the environment, .env and recipes, as the words of flags."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from helpers.core import REPO, SettingsError, find_path, shorten
from helpers.settings import trl_fields
from helpers.settings.secrets import ADDRESS_VARIABLES, refuse_secrets

SECTIONS = ("sft", "dpo", "merge", "vibes", "judge", "pairs")  # of a recipe
EXPORTED = ("HF_", "WANDB_", "OPENAI_")  # variables in .env that libraries read
PLAIN = (str, int, float, bool, list, tuple, dict, Path, type(None))

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
    """Values that a line of a cell, or papermill, binds to the name of a setting."""
    plain = {n: v for n, v in namespace.items() if isinstance(v, PLAIN) and not n.startswith("_")}
    names = {**types, **dict.fromkeys(trl_fields.LEGACY_NAMES)}
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
        raise SettingsError(".env has zeros in it, so it is no text. Write it again, in UTF-8.")
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
    names = {env_name(step, name): name for name in (*sorted(trl_fields.LEGACY_NAMES - types.keys()), *types)}
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


def from_recipe(step: str, name: str, exclusive: Sequence[Sequence[str]] = (), types: Iterable[str] = ()) -> Words:
    """The keys at the top of a recipe, and those of the step's section, which win: a key of an `exclusive` group in the
    section also replaces the others of its group at the top. Of the keys at the top, a step that does not train leaves
    out those that are not in `types`: they are for training."""
    import yaml

    file = find_path(name)
    if file is None or not file.is_file():
        names = sorted(f"recipes/{f.name}" for f in (REPO / "recipes").glob("*.yaml"))
        raise SettingsError(f"recipe {name!r} is not a file. Use one of {', '.join(names)}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        refuse_secrets(f"recipe {name!r}", [text])
        content = yaml.load(text, _recipe_loader())
        json.dumps(content, default=str)
    except UnicodeDecodeError as error:
        raise SettingsError(f"recipe {name!r} is not UTF-8: {error.reason}. Save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # ValueError: an alias of itself
        raise SettingsError(f"recipe {name!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(s) or {}, dict) for s in SECTIONS):
        raise SettingsError(f"recipe {name!r} must hold names with values, in sections {', '.join(SECTIONS)} or above.")
    section = content.get(step) or {}
    replaced = {key for group in exclusive if set(group) & set(section) for key in group}
    left_out = {key for key in content if step not in trl_fields.CONFIGS and str(key).replace("-", "_") not in types}
    values = {k: v for k, v in content.items() if k not in {*SECTIONS, *replaced, *left_out}} | section
    return {str(key).replace("-", "_"): to_cli_tokens(value) for key, value in values.items()}


@functools.cache
def _recipe_loader() -> Any:
    """PyYAML's safe loader, which also reads 1e-6 as a number, as YAML 1.2 does and PyYAML 6 does not."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader


def to_cli_tokens(value: Any) -> list[str]:
    """A value of a recipe or a notebook, as it would be typed after its flag."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in to_cli_tokens(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def takes_several(kind: Any) -> bool:
    """Whether a setting of this type takes several words."""
    return any(get_origin(each) in (tuple, list) for each in (kind, *get_args(kind)))


def suggest(name: str, names: Mapping[str, Any], prefix: str = "", cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {prefix}{close[0]}?" if close else ""
