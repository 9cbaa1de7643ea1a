"""Write report.html: one self-contained page for a run of 01 or 02, and for what was made from it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from helpers.core import (
    REPO,
    SIGNALS,
    SettingsError,
    UserError,
    atomic_write,
    figure_to_png,
    find_path,
    is_main_process,
    short_path,
)
from helpers.runs.checkpoints import load_record, remove_drafts
from helpers.runs.curves import Curves, Panel, logged_panels, no_problem_text, plot_runs, read_history, read_samples
from helpers.runs.run import TRAINING_STEPS, Run, dataset_names, lineage, list_merges, list_runs, read_run

TEMPLATES = [str(folder) for folder in sorted(Path(__file__).parents[1].glob("*/templates"))]  # of every subpackage
FILE = "report.html"


def write_report(folder: Path) -> Path:
    """Write report.html of a run of 01 or 02 in any state, and return its path. Raises UserError for another folder.
    The page makes no request and shows every text as text. A section that cannot be rendered says why in its place."""
    record = read_run(folder)
    if record.get("step") not in TRAINING_STEPS:
        raise UserError(f"{short_path(folder)} has no report: it is not the folder of a run of 01_sft.py or 02_dpo.py.")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=format_value,
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    environment.filters |= {"number": format_number, "interval": format_interval, "day": format_day, "word": as_word}
    environment.globals["run"] = context = RunContext(folder, record)
    environment.tests["outdated"] = context.is_outdated

    def render(section: str) -> Markup:
        try:
            return Markup(environment.get_template(f"report_{section}.html").render())
        except Exception as error:  # files may be old, broken or half written
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            text = escape(hide_paths(f"This section could not be rendered ({why})."))
            return Markup(f'<p class="warn">{text}</p>')

    style = Path(__file__).with_name("templates") / "report.css"
    css = style.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    page = environment.get_template("report.html").render(render=render, style=Markup(css), policy=Markup(policy))
    file = folder / FILE
    atomic_write(file, page.encode("utf-8", errors="xmlcharrefreplace"))  # half a surrogate pair becomes U+FFFD
    return file


def show_report(*folders: Path) -> None:
    """Write the report of the training run behind each folder, and print the last one's path. Never raises."""
    if not is_main_process():
        return
    try:
        files = [write_report(trained) for trained in dict.fromkeys(filter(None, map(_training_run, folders)))]
    except Exception as error:
        print(f"Report: not written ({type(error).__name__}: {error}).")
        return
    if files:
        print(f"Report: {short_path(files[-1])}")


def save_partial_report(folder: Path) -> None:
    """Write curves.png and report.html of a run that ends early, if it has logged anything. The caller is about to
    raise what ended the run, so nothing is raised here, not even for a second Ctrl-C. SIGTERM, which a launcher sends
    to all processes when one fails, and SIGHUP are ignored until `Run.training` restores them."""
    if not is_main_process():
        return
    with contextlib.suppress(Exception, KeyboardInterrupt):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS[1:]:
                signal.signal(number, signal.SIG_IGN)
        atomic_write(folder / "curves.png", figure_to_png(Curves.read(folder).figure))
        print(f"Report: {short_path(write_report(folder))}", flush=True)


def _training_run(folder: Path) -> Path | None:
    """The newest run of 01 or 02 in the lineage of `folder`."""
    return next((Path(run["folder"]) for run in lineage(folder) if run.get("step") in TRAINING_STEPS), None)


def main(argv: Sequence[str]) -> None:
    """Write report.html: one self-contained page for a run of 01 or 02, and for what was made from it.

    python -m helpers report outputs/<run>
    """
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SettingsError("usage: python -m helpers report outputs/<run>")
    folder = find_path(argv[0])
    if folder is None or not load_record(folder):
        raise UserError(f"{argv[0]!r} is not the folder of a run: it has no run.json.")
    place = _training_run(folder) or folder
    remove_drafts(place)
    print(f"Report: {short_path(write_report(place))}")


class RunContext(Run):
    """What the templates show: a run's files, its ancestors, and the merges and comparisons made from it."""

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return self.record.get("metrics") or {}

    @cached_property
    def history(self) -> list[dict[str, float]]:
        return read_history(self.folder / "metrics.jsonl")

    @property
    def no_problem(self) -> str:
        return no_problem_text(self.history)

    @cached_property
    def panels(self) -> list[Panel]:
        return logged_panels(self.history)

    @cached_property
    def completions(self) -> list[dict[str, Any]]:
        return read_samples(self.folder)

    @cached_property
    def data_report(self) -> dict[str, Any]:
        file = self.folder / "data_report.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    @cached_property
    def ancestors(self) -> list[dict[str, Any]]:
        """The records of the run and of those before it, each with its `data` names; the newest first."""
        return [record | {"datasets": dataset_names(record)} for record in lineage(self.folder.resolve())]

    @cached_property
    def merges(self) -> list[Run]:
        return list_merges(self.folder)

    @cached_property
    def comparisons(self) -> list[Run]:
        """The runs of 05_judge.py with this run, or a merge of it, among their models."""
        own = [Run(self.folder.resolve(), self.record), *self.merges]
        judged = list_runs(self.folder.resolve().parent, "judge")
        models = [(run, (run.record.get("metrics") or {}).get("models") or ()) for run in judged]
        return [run for run, names in models if any(run.matches_model(name, own) for name in names)]

    def is_outdated(self, other: Run) -> bool:
        """Whether a merge or comparison was made before this run was trained again."""
        made_from = other.record.get("origin") if other.record.get("step") == "merge" else ""
        if made_from and self.record.get("fingerprint"):
            return bool(made_from != self.record["fingerprint"])
        return str(other.record.get("finished") or "~") < str(self.record.get("finished") or "")

    def draw(self, *panels: Panel) -> Markup:
        """The curves of some panels."""
        return to_data_uri(figure_to_png(plot_runs({"": self.history}, panels=panels)))

    def picture(self, file: Path) -> Markup | None:
        return to_data_uri(file.read_bytes()) if file.is_file() else None

    def link(self, text: str, file: Path) -> Markup:
        """A link from the report to a file, or only the text if there is no such file."""
        try:
            target = quote(os.path.relpath(file.resolve(), self.folder.resolve()).replace(os.sep, "/"))
        except ValueError:  # another drive
            target = ""
        text = escape(hide_paths(text))
        return Markup(f'<a href="{target}"><bdi>{text}</bdi></a>') if target and file.is_file() else text


def to_data_uri(png: bytes) -> Markup:
    return Markup(f"data:image/png;base64,{base64.b64encode(png).decode()}")


def format_value(value: Any) -> Any:
    """A value as text, without folders of this machine; what every expression in a template goes through."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    if isinstance(value, list | tuple) and not any(isinstance(each, dict | list) for each in value):
        return " ".join(str(format_value(each)) for each in value)
    if isinstance(value, list | tuple | dict):
        return hide_paths(json.dumps(value, ensure_ascii=False, default=str))
    return hide_paths(str(value))


def format_number(value: Any, form: str = ",") -> str:
    """A number in the given format; "-" for anything else."""
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else "-"


def format_interval(interval: Any, form: str = ".1%") -> str:
    low, high = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    return "-" if low is None or high is None else f"{format_number(low, form)} to {format_number(high, form)}"


def format_day(when: Any) -> str:
    """A time of run.json, which is UTC, to the minute."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*?([+-]\d\d:\d\d|Z)?$", r"\1 \2 UTC", str(when or "-"))


def as_word(value: Any) -> str:
    """A value as a word of a command; folders that are not in the repository have to be filled in."""
    return shlex.quote(hide_paths(str(value), fill_in=True))


def hide_paths(text: str, fill_in: bool = False) -> str:
    """`text` with paths relative to the repository; of a folder elsewhere only the last part. With `fill_in`, for a
    command, PATH/TO/ in front shows that it has to be filled in."""
    text = re.sub(rf"{re.escape(str(REPO))}(?![\w@+-])", ".", text.replace(f"{REPO}{os.sep}", ""))
    if Path(text).is_absolute() and "\n" not in text:
        return f"{'PATH/TO/' if fill_in else ''}{Path(text).name}" if Path(text).name else text
    start = "PATH/TO/" if fill_in else "…/"
    return re.sub(r"(?<![\w.:/])(?:/[\w.@+-]+){2,}", lambda path: f"{start}{Path(path[0]).name}", text)
