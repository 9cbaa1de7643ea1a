"""Run a notebook that is killed, or told to stop, at a call: `python tests/killed.py TARGET N SIGNAL NOTEBOOK FLAGS`.

TARGET is `module:name` or `module:Class.name`; its N-th call does not happen, or with N of `2+` happens and is the last
thing that does. SIGNAL is a number: 9 leaves nothing to clean up.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import signal
import sys
from typing import Any


def arm(target: str, count: str, number: int) -> None:
    """Send this process a signal at a call of `target`."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        is_due = calls == int(count.rstrip("+"))
        result = function(*args, **kwargs) if not is_due or count.endswith("+") else None
        if is_due:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs) if is_due and not count.endswith("+") else result

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGHUP):  # a job in the background and nohup ignore them
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    arm(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    del sys.argv[:4]
    runpy.run_path(sys.argv[0], run_name="__main__")
