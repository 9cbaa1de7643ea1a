"""Settings of a notebook: flags > notebook > environment > .env > recipe > the defaults in its Settings cell.

Every layer gives words, and the same two parsers read them: tyro for the fields of the Settings cell, TRL's own argument
parser for every other field of SFTConfig / DPOConfig. Neither torch nor TRL is imported unless a TRL field is named,
so that help and typing mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from helpers import trl_fields
from helpers.errors import UserError, in_kernel, report_user_errors

REPO = Path(__file__).resolve().parents[1]
SECTIONS = ("sft", "dpo", "merge", "vibes", "judge")
EXPORTED = ("HF_", "WANDB_", "OPENAI_")
PLAIN = (str, int, float, bool, list, tuple, dict, Path, type(None))
# What may differ between two starts of one run: where it is kept, what is reported, and whether it goes on.
NOT_IDENTITY = {"recipe", "output_dir", "run_name", "resume", "dry_run", "report_to", "wandb_project", "prepare"}
NOT_IDENTITY |= {"push_to_hub", "hub_repo_id", "private", "logging_steps", "disable_tqdm"}


class SettingsError(UserError):
    """A setting that cannot be used: its name, its value, and what to do."""

    status = 2


@dataclasses.dataclass
class RunSettings:
    """What every notebook shares."""

    step: ClassVar[str] = ""

    recipe: str = ""  # YAML file of settings; recipes/ has some, and --recipe recipes/demo.yaml needs no GPU
    output_dir: Path = Path("outputs")  # where runs are kept, one folder each
    run_name: str = ""  # the run's folder; made from the settings when empty
    seed: int = 42  # seed of the data split, the adapter's weights, the order of rows and sampling
    resume: Literal["auto", "never"] = "auto"  # auto: go on where the same command stopped; never: replace its run
    dry_run: bool = False  # say what would be done, and stop
    report_to: str = "none"  # tracker: none, wandb, tensorboard, trackio ...
    wandb_project: str = ""  # Weights & Biases project; naming one turns wandb on
    prepare: str = ""  # module run first (python -m), to make what a recipe names

    sources: dict[str, str] = dataclasses.field(default_factory=dict, init=False, repr=False)
    trl: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def values(self) -> dict[str, Any]:
        """Every setting and its value, ready for JSON; TRL fields given by hand come last."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {name: str(v) if isinstance(v, Path) else v for name, v in (own | self.trl).items()}

    def identity(self) -> dict[str, Any]:
        """The settings that make a run what it is."""
        return {name: v for name, v in self.values().items() if name not in NOT_IDENTITY}

    def digest(self, *more: str) -> str:
        """Six hex digits of `identity()` and of `more` (what the run starts from)."""
        text = json.dumps([self.identity(), *more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:6]

    def given(self, name: str) -> bool:
        """Whether `name` was set at all, rather than left at the cell's default."""
        return self.sources[name] != "default"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("setting", "value", "from", box=None, pad_edge=False, title_justify="left")
        for name, value in self.values().items():
            style = "dim" if self.sources[name] == "default" else ""
            table.add_row(name, str(value), self.sources[name], style=style)
        return table


S = TypeVar("S", bound=RunSettings)


def load_settings(cls: type[S], namespace: Mapping[str, Any], argv: list[str] | None = None) -> S:
    """Resolve `cls` from every layer, print the table, and return it; see the module's docstring for the order.

    `namespace` is the notebook's globals(). `argv` stands for the command line; in a kernel, where it belongs to the
    kernel, it is never read. Fields of the step's TRL config that were given arrive in `.trl`, ready for the config.
    Raises SettingsError; a command prints it as one line and exits with status 2.
    """
    report_user_errors()
    _quieten()
    if argv is None:
        argv = [] if in_kernel() else sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        _print_help(cls)
        raise SystemExit(0)
    if {"--help_trl", "--help-trl"} & set(argv):
        print(trl_fields.help_text(cls.step, hide=_types(cls)))
        raise SystemExit(0)

    flags = _known(cls, dict(_split_flags(argv)), "flag")
    bound = _known(cls, _from_namespace(cls, namespace), "notebook")
    environment = _known(cls, _from_variables(cls, os.environ, strict=False), "environment")
    dotenv = _known(cls, _from_variables(cls, _read_dotenv(), strict=True), ".env")
    named = [layer["recipe"] for layer in (flags, bound, environment, dotenv) if "recipe" in layer][:1]
    recipe = _known(cls, _from_recipe(cls, _parse(str, "recipe", *named[0])) if named else {}, "recipe")

    words: dict[str, tuple[list[str], str]] = {}
    for layer in (recipe, dotenv, environment, bound, flags):
        words |= layer
    settings = cls(**{name: _parse(_types(cls)[name], name, *w) for name, w in words.items() if name in _types(cls)})
    settings.sources = {name: "default" for name in _types(cls)} | {name: source for name, (_, source) in words.items()}
    given = {name: w for name, w in words.items() if name not in _types(cls)}
    if given:
        settings.trl = trl_fields.parse(cls.step, given, SettingsError)
    for name, hint in _types(cls).items():
        if hint is Path:  # by hand: from where it was typed; in a default or a file: from the repository
            start = Path.cwd() if settings.sources[name].startswith(("flag", "environment")) else REPO
            setattr(settings, name, start / getattr(settings, name))
    if settings.wandb_project and not settings.given("report_to"):
        settings.report_to = "wandb"
    _show(settings)
    if settings.prepare and not settings.dry_run:
        _prepare(settings.prepare)
    return settings


def one_of(settings: RunSettings, *names: str) -> None:
    """Raise SettingsError where more than one of `names` was given: they say the same thing in two ways."""
    if len(given := [f"--{name} {getattr(settings, name)}" for name in names if settings.given(name)]) > 1:
        raise SettingsError(f"{' and '.join(given)} contradict each other: give one of them")


def _quieten() -> None:
    """Silence what is said at every start and helps nobody; a progress bar is for someone who watches."""
    if not in_kernel() and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # bitsandbytes 0.50 looks for an optional CPU kernel; trl 1.16 sets gradient_checkpointing, transformers 5.23 warns
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated", category=FutureWarning)


def _prepare(module: str) -> None:
    """python -m MODULE, in this process, without our own command line."""
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as error:
        raise SettingsError(f"--prepare {module}: {error}") from None
    finally:
        sys.argv = words


def find_path(name: str) -> Path | None:
    """The folder or file that `name` means, seen from here or else from the repository; None for a Hub id."""
    for start in (Path.cwd(), REPO):
        if name and (start / Path(name).expanduser()).exists():
            return start / Path(name).expanduser()
    return None


def short_path(path: Path | str) -> str:
    """`path` as one would type it here."""
    return os.path.relpath(path) if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()) else str(path)


def variable(cls: type[RunSettings], name: str) -> str:
    """The environment variable of a setting: the step's prefix, written once."""
    return name.upper() if name.startswith(f"{cls.step}_") else f"{cls.step}_{name}".upper()


def _types(cls: type[RunSettings]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _split_flags(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """`--name value ...`, `--name=value` and `--name`, in order, with underscores for hyphens."""
    name, words = "", []
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


def _known(cls: type[RunSettings], raw: Mapping[str, list[str]], layer: str) -> dict[str, tuple[list[str], str]]:
    """Names as this version has them, each with its words and its source; an unknown name is refused."""
    types, known = _types(cls), {}
    for name, words in raw.items():
        source = f"{layer} {variable(cls, name)}" if layer in ("environment", ".env") else layer
        new, words, note = trl_fields.current_name(cls.step, name, words, own=set(types))
        if note:
            print(f"note: {note}", file=sys.stderr)
        if new is None:
            continue
        if new not in types and new.startswith("no_") and not words:
            new, words = new.removeprefix("no_"), ["False"]
        if new not in types and new not in trl_fields.names(cls.step):
            raise SettingsError(f"unknown setting {_where(layer, name)}{_nearest(cls, new)}")
        known[new] = (words, source)
    return known


def _where(layer: str, name: str) -> str:
    return f"--{name}" if layer == "flag" else f"{name} ({layer})"


def _nearest(cls: type[RunSettings], name: str) -> str:
    names = [*_types(cls), *trl_fields.names(cls.step)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean --{close[0]}?" if close else ": see --help" + (" and --help_trl" if cls.step else "")


def _words(value: Any) -> list[str]:
    """A value of a recipe or a notebook, as it would be typed after its flag."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in _words(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def _from_namespace(cls: type[RunSettings], namespace: Mapping[str, Any]) -> dict[str, list[str]]:
    """Values bound by a line in a cell or by papermill, under a setting's name or a TRL field's."""
    plain = {n: v for n, v in namespace.items() if isinstance(v, PLAIN) and not n.startswith("_")}
    own = {n for n in plain if n in _types(cls)}
    others = set(plain) - own
    known = own | ({n for n in others if n in trl_fields.names(cls.step)} if others else set())
    for name in others - known:
        if close := difflib.get_close_matches(name, [*_types(cls), *trl_fields.names(cls.step)], n=1, cutoff=0.88):
            print(f"warning: {name} is no setting; did you mean {close[0]}?", file=sys.stderr)
    return {n: _words(plain[n]) for n in known}


def _read_dotenv() -> dict[str, str]:
    """.env of the folder one starts from, or else of the repository; tokens and addresses in it are exported."""
    from dotenv import dotenv_values

    file = next((f for f in (Path.cwd() / ".env", REPO / ".env") if f.is_file()), None)
    values = {k: v for k, v in dotenv_values(file).items() if v} if file else {}
    for name, value in values.items():
        if name.startswith(EXPORTED):
            os.environ.setdefault(name, value)
    return values


def _from_variables(cls: type[RunSettings], variables: Mapping[str, str], strict: bool) -> dict[str, list[str]]:
    prefix = f"{cls.step.upper()}_"
    own = {variable(cls, name): name for name in _types(cls)}
    found = {}
    for key in sorted(k for k in variables if k.startswith(prefix)):
        if (name := own.get(key)) is None:
            trl = {variable(cls, n): n for n in trl_fields.names(cls.step) | set(trl_fields.OLDER)}
            if (name := trl.get(key)) is None:
                message = f"{key} is no variable of this notebook{_nearest(cls, key.removeprefix(prefix).lower())}"
                if strict:
                    raise SettingsError(f"{message.replace('--', '')} (in .env)")
                print(f"warning: {message}", file=sys.stderr)
                continue
        text = variables[key]
        try:
            listed = json.loads(text) if text.startswith("[") else None
        except json.JSONDecodeError:
            listed = None
        many = "tuple" in str(_types(cls).get(name, "")) or name == "loss_type"
        found[name] = _words(listed) if listed else shlex.split(text) if many else [text]
    return found


def _from_recipe(cls: type[RunSettings], name: str) -> dict[str, list[str]]:
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
        raise SettingsError(f"recipe {name!r}: names with values, and sections {', '.join(SECTIONS)} of such")
    values = {k: v for k, v in content.items() if k not in SECTIONS} | (content.get(cls.step) or {})
    return {str(key).replace("-", "_"): _words(value) for key, value in values.items()}


def _parse(hint: Any, name: str, words: list[str], source: str) -> Any:
    """One field through tyro. A switch may stand alone; None for a text means that there is none."""
    import tyro

    if hint is bool:
        switch = {"true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}
        words = [switch.get(word.lower(), word) for word in words] or ["True"]
    elif hint is str and words == ["None"]:
        return ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(hint, args=words)
    except SystemExit:
        kind = " or ".join(map(str, get_args(hint))) if get_args(hint) else getattr(hint, "__name__", str(hint))
        got = " ".join(words) or "nothing"
        raise SettingsError(f"--{name} takes {kind}, not {got!r} (from {source})") from None


def _print_help(cls: type[RunSettings]) -> None:
    """tyro's help; each line ends with the field's default and its environment variable."""
    import tyro

    for base in cls.__mro__:
        for name, hint in list(vars(base).get("__annotations__", {}).items()):
            if name in _types(cls):
                hint_of = lambda default, name=name: f"(default: {default}; {variable(cls, name)})"  # noqa: E731
                base.__annotations__[name] = Annotated[hint, tyro.conf.arg(help_behavior_hint=hint_of)]
    more = f"Any field of trl.{trl_fields.CONFIGS[cls.step]} is a flag too: --help_trl." if cls.step in trl_fields.CONFIGS else ""
    tyro.cli(cls, args=["--help"], use_underscores=True, config=(tyro.conf.FlagConversionOff,), description=more)


def _show(settings: RunSettings) -> None:
    from rich.console import Console

    if int(os.environ.get("RANK", "0")) == 0:
        Console().print(settings)
