"""Mistakes that a user can mend: one clear line, a status, no traceback. And where this code is running."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

# How PEFT 0.21 and transformers 5.23 begin to say that a setting names nothing.
REFUSED = {"Target modules": "--lora_targets", "Specified `attn_implementation": "--attention"}


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


def stray_words(name: str, words: list[str]) -> SettingsError:
    """For a flag of one value that several words follow."""
    rest = " ".join(words[1:])
    return SettingsError(
        f"{rest!r} after --{name} {words[0]} stands alone: a setting is given as --name value; see --help"
    )


class Stop(UserError):
    """Nothing is wrong, and nothing is left to do: a dry run, or a run that has finished."""

    status = 0


class Interrupted(UserError):
    """A run was told to stop and has saved what it had. The status is the one that shells give after a signal, and 3
    where --stop_on has ended it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def in_kernel() -> bool:
    """True in a Jupyter or VS Code cell, where sys.argv belongs to the kernel and SystemExit helps nobody."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def report_user_errors() -> None:
    """From here on a command prints a UserError as one line, and exits with its status."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _of_a_config(error, trace):
            error = SettingsError(f"TRL refuses these settings: {' '.join(str(error).split())}")
        for start, setting in REFUSED.items():
            if isinstance(error, ValueError) and str(error).startswith(start):
                error = SettingsError(f"{setting}: {' '.join(str(error).split())}")
        if not isinstance(error, UserError):
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank == "0" or not error.everywhere:
            who = "error" if error.everywhere else f"error of process {os.environ.get('RANK', '0')}"
            # torch 2.13 (distributed_c10d.py) calls this with a sys.stderr of its own, lost when a hook exits
            print(error if isinstance(error, Stop) else f"{who}: {error}", file=sys.__stderr__, flush=True)
        sys.exit(error.status)  # an excepthook's SystemExit becomes the status of the process

    if not in_kernel():
        sys.excepthook = hook


def answer_help(argv: Sequence[str], doc: str | None) -> None:
    """Where --help is asked for, print a module's docstring, which has its commands, and end well."""
    if {"-h", "--help"} & set(argv):
        print((doc or "").strip())
        raise SystemExit(0)


def _of_a_config(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether SFTConfig, DPOConfig or what they inherit from refused its values."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    files = {os.path.basename(code.co_filename) for code in frames if code.co_name == "__post_init__"}
    return isinstance(error, ValueError) and bool(files & {"training_args.py", "sft_config.py", "dpo_config.py"})
