"""What a report is made of: words, tables, pictures. All of them are text, which the template escapes."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from helpers.paths import REPO

Part = dict[str, Any]  # its kind, and what the template's macro of that kind shows
Cell = str | dict[str, str]  # a text, or a link


def words(text: str, tone: str = "") -> Part:
    """A paragraph; `tone` is quiet, good or warn."""
    return {"kind": "words", "text": text, "tone": tone}


def heading(text: str) -> Part:
    return {"kind": "heading", "text": text}


def notes(texts: Iterable[tuple[str, bool]]) -> Part:
    """A list of texts; those that matter stand out."""
    return {"kind": "notes", "texts": list(texts)}


def beside(*parts: Part) -> Part:
    """Parts side by side, where there is room."""
    return {"kind": "beside", "parts": parts}


def command(text: str) -> Part:
    """Something to paste into a terminal."""
    return {"kind": "command", "text": text}


def card(title: str, facts: Iterable[tuple[str, str]], tone: str = "") -> Part:
    """A heading with names and texts under it; `tone` warn, or steps for columns side by side."""
    return {"kind": "card", "title": title, "facts": list(facts), "tone": tone}


def fold(title: str, *parts: Part) -> Part:
    """Parts that are there when they are opened."""
    return {"kind": "fold", "title": title, "parts": parts}


def links(found: Iterable[Cell]) -> Part:
    return {"kind": "links", "links": list(found)}


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Part:
    """Rows of values (see `say`) or links; a column of numbers stands on the right. `label` is for screen readers."""
    said = [[cell if isinstance(cell, dict) else say(cell) for cell in row] for row in rows]
    columns: list[list[Cell]] = [[row[i] for row in said] for i in range(len(head))]
    numeric = [_are_numbers(column) for column in columns]
    return {"kind": "table", "label": label, "head": list(head), "rows": said, "numeric": numeric}


def picture(png: bytes, alt: str, caption: str = "") -> Part:
    """A PNG that travels in the page; `alt` says in words what is in it."""
    src = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"kind": "picture", "src": src, "alt": alt, "caption": caption}


def link(text: str, to: Path, start: Path) -> Cell:
    """A link to a file, from a page in the folder `start`; only the text where there is no such file."""
    try:
        href = quote(os.path.relpath(to.resolve(), start.resolve()).replace(os.sep, "/"))
    except ValueError:  # another drive
        return text
    return {"text": text, "href": href} if to.is_file() else text


def read_json(file: Path) -> dict[str, Any]:
    """What stands in a file; {} where there is none. Raises ValueError where it is no JSON."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def day(when: Any) -> str:
    """A time of run.json, which is UTC, to the minute."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*?([+-]\d\d:\d\d|Z)?$", r"\1 \2 UTC", str(when or "-"))


def say(value: Any) -> str:
    """A value of run.json as one reads it, without folders of this machine."""
    if value is None:
        return "-"
    if isinstance(value, bool | int | str):
        return tidy(str(value))
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    if isinstance(value, list | tuple) and not any(isinstance(each, dict | list) for each in value):
        return " ".join(map(say, value))
    return tidy(json.dumps(value, ensure_ascii=False, default=str))


def number(value: Any, form: str) -> str:
    """A number in the form `form`; "-" where it is none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if known else "-"


def span(interval: Any, form: str = ".1%") -> str:
    """An interval, of shares where nothing else is said."""
    low, high = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    return "-" if low is None or high is None else f"{number(low, form)} to {number(high, form)}"


def tidy(text: str) -> str:
    """`text` with paths as they are seen from the repository; of a folder elsewhere the last part alone."""
    return _without_folders(text, "", "…/")


def typed(text: str) -> str:
    """A word of a command: a path as it is typed in the repository, and PATH/TO where it is to be filled in."""
    return _without_folders(text, "PATH/TO/", "PATH/TO/")


def _without_folders(text: str, alone: str, among: str) -> str:
    """`text` with paths as they are seen from the repository; of a folder elsewhere the last part, behind `alone` or,
    where more than the path stands in `text`, `among`."""
    text = re.sub(rf"{re.escape(str(REPO))}(?![\w@+-])", ".", text.replace(f"{REPO}{os.sep}", ""))
    if Path(text).is_absolute() and "\n" not in text:
        return f"{alone}{Path(text).name}" if Path(text).name else text
    return re.sub(r"(?<![\w.:/])(?:/[\w.@+-]+){2,}", lambda found: f"{among}{Path(found[0]).name}", text)


def _are_numbers(cells: Sequence[Cell]) -> bool:
    """Whether these are numbers, and what stands where there is none."""
    given = [cell for cell in cells if cell != "-"]
    number = re.compile(r"-?[\d.,]+(e[+-]?\d+)?%?|-?(nan|inf)")
    return bool(given) and all(isinstance(cell, str) and number.fullmatch(cell) for cell in given)
