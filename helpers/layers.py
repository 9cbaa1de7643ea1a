"""The layers that settings come from. Each gives words by name, as they would be typed after a flag."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers import trl_fields
from helpers.errors import SettingsError
from helpers.paths import REPO, find_path

SECTIONS = ("sft", "dpo", "merge", "vibes", "judge")
EXPORTED = ("HF_", "WANDB_", "OPENAI_")
PLAIN = (str, int, float, bool, list, tuple, dict, Path, type(None))


def split_flags(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """`--name value ...`, `--name=value` and `--name`, in order, with underscores for hyphens."""
    name, words = "", list[str]()
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            if name:
                yield name, words
            name, equals, value = word[2:].partition("=")
            name, words = name.replace("-", "_"), [value] if equals else []
        elif not name or (word.startswith("-") and not re.match(r"-[\d.]", word)):
            raise SettingsError(f"{word!r} stands alone: a setting is given as --name value; see --help")
        else:
            words.append(word)
    if name:
        yield name, words


def from_namespace(step: str, own: Collection[str], namespace: Mapping[str, Any]) -> dict[str, list[str]]:
    """Values bound by a line in a cell or by papermill, under a setting's name, a TRL field's or an older one."""
    plain = {n: v for n, v in namespace.items() if isinstance(v, PLAIN) and not n.startswith("_")}
    names = {*own, *trl_fields.names(step), *trl_fields.OLDER} if set(plain) - set(own) else set(own)
    for name in set(plain) - names:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.88):
            print(f"warning: {name} is no setting; did you mean {close[0]}?", file=sys.stderr)
    return {n: as_words(v) for n, v in plain.items() if n in names}


def read_dotenv() -> dict[str, str]:
    """.env of the folder one starts from, or else of the repository; tokens and addresses in it are exported."""
    from dotenv import dotenv_values

    file = next((f for f in (Path.cwd() / ".env", REPO / ".env") if f.is_file()), None)
    values = {k: v for k, v in dotenv_values(file).items() if v} if file else {}
    for name, value in values.items():
        if name.startswith(EXPORTED):
            os.environ.setdefault(name, value)
    return values


def variable(step: str, name: str) -> str:
    """The environment variable of a setting: the step's prefix, written once."""
    return name.upper() if name.startswith(f"{step}_") else f"{step}_{name}".upper()


def from_variables(
    step: str, types: Mapping[str, Any], variables: Mapping[str, str], unknown: Callable[[str], None]
) -> dict[str, list[str]]:
    """Variables behind the step's prefix, by the setting's name; `unknown` is told of each that is none's."""
    known = {variable(step, name): name for name in types}
    found = {}
    for key in sorted(k for k in variables if k.startswith(f"{step.upper()}_")):
        if key not in known:
            known |= {variable(step, n): n for n in trl_fields.names(step) | trl_fields.OLDER if n not in types}
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            unknown(f"{key} is no variable of this notebook" + (f": did you mean {close[0]}?" if close else ""))
            continue
        name, text = known[key], variables[key]
        try:
            listed = json.loads(text) if text.startswith("[") else None
        except json.JSONDecodeError:
            listed = None
        # a text may hold spaces; the values of TRL's lists, and of ours but for prompts and datasets, hold none
        one = name in ("prompts", "dataset_id") or (name in types and "tuple" not in str(types[name]))
        found[name] = as_words(listed) if listed else [text] if one or text.startswith("{") else text.split()
    return found


def from_recipe(step: str, name: str) -> dict[str, list[str]]:
    """Keys at the top of a recipe, and those of the step's own section over them."""
    import yaml

    file = find_path(name)
    if file is None or not file.is_file():
        have = ", ".join(sorted(f"recipes/{f.name}" for f in (REPO / "recipes").glob("*.yaml")))
        raise SettingsError(f"recipe {name!r} is not a file; there are {have}")
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"recipe {name!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(s) or {}, dict) for s in SECTIONS):
        raise SettingsError(
            f"recipe {name!r}: names with values are needed, and sections {', '.join(SECTIONS)} of such"
        )
    values = {k: v for k, v in content.items() if k not in SECTIONS} | (content.get(step) or {})
    return {str(key).replace("-", "_"): as_words(value) for key, value in values.items()}


def as_words(value: Any) -> list[str]:
    """A value of a recipe or a notebook, as it would be typed after its flag."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in as_words(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
