"""Resolve the settings of a notebook: flags > notebook > environment > .env > recipe > the defaults of its cell.

Each layer gives words, as typed after a flag. One parser (tyro) reads them all, for the fields of the cell and those of
TRL's config. Neither torch nor TRL is imported, so that --help and typing mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import logging
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from helpers import core
from helpers.core import (
    REPO,
    CleanExit,
    SettingsError,
    add_user_paths,
    install_error_hook,
    is_main_process,
    is_notebook,
    process_lock,
    replaced,
    short_path,
    shorten,
    show,
    silence_other_processes,
)
from helpers.settings.fields import SOURCE_ORDER, RunSettings, TrainSettings
from helpers.settings.sources import (
    BOOLEANS,
    CONFIGS,
    NAMES,
    Words,
    current_name,
    env_name,
    field_types,
    from_namespace,
    from_recipe,
    from_variables,
    read_dotenv,
    split_flags,
    suggest,
    takes_several,
    to_cli_tokens,
    trl_help,
)

RUN_CODE = ("setup_module", "trust_remote_code", "judge_module", "bench")  # settings that run code of others
# lists whose entries may hold commas
TEXTS = ("prompts", "dataset_id", "models", "votes", "from_votes", "exclude", "generation_kwargs")
SINGULARS = {int: "an integer", float: "a number", bool: "True or False", str: "a text", Path: "a path"}
PLURALS = {int: "integers", float: "numbers", str: "texts"}
# A field of a Settings class and its comment, which is on the same line or on one of the lines that continue it.
COMMENT = re.compile(r"^    (\w+): (?:.|\n(?=     |    \)))*?  # (.+)", re.MULTILINE)

S = TypeVar("S", bound=RunSettings)
RecipeReader = Callable[[str, dict[str, Words], list[str]], Words]  # (file, the layers above it, notes) → settings


def load_settings(
    cls: type[S], namespace: Mapping[str, Any], argv: list[str] | None = None, read_recipe: RecipeReader | None = None
) -> S:
    """Resolve the settings `cls` from every layer, print those that were given, and return them. `namespace` is the
    notebook's globals(). `argv` replaces the command line, which is never read in a kernel. `read_recipe` replaces
    `recipe_words`. Fields of TRL's config that were given are in `.trl` of the result. Raises SettingsError; a command
    prints it as one line and exits with status 2."""
    install_error_hook()
    silence_warnings()
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # long and short batches take turns
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that wait longer keep others' from running on a busy CPU
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    configure_kernel() if is_notebook() else silence_other_processes()
    if argv is None:
        argv = [] if is_notebook() else sys.argv[1:]
    own = own_types(cls)
    if {"-h", "--help", "--help_trl", "--help-trl"} & set(argv):
        try:
            is_ours = {"-h", "--help"} & set(argv)
            print(format_help(cls) if is_ours else trl_help(cls.step, own, _notebook_source()), flush=True)
        except BrokenPipeError:  # the reader of the output, such as `head`, has closed its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        raise SystemExit(0)

    types = field_types(cls.step) | own
    environment, unknown = from_variables(cls.step, types, os.environ)
    dotenv, refused = from_variables(cls.step, types, read_dotenv())
    if refused:
        raise SettingsError(f"{refused[0]} (in .env)")
    if names := [name for name in RUN_CODE if name in dotenv]:
        raise SettingsError(f"{env_name(cls.step, names[0])} cannot be set in .env, because it runs code. Use a flag.")
    flags, bound = dict(split_flags(argv)), from_namespace(types, namespace)
    layers = {"flag": flags, "notebook": bound, "environment": environment, ".env": dotenv}
    notes: list[str] = []
    given = {source: _translate(cls, types, words, source, notes) for source, words in layers.items()}
    if recipes := [(words["recipe"], source) for source, words in given.items() if "recipe" in words]:
        file = parse_value(str, "recipe", *recipes[0])
        given["recipe"] = read_recipe(file, given, notes) if read_recipe else recipe_words(cls, file, notes)
    if is_main_process() and notes:
        print(f"note: {'; '.join(dict.fromkeys(notes))}", file=sys.stderr)

    values, sources = dict[str, Any](), {f.name: "default" for f in dataclasses.fields(cls) if f.init}
    for layer in SOURCE_ORDER:  # the lowest first
        for name, words in given.get(layer, {}).items():
            sources[name] = f"{layer} {env_name(cls.step, name)}" if layer in ("environment", ".env") else layer
            values[name] = words or cls.const.get(name, [])
    values = {name: parse_value(types[name], name, words, sources[name]) for name, words in values.items()}
    settings = cls(**{name: value for name, value in values.items() if name in own})
    settings.trl = {name: value for name, value in values.items() if name not in own}
    settings.sources = sources
    _resolve(settings)
    show(settings)
    for message in unknown if is_main_process() else ():  # below the settings, where it is seen
        print(f"warning: {message}", file=sys.stderr)
    if settings.setup_module and settings.dry_run:
        print(f"Dry run: --setup_module {settings.setup_module} is not run.")
    elif settings.setup_module:
        run_setup_module(settings.setup_module)
    return settings


def recipe_words(cls: type[RunSettings], file: str, notes: list[str]) -> Words:
    """What the notebook with the settings `cls` reads in a recipe, by its current names. Adds notes on older names."""
    own = own_types(cls)
    content = from_recipe(cls.step, file, cls.exclusive, own)
    return _translate(cls, field_types(cls.step) | own, content, "recipe", notes)


def _notebook_source() -> str:
    """The text of the notebook that runs as a command; "" for any other program."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""


def _resolve(settings: RunSettings) -> None:
    """Apply what follows from several settings, and check them all."""
    is_typed = settings.sources["output_dir"].startswith(("flag", "environment"))  # else relative to the repository
    settings.output_dir = (Path.cwd() if is_typed else REPO) / settings.output_dir
    core.output_dir = settings.output_dir
    for group in settings.exclusive:
        given = [name for name in group if getattr(settings, name) and settings.is_set(name)]
        highest = [name for name in given if settings.layer(name) == max(map(settings.layer, given))]
        if len(highest) > 1:
            flags = " and ".join(f"--{name} {getattr(settings, name)}" for name in highest)
            raise SettingsError(f"{flags} exclude each other. Give one of them.")
        for name in group if highest else ():
            if name not in highest and (value := getattr(settings, name)):
                layer = settings.sources[name].split()[0]
                settings.override(f"{layer} (but {highest[0]} wins)", **{name: type(value)()})
    trains = settings.step in CONFIGS
    if isinstance(settings, TrainSettings) and not settings.is_set("report_to"):
        if settings.wandb_project:
            settings.report_to = "wandb"
        elif os.environ.get("WANDB_PROJECT"):  # as transformers does
            settings.override("environment WANDB_PROJECT", report_to="wandb")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not trains:
        raise SettingsError("this notebook runs in one process. Start it with `python`, without a launcher.")
    settings.check()
    if settings.trl.get("deepspeed"):  # transformers sets it too, but only when the trainer's config is made
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


def silence_warnings() -> None:
    """Silence warnings that appear at every start and need no action, and progress bars that nobody watches."""
    if not is_notebook() and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # bitsandbytes 0.50 looks for an optional CPU kernel; trl 1.16 sets gradient_checkpointing, transformers 5.23 warns
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_relevant)
    logging.getLogger("transformers.trainer_utils").addFilter(_is_relevant)
    logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)  # ours names the line
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm: without ipywidgets its bars are text
    names = "(is_)?gradient_checkpointing(_(en|dis)able)?"
    warnings.filterwarnings("ignore", message=f"`{names}` is deprecated", category=FutureWarning)


def _is_relevant(record: logging.LogRecord) -> bool:
    """False for deepspeed 0.19's message that there is no GPU, unless DeepSpeed is used, and for transformers 5.23's
    that a resumed run has other steps: it compares shares (0.2) with numbers, and `check_same_settings` has compared.
    """
    text, is_used = record.getMessage(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return "arguments do not match" not in text and (is_used or not text.startswith("Setting accelerator to CPU"))


def configure_kernel() -> None:
    """Reload edited helpers (`%autoreload 0` ends it), and fit tables next to JupyterLab's file browser. Where nobody
    types (papermill, nbclient), a CleanExit is no error: the cells after it do nothing. It is done here, because VS
    Code reads jupyter.runStartupCommands from the user's own settings only."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell.extension_manager.load_extension("autoreload") is None:  # not loaded before
        shell.run_line_magic("autoreload", "2")
    os.environ.setdefault("JUPYTER_COLUMNS", "100")  # the default of rich is 115

    def end(shell: Any, kind: Any, error: CleanExit, trace: Any, tb_offset: Any = None) -> None:
        show(str(error))
        shell.input_transformers_post.append(lambda lines: [])

    def clear(result: Any) -> None:  # ipykernel 7 replies with it after this
        result.error_in_exec = None if isinstance(result.error_in_exec, CleanExit) else result.error_in_exec

    if not getattr(shell.kernel, "_allow_stdin", True):
        shell.set_custom_exc((CleanExit,), end)
        shell.events.register("post_run_cell", clear)


def run_setup_module(module: str) -> None:
    """Run `python -m module` in this process, without our command line."""
    add_user_paths()
    try:
        with process_lock(f"prepare {module}"), replaced(sys, argv=sys.argv[:1]):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except (ImportError, SyntaxError) as error:
        raise SettingsError(f"--setup_module {module} cannot be run: {error}") from None


def own_types(cls: type[RunSettings]) -> dict[str, Any]:
    """The fields of a Settings class that can be set, and their types."""
    hints, unused = get_type_hints(cls), NAMES["unused"].get(cls.step, "").split()
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and f.name not in unused}


def _translate(cls: type[RunSettings], types: Mapping[str, Any], raw: Words, layer: str, notes: list[str]) -> Words:
    """Give the settings of one layer their current names. Raises SettingsError for an unknown name."""
    result: Words = {}
    for name, words in raw.items():
        new, words, note = current_name(cls.step, name, words, own_types(cls))
        if note:
            notes.append(note)
        if new is None:
            continue
        if new not in types and new.startswith("no_") and not words:
            new, words = new.removeprefix("no_"), ["False"]
        if new not in types:
            variable = f" {env_name(cls.step, name)}" if layer in ("environment", ".env") else ""
            place = f"--{name}" if layer == "flag" else f"{name} ({layer}{variable})"
            more = " and --help_trl" if cls.step in CONFIGS else ""
            raise SettingsError(f"unknown setting {place}: {suggest(new, types, '--') or f'see --help{more}'}")
        if note and new in result and takes_several(types[new]):  # two older names of one list
            words = [*result[new], *words]
        result[new] = words
    return result


def parse_value(kind: Any, name: str, words: list[str], source: str) -> Any:
    """Read `words` as a value of the type `kind`. A switch needs no word. Raises SettingsError."""
    import tyro

    if words == ["None"] and (kind is str or type(None) in (kind, *get_args(kind))):
        return "" if kind is str else None
    if takes_several(kind) and name not in TEXTS and all(re.fullmatch(r"[\w.,+-]+", word) for word in words):
        words = [part for word in words for part in word.split(",") if part]
    if kind is Path and words in ([""], ["."]) and name == "output_dir":
        raise SettingsError(f"--{name} {words[0]!r} cannot hold runs (from {source}). Use a folder such as outputs.")
    if kind is type(None):
        raise SettingsError(f"--{name} cannot be set from outside (from {source}). Set it in `config` in the notebook.")
    if bool in (kind, *get_args(kind)):
        words = [BOOLEANS.get(word.lower(), word) for word in words] or ["True"]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(kind, args=words)
    except SystemExit:
        got = shorten(repr(" ".join(words))) if words else "nothing"
        message = f"--{name} takes {describe_value(kind)}, not {got} (from {source})."
        if words == ["None"]:
            message += " Use 0 for no limit."
        if source == "flag" and len(words) > 1 and not takes_several(kind):
            message = f"--{name} takes one value, not {got}. Give each setting as --name value; see --help."
        raise SettingsError(message) from None


def _words_of(kind: Any) -> list[Any]:
    """What a word of a setting is: [int] for int | None, and the choices of a Literal."""
    parts = [part for part in get_args(kind) if part not in (Ellipsis, type(None))]
    return list(dict.fromkeys(word for part in parts for word in _words_of(part))) or [kind]


def describe_value(kind: Any) -> str:
    """What a setting takes, as "a number" or "full or lora"."""
    names = PLURALS if takes_several(kind) else SINGULARS
    return " or ".join(names.get(word, str(word)) for word in _words_of(kind))


def format_help(cls: type[RunSettings]) -> str:
    """The text of --help: each setting in its group, with its comment, its default and its variable."""
    types, comments = own_types(cls), dict[str, str]()
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(COMMENT.findall(inspect.getsource(base)))
    config = CONFIGS.get(cls.step)
    parser = argparse.ArgumentParser(
        usage=f"python {cls.program or short_path(sys.argv[0])} [--name value ...]",
        description=f"{cls.__doc__}" + f" Any field of trl.{config} is also a flag: see --help_trl." * bool(config),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        add_help=False,
    )
    groups = {title: names.split() for title, names in NAMES["groups"].items()}
    grouped = {name for names in groups.values() for name in names}
    groups["step"] = [name for name in types if name not in grouped]
    for title, names in groups.items():
        section = parser.add_argument_group(title if title != "step" else cls.step)
        for name in filter(types.__contains__, names):
            kind, default = types[name], " ".join(to_cli_tokens(getattr(cls, name)))
            end = f"default: {default}; {env_name(cls.step, name)}" if default else env_name(cls.step, name)
            text = f"{comments.get(name, '')} ({end})".replace("%", "%%")
            words = " or ".join(getattr(word, "__name__", str(word)) for word in _words_of(kind)).upper()
            words = f"{{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else words
            options: Any = {"metavar": words + " ..." * takes_several(kind)}
            section.add_argument(f"--{name}", help=text, **({"action": "store_true"} if kind is bool else options))
    return parser.format_help()
