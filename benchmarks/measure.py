"""What the scripts here share: the peak of a process's own memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def anonymous_peak() -> Iterator[list[float]]:
    """A list whose one item is the largest anonymous resident size so far, in MiB (RssAnon, Linux).

    Pages of files do not count: they can be dropped at any time.
    """
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
