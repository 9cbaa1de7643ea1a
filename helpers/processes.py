"""The processes of one launch: which one speaks and writes, and how they wait for each other."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def is_main_process() -> bool:
    """True for the one process of a launch that prints, writes and pushes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return when every process of the launch is here. Before the trainer is made there is nothing to wait with."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
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
def until_read() -> Iterator[None]:
    """End without a word where whoever reads what is printed, as `head`, has read enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(0) from None


def be_quiet_unless_main() -> None:
    """What a notebook prints is said once, by the main process; errors are not silenced."""
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
        os.environ["TQDM_DISABLE"] = "1"
