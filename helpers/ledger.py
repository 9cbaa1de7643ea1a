"""Append-only files of rows: what was answered or paid for is not lost, and not made again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from helpers.errors import Interrupted, UserError
from helpers.paths import short_path
from helpers.rows import read_lines
from helpers.runs import Run

Row = dict[str, Any]


class Ledger:
    """A JSONL file of rows, each under a key: `rows[key]`. Of two rows with one key the later holds.

    A last line that was cut short, by a kill or a full disk, is taken off when the file is next written to. Raises
    UserError for a line that is not an object, or that `key` cannot read.
    """

    def __init__(self, file: Path, key: Callable[[Row], Hashable]) -> None:
        self.file, self.key = file, key
        self.rows: dict[Hashable, Row] = {}
        self._end = 0  # of the last whole line
        if file.is_file():
            content = file.read_bytes()
            self._end = content.rfind(b"\n") + 1
            if b"{" in content[self._end :] and _is_whole(content[self._end :]):  # written by hand, without its newline
                self._end = len(content)
            for row in read_lines(file, end=self._end):
                try:
                    self.rows[key(row)] = row
                except (LookupError, TypeError, AttributeError) as error:
                    raise UserError(f"{file}: a row is not of this file's kind ({error!r}): {str(row)[:80]}") from None

    def __contains__(self, key: Hashable) -> bool:
        return key in self.rows

    def add(self, *rows: Row) -> None:
        """Append rows, in one write that reaches the disk before this returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
        with self.file.open("a+b") as out:
            if os.name == "posix":  # another process may be adding to it
                import fcntl

                fcntl.flock(out, fcntl.LOCK_EX)
            out.seek(self._end)
            rest = out.read()  # whole lines of another process, or one that was cut short
            whole = self._end + rest.rfind(b"\n") + 1
            out.truncate(whole)
            out.seek(max(0, whole - 1))
            if out.read() not in (b"", b"\n"):
                text = b"\n" + text
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            self._end = out.tell()
        self.rows |= {self.key(row): row for row in rows}


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextlib.contextmanager
def going_on(run: Run) -> Iterator[None]:
    """Work that the same command goes on with, should it be stopped: what was added to a ledger by then is kept."""
    finished = run.finished
    try:
        if not finished:
            run.update(status="running")
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        with contextlib.suppress(OSError):  # a full disk has no room for this either
            if not finished:
                run.update(status="interrupted" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            kept = f"what was done by then is kept in {short_path(run.folder)}, and the same command goes on with it"
            raise Interrupted(f"stopped by SIGINT: {kept}", signal.SIGINT) from None
        if isinstance(error, UserError) and type(error) is UserError:
            error.args = (f"{error} (what was done by then is kept; the same command goes on)",)
        raise
