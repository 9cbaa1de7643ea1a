"""Mistakes that a user can mend: one clear line, a status, no traceback. And where this code is running."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

# How PEFT 0.21 and transformers 5.23 begin to say that a setting names nothing.
REFUSED_BY_LIBRARIES = {
    "Target modules": "--lora_target_modules",
    "Specified `attn_implementation": "--attn_implementation",
}


class UserError(Exception):
    """A mistake of the user's, told in one line that says what to do. `status` is the command's exit status."""

    status = 1
    everywhere = True  # every process of a launch raises it alike, and one of each machine's says it

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class SettingsError(UserError):
    """A setting that cannot be used: its name, its value, and what to do."""

    status = 2


def unexpected_words(name: str, words: list[str]) -> SettingsError:
    """For a flag of one value that several words follow."""
    rest = " ".join(words[1:])
    return SettingsError(
        f"{rest!r} after --{name} {words[0]} stands alone: a setting is given as --name value; see --help"
    )


class CleanExit(UserError):
    """Nothing is wrong, and nothing is left to do: a dry run, or a run that has finished."""

    status = 0


class Interrupted(UserError):
    """A run was told to stop and has saved what it had. The status is the one that shells give after a signal, and 3
    where --stop_on_diagnostic has ended it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def is_notebook() -> bool:
    """True in a Jupyter or VS Code cell, where sys.argv belongs to the kernel and SystemExit helps nobody."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def install_error_hook() -> None:
    """From here on a command prints a UserError as one line, and exits with its status."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _of_a_config(error, trace):
            error = SettingsError(f"TRL refuses these settings: {' '.join(str(error).split())}")
        for start, setting in REFUSED_BY_LIBRARIES.items():
            if isinstance(error, ValueError) and str(error).startswith(start):
                error = SettingsError(f"{setting}: {' '.join(str(error).split())}")
        if not isinstance(error, UserError):
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank == "0" or not error.everywhere:
            who = "error" if error.everywhere else f"error of process {os.environ.get('RANK', '0')}"
            # torch 2.13 (distributed_c10d.py) calls this with a sys.stderr of its own, lost when a hook exits
            print(error if isinstance(error, CleanExit) else f"{who}: {error}", file=sys.__stderr__, flush=True)
        sys.exit(error.status)  # an excepthook's SystemExit becomes the status of the process

    if not is_notebook():
        sys.excepthook = hook


def print_help_if_asked(argv: Sequence[str], doc: str | None) -> None:
    """Where --help is asked for, print a module's docstring, which has its commands, and end well."""
    if {"-h", "--help"} & set(argv):
        print((doc or "").strip())
        raise SystemExit(0)


def _of_a_config(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether SFTConfig, DPOConfig or what they inherit from refused its values."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    files = {os.path.basename(code.co_filename) for code in frames if code.co_name == "__post_init__"}
    return isinstance(error, ValueError) and bool(files & {"training_args.py", "sft_config.py", "dpo_config.py"})


REPO = Path(__file__).resolve().parents[1]


def find_path(name: str) -> Path | None:
    """The folder or file that `name` means, seen from here or else from the repository; None for a Hub id."""
    for start in (Path.cwd(), REPO):
        if name and (start / Path(name).expanduser()).exists():
            return start / Path(name).expanduser()
    return None


def short_path(path: Path | str) -> str:
    """`path` as one would type it here."""
    return os.path.relpath(path) if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()) else str(path)


def is_main_process() -> bool:
    """True for the one process of a launch that prints, writes and pushes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Return when every process of the launch is here. Before the trainer is made there is nothing to wait with."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def process_lock(name: str) -> Iterator[None]:
    """One process after another: the first does the work, the others find it done in the datasets cache."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    from datasets import config
    from filelock import FileLock

    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        yield


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """End without a word where whoever reads what is printed, as `head`, has read enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(0) from None


def silence_other_processes() -> None:
    """What a notebook prints is said once, by the main process; errors are not silenced."""
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
        os.environ["TQDM_DISABLE"] = "1"


def show(*things: Any, save_as: Path | None = None) -> None:
    """Print each thing in a terminal; in a notebook display its HTML, or its picture. A figure in a terminal is silent:
    its file is what one opens there, where `save_as` names one. Only the main process does anything."""
    from rich.console import Console

    for thing in things if is_main_process() else ():
        if hasattr(thing, "savefig"):
            if save_as:
                thing.savefig(save_as, dpi=120)
            if is_notebook():
                from IPython.display import display

                display(figure_to_image(thing))
        elif is_notebook() and hasattr(thing, "_repr_html_"):
            from IPython.display import display

            display(thing)
        elif isinstance(thing, str):  # as it is: a line of flags is there to be pasted
            print(thing)
        else:
            Console().print(thing, crop=False)  # a Text without wrapping keeps its flags on one line


def figure_to_image(figure: Any) -> Any:
    """A figure as a notebook shows it."""
    from IPython.display import Image

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return Image(picture.getvalue())


def write_json(file: Path, content: Any) -> None:
    atomic_write(file, (json.dumps(content, indent=1, default=str) + "\n").encode())


def atomic_write(file: Path, content: bytes) -> None:
    """Write beside the file, then rename: a reader sees the old file or the new one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)  # on a full disk


def read_jsonl(file: Path, end: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of its first `end` bytes.

    Raises UserError with the number of a line that is not UTF-8, or not an object.
    """
    rows = []
    with file.open("rb") as whole:
        lines = whole if end is None else io.BytesIO(whole.read(end))
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(row, dict):
                        raise UserError(f"{file.name}, line {number}, is not a JSON object")
                except UnicodeDecodeError as error:
                    raise UserError(f"{file.name}, line {number}, is not UTF-8: {error.reason}") from None
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{file.name}, line {number}, is not JSON: {error.msg}, column {error.colno}"
                    ) from None
                rows.append(row)
    return rows


HUB_ANSWERS = {
    401: "the Hub does not accept your token (401): give a valid one as HF_TOKEN, or none for what is public",
    403: "your token may not do that (403): give one with the right to, as HF_TOKEN",
    404: "it is not on the Hub, or your token may not see it (404)",
    429: "the Hub asks to slow down (429): give the same command again in some minutes",
}


def describe_error(error: BaseException) -> str:
    """One line; the error's own words where it is not the Hub's."""
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    said = " ".join(str(error).split())[:300]
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return HUB_ANSWERS[404]  # without a token, a repository that is not there is answered with 401
    if any(isinstance(e, RevisionNotFoundError | RemoteEntryNotFoundError) for e in chain):
        return said
    answers = [answer for e in chain if (answer := getattr(e, "response", None)) is not None]
    status = answers[0].status_code if answers else 0
    full = next((line for e in chain for line in str(getattr(e, "server_message", "") or e).splitlines()
                 if re.search(r"storage|quota", line, re.IGNORECASE)), "")  # fmt: skip
    if status in (402, 403, 413) and full:
        return f"the account has no room for it ({' '.join(full.split())[:200]}): make some, or push elsewhere"
    if status >= 500:
        return f"the Hub fails ({status}): give the same command again later"
    if status in HUB_ANSWERS:
        return HUB_ANSWERS[status]
    if any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in chain):
        from huggingface_hub import is_offline_mode

        if is_offline_mode():
            return "it is not in the cache, and HF_HUB_OFFLINE is set: leave it out once, or give a folder"
        return "it is not in the cache, and the Hub cannot be reached: connect, or give a folder"
    return said


def fingerprint(*things: Any) -> str:
    """Sixteen hex digits of anything that JSON holds."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:16]


def safe_file_name(model: str) -> str:
    """A model's name as a file's: what no file system takes is replaced."""
    return "".join("-" if c in '/\\:*?"<>|' else c for c in model)


def lazy_door(room: str, modules: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a room's `__init__`: a name is imported from its module when it is first used.

    `modules` maps a module of the room to the names that others may use.
    """
    where = {name: f"{room}.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    return sorted(where), get
