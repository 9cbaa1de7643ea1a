"""python -m tests.settings.env_example: write .env.example anew from the Settings of the notebooks."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from helpers.core import REPO
from helpers.runs.start import settings_of
from helpers.settings.load import COMMENT, RUN_CODE, own_types
from helpers.settings.sources import env_name, to_cli_tokens


def env_example() -> str:
    """The part of the file that is written by hand, and the variables of each notebook."""
    file = REPO / ".env.example"
    head = re.split(r"^# notebooks/", file.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    return head + "\n".join(section(notebook) for notebook in sorted((REPO / "notebooks").glob("*.py")))


def section(notebook: Path) -> str:
    cls = settings_of(notebook)
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__[1:-1]):
        comments |= dict(COMMENT.findall(inspect.getsource(base)))
    comments |= dict(COMMENT.findall(notebook.read_text()))
    lines = [f"# notebooks/{notebook.name}: {cls.__doc__}"]
    for name in (name for name in own_types(cls) if name not in RUN_CODE):
        lines += [f"# {comments[name]}", f"# {env_name(cls.step, name)}={' '.join(to_cli_tokens(getattr(cls, name)))}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (REPO / ".env.example").write_text(env_example())
