"""The house: rooms that import one way, one door to each room, short modules, and notebooks in their form.

`python -m tests.test_house` prints the figures.
"""

from __future__ import annotations

import ast
import importlib
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
# Each room may import those before it, itself, and nothing after it.
ROOMS = ("core", "settings", "runs", "models", "data", "training", "merging", "hub", "evaluation")
MODULES, LINES = 50, 8500  # of helpers/, at most
STANDING = 53, 14_510  # what there is: neither may grow
MODULE_LINES = 80, 400  # of a module; `__init__` and `__main__` may be shorter
DOORS, NAMES = 9, 45  # that the notebooks together import, at most
NOTEBOOK_LINES, CELL_LINES, SETTINGS_LINES, MEDIAN_LINES = 300, 25, 60, 12
DEFINED_OFTEN = {"main"}  # what `python -m helpers NAME` calls

HELPERS = sorted((REPO / "helpers").rglob("*.py"))
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.py"))
OUTSIDE = [*NOTEBOOKS, *sorted((REPO / "benchmarks").glob("*.py")), *sorted((REPO / "docs").glob("*.py"))]
unfinished = pytest.mark.xfail(strict=False, reason="helpers/ still has more lines and modules than the limits")
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)


def count_lines() -> int:
    return sum(len(file.read_text().splitlines()) for file in HELPERS)


def module_name(file: Path) -> str:
    parts = file.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULE_NAMES = {module_name(file): file for file in HELPERS}


def room_of(module: str) -> str:
    """The room of a module; "" for helpers itself and its __main__, which stand before all rooms."""
    parts = module.split(".")
    return "" if len(parts) == 1 or parts[1] == "__main__" else parts[1]


@cache
def door_of(room: str) -> dict[str, str]:
    """The names that a room's `__init__` offers, and the module of each."""
    file = REPO / "helpers" / room / "__init__.py"
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    (table,) = [ast.literal_eval(c.args[1]) for c in calls if getattr(c.func, "id", "") == "lazy_exports"]
    return {name: f"helpers.{room}.{module}" for module, names in table.items() for name in names}


@dataclass(frozen=True)
class Import:
    """An import of something of helpers/: in a function or not, or by its name in a text."""

    target: str  # a module of helpers/, or a room
    name: str  # what is taken from it; "" for the module
    line: int


def imports_of(file: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "helpers":
                    yield Import(alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # a relative one, from the package that the file lies in
                package = ".".join(file.relative_to(REPO).parts[: -node.level])
                module = f"{package}.{module}".rstrip(".")
            if module.split(".")[0] == "helpers":
                for alias in node.names:
                    whole = f"{module}.{alias.name}"
                    yield (
                        Import(whole, "", node.lineno)
                        if whole in MODULE_NAMES
                        else Import(module, alias.name, node.lineno)
                    )
        elif isinstance(node, ast.Constant) and node.value in MODULE_NAMES and node.value != "helpers":
            yield Import(node.value, "", node.lineno)  # as importlib.import_module takes it


def behind_the_door(imported: Import) -> str:
    """The module that an import reaches, where it goes through a door."""
    room = imported.target.removeprefix("helpers.")
    if imported.name and room in ROOMS[1:]:
        return door_of(room).get(imported.name, imported.target)
    return imported.target


def imports_between_modules() -> dict[str, set[str]]:
    graph = {}
    for name, file in MODULE_NAMES.items():
        targets = {behind_the_door(i) for i in imports_of(file)}
        graph[name] = targets - {name, "helpers"}
    for room in ROOMS[1:]:  # a door is lazy: what it offers is imported by whoever asks for it
        graph[f"helpers.{room}"] = set()
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One cycle through each module that is first found in one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                walk(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def against_the_order() -> list[str]:
    wrong = []
    for name, file in MODULE_NAMES.items():
        here = room_of(name)
        for imported in imports_of(file) if here else ():
            there = room_of(imported.target)
            if there and ROOMS.index(there) > ROOMS.index(here):
                wrong.append(f"{file.relative_to(REPO)}:{imported.line} ({here}) imports {imported.target} ({there})")
    return wrong


def public_names() -> dict[str, list[str]]:
    """Each public name of helpers/ and the modules that define it: classes, functions and constants."""
    where: dict[str, list[str]] = defaultdict(list)
    for module, file in MODULE_NAMES.items():
        names = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        for name in names:
            if not name.startswith("_"):
                where[name].append(module)
    return where


def taken_by_notebooks() -> set[tuple[str, str]]:
    return {(i.target, i.name) for notebook in NOTEBOOKS for i in imports_of(notebook)}


def test_every_module_belongs_to_a_room() -> None:
    assert {room_of(name) for name in MODULE_NAMES} == {"", *ROOMS}
    assert all(len(name.split(".")) <= 3 for name in MODULE_NAMES)


def test_rooms_import_one_way() -> None:
    assert against_the_order() == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert [" → ".join(cycle) for cycle in cycles(imports_between_modules())] == []


def test_an_import_in_a_function_or_by_name_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.REPO", tmp_path)
    file = tmp_path / "helpers" / "runs" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "def f():\n    from helpers.data import loading\n    import_module('helpers.models.plan')\n"
        "    from .run import start_run\n    from .. import core\n"
    )
    assert [(i.target, i.name) for i in sorted(imports_of(file), key=lambda i: i.line)] == [
        ("helpers.data.loading", ""), ("helpers.models.plan", ""), ("helpers.runs.run", "start_run"),
        ("helpers.core", ""),
    ]  # fmt: skip
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_no_helper_imports_a_notebook() -> None:
    for file in HELPERS:
        assert not re.search(r"^\s*(from|import) notebooks", file.read_text(), re.MULTILINE), file.name


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_door_offers_what_its_modules_define(room: str) -> None:
    door = importlib.import_module(f"helpers.{room}")
    names = public_names()
    for name, module in door_of(room).items():
        assert module in names[name], f"{module} does not define {name}"
        assert name in door.__all__


def test_only_doors_are_used_from_outside() -> None:
    doors = {f"helpers.{room}" for room in ROOMS}
    wrong = [
        f"{file.relative_to(REPO)}:{i.line} imports {i.target} {i.name}".rstrip()
        for file in OUTSIDE for i in imports_of(file)
        if i.target not in doors or not i.name or (i.target != "helpers.core" and i.name not in door_of(i.target[8:]))
    ]  # fmt: skip
    for page in (REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")):
        shown = re.findall(r"^\s*(?:from|import) (helpers[\w.]*)", page.read_text(), re.MULTILINE)
        wrong += [f"{page.name} imports {module}" for module in shown if module not in doors]
    assert wrong == []


def test_notebooks_take_few_names_from_few_doors() -> None:
    taken = taken_by_notebooks()
    assert len({door for door, _ in taken}) <= DOORS
    assert len(taken) <= NAMES, sorted(taken)


@unfinished
def test_helpers_has_few_modules() -> None:
    assert len(HELPERS) <= MODULES


@unfinished
def test_helpers_is_small() -> None:
    assert count_lines() <= LINES


def test_helpers_does_not_grow() -> None:
    assert (len(HELPERS) <= STANDING[0], count_lines() <= STANDING[1]) == (True, True)


def test_every_module_has_a_readable_size() -> None:
    least, most = MODULE_LINES
    wrong = {}
    for name, file in MODULE_NAMES.items():
        lines = len(file.read_text().splitlines())
        if lines > most or (lines < least and not file.name.startswith("__")):
            wrong[name] = lines
    assert wrong == {}


def test_no_public_name_is_defined_twice() -> None:
    assert {n: m for n, m in public_names().items() if len(m) > 1 and n not in DEFINED_OFTEN} == {}


def code_cells(notebook: Path) -> list[Any]:
    import jupytext

    return [cell for cell in jupytext.read(notebook).cells if cell.cell_type == "code"]


def is_settings(cell: Any) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


@each_notebook
def test_a_notebook_is_flat_and_short(notebook: Path) -> None:
    text = notebook.read_text()
    assert text.count("# %%") == len(re.findall(r"^# %%", text, re.MULTILINE))
    assert len(text.splitlines()) <= NOTEBOOK_LINES
    cells = code_cells(notebook)
    assert [is_settings(cell) for cell in cells].count(True) == 1
    sizes = [len(cell.source.splitlines()) for cell in cells]
    for cell, size in zip(cells, sizes, strict=True):
        assert size <= (SETTINGS_LINES if is_settings(cell) else CELL_LINES), cell.source
    assert statistics.median(sizes) <= MEDIAN_LINES


@each_notebook
def test_every_cell_compiles_alone_and_reads_as_a_notebook(notebook: Path) -> None:
    wrong = [fault for cell in code_cells(notebook) for fault in faults(cell.source, is_settings(cell))]
    assert wrong == []


def faults(source: str, settings: bool = False) -> list[str]:
    """What a cell should not have; the class of the settings cell is allowed there."""
    found = []
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    if settings and [node.name for node in classes] == ["Settings"]:
        tree.body.remove(classes[0])
    for node in ast.walk(tree):
        kind = type(node).__name__
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Raise | ast.Try):
            found.append(f"{kind}: {ast.unparse(node).splitlines()[0]}")
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute | ast.IfExp):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            found += [f"alias: {ast.unparse(node)}" for name in names if re.match(r"[A-Z]\w*[a-z]", name)]
        elif isinstance(node, ast.ImportFrom):
            found += [f"alias: {ast.unparse(node)}" for alias in node.names if alias.asname]
        elif isinstance(node, ast.Call):
            inside = [part for word in [*node.args, *node.keywords] for part in ast.walk(word)]
            if any(isinstance(part, ast.NamedExpr) for part in inside):
                found.append(f"walrus in a call: {ast.unparse(node)}")
            if len(node.args) > 2 and getattr(node.func, "id", "") not in ("print", "show"):
                found.append(f"{len(node.args)} positional arguments: {ast.unparse(node)}")
    return found


def test_what_a_cell_should_not_have_is_seen() -> None:
    for source in (
        "def f(): ...", "class A: ...", "raise X", "try:\n  f()\nexcept E:\n  pass", "Trainer = SharedPrefixDPOTrainer",
        "from helpers.data import X as Y", "show((a := f()).b)", "f(1, 2, 3)", "if a:\n  raise X",
    ):  # fmt: skip
        assert len(faults(source)) >= 1, source
    for source in ("print(1, 2, 3)", "f(1, 2, c=3)", "a = b if c else d", "NAME = x", "with a:\n    b = f(c=d)"):
        assert faults(source) == [], source
    assert faults("class Settings(TrainSettings):\n    a: int = 1", settings=True) == []


def figures() -> str:
    """What the limits are about, as it is now."""
    lines = {file: len(file.read_text().splitlines()) for file in HELPERS}
    taken = taken_by_notebooks()
    rows = [
        f"helpers/: {len(HELPERS)} modules of {MODULES}, {sum(lines.values()):,} lines of {LINES:,}",
        f"notebooks take {len(taken)} names of {NAMES} from {len({d for d, _ in taken})} doors of {DOORS}",
    ]
    for room in ("", *ROOMS):
        own = [n for file, n in lines.items() if room_of(module_name(file)) == room]
        rows.append(f"  {room or 'helpers':11} {len(own):2} modules {sum(own):6,} lines, the longest {max(own):4}")
    for notebook in NOTEBOOKS:
        sizes = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
        rows.append(
            f"  {notebook.name:17} {len(notebook.read_text().splitlines()):3} lines, {len(sizes)} code cells, "
            f"median {statistics.median(sizes):g}, longest {max(sizes)}"
        )
    return "\n".join(rows)


def test_the_figures_are_printed() -> None:
    """They are seen with `pytest -rP`."""
    print(text := figures())
    assert f"{len(HELPERS)} modules" in text


if __name__ == "__main__":
    print(figures())
