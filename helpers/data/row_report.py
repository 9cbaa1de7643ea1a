"""Load datasets for training: mix, deduplicate and split them, and report what happened to every row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from helpers.core import SettingsError, UserError
from helpers.data.encode import NOT_RENDERED
from helpers.data.formats import PairingConfig
from helpers.data.loading import load_rows, parse_dataset_specs, subsample
from helpers.data.prepare import PROMPT_TOO_LONG, SIDES, TOO_LONG, LengthLimits, tokenize_dataset
from helpers.models.chat import suggest_template
from helpers.settings.fields import template_variables

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame, Series
    from transformers import PreTrainedTokenizerBase as Tokenizer


EXAMPLES = 3  # row numbers that are shown for a reason
INTERNAL_COLUMNS = ["source_index", "drop_reason", "modification", "rendered_with", "chosen_hash", "rejected_hash"]
OTHERS_KEPT = "(other pairs of the row are kept)"
Config = TypeVar("Config")


@dataclasses.dataclass
class RowReport:
    """What happened to every row: `kept + sum(dropped) == read`.

    `examples` has up to three row numbers for each reason, counted from 1 and behind the dataset's name if there are
    several. A row that gives several pairs is kept if one of them is; the others are in `dropped_pairs`. `lengths` has
    the tokens of what was dropped as TOO_LONG or PROMPT_TOO_LONG, `sets` the counts of each dataset. `unused` are the
    columns, and keys of messages, that are not read; `hash` is one over the tokens of the rows. `rendered_with` counts
    kept pairs and conversations with tools and thoughts, and by the variables of the chat template, as JSON.
    """

    read: int = 0
    kept: int = 0
    train: int = 0
    eval: int = 0
    format: str = ""
    hash: str = ""
    unused: list[str] = dataclasses.field(default_factory=list)
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    flagged: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped_pairs: Counter[str] = dataclasses.field(default_factory=Counter)
    rendered_with: Counter[str] = dataclasses.field(default_factory=Counter)
    changed_rows: int = 0
    examples: dict[str, list[int | str]] = dataclasses.field(default_factory=dict)
    lengths: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    sets: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def count(self, counter: Counter[str], reasons: Iterable[str], rows: Iterable[int | str]) -> None:
        """Count the reason of each row."""
        for reason, row in zip(reasons, rows, strict=True):
            counter[reason] += 1
            if len(examples := self.examples.setdefault(reason, [])) < EXAMPLES:
                examples.append(row)

    def check(self, strict: bool, tokenizer: Tokenizer | None = None) -> None:
        """Raise SettingsError if no row is left, or if `strict` and a row or pair was dropped. It names a template that
        is safe with `tokenizer` if the row's is at fault."""
        dropped = self.dropped + self.dropped_pairs
        if not self.kept or (strict and dropped):
            reasons = "; ".join(f"{reason}: {n} (row {self.examples[reason][0]})" for reason, n in dropped.items())
            rows = f"{self.dropped.total()} of {self.read} rows cannot" if self.kept else f"no row of {self.read} can"
            by_template = [reason for reason in dropped if "chat template" in reason]
            if by_template and all(reason.endswith(NOT_RENDERED.format("")) for reason in by_template):
                reasons += ". Use a Jinja file that renders it as `--chat_template FILE`, or remove it from the rows."
            elif by_template and tokenizer:
                reasons += f". {suggest_template(tokenizer)}"
            raise SettingsError(f"{rows} be used. {reasons}")

    @property
    def by_kind(self) -> dict[str, Counter[str]]:
        """Counts by reason of what was changed, dropped or flagged, and of dropped pairs of kept rows."""
        names = {"changed": "changed", "dropped": "dropped", "dropped pairs": "dropped_pairs", "flagged": "flagged"}
        return {kind: getattr(self, name) for kind, name in names.items()}

    def as_dict(self) -> dict[str, Any]:
        """All counts, ready for JSON."""
        counts = {
            name: getattr(self, name)
            for name in ("format", "hash", "unused", "read", "kept", "train", "eval", "sets", "rendered_with")
        }
        counts["examples"] = self.examples
        return counts | {
            "changed": self.changed_rows,
            "dropped": self.dropped.total(),
            "reasons": {reason: n for reasons in self.by_kind.values() for reason, n in reasons.items()},
            "by": {kind: dict(reasons) for kind, reasons in self.by_kind.items()},
        }

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("rows", "count", "example rows", box=None, pad_edge=False)
        table.add_row(f"read ({self.format})", f"{self.read:,}", "")
        for kind, reasons in self.by_kind.items():
            for reason, count in reasons.most_common():
                table.add_row(f"  {kind}: {reason}", f"{count:,}", ", ".join(map(str, self.examples[reason])))
        if self.unused:
            table.add_row("  not used", str(len(self.unused)), ", ".join(self.unused))
        table.add_row("kept", f"{self.kept:,}", "", style="bold")
        table.add_row("  train", f"{self.train:,}", "")
        table.add_row("  eval", f"{self.eval:,}", "")
        for what, count in self.rendered_with.items():
            if what != "{}":
                table.add_row("  with " + what.strip("{}").replace('"', ""), f"{count:,}", "")
        return table


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows to train on (0: all) and to hold out (0: `eval_fraction` of them), in the order of `seed`."""

    train_rows: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """Prepared rows of one split of a dataset. `numbers` are those of the rows that their source_index refers to."""

    rows: Dataset
    numbers: Sequence[int | str]
    label: str = ""
    is_eval: bool = False


def load_preferences(settings: Any, tokenizer: Tokenizer) -> tuple[Dataset, Dataset, RowReport]:
    """Pairs to train on, pairs to evaluate on, and the report on every row. No prompt is in both.

    Columns: prompt, chosen, rejected (lists of {role, content}); prompt_ids, chosen_ids, rejected_ids, the tokens that
    DPOTrainer trains on; margin of the ratings, or null; prompt_hash; tokens of the prompt and the longer answer.
    Raises UserError if a dataset cannot be read or used, if the chat template is not safe to train on (see
    `validate_chat_template`), or with `settings.strict` if a row was dropped.
    """
    return _load(settings, tokenizer, use_pairs=True)


def load_instructions(settings: Any, tokenizer: Tokenizer) -> tuple[Dataset, Dataset, RowReport]:
    """As `load_preferences`, for conversations. A preference dataset gives its chosen answers.

    Columns: messages; input_ids and labels, which SFTTrainer takes as they are and which learn every assistant turn;
    prompt_hash; tokens.
    """
    return _load(settings, tokenizer, use_pairs=False)


def _load(settings: Any, tokenizer: Tokenizer, use_pairs: bool) -> tuple[Dataset, Dataset, RowReport]:
    split, specs = config_from(settings, Split), parse_dataset_specs(settings)
    limits, pairing = config_from(settings, LengthLimits), config_from(settings, PairingConfig)
    options = {"pairing": pairing, "system_prompt": settings.system_prompt, "num_proc": settings.dataset_num_proc}
    options["chat_template_kwargs"] = template_variables(settings)
    splits, formats, names = [], [], [Path(spec.id).name for spec in specs]
    has_labels = len(specs) > 1 or any(spec.eval_split for spec in specs)
    for spec, short in zip(specs, names, strict=True):
        for name in filter(None, (spec.eval_split, spec.split)):
            is_eval = name == spec.eval_split
            rows, indices = subsample(load_rows(spec, name), 1 if is_eval else spec.fraction, split.seed)
            prepared, row_format = tokenize_dataset(rows, tokenizer, use_pairs, limits, spec.format, **options)
            label = f"{short if names.count(short) == 1 else spec.id} {name}" if has_labels else ""
            numbers = [f"{label} {index + 1}" if label else index + 1 for index in indices]
            splits.append(PreparedSplit(prepared, numbers, label, is_eval))
            formats.append(row_format)
    report, train, held_out = deduplicate(splits)
    report.format = ", ".join(dict.fromkeys(map(str, formats)))
    report.unused = list(dict.fromkeys(name for row_format in formats for name in row_format.unused))
    report.check(settings.strict, tokenizer)
    if held_out is None:
        train, held_out = split_by_prompt(train, split)
    elif not len(train) or not len(held_out):
        raise UserError(f"no row of {'--dataset_split' if len(held_out) else '--eval_split'} can be used")
    else:
        train = train.select(shuffled_indices(train, split.seed)[: split.train_rows or None])
        held_out = held_out.select(shuffled_indices(held_out, split.seed)[: split.eval_rows or None])
    report.train, report.eval, report.hash = len(train), len(held_out), hash_tokens(train, held_out)
    return train, held_out, report


def hash_tokens(*sets: Dataset) -> str:
    """A hash over the token ids of prepared rows, in their order."""
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    for rows in sets:
        names = [name for name in rows.column_names if name.endswith("_ids") or name == "labels"]
        for table in rows.select_columns(names).with_format("arrow").iter(1000):
            for column in table.columns:
                digest.update(pc.list_value_length(column).to_numpy().tobytes())
                digest.update(pc.list_flatten(column).to_numpy().tobytes())
    return digest.hexdigest()[:16]


def config_from(settings: Any, cls: type[Config]) -> Config:
    """A dataclass filled from the settings of the same names; what the settings lack keeps its default."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})


def prepare_rows(
    rows: Dataset, tokenizer: Tokenizer, limits: LengthLimits, use_pairs: bool = True, **options: Any
) -> tuple[Dataset, RowReport]:
    """Prepared rows of one loaded dataset without duplicates, not split; `options` are those of `tokenize_dataset`."""
    prepared, row_format = tokenize_dataset(rows, tokenizer, use_pairs, limits, **options)
    report, kept, _ = deduplicate([PreparedSplit(prepared, range(1, len(rows) + 1))])
    report.format, report.unused = str(row_format), list(row_format.unused)
    return kept, report


def deduplicate(splits: list[PreparedSplit]) -> tuple[RowReport, Dataset, Dataset | None]:
    """The report, the rows to train on, and the rows of evaluation splits, if there are any.

    A pair is kept once. A pair that also occurs with swapped labels is dropped both times. A prompt of an evaluation
    split is not trained on.
    """
    from datasets import concatenate_datasets

    splits = sorted(splits, key=lambda split: not split.is_eval)
    rows = concatenate_datasets([split.rows for split in splits])
    pairs = rows.select_columns(["prompt_hash", "tokens", *INTERNAL_COLUMNS]).to_pandas()
    pairs["split"] = np.repeat(range(len(splits)), [len(split.rows) for split in splits])
    pairs["is_eval"] = [splits[number].is_eval for number in pairs["split"]]
    pairs["row"] = [splits[n].numbers[i] for n, i in zip(pairs["split"], pairs["source_index"], strict=True)]
    pairs["drop_reason"] = _drop_reasons(pairs)
    is_kept, rows = pairs["drop_reason"] == "", rows.remove_columns(INTERNAL_COLUMNS)
    train, held_out = (rows.select(np.flatnonzero(is_kept & side)) for side in (~pairs["is_eval"], pairs["is_eval"]))
    return _count_rows(pairs, splits), train, held_out if splits[0].is_eval else None


def _drop_reasons(pairs: DataFrame) -> Series[str]:
    """Why each pair is dropped, or ""."""
    reasons = pairs["drop_reason"]
    prompt, chosen, rejected = (pairs[f"{side}_hash"].fillna("") for side in SIDES)
    pair, swapped = prompt + " " + chosen + " " + rejected, prompt + " " + rejected + " " + chosen
    is_usable = reasons == ""
    reasons = reasons.mask(is_usable & swapped.isin(pair[is_usable]), "the same pair with both labels")
    is_usable = reasons == ""
    is_leak = ~pairs["is_eval"] & prompt.isin(prompt[is_usable & pairs["is_eval"]])
    reasons = reasons.mask(is_usable & is_leak, "prompt is in the evaluation split")
    is_usable = reasons == ""
    is_repeated = is_usable & pair.where(is_usable).duplicated()
    return reasons.mask(is_repeated, np.where(rejected == "", "duplicate conversation", "duplicate pair"))


def _count_rows(pairs: DataFrame, splits: list[PreparedSplit]) -> RowReport:
    """The report on rows, each of which has one or several `pairs`."""
    report, row = RowReport(read=sum(len(split.numbers) for split in splits)), ["split", "row"]
    is_kept = pairs["drop_reason"] == ""
    is_row_kept = is_kept.groupby([pairs[name] for name in row]).transform("any")
    kept, lost, dropped = pairs[is_kept], pairs[~is_kept & is_row_kept], pairs[~is_row_kept].drop_duplicates(row)
    changed = kept[kept["modification"] != ""].drop_duplicates(row)
    changes = changed.assign(modification=changed["modification"].str.split("; ")).explode("modification")
    again = kept[kept.groupby("prompt_hash")["row"].transform("first") != kept["row"]]
    report.count(report.flagged, ["duplicate prompt"] * len(again), again["row"])
    report.count(report.dropped, dropped["drop_reason"], dropped["row"])
    report.count(report.dropped_pairs, lost["drop_reason"] + f" {OTHERS_KEPT}", lost["row"])
    report.count(report.changed, changes["modification"], changes["row"])
    report.rendered_with.update(name for names in kept["rendered_with"] for name in names.split("\n"))
    report.kept, report.changed_rows = report.read - len(dropped), len(changed)
    for reason in (TOO_LONG, PROMPT_TOO_LONG):
        report.lengths[reason] = pairs.loc[pairs["drop_reason"] == reason, "tokens"].astype(int).tolist()
    for number, split in enumerate(splits):
        if split.label:
            reasons = Counter("dropped: " + dropped.loc[dropped["split"] == number, "drop_reason"])
            read, lost_rows, changed_rows = len(split.numbers), reasons.total(), int((changed["split"] == number).sum())
            counts = Counter(read=read, kept=read - lost_rows, changed=changed_rows, dropped=lost_rows, **reasons)
            report.sets[split.label] = counts
    return report


def split_by_prompt(rows: Dataset, split: Split) -> tuple[Dataset, Dataset]:
    """Train and evaluation rows with no prompt in both, in an order that depends on the seed, not on the file."""
    if not (split.eval_rows or split.eval_fraction):
        raise SettingsError("--eval_rows and --eval_fraction are both 0. Set one: evaluation needs rows.")
    order, prompts = shuffled_indices(rows, split.seed), rows["prompt_hash"][:]
    share = max(1, round(split.eval_fraction * len(order)))
    count = min(split.eval_rows or share, max(share, len(order) // 4), len(order) - 1)
    if count < split.eval_rows:
        print(f"`--eval_rows {split.eval_rows}` is more than a quarter of {len(order)} rows; using {count}.")
    while 0 < count < len(order) and prompts[order[count]] == prompts[order[count - 1]]:
        count += 1  # all rows of a prompt go to one side
    train = order[count:][: split.train_rows or None]
    if not train:
        raise UserError(f"{len(order)} rows are too few for --eval_rows {count}: none is left to train on")
    return rows.select(train), rows.select(order[:count])


def shuffled_indices(rows: Dataset, seed: int) -> list[int]:
    """Row indices in an order given by the seed and the prompts; rows of one prompt are neighbours."""
    prompts = rows["prompt_hash"][:]
    rank = {prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest() for prompt in set(prompts)}
    return sorted(range(len(prompts)), key=lambda i: (rank[prompts[i]], i))
