"""A report's sections on the training: what the run's own folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from helpers.curves import PANELS, Curves
from helpers.history import History, read_history, read_samples, series
from helpers.model_card import dataset_names
from helpers.report_parts import Part, beside, card, fold, heading, notes, number, picture, read_json, say, table, words
from helpers.report_results import Subject

COLUMNS = 6  # steps of samples side by side


def findings(subject: Subject) -> Iterator[Part]:
    if (subject.folder / "metrics.jsonl").is_file():
        found = [dataclasses.asdict(finding) for finding in Curves.read(subject.folder).findings]
    else:
        found = subject.record.get("findings") or []
    for each in found:
        facts = [("seen", each["seen"]), ("why it matters", each["why"]), ("to try", each["try_"])]
        yield card(each["name"], facts, "warn")
    if not found and (subject.folder / "metrics.jsonl").is_file():
        yield words("None: nothing is wrong with these curves.", "good")
    elif not found:
        yield words("None yet: nothing has been logged.", "quiet")


def curves(subject: Subject) -> Iterator[Part]:
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


def metrics(subject: Subject) -> Iterator[Part]:
    given = subject.record.get("metrics") or {}
    if not given:
        yield words("None yet: they are measured when the run ends.", "quiet")
        return
    held_out = {name.removeprefix("eval_"): value for name, value in given.items() if name.startswith("eval_")}
    others = {name: value for name, value in given.items() if not name.startswith("eval_")}
    titled = {"on held-out rows": held_out, "of the training": others}
    yield beside(*(table(title, [title, "value"], values.items()) for title, values in titled.items() if values))


def settings(subject: Subject) -> Iterator[Part]:
    values, sources = subject.record.get("settings") or {}, subject.record.get("sources") or {}
    kinds = {"parent": f"the base of {subject.record.get('parent')}"}  # what --sft_run led to
    rows = [(name, value, kinds.get(source := sources.get(name, "unknown"), source)) for name, value in values.items()]
    changed = [row for row in rows if not str(row[2]).startswith("default")]
    rest = [row for row in rows if str(row[2]).startswith("default")]
    head = ["setting", "value", "from"]
    yield table("settings that were changed", head, changed) if changed else words("All are the defaults.", "quiet")
    if rest:
        yield fold(f"{len(rest)} at their defaults", table("settings at their defaults", head, rest))


def data(subject: Subject) -> Iterator[Part]:
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
        yield notes((each["text"], bool(each.get("matters"))) for each in found)
    if (file := subject.folder / "data_report.png").is_file():
        said = [f"{name} median {number(n.get('median', n.get('half')), ',.0f')}, "  # half: of older runs
                f"longest {number(n.get('longest'), ',.0f')}"
                for name, n in (report.get("lengths") or {}).items()]  # fmt: skip
        share = " of ".join(number(account.get(name), ",") for name in ("kept", "read"))
        tokens = "; ".join(said) or "not known"
        yield picture(file.read_bytes(), f"Plots of the data. Tokens: {tokens}. Rows: {share} kept.")
    else:
        yield words("No plots: data_report.png is written when training starts.", "quiet")


def samples(subject: Subject) -> Iterator[Part]:
    rows = read_samples(subject.folder)
    if not rows:
        yield words("None: --sample_steps says when held-out prompts are answered.", "quiet")
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


def made_with(subject: Subject) -> Iterator[Part]:
    record = subject.record
    versions, plan = record.get("versions") or {}, record.get("plan") or {}
    tables = []
    if versions:
        tables.append(table("versions", ["package", "version"], [*versions.items(), ("commit", record.get("commit"))]))
    if plan:
        tables.append(table("machine", ["machine", ""], [*plan.items(), ("processes", record.get("processes"))]))
    yield beside(*tables) if tables else words("Versions were not kept.", "quiet")
