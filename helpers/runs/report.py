"""One HTML page a run: what was asked, what was seen, what came out, and what was made of it.

python -m helpers report outputs/<run>
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from helpers.core import (
    REPO,
    SettingsError,
    UserError,
    atomic_write,
    find_path,
    install_error_hook,
    is_main_process,
    print_help_if_asked,
    short_path,
)
from helpers.runs.curves import PANELS, Curves, History, read_history, read_samples, series
from helpers.runs.run import STEPS, Run, dataset_names, lineage, parent_of, read_run

TEMPLATE = Path(__file__).with_name("report.html")
FILE = "report.html"
TRAINED = {"sft": "instruction tuning", "dpo": "alignment with DPO"}


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
    atomic_write(file, page.encode("utf-8", errors="xmlcharrefreplace"))  # half a surrogate pair becomes U+FFFD there
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


def save_partial_report(folder: Path) -> None:
    """curves.png and report.html of a run that is ended early, where it has logged anything.

    What ended it is about to be raised, so nothing is here: not what goes wrong, nor a second Ctrl-C. SIGTERM, which a
    launcher sends to all processes as soon as one has failed, is ignored until `Run.training` gives it back.
    """
    if not is_main_process():
        return
    with contextlib.suppress(Exception, KeyboardInterrupt):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        atomic_write(folder / "curves.png", Curves.read(folder).as_png())
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
    install_error_hook()
    print_help_if_asked(argv, __doc__)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SettingsError("usage: python -m helpers report outputs/<run>")
    folder = find_path(argv[0])
    if folder is None or not read_run(folder):
        raise UserError(f"{argv[0]!r} is not the folder of a run: it has no run.json")
    trained = _trained(folder)
    print(f"Report: {short_path(write_report(Path(trained[0]['folder']) if trained else folder))}")


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


MERGE = "python notebooks/03_merge_push.py --run"
OLDER = "It is older than this run, which has been trained anew since: the weights may have been others."


@dataclasses.dataclass
class Subject:
    """A run, and what was made from it, as it stands in the run's folder and beside it."""

    run: Run

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def record(self) -> dict[str, Any]:
        return self.run.record

    @property
    def place(self) -> str:
        """The run's folder, in a command."""
        return shlex.quote(typed(str(self.folder.resolve())))

    def beside(self, step: str) -> list[Run]:
        """Runs of `step` in the same place, the newest first."""
        runs = [Run(file.parent, read_run(file.parent)) for file in self.folder.resolve().parent.glob("[!.]*/run.json")]
        found = [run for run in runs if run.record.get("step") == step]
        return sorted(found, key=lambda run: str(run.record.get("finished") or ""), reverse=True)

    def merges(self) -> list[Run]:
        here = self.folder.resolve()
        parents = [(run, parent_of(run.folder, run.record)) for run in self.beside("merge")]
        return [run for run, parent in parents if parent and parent.resolve() == here]

    def comparisons(self) -> list[Run]:
        """Runs of 05_judge.py in which this run, or a merge of it, is one of the models."""
        names = {self.folder.resolve().name, *(merge_section.name for merge_section in self.merges())}
        return [run for run in self.beside("judge") if names & _models(run.record.get("metrics") or {}).keys()]

    def is_older(self, other: Run) -> bool:
        """Whether `other` was made of this run as it was before it was trained anew. A merge says of which weights."""
        made_of = other.record.get("origin") if other.record.get("step") == "merge" else ""
        if made_of and self.record.get("fingerprint"):
            return bool(made_of != self.record["fingerprint"])
        return str(other.record.get("finished") or "~") < str(self.record.get("finished") or "")


def merge_section(subject: Subject) -> Iterator[Part]:
    merges = subject.merges()
    if not merges and subject.record.get("step") == "sft":
        yield words("Not merged: 03_merge_push.py merges what 02_dpo.py makes of it.", "quiet")
    elif not merges and not subject.run.is_adapter and subject.run.finished:
        yield words("Nothing to merge: all weights were trained, and the folder holds the whole model.", "quiet")
    elif not merges:
        yield words(f"Not merged yet: {MERGE} {subject.place}", "quiet")
    for run in merges:
        proof = run.record.get("metrics") or {}
        yield heading(run.name)
        into = say(run.record.get("merge_base", "original"))
        if "kl" in proof:
            yield words(f"Merged into the {into} weights. On held-out prompts, beside the policy as it was trained:")
            row = [number(proof.get("kl"), ".2e"), number(proof.get("top1"), ".2%"),
                   number(proof.get("max_abs"), ".2e"), number(proof.get("mean_abs"), ".2e")]  # fmt: skip
            head = ["KL, nats", "same top token", "largest difference of logits", "mean difference"]
            yield table("proof of the merge", head, [row])
        elif "relative" in proof:
            yield words(f"Merged into the {into} weights, and compared layer by layer: {say(proof.get('layers'))} "
                        f"layers differ by {number(proof['relative'], '.1e')} at most.")  # fmt: skip
        else:
            yield words(f"This merge is {say(run.record.get('status'))}, and has no proof.", "warn")
        if subject.is_older(run):
            yield words(OLDER, "warn")


def verdicts_section(subject: Subject) -> Iterator[Part]:
    judged = subject.comparisons()
    if not judged:
        yield words("Not compared yet: python notebooks/04_vibes.py --models "
                    f"{subject.place}, then 05_judge.py.", "quiet")  # fmt: skip
    for i, run in enumerate(judged):
        parts = list(comparison(run, subject.folder))
        if subject.is_older(run):
            parts.append(words(OLDER, "warn"))
        yield from parts if i == 0 else [fold(f"and {run.name}", *parts)]


def comparison(run: Run, start: Path) -> Iterator[Part]:
    """The verdicts of a run of 05_judge.py, with links from `start`."""
    found = run.record.get("metrics") or {}
    models = _models(found)
    yield heading(f"{' and '.join(models)}, judged by {say(found.get('judge'))}")
    if run.record.get("status") != "finished":
        yield words(f"This comparison is {say(run.record.get('status'))}: the numbers are of what was judged.", "warn")
    if any("average" in counts for counts in models.values()):
        yield table("ratings", ["model", "rating, 1 to 10", "95% interval", "no rating"],
                    [(name, number(m.get("average"), ".2f"), span(m.get("interval"), ".2f"), m.get("errors"))
                     for name, m in models.items()])  # fmt: skip
    else:
        rates = ("win_rate", "loss_rate", "win_rate_adjusted")
        yield table("wins, losses and ties", ["model", "win", "loss", "tie", *rates],
                    [(name, m.get("win"), m.get("loss"), m.get("tie"), *(number(m.get(rate), ".1%") for rate in rates))
                     for name, m in models.items()])  # fmt: skip
    for pair in found.get("pairs") or ([found] if "candidate" in found else []):
        yield from _pair(pair)
    if scores := found.get("scores"):
        names = list(next(iter(scores.values())))
        shares = [(model, *(number(own.get(name), ".1%") for name in names)) for model, own in scores.items()]
        yield table("scores", ["answers that are", *names], shares)
    if found.get("notes"):
        yield notes((note, False) for note in found["notes"])
    if (file := run.folder / "results.png").is_file():
        alt = "; ".join(f"{name} wins {say(m.get('win'))}, loses {say(m.get('loss'))}, ties {say(m.get('tie'))}"
                        if "win" in m else f"{name} is rated {number(m.get('average'), '.2f')}"
                        for name, m in models.items())  # fmt: skip
        yield picture(file.read_bytes(), f"Bars of the verdicts: {alt}.")
    answers = run.folder.parent / Path(str(run.record.get("answers_dir") or "-")).name / "answers.html"
    if isinstance(to := link("All the answers, side by side", answers, start), dict):
        yield links([to])
    if found.get("method"):
        yield fold("How this was counted", words(found["method"], "quiet"))


def _pair(pair: dict[str, Any]) -> Iterator[Part]:
    candidate, baseline = say(pair.get("candidate")), say(pair.get("baseline"))
    rows = [
        ("win rate, a tie being half a win", number(pair.get("win_rate_adjusted"), ".1%"), span(pair.get("interval"))),
        ("the same at equal lengths", number(pair.get("length_controlled"), ".1%"),
         span(pair.get("length_controlled_interval"))),
        ("sign test", f"p = {number(pair.get('sign_p'), '.2g')}", "-"),
        ("same verdict in both orders", number(pair.get("consistency"), ".1%"), "-"),
        (f"of {say(pair.get('decided_unequal'))} decided, went to the longer answer",
         number(pair.get("longer_won"), ".1%"), "-"),
        ("no verdict that could be read", number(pair.get("errors"), ","), "-"),
    ]  # fmt: skip
    tables = [table("a pair of models", [f"{candidate} against {baseline}", "", "95% interval"], rows)]
    if len(kinds := pair.get("categories") or {}) > 1:
        tables.append(table("by category", ["category", "win", "loss", "tie", "a tie being half a win"],
                    [(name, c.get("win"), c.get("loss"), c.get("tie"), number(c.get("win_rate_adjusted"), ".1%"))
                     for name, c in kinds.items()]))  # fmt: skip
    yield beside(*tables)


def _models(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Counts (or ratings) by model."""
    models = found.get("models")
    return models if isinstance(models, dict) else {n: {} for n in (found.get("candidate"), found.get("baseline")) if n}


def lineage_section(subject: Subject) -> Iterator[Part]:
    here = subject.folder.resolve()
    runs = lineage(here)
    rows: list[tuple[Cell, ...]] = []
    for record in runs:
        folder, revision = Path(record["folder"]), (record.get("settings") or {}).get("dataset_revision")
        data = ", ".join(dataset_names(record)) + (f" at revision {revision}" if revision else "")
        name: Cell = folder.name if folder == here else link(folder.name, folder / "report.html", here)
        step = STEPS.get(str(record.get("step")), say(record.get("step")))
        rows.append((name, step, data or "-", day(record.get("finished"))))
    revision = (runs[-1].get("settings") or {}).get("revision")
    base = say(runs[-1].get("base_model")) + (f" at revision {revision}" if revision else "")
    yield table("runs, the newest first", ["run", "what", "data", "finished"], [*rows, (base, "base model", "-", "-")])
    made = [*subject.merges(), *subject.comparisons()]
    if made:
        yield words(f"Made from it: {', '.join(run.name for run in made)}.")


def next_section(subject: Subject) -> Iterator[Part]:
    record, given = subject.record, subject.record.get("settings") or {}
    step, sources = record.get("step"), record.get("sources") or {}
    script = {"sft": "01_sft.py", "dpo": "02_dpo.py"}.get(str(step), "02_dpo.py")
    recipe = f" --recipe {shlex.quote(typed(str(given['recipe'])))}" if given.get("recipe") else ""
    merges, judged = ([run for run in runs if run.finished and not subject.is_older(run)]
                      for runs in (subject.merges(), subject.comparisons()))  # fmt: skip
    if not subject.run.finished:
        kept = {n: v for n, v in given.items() if n not in ("resume", "dry_run")
                and not str(sources.get(n, "default")).startswith(("default", "recipe", "parent"))}  # fmt: skip
        without = ""
        if set(given.get("stop_on_diagnostic") or ()) & {each["name"] for each in record.get("diagnostics") or ()}:
            without = " without --stop_on_diagnostic, which would end it again at once,"
            kept.pop("stop_on_diagnostic", None)
            if sources.get("stop_on_diagnostic") not in ("flag", "notebook"):
                kept["stop_on_diagnostic"] = []  # none, instead of a recipe's or the environment's
        values = {n: v if isinstance(v, list) else [v] for n, v in kept.items()}
        flags = [word for n, given_here in values.items() for word in (f"--{n}", *(typed(str(v)) for v in given_here))]
        yield words(f"It is not finished. The same command{without} goes on from its newest checkpoint:")
        yield command(shlex.join(["python", f"notebooks/{script}", *flags]))
    elif step == "dpo" and merges and judged:
        yield words("Merged and compared. What is left is to publish it, privately:")
        yield command(f"{MERGE} {subject.place} --push_to_hub --hub_repo_id NAME/MODEL{recipe}")
    elif step == "dpo" and merges:
        yield words("Merged. What changed shows beside the model it started from:")
        yield command(f"python notebooks/04_vibes.py --models {subject.place}{recipe}")
    else:
        yield command(f"{subject.run.next_command(place=subject.place)}{recipe}")


COLUMNS = 6  # steps of samples side by side


def findings_section(subject: Subject) -> Iterator[Part]:
    if (subject.folder / "metrics.jsonl").is_file():
        found = [dataclasses.asdict(each) for each in Curves.read(subject.folder).diagnostics]
    else:
        found = subject.record.get("diagnostics") or []
    for each in found:
        facts = [("observed", each["observation"]), ("why it matters", each["reason"]), ("to try", each["suggestion"])]
        yield card(each["name"], facts, "warn")
    if not found and (subject.folder / "metrics.jsonl").is_file():
        yield words("None: nothing is wrong with these curves.", "good")
    elif not found:
        yield words("None yet: nothing has been logged.", "quiet")


def curves_section(subject: Subject) -> Iterator[Part]:
    logs, drawn = subject.folder / "metrics.jsonl", subject.folder / "curves.png"
    if not logs.is_file() and not drawn.is_file():
        yield words("None yet: nothing has been logged.", "quiet")
        return
    history = read_history(logs)
    if drawn.is_file() and (not history or drawn.stat().st_mtime >= logs.stat().st_mtime):
        png = drawn.read_bytes()
    else:
        png = Curves.read(subject.folder).as_png()
    yield picture(png, in_words(history), "Lines are training, dots the held-out rows.")


def in_words(history: History) -> str:
    """What curves of this history show, for whoever does not see them."""
    said = []
    for panel, names in PANELS.items():
        for name in names:
            (_, training), (_, held_out) = series(history, name), series(history, f"eval_{name}")
            what = panel if len(names) == 1 else f"{panel}, {name.rpartition('/')[2]},"
            ends = [f"from {v[0]:.3g} to {v[-1]:.3g}{where}"
                    for v, where in ((training, ""), (held_out, " on held-out rows")) if v]  # fmt: skip
            said += [f"{what} {' and '.join(ends)}"] if ends else []
    last = max((log.get("step", 0) for log in history), default=0)
    return f"Training curves over {last:,} steps: {'; '.join(said) or 'nothing was logged'}."


def metrics_section(subject: Subject) -> Iterator[Part]:
    given = subject.record.get("metrics") or {}
    if not given:
        yield words("None yet: they are measured when the run ends.", "quiet")
        return
    held_out = {name.removeprefix("eval_"): value for name, value in given.items() if name.startswith("eval_")}
    others = {name: value for name, value in given.items() if not name.startswith("eval_")}
    titled = {"on held-out rows": held_out, "of the training": others}
    yield beside(*(table(title, [title, "value"], values.items()) for title, values in titled.items() if values))


def settings_section(subject: Subject) -> Iterator[Part]:
    values, sources = subject.record.get("settings") or {}, subject.record.get("sources") or {}
    kinds = {"parent": f"the base of {subject.record.get('parent')}"}  # what --sft_run led to
    rows = [(name, value, kinds.get(source := sources.get(name, "unknown"), source)) for name, value in values.items()]
    changed = [row for row in rows if not str(row[2]).startswith("default")]
    rest = [row for row in rows if str(row[2]).startswith("default")]
    head = ["setting", "value", "from"]
    yield table("settings that were changed", head, changed) if changed else words("All are the defaults.", "quiet")
    if rest:
        yield fold(f"{len(rest)} at their defaults", table("settings at their defaults", head, rest))


def data_section(subject: Subject) -> Iterator[Part]:
    account, report = subject.record.get("data") or {}, read_json(subject.folder / "data_report.json")
    if not account:
        yield words("No account: no data had been read.", "quiet")
    else:
        counts = ["read", "kept", "changed", "dropped"]
        sets = account.get("sets") or {}
        whole = "all" if sets else ", ".join(dataset_names(subject.record))
        rows = [(name, each) for name, each in [*sets.items(), (whole, account)]]
        head = [*counts, "train", "eval"]
        yield table("rows by set", ["rows of", *counts, "trained on", "held out"],
                    [(name, *(number(each.get(n), ",") for n in head)) for name, each in rows])  # fmt: skip
        examples, by = account.get("examples") or {}, account.get("by") or {"-": account.get("reasons") or {}}
        reasons = [(label, reason, number(count, ","), ", ".join(map(str, examples.get(reason, ()))))
                   for label, found in by.items() for reason, count in found.items()]  # fmt: skip
        reasons += [(f"dropped of {name}", what.removeprefix("dropped: "), number(count, ","), "")
                    for name, each in sets.items() for what, count in each.items()
                    if what.startswith("dropped: ")]  # fmt: skip
        if reasons:
            yield table("what became of rows", ["what", "because of", "rows", "as rows"], reasons)
    if found := report.get("findings"):
        yield heading("What the data will teach")
        yield notes((each["text"], bool(each.get("is_warning"))) for each in found)
    if (file := subject.folder / "data_report.png").is_file():
        said = [f"{name} median {number(n.get('median', n.get('half')), ',.0f')}, "  # half: of older runs
                f"longest {number(n.get('longest'), ',.0f')}"
                for name, n in (report.get("lengths") or {}).items()]  # fmt: skip
        share = " of ".join(number(account.get(name), ",") for name in ("kept", "read"))
        tokens = "; ".join(said) or "not known"
        yield picture(file.read_bytes(), f"Plots of the data. Tokens: {tokens}. Rows: {share} kept.")
    else:
        yield words("No plots: data_report.png is written when training starts.", "quiet")


def samples_section(subject: Subject) -> Iterator[Part]:
    rows = read_samples(subject.folder)
    if not rows:
        yield words("None: --completion_steps says when held-out prompts are answered.", "quiet")
        return
    steps = list(dict.fromkeys(row["step"] for row in rows))
    every = (len(steps) - 1) / (COLUMNS - 1)
    shown = steps if len(steps) <= COLUMNS else [steps[round(i * every)] for i in range(COLUMNS)]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        said = {row["step"]: row for row in rows if row["prompt"] == prompt}
        facts = [(f"step {step}, {say(said[step].get('tokens'))} tokens", said[step]["answer"] or "(empty)")
                 for step in shown if step in said]  # fmt: skip
        yield card(prompt or "(empty prompt)", facts, "steps")
    if len(shown) < len(steps):
        yield words(f"{len(steps) - len(shown)} more steps are in samples.jsonl.", "quiet")


def versions_section(subject: Subject) -> Iterator[Part]:
    record = subject.record
    versions, plan = record.get("versions") or {}, record.get("plan") or {}
    tables = []
    if versions:
        tables.append(table("versions", ["package", "version"], [*versions.items(), ("commit", record.get("commit"))]))
    if plan:
        tables.append(table("machine", ["machine", ""], [*plan.items(), ("processes", record.get("processes"))]))
    yield beside(*tables) if tables else words("Versions were not kept.", "quiet")


SECTIONS: dict[str, tuple[str, Callable[[Subject], Iterator[Part]]]] = {
    "findings": ("Findings", findings_section),
    "curves": ("Curves", curves_section),
    "metrics": ("Metrics", metrics_section),
    "settings": ("Settings", settings_section),
    "data": ("Data", data_section),
    "samples": ("Samples while it trained", samples_section),
    "merge": ("Merge", merge_section),
    "verdicts": ("Side by side", verdicts_section),
    "lineage": ("Lineage", lineage_section),
    "made-with": ("Made with", versions_section),
    "next": ("Next", next_section),
}
