"""Settings of a notebook: flags > notebook > environment > .env > recipe > the defaults in its Settings cell.

Every layer gives words, and the same two parsers read them: tyro for the fields of the Settings cell, TRL's own
argument parser for every other field of SFTConfig / DPOConfig. Neither torch nor TRL is imported unless a TRL field is
named, so that help and typing mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from helpers.core import (
    REPO,
    SettingsError,
    find_path,
    ignore_broken_pipe,
    install_error_hook,
    is_main_process,
    is_notebook,
    process_lock,
    silence_other_processes,
    unexpected_words,
)
from helpers.settings import trl_fields
from helpers.settings.fields import SOURCE_ORDER, RunSettings, TrainSettings

__all__ = ["RunSettings", "TrainSettings", "load_settings", "one_of"]

S = TypeVar("S", bound=RunSettings)


def load_settings(cls: type[S], namespace: Mapping[str, Any], argv: list[str] | None = None) -> S:
    """Resolve `cls` from every layer, print the table, and return it; see the module's docstring for the order.

    `namespace` is the notebook's globals(). `argv` stands for the command line; in a kernel, where it belongs to the
    kernel, it is never read. Fields of the step's TRL config that were given arrive in `.trl`, ready for the config.
    Raises SettingsError; a command prints it as one line and exits with status 2.
    """
    install_error_hook()
    silence_warnings()
    if is_notebook():
        configure_kernel()
    else:
        silence_other_processes()
    if argv is None:
        argv = [] if is_notebook() else sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        with ignore_broken_pipe():
            _print_help(cls)
        raise SystemExit(0)
    if {"--help_trl", "--help-trl"} & set(argv):
        with ignore_broken_pipe():
            print(trl_fields.trl_help(cls.step, hide=_field_types(cls)))
        raise SystemExit(0)

    step, types = cls.step, _field_types(cls)
    flags = _current_names(cls, dict(split_flags(argv)), "flag")
    bound = _current_names(cls, from_namespace(step, types, namespace), "notebook")
    strange: list[str] = []  # variables of the environment: they may be another program's
    environment = _current_names(cls, from_variables(step, types, os.environ, strange.append), "environment")
    dotenv = _current_names(cls, from_variables(step, types, read_dotenv(), _refuse), ".env")
    named = [layer["recipe"] for layer in (flags, bound, environment, dotenv) if "recipe" in layer][:1]
    recipe = _current_names(cls, from_recipe(step, parse_value(str, "recipe", *named[0])), "recipe") if named else {}

    words = recipe | dotenv | environment | bound | flags
    settings = cls(**{name: parse_value(types[name], name, *w) for name, w in words.items() if name in types})
    settings.sources = dict.fromkeys(types, "default") | {name: source for name, (_, source) in words.items()}
    if given := {name: w for name, w in words.items() if name not in types}:
        parse = trl_fields.parse_fields_fast if settings.dry_run else trl_fields.parse_fields
        settings.trl = parse(step, given, SettingsError)
    for name, hint in types.items():
        if hint is Path:  # by hand: from where it was typed; in a default or a file: from the repository
            start = Path.cwd() if settings.sources[name].startswith(("flag", "environment")) else REPO
            setattr(settings, name, start / getattr(settings, name))
    if settings.wandb_project and not settings.is_set("report_to"):
        settings.report_to = "wandb"
    settings.check()
    if settings.trl.get("deepspeed"):  # transformers says so too, but only when the trainer's config is made
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    _print_settings(settings)
    for message in strange if is_main_process() else ():  # here, where it is seen
        print(f"warning: {message}", file=sys.stderr)
    if settings.setup_module:
        run_setup_module(settings.setup_module)
    return settings


def one_of(settings: RunSettings, *names: str) -> None:
    """Keep the one of `names` that the highest layer gave: they say the same thing in different ways.

    The others go back to nothing. Raises SettingsError where one layer gave more than one.
    """
    layer = {name: settings.sources[name].split()[0] for name in names}
    given = {
        name: SOURCE_ORDER.index(layer[name])
        for name in names
        if getattr(settings, name) and SOURCE_ORDER.index(layer[name])
    }
    highest = [name for name in given if given[name] == max(given.values())]
    if len(highest) > 1:
        said = " and ".join(f"--{name} {getattr(settings, name)}" for name in highest)
        raise SettingsError(f"{said} contradict each other: give one of them")
    for name in set(names) - set(highest) if highest else ():
        settings.override(f"{layer[name]}, but {highest[0]} wins", **{name: type(getattr(settings, name))()})


def silence_warnings() -> None:
    """Silence what is said at every start and helps nobody; a progress bar is for someone who watches."""
    if not is_notebook() and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # bitsandbytes 0.50 looks for an optional CPU kernel; trl 1.16 sets gradient_checkpointing, transformers 5.23 warns
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_relevant)
    logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)  # loading.py says which line
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm: its bars are text without ipywidgets
    names = "(is_)?gradient_checkpointing(_(en|dis)able)?"
    warnings.filterwarnings("ignore", message=f"`{names}` is deprecated", category=FutureWarning)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Not that there is no GPU, as deepspeed 0.19 says wherever it is installed, where nothing is asked of it."""
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return wanted or not record.getMessage().startswith("Setting accelerator to CPU")


def configure_kernel() -> None:
    """Let the next cell use a helper as it was edited (`%autoreload 0` ends it), and tables fit beside JupyterLab's
    file browser. Here, as VS Code takes jupyter.runStartupCommands from a user's own settings only."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell.extension_manager.load_extension("autoreload") is None:  # not loaded yet
        shell.run_line_magic("autoreload", "2")
    os.environ.setdefault("JUPYTER_COLUMNS", "100")  # rich's own is 115


def run_setup_module(module: str) -> None:
    """python -m MODULE, in this process, without our own command line."""
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        with process_lock(f"prepare {module}"):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as error:
        raise SettingsError(f"--setup_module {module}: {error}") from None
    finally:
        sys.argv = words


def _field_types(cls: type[RunSettings]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _current_names(
    cls: type[RunSettings], raw: Mapping[str, list[str]], layer: str
) -> dict[str, tuple[list[str], str]]:
    """Names as this version has them, each with its words and its source; an unknown name is refused."""
    types = _field_types(cls)
    known: dict[str, tuple[list[str], str]] = {}
    for name, words in raw.items():
        source = f"{layer} {env_name(cls.step, name)}" if layer in ("environment", ".env") else layer
        new, words, note = trl_fields.current_name(cls.step, name, words, own=set(types))
        if note:
            print(f"note: {note}", file=sys.stderr)
        if new is None:
            continue
        if new not in types and new.startswith("no_") and not words:
            new, words = new.removeprefix("no_"), ["False"]
        if new not in types and new not in trl_fields.field_names(cls.step):
            close = difflib.get_close_matches(new, [*types, *trl_fields.field_names(cls.step)], n=1)
            where = f"--{name}" if layer == "flag" else f"{name} ({source})"
            more = " and --help_trl" if cls.step in trl_fields.CONFIGS else ""
            hint = f"did you mean --{close[0]}?" if close else f"see --help{more}"
            raise SettingsError(f"unknown setting {where}: {hint}")
        if note and new in known and "tuple" in str(types.get(new)):  # two older names of what is one list today
            words = [*known[new][0], *words]
        known[new] = (words, source)
    return known


def _refuse(message: str) -> None:
    raise SettingsError(f"{message} (in .env)")


def parse_value(hint: Any, name: str, words: list[str], source: str) -> Any:
    """One field through tyro. A switch may stand alone; None for a text means that there is none."""
    import tyro

    if hint is bool:
        words = [str(trl_fields.BOOLEANS.get(word.lower(), word)) for word in words] or ["True"]
    elif hint is str and words == ["None"]:
        return ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(hint, args=words)
    except SystemExit:
        if source == "flag" and len(words) > 1 and get_origin(hint) is not tuple:
            raise unexpected_words(name, words) from None
        kind = " or ".join(map(str, get_args(hint))) if get_args(hint) else getattr(hint, "__name__", str(hint))
        got = " ".join(words) or "nothing"
        raise SettingsError(f"--{name} takes {kind}, not {got!r} (from {source})") from None


def _print_help(cls: type[RunSettings]) -> None:
    """tyro's help; each line ends with the field's default and its environment variable."""
    import tyro

    for base in cls.__mro__:
        for name, hint in list(vars(base).get("__annotations__", {}).items()):
            if name in _field_types(cls):
                hint_of = lambda default, name=name: f"(default: {default}; {env_name(cls.step, name)})"  # noqa: E731
                base.__annotations__[name] = Annotated[hint, tyro.conf.arg(help_behavior_hint=hint_of)]
    more = (
        f"Any field of trl.{trl_fields.CONFIGS[cls.step]} is a flag too: --help_trl."
        if cls.step in trl_fields.CONFIGS
        else ""
    )
    tyro.cli(cls, args=["--help"], use_underscores=True, config=(tyro.conf.FlagConversionOff,), description=more)


def _print_settings(settings: RunSettings) -> None:
    from rich.console import Console

    if is_main_process():
        Console().print(settings)


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
    names = {*own, *trl_fields.field_names(step), *trl_fields.LEGACY_NAMES} if set(plain) - set(own) else set(own)
    for name in set(plain) - names:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.88):
            print(f"warning: {name} is no setting; did you mean {close[0]}?", file=sys.stderr)
    return {n: to_cli_tokens(v) for n, v in plain.items() if n in names}


def read_dotenv() -> dict[str, str]:
    """.env of the folder one starts from, or else of the repository; tokens and addresses in it are exported."""
    from dotenv import dotenv_values

    file = next((f for f in (Path.cwd() / ".env", REPO / ".env") if f.is_file()), None)
    values = {k: v for k, v in dotenv_values(file).items() if v} if file else {}
    for name, value in values.items():
        if name.startswith(EXPORTED):
            os.environ.setdefault(name, value)
    return values


def env_name(step: str, name: str) -> str:
    """The environment variable of a setting: the step's prefix, written once."""
    return name.upper() if name.startswith(f"{step}_") else f"{step}_{name}".upper()


def from_variables(
    step: str, types: Mapping[str, Any], variables: Mapping[str, str], unknown: Callable[[str], None]
) -> dict[str, list[str]]:
    """Variables behind the step's prefix, by the setting's name; `unknown` is told of each that is none's."""
    known = {env_name(step, name): name for name in types}
    found = {}
    for key in sorted(k for k in variables if k.startswith(f"{step.upper()}_")):
        if key not in known:
            known |= {
                env_name(step, n): n for n in trl_fields.field_names(step) | trl_fields.LEGACY_NAMES if n not in types
            }
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
        found[name] = to_cli_tokens(listed) if listed else [text] if one or text.startswith("{") else text.split()
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
    return {str(key).replace("-", "_"): to_cli_tokens(value) for key, value in values.items()}


def to_cli_tokens(value: Any) -> list[str]:
    """A value of a recipe or a notebook, as it would be typed after its flag."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in to_cli_tokens(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
