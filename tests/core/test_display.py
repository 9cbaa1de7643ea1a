"""What is printed of the text of others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from helpers import core
from helpers.core import find_path, new_figure, printable, shorten, show


def test_text_of_others_cannot_command_a_terminal_and_is_no_markup(capsys: Any) -> None:
    from rich.table import Table

    hostile = "[red]a[/b] \x1b]52;c;aGk=\x07 \x9b2J :smile: \u202ereversed"
    table = Table("column")
    table.add_row(hostile)
    show(hostile, table, Text(hostile, style="bold"))
    shown = capsys.readouterr().out
    assert shown.count("[red]a[/b] \\x1b]52;c;aGk=") == 3
    assert shown.count(":smile: \\u202ereversed") == 3
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


def test_printable_keeps_text_tabs_and_lines() -> None:
    assert printable("ä\tb\nc 漢 🎉") == "ä\tb\nc 漢 🎉"
    assert printable("\x00\r\u2028") == "\\x00\\r\\u2028"


def test_a_name_that_no_file_can_have_is_not_found_and_is_shortened() -> None:
    assert find_path("x" * 5000) is None
    assert find_path("~nobody-of-that-name/x") is None
    assert find_path(str(Path(__file__))) == Path(__file__)
    assert shorten("x" * 5000) == "x" * 199 + "…"


def test_a_read_only_clone_finds_in_the_output_folder_what_a_recipe_calls_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, elsewhere, here = tmp_path / "clone", tmp_path / "elsewhere", tmp_path / "here"
    for folder in (clone, elsewhere / "made", here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(core, "REPO", clone)
    monkeypatch.setattr(core, "output_dir", elsewhere)
    assert (core.writable_output("outputs/made"), find_path("outputs/made")) == (clone / "outputs" / "made", None)
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(clone))
    assert (core.writable_output("outputs/made"), find_path("outputs/made")) == (elsewhere / "made",) * 2
    assert core.writable_output("recipes/x") == clone / "recipes" / "x"
    (here / "outputs" / "made").mkdir(parents=True)  # the current folder comes first, as for every path
    assert find_path("outputs/made") == here / "outputs" / "made"


@pytest.mark.parametrize("name", [r"a$\foo$b", "$x_$", "100 $ and 5 $", "a_b^c", "[red]x[/]"])
def test_a_figure_shows_any_name_as_it_is(name: str, tmp_path: Path) -> None:
    figure = new_figure(figsize=(3, 2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], label=name)
    axis.set_yticks([0, 1], [name, name])
    axis.set_title(name)
    axis.set(xlabel=name)
    axis.legend(title=name)
    axis.text(0, 0, name)
    figure.suptitle(name)
    figure.supxlabel(name)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
