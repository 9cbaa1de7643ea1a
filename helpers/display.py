"""Tables and figures, as a terminal or a notebook shows them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from helpers.errors import in_kernel
from helpers.processes import is_main_process


def show(*things: Any, save_as: Path | None = None) -> None:
    """Print each thing in a terminal; in a notebook display its HTML, or its picture. A figure in a terminal is silent:
    its file is what one opens there, where `save_as` names one. Only the main process does anything."""
    from rich.console import Console

    for thing in things if is_main_process() else ():
        if hasattr(thing, "savefig"):
            if save_as:
                thing.savefig(save_as, dpi=120)
            if in_kernel():
                from IPython.display import display

                display(as_picture(thing))
        elif in_kernel() and hasattr(thing, "_repr_html_"):
            from IPython.display import display

            display(thing)
        elif isinstance(thing, str):  # as it is: a line of flags is there to be pasted
            print(thing)
        else:
            Console().print(thing)


def as_picture(figure: Any) -> Any:
    """A figure as a notebook shows it."""
    from IPython.display import Image

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return Image(picture.getvalue())
