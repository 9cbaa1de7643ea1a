"""Where things are: the repository, and names that mean a folder or file."""

from __future__ import annotations

import os
from pathlib import Path

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
