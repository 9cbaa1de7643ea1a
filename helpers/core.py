"""What every subpackage uses: errors, processes, paths, files and display."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

REPO = Path(__file__).resolve().parents[1]
output_dir: Path | None = None  # --output_dir, once settings are loaded


class UserError(Exception):
    """A mistake that the user can fix: one line that says how. `status` is the exit status of the command."""

    status = 1
    everywhere = True  # all processes of a launch raise it: only one prints it

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [printable(f"{type(self).__name__}: {self}")]


class SettingsError(UserError):
    """A setting that cannot be used: its name, its value, and the fix."""

    status = 2


class CleanExit(UserError):
    """Not an error: there is nothing more to do, as after a dry run or for a finished run."""

    status = 0


class Interrupted(UserError):
    """A run was stopped and has saved its state. `status` is 128 + the signal, or 3 for --stop_on_diagnostic."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled as Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def handle_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Let `handler` receive the signals that end a program, but those that are ignored (as with nohup), and in this
    process only: forked workers end at once. Returns the handlers before; {} outside of the main thread."""
    process = os.getpid()

    def receive(number: int, frame: Any) -> None:
        if os.getpid() == process:
            return handler(number, frame)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, receive) for number in numbers}


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


DISK_FULL_ERRORS = ("no space left", "disk quota exceeded", "file write failed", "pytorchstreamwriter failed writing",
                    "unexpected pos")  # fmt: skip
OS_ERRORS = {
    errno.EACCES: "Fix its permissions, or use another path",
    errno.EPERM: "Fix its permissions, or use another path",
    errno.EROFS: "Use a path on a file system that can be written",
    errno.ENAMETOOLONG: "Use a shorter name",
}


def is_disk_full(error: BaseException) -> bool:
    """Whether Python, safetensors or torch raised `error` because a file could not be written to its end."""
    code = error.errno if isinstance(error, OSError) else None
    text = f"{type(error).__name__} {error}".lower()
    return code in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in DISK_FULL_ERRORS)


# Whose ValueErrors, NotImplementedErrors and ImportErrors are about the settings.
LIBRARIES = {"trl": "TRL", "transformers": "transformers", "peft": "PEFT", "accelerate": "accelerate",
             "bitsandbytes": "bitsandbytes"}  # fmt: skip
# How PEFT 0.21 and transformers 5.23 begin to refuse a setting.
REFUSED_BY_LIBRARIES = {
    "Target modules": "--lora_target_modules",
    "Specified `attn_implementation": "--attn_implementation",
}


def _explain(error: BaseException, trace: TracebackType | None) -> BaseException:
    """What a user can fix as a UserError of one line: a signal, an error of the operating system, or what a library
    says about the settings. Any other error as it is."""
    message, path = " ".join(str(error).split()), getattr(error, "filename", None)
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the interpreter's exit
        name = signal.Signals(number).name
        return Interrupted(f"Stopped by {name}. Run the same command again to resume.", 128 + number)
    if is_disk_full(error):
        where = f" ({path})" if path else ""
        return UserError(f"The disk is full{where}. Free some space, then run the same command again.")
    if isinstance(error, OSError) and error.errno in OS_ERRORS and path:
        return UserError(f"{path}: {error.strerror}. {OS_ERRORS[error.errno]}.")
    if message.startswith("You set `ignore_mismatched_sizes` to `False`"):  # transformers 5.23, below its report
        what = "The model is broken: its weights do not have the shapes of its config.json (see above)"
        return UserError(f"{what}. Restore its files, or download it again.")
    for start, setting in REFUSED_BY_LIBRARIES.items() if isinstance(error, ValueError) else ():
        if message.startswith(start):
            return SettingsError(f"{setting}: {message}")
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    package = re.search(r"[\\/]site-packages[\\/](\w+)", frames[-1]) if frames else None
    library = LIBRARIES.get(package[1]) if package and not os.environ.get("TRACEBACK") else None
    if library and isinstance(error, ValueError | NotImplementedError | ImportError):
        return SettingsError(f"{library} refuses these settings: {message} (TRACEBACK=1 shows where)")
    return error


def install_error_hook() -> None:
    """Make a command print a UserError, or the signal that ends it, as one line, and exit with its status. Other errors
    keep their traceback."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error = _explain(error, trace)
        if not isinstance(error, UserError):
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        if os.environ.get("LOCAL_RANK", "0") == "0" or not error.everywhere:
            prefix = "error" if error.everywhere else f"error of process {os.environ.get('RANK', '0')}"
            # torch 2.13 (distributed_c10d.py) calls this with its own sys.stderr, which is lost when a hook exits
            line = printable(str(error) if isinstance(error, CleanExit) else f"{prefix}: {error}")
            print(line, file=sys.__stderr__, flush=True)
        sys.exit(error.status)  # the SystemExit of an excepthook is the exit status of the process

    if not is_notebook():
        sys.excepthook = hook
        handle_signals(_interrupt)


def is_notebook() -> bool:
    """True in a Jupyter or VS Code cell, where sys.argv belongs to the kernel and SystemExit does not exit."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def is_main_process() -> bool:
    """True for the one process of a launch that prints, writes and pushes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Wait until all processes of the launch arrive here. Does nothing before torch.distributed is initialized."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """Give attributes of an object or a module other values within the block."""
    before = {name: vars(target)[name] for name in values if name in vars(target)}  # others are of its class
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values.keys() & vars(target).keys():
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)


@contextlib.contextmanager
def process_lock(name: str) -> Iterator[None]:
    """Run the block in one process at a time: the first does the work, the others find its result in the cache."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    from datasets import config
    from filelock import FileLock

    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        yield


def silence_other_processes() -> None:
    """Print in the main process only; errors are printed by all."""
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the lifetime of the process
        os.environ["TQDM_DISABLE"] = "1"


def find_path(name: str) -> Path | None:
    """The folder or file `name`, relative to the current folder or else to the repository; None for a Hub id. What a
    setup module wrote to --output_dir, because the repository cannot be written, is found as outputs/..."""
    with contextlib.suppress(OSError, RuntimeError):  # too long for a file name, or ~ of an unknown user
        for place in (Path.cwd() / Path(name).expanduser(), REPO / Path(name).expanduser(), writable_output(name)):
            if name and place.exists():
                return place
    return None


def writable_output(name: Path | str) -> Path:
    """Where `outputs/...` of a recipe lies: in the repository, or in --output_dir if the repository is read-only."""
    path = REPO / name
    is_writable = os.access(next(parent for parent in path.parents if parent.exists()), os.W_OK)
    if is_writable or output_dir is None or not Path(name).is_relative_to("outputs"):
        return path
    return output_dir / Path(name).relative_to("outputs")


def short_path(path: Path | str) -> str:
    """`path` as the user would type it in the current folder."""
    return os.path.relpath(path) if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()) else str(path)


def add_user_paths() -> None:
    """Let `import` find modules in the current folder and in the repository, after all installed packages."""
    sys.path.extend(path for path in (str(Path.cwd()), str(REPO)) if path not in sys.path)


def import_user_module(name: str, setting: str) -> ModuleType:
    """Import the module that --`setting` names. Raises SettingsError if it cannot be imported."""
    add_user_paths()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ImportError | SyntaxError) else f"{type(error).__name__}: "
        raise SettingsError(f"--{setting} {name} cannot be imported: {kind}{error}") from None


def lazy_exports(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` for the `__init__` of a subpackage: a name is imported when it is first used.
    `modules` maps each of its modules to its public names."""
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return sorted(homes), get


Row = dict[str, Any]  # of a dataset or of a JSONL file


def atomic_write(file: Path, content: bytes) -> None:
    """Write to a temporary file, then rename it: a reader sees the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # left behind when the disk is full


def write_json(file: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    atomic_write(file, (json.dumps(content, indent=1, default=str) + "\n").encode())


def read_jsonl(file: Path, end: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of its first `end` bytes. Raises UserError with the line number for a line that
    is not UTF-8, or not a JSON object."""
    rows = []
    with file.open("rb") as stream:
        lines = stream if end is None else io.BytesIO(stream.read(end))
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{file.name}, line {number}, is not UTF-8: {error.reason}") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{file.name}, line {number}, is not JSON: {error.msg}, column {error.colno}") from None
            except RecursionError:
                raise UserError(f"{file.name}, line {number}, is nested too deeply") from None
            if not isinstance(row, dict):
                raise UserError(f"{file.name}, line {number}, is not a JSON object")
            rows.append(row)
    return rows


def fingerprint(*things: Any) -> str:
    """Sixteen hex digits of a hash over `things`, which JSON must be able to hold."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:16]


# C0 and C1 control characters but tab and newline: a terminal would obey them (OSC 52 writes the clipboard).
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text of others for a terminal: control characters are shown as escapes, such as \\x1b."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shorten(text: str, width: int = 200) -> str:
    """The beginning of a text, in at most `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


class _Printable:
    """A renderable of rich whose texts are `printable`."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        for segment in console.render(self.thing, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


BLUE, ORANGE, GREY, LIGHT_GREY = "#0072B2", "#D55E00", "#767676", "#C8C8C8"  # of plots (Okabe and Ito)


def show(*things: Any, save_as: Path | None = None) -> None:
    """Print each thing in a terminal, or display it in a notebook. A figure is saved to `save_as`, and displayed in a
    notebook only. Only the main process does anything."""
    from rich.console import Console

    for thing in things if is_main_process() else ():
        is_figure = hasattr(thing, "savefig")
        if is_figure and save_as:
            thing.savefig(save_as, dpi=120)
        if is_notebook() and (is_figure or hasattr(thing, "_repr_html_")):
            from IPython.display import Image, display

            display(Image(figure_to_png(thing, dpi=100)) if is_figure else thing)
        elif isinstance(thing, str):
            print(printable(thing))  # without wrapping: commands are there to be pasted
        elif not is_figure:  # a Text without wrapping keeps its flags on one line; brackets in data are not markup
            Console(markup=False, emoji=False).print(_Printable(thing), crop=False)


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure that shows its texts as they are: `$` and backslashes in names are no formula."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    class PlainFigure(Figure):
        def draw(self, renderer: Any) -> None:
            for text in self.findobj(Text):
                text.set_parse_math(False)
            super().draw(renderer)

    return PlainFigure(**options)


def figure_to_png(figure: Any, dpi: int = 120) -> bytes:
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
    return buffer.getvalue()
