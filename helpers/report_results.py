"""A report's sections on what became of a run: its merges, the comparisons that it is in, where it comes from."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.model_card import STEPS, dataset_names, lineage, parent_of
from helpers.report_parts import (
    Cell,
    Part,
    beside,
    command,
    day,
    fold,
    heading,
    link,
    links,
    notes,
    number,
    picture,
    say,
    span,
    table,
    typed,
    words,
)
from helpers.runs import Run, read_run

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
        names = {self.folder.resolve().name, *(merge.name for merge in self.merges())}
        return [run for run in self.beside("judge") if names & _models(run.record.get("metrics") or {}).keys()]

    def is_older(self, other: Run) -> bool:
        """Whether `other` was made of this run as it was before it was trained anew. A merge says of which weights."""
        made_of = other.record.get("origin") if other.record.get("step") == "merge" else ""
        if made_of and self.record.get("fingerprint"):
            return bool(made_of != self.record["fingerprint"])
        return str(other.record.get("finished") or "~") < str(self.record.get("finished") or "")


def merge(subject: Subject) -> Iterator[Part]:
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


def verdicts(subject: Subject) -> Iterator[Part]:
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
    for pair in found.get("pairs") or ([found] if "after" in found else []):
        yield from _pair(pair)
    if scores := found.get("scores"):
        names = list(next(iter(scores.values())))
        shares = [(model, *(number(own.get(name), ".1%") for name in names)) for model, own in scores.items()]
        yield table("scores", ["answers that are", *names], shares)
    if found.get("notes"):
        yield notes((note, False) for note in found["notes"])
    if (file := run.folder / "verdicts.png").is_file():
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
    after, before = say(pair.get("after")), say(pair.get("before"))
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
    tables = [table("a pair of models", [f"{after} against {before}", "", "95% interval"], rows)]
    if len(kinds := pair.get("categories") or {}) > 1:
        tables.append(table("by category", ["category", "win", "loss", "tie", "a tie being half a win"],
                    [(name, c.get("win"), c.get("loss"), c.get("tie"), number(c.get("win_rate_adjusted"), ".1%"))
                     for name, c in kinds.items()]))  # fmt: skip
    yield beside(*tables)


def _models(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Counts (or ratings) by model."""
    models = found.get("models")
    return models if isinstance(models, dict) else {n: {} for n in (found.get("after"), found.get("before")) if n}


def origin(subject: Subject) -> Iterator[Part]:
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


def next_step(subject: Subject) -> Iterator[Part]:
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
        if set(given.get("stop_on") or ()) & {each["name"] for each in record.get("findings") or ()}:
            without = " without --stop_on, which would end it again at once,"
            kept.pop("stop_on", None)
            if sources.get("stop_on") not in ("flag", "notebook"):
                kept["stop_on"] = []  # none, instead of a recipe's or the environment's
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
