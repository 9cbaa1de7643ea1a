"""One HTML page a run: what was asked, what was seen, what came out, and what was made of it.

python -m helpers.report outputs/<run>
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers import report_results, report_training
from helpers.curves import Curves
from helpers.errors import SettingsError, UserError, answer_help, report_user_errors
from helpers.model_card import lineage
from helpers.paths import find_path, short_path
from helpers.processes import is_main_process
from helpers.report_parts import Part, day, say, tidy, words
from helpers.report_results import Subject
from helpers.runs import Run, read_run, write_whole

TEMPLATE = Path(__file__).with_name("report.html")
FILE = "report.html"
TRAINED = {"sft": "instruction tuning", "dpo": "alignment with DPO"}
SECTIONS: dict[str, tuple[str, Callable[[Subject], Iterator[Part]]]] = {
    "findings": ("Findings", report_training.findings),
    "curves": ("Curves", report_training.curves),
    "metrics": ("Metrics", report_training.metrics),
    "settings": ("Settings", report_training.settings),
    "data": ("Data", report_training.data),
    "samples": ("Samples while it trained", report_training.samples),
    "merge": ("Merge", report_results.merge),
    "verdicts": ("Side by side", report_results.verdicts),
    "lineage": ("Lineage", report_results.origin),
    "made-with": ("Made with", report_training.made_with),
    "next": ("Next", report_results.next_step),
}


def write_report(folder: Path) -> Path:
    """Write report.html of the run in `folder`, a run of 01 or 02 in any state; where it is.

    It is self-contained, asks nothing of any network, and shows every text as text. A section that cannot be made says
    why in its place. Raises UserError where the folder is of no such run.
    """
    from jinja2 import Environment, StrictUndefined

    record = read_run(folder)
    if record.get("step") not in TRAINED:
        raise UserError(f"{short_path(folder)} is not the folder of a run of 01_sft.py or 02_dpo.py: it has no report")
    subject = Subject(Run(folder, record))
    template = TEMPLATE.read_text(encoding="utf-8")
    page = (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            title=folder.resolve().name,
            policy=_policy(template),
            status=say(record.get("status", "unknown")),
            about=_about(record),
            error=tidy(str(record.get("error") or "")),
            sections=[
                {"id": name, "title": title, "parts": _parts(make, subject)} for name, (title, make) in SECTIONS.items()
            ],
        )
    )
    file = folder / FILE
    write_whole(file, page.encode("utf-8", errors="xmlcharrefreplace"))  # half a surrogate pair becomes U+FFFD there
    return file


def show_report(*folders: Path) -> None:
    """Write the report of each run that these folders belong to, a merge to the run that it is of, and print the last
    one's path. Says so where that cannot be done, and raises nothing: no run fails because of its report."""
    if not is_main_process():
        return
    try:
        trained = [Path(run["folder"]) for folder in folders for run in _trained(folder)]
        files = [write_report(folder) for folder in dict.fromkeys(trained)]
    except Exception as error:
        print(f"Report: none, for it cannot be written ({type(error).__name__}: {error})")
        return
    if files:
        print(f"Report: {short_path(files[-1])}")


def leave_report(folder: Path) -> None:
    """curves.png and report.html of a run that is ended early, where it has logged anything.

    What ended it is about to be raised, so nothing is here: not what goes wrong, nor a second Ctrl-C. SIGTERM, which a
    launcher sends to all processes as soon as one has failed, is ignored until `Run.training` gives it back.
    """
    if not is_main_process():
        return
    with contextlib.suppress(Exception, KeyboardInterrupt):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write_whole(folder / "curves.png", Curves.read(folder).as_png())
        print(f"Report: {short_path(write_report(folder))}", flush=True)


def _trained(folder: Path) -> list[dict[str, Any]]:
    """The newest run of 01 or 02 that led to `folder`, alone; [] where there is none."""
    return [run for run in lineage(folder) if run.get("step") in TRAINED][:1]


def _about(record: dict[str, Any]) -> list[str]:
    """What stands beside the status: which step, of what, when."""
    last = "finished" if record.get("finished") else "started"
    base = f"on {say(record['base_model'])}" if record.get("base_model") else ""
    start = f"of {say(record['parent'])}" if record.get("parent") else base
    return [text for text in (f"{TRAINED[record['step']]} {start}".strip(), f"{last} {day(record.get(last))}") if text]


def _parts(make: Callable[[Subject], Iterator[Part]], subject: Subject) -> list[Part]:
    """A section; where it cannot be made, what there is of it, and why there is not more."""
    parts: list[Part] = []
    try:
        parts.extend(make(subject))
    except Exception as error:  # of whatever older, broken or half-written files make of it
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        parts.append(words(f"This could not be shown in full ({tidy(why)}).", "warn"))
    return parts


def _policy(template: str) -> str:
    """Content-Security-Policy that allows the template's own style and the pictures in the page, and no request."""
    [style] = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


def main(argv: Sequence[str]) -> None:
    """Make the report of the run whose folder is named anew."""
    report_user_errors()
    answer_help(argv, __doc__)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SettingsError("usage: python -m helpers.report outputs/<run>")
    folder = find_path(argv[0])
    if folder is None or not read_run(folder):
        raise UserError(f"{argv[0]!r} is not the folder of a run: it has no run.json")
    trained = _trained(folder)
    print(f"Report: {short_path(write_report(Path(trained[0]['folder']) if trained else folder))}")


if __name__ == "__main__":
    main(sys.argv[1:])
