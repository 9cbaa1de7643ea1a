"""The account of every row of every set that is mixed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError
from helpers.data.loading import DatasetSpec, load_rows, subsample

if TYPE_CHECKING:
    from datasets import Dataset


EXAMPLES = 3
INTERNAL_COLUMNS = ("row", "fault", "change", "chosen_key", "rejected_key")


@dataclasses.dataclass
class RowReport:
    """What became of every row: `kept + sum(dropped) == read`, each reason with a count and up to three row numbers.

    Rows are counted from 0; with several sets, the number stands behind its set's name. A row that gives several pairs
    is kept while one of them is; the others are `lost_pairs`. `over_long` and `long_prompts` are the tokens of what was
    dropped for its length, or for its prompt's. Of several sets, `sets` has for each what was read, kept, changed and
    dropped, and "dropped: " with each reason.
    """

    read: int = 0
    kept: int = 0
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    noted: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[int | str]] = dataclasses.field(default_factory=dict)
    format: str = ""
    over_long: list[int] = dataclasses.field(default_factory=list)
    long_prompts: list[int] = dataclasses.field(default_factory=list)
    changed_rows: int = 0
    lost_pairs: Counter[str] = dataclasses.field(default_factory=Counter)
    sets: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def count(self, what: Counter[str], reason: str, row: int | str) -> None:
        """One more of `what` (changed, dropped, lost_pairs or noted) for this reason, with the row's number."""
        what[reason] += 1
        if len(numbers := self.examples.setdefault(reason, [])) < EXAMPLES:
            numbers.append(row)

    def check(self, strict: bool) -> None:
        """Raise SettingsError where nothing is left, or where `strict` and a row was dropped."""
        if self.kept and not (strict and (self.dropped or self.lost_pairs)):
            return
        reasons = "; ".join(
            f"{reason}: {n} (row {self.examples[reason][0]})" for reason, n in (self.dropped + self.lost_pairs).items()
        )
        lost = self.dropped.total()
        who = f"{lost} of {self.read} rows cannot" if self.kept else f"no row of {self.read} can"
        raise SettingsError(f"{who} be used. {reasons}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "read": self.read,
            "kept": self.kept,
            "changed": self.changed_rows,
            "dropped": sum(self.dropped.values()),
            "reasons": dict(self.changed + self.dropped + self.lost_pairs + self.noted),
            "by": {label: dict(reasons) for label, reasons in self._by_what_became().items()},
            "sets": self.sets,
            "examples": self.examples,
        }

    def _by_what_became(self) -> dict[str, Counter[str]]:
        return {"changed": self.changed, "dropped": self.dropped, "lost": self.lost_pairs, "noted": self.noted}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("rows", "count", "example rows", box=None, pad_edge=False)
        table.add_row(f"read ({self.format})", f"{self.read:,}", "")
        for label, reasons in self._by_what_became().items():
            for reason, count in reasons.most_common():
                table.add_row(f"  {label}: {reason}", f"{count:,}", ", ".join(map(str, self.examples[reason])))
        table.add_row("kept", f"{self.kept:,}", "", style="bold")
        return table


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """Prepared rows of one split of one set: a dataset with BOOKKEEPING and prompt_key, whose `row` is an index into
    `numbers`, the numbers of the rows that were read."""

    made: Dataset
    numbers: list[int]
    label: str = ""
    held_out: bool = False

    def number(self, row: int) -> int | str:
        return f"{self.label}{self.numbers[row]}" if self.label else self.numbers[row]


Prepare = Callable[["Dataset", str], tuple["Dataset", str]]


def load_and_split(
    sources: list[DatasetSpec], prepare: Prepare, split: Split, strict: bool
) -> tuple[Dataset, Dataset, RowReport]:
    """Train and evaluation rows of all sources, no prompt in both, and the account of every row that was read.

    `prepare` takes rows and the name of their format, and gives prepared rows (see Part) and the format they had.
    Raises UserError where a set cannot be read, where nothing is left, or where `strict` and a row was dropped.
    """
    parts, formats = [], []
    several = len(sources) > 1 or any(source.eval_split for source in sources)
    names = [source.name for source in sources]
    for source in sources:
        shown = source.name if names.count(source.name) == 1 else source.id
        for name in filter(None, (source.eval_split, source.split)):
            held_out = name == source.eval_split
            rows, numbers = subsample(load_rows(source, name), 1 if held_out else source.fraction, split.seed)
            made, found = prepare(rows, source.format)
            parts.append(PreparedSplit(made, numbers, f"{shown} {name} " if several else "", held_out))
            formats.append(found)
    account, train, held_out_rows = deduplicate(parts)
    account.format = ", ".join(dict.fromkeys(formats))
    account.check(strict)
    if held_out_rows is None:
        train, held_out_rows = split_by_prompt(train, split)
    else:
        if not len(train) or not len(held_out_rows):
            raise UserError(f"no row of {'--dataset_split' if len(held_out_rows) else '--eval_split'} can be used")
        held_out_rows = first_rows(held_out_rows, split.eval_rows, split.seed)
        train = first_rows(train, split.train_rows, split.seed)
    return train, held_out_rows, account


def deduplicate(parts: list[PreparedSplit]) -> tuple[RowReport, Dataset, Dataset | None]:
    """The account, with what only shows between rows; the rows that are kept; and those held out, if a part is.

    A pair is kept once. One that stands there with both labels is dropped both times, and a prompt that is evaluated
    on is not trained on. A row that gave several pairs is kept while one of them is.
    """
    from datasets import concatenate_datasets

    parts = sorted(parts, key=lambda part: not part.held_out)
    account = RowReport(read=sum(len(part.numbers) for part in parts))
    labels = {
        key for part in parts for fault, key in zip(part.made["fault"], _keys(part.made), strict=True) if not fault
    }
    seen: set[tuple[str, str, str]] = set()
    first: dict[str, int | str] = {}  # row of each prompt
    sets = []
    for part in parts:
        evaluated = set(first) if not part.held_out and any(p.held_out for p in parts) else set()
        good: list[int] = []
        kept: dict[int, str] = {}
        dropped: dict[int, list[str]] = {}
        columns = [part.made[name][:] for name in ("row", "fault", "change")]
        for i, (row, fault, change, key) in enumerate(zip(*columns, _keys(part.made), strict=True)):
            if fault := fault or _fault_between(key, labels, seen, evaluated):
                dropped.setdefault(row, []).append(fault)
                continue
            seen.add(key)
            number = part.number(row)
            if first.setdefault(key[0], number) != number:
                account.count(account.noted, "duplicate prompt", number)
            kept[row] = kept.get(row) or change
            good.append(i)
        for row, row_faults in dropped.items():
            if row not in kept:
                account.count(account.dropped, row_faults[0], part.number(row))
            for fault in row_faults if row in kept else ():
                account.count(account.lost_pairs, f"a pair of a kept row: {fault}", part.number(row))
        for row, change in kept.items():
            account.changed_rows += bool(change)
            for reason in change.split("; ") if change else ():
                account.count(account.changed, reason, part.number(row))
        account.kept += len(kept)
        if part.label:
            gone = Counter(f"dropped: {row_faults[0]}" for row, row_faults in dropped.items() if row not in kept)
            own = account.sets.setdefault(part.label.strip(), Counter())
            own.update(read=len(part.numbers), kept=len(kept), changed=sum(map(bool, kept.values())))
            own.update(gone, dropped=gone.total())
        account.over_long += _where(part.made, columns[1], "over-long")["tokens"][:]
        if "prompt_ids" in part.made.column_names:
            long = _where(part.made, columns[1], "prompt over-long")
            account.long_prompts += map(len, long["prompt_ids"][:])
        sets.append(part.made.select(good).remove_columns(list(INTERNAL_COLUMNS)))
    count = sum(part.held_out for part in parts)
    held_out = concatenate_datasets(sets[:count]) if count else None
    return account, concatenate_datasets(sets[count:]), held_out


def _where(made: Dataset, faults: list[str], fault: str) -> Dataset:
    return made.select([i for i, found in enumerate(faults) if found == fault])


def _keys(made: Dataset) -> list[tuple[str, str, str]]:
    return list(zip(made["prompt_key"][:], made["chosen_key"][:], made["rejected_key"][:], strict=True))


def _fault_between(
    key: tuple[str, str, str], labels: set[tuple[str, str, str]], seen: set[tuple[str, str, str]], evaluated: set[str]
) -> str:
    """What is wrong with a pair beside others, or ""; a conversation has no rejected side, and its key is ""."""
    prompt, chosen, rejected = key
    if (prompt, rejected, chosen) in labels:
        return "the same pair with both labels"
    if prompt in evaluated:
        return "its prompt is evaluated on"
    if key in seen:
        return "duplicate pair" if rejected else "duplicate conversation"
    return ""


@dataclasses.dataclass(frozen=True)
class Split:
    """How many rows are trained on (0: all) and held out (0: `eval_fraction` of them), in the order of `seed`."""

    train_rows: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.1
    seed: int = 0


def split_by_prompt(rows: Dataset, split: Split) -> tuple[Dataset, Dataset]:
    """Train and evaluation rows with no prompt in both; the order is the seed's, not the file's."""
    order, prompts = _order(rows, split.seed)
    if not (split.eval_rows or split.eval_fraction):
        raise UserError("--eval_rows 0 and --eval_fraction 0: something has to be held out, to see what is learned")
    share = max(1, round(split.eval_fraction * len(order)))
    wanted = min(split.eval_rows or share, max(share, len(order) // 4), len(order) - 1)
    if wanted < split.eval_rows:
        print(f"Held out: {wanted:,} rather than --eval_rows {split.eval_rows:,}, of {len(order):,} that there are.")
    while 0 < wanted < len(order) and prompts[order[wanted]] == prompts[order[wanted - 1]]:
        wanted += 1  # the prompt at the border goes to the evaluation rows as a whole
    chosen = order[wanted : wanted + split.train_rows] if split.train_rows else order[wanted:]
    if not chosen:
        raise UserError(f"{len(prompts)} rows are too few for --eval_rows {wanted}: nothing is left to train on")
    return rows.select(chosen), rows.select(order[:wanted])


def first_rows(rows: Dataset, count: int, seed: int) -> Dataset:
    """The first `count` rows in the seed's order; 0 takes all."""
    order, _ = _order(rows, seed)
    return rows.select(order[:count] if count else order)


def _order(rows: Dataset, seed: int) -> tuple[list[int], list[str]]:
    """Row numbers with rows of one prompt together, in an order that the seed and the prompts decide."""
    prompts = rows["prompt_key"][:]
    rank = {p: hashlib.sha256(f"{seed} {p}".encode()).digest() for p in set(prompts)}
    return sorted(range(len(prompts)), key=lambda i: (rank[prompts[i]], i)), prompts
