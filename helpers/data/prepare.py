"""Load datasets for training: read each row, check it, tokenize it and apply the length limits in one pass; then mix,
deduplicate and split them."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.core import SettingsError, UserError, process_lock
from helpers.data.encode import (
    PROMPT_TOO_LONG,
    SIDES,
    TOO_LONG,
    LengthLimits,
    apply_limits,
    bound_texts,
    count_tokens,
    describe_rendering,
    encode,
    template_options,
)
from helpers.data.formats import MARGIN_COLUMNS, Example, Format, PairingConfig, choose_format, unused_columns
from helpers.data.loading import load_rows, parse_dataset_specs
from helpers.data.messages import EXTRA_KEYS, add_system_prompt, conversation_hash
from helpers.data.row_report import OTHERS_KEPT, RowReport, Split, config_from
from helpers.models import chat
from helpers.settings.fields import template_variables

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame, Series
    from transformers import PreTrainedTokenizerBase as Tokenizer


TOKENIZERS: dict[str, Tokenizer] = {}  # forked workers inherit them; sending one takes half a second
INTERNAL_COLUMNS = ["source_index", "drop_reason", "modification", "rendered_with", "chosen_hash", "rejected_hash"]


def tokenize_dataset(
    rows: Dataset,
    tokenizer: Tokenizer,
    use_pairs: bool,
    limits: LengthLimits,
    data_format: str = "auto",
    pairing: PairingConfig | None = None,
    system_prompt: str = "",
    num_proc: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    validate: bool = False,
) -> tuple[Dataset, Format]:
    """Prepare all rows, cached by content; returns them and their format. Raises UserError.

    Pairs have the columns prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids and margin, conversations have
    messages, input_ids and labels. Both have tokens, prompt_hash and INTERNAL_COLUMNS. With `validate`, rows that the
    chat template makes unsafe to train on are dropped.
    """
    pairing, row_format = pairing or PairingConfig(), choose_format(rows, data_format, use_pairs)
    if use_pairs and pairing.recommended and "status" not in rows.column_names:
        example = "argilla/distilabel-intel-orca-dpo-pairs"
        raise SettingsError(f"--recommended needs a dataset with a status column, such as {example}. Leave it out.")
    has_ratings = row_format.name == "scored" or any({*names} <= {*rows.column_names} for names in MARGIN_COLUMNS)
    if use_pairs and pairing.min_margin and not has_ratings and "rating" not in rows.column_names:
        names = ", ".join(" and ".join(names) for names in MARGIN_COLUMNS)
        raise SettingsError(f"--min_margin needs ratings, in columns such as {names}. Leave it out.")
    row_format = dataclasses.replace(row_format, unused=unused_columns(rows, row_format, pairing))
    config = {"row_format": row_format, "limits": limits, "pairing": pairing, "system_prompt": system_prompt}
    config |= {"options": chat_template_kwargs or {}, "template": chat.marked_template(tokenizer), "validate": validate}
    fingerprint = content_fingerprint(rows, tokenizer, config)
    TOKENIZERS[fingerprint] = tokenizer
    try:
        with process_lock(fingerprint):
            prepared = rows.map(
                _prepare_batch,
                batched=True,
                batch_size=100,
                with_indices=True,
                fn_kwargs=config | {"tokenizer_key": fingerprint},
                remove_columns=rows.column_names,
                num_proc=worker_count(num_proc, len(rows)),
                new_fingerprint=fingerprint,
                desc="Preparing rows",
            )
    finally:
        del TOKENIZERS[fingerprint]
    return prepared, row_format


def content_fingerprint(rows: Dataset, tokenizer: Tokenizer, config: dict[str, Any]) -> str:
    """A name for the prepared rows. It changes with the rows, the tokenizer, the config and the code.

    datasets makes such names by pickling, which for tokenizers changes from one process to the next.
    """
    files = ("data/messages.py", "data/formats.py", "data/encode.py", "models/chat.py")
    code = [(Path(__file__).parents[1] / file).read_text() for file in files]
    code += [inspect.getsource(_prepare_batch), inspect.getsource(_hashes)]
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # left from an earlier call, and without effect here
        tokenizer.backend_tokenizer.no_padding()
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [rows._fingerprint, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map, config, *code]
    parts.append(chat.eos_token_ids(tokenizer))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def worker_count(wanted: int, rows: int) -> int | None:
    """Number of processes for `Dataset.map`, or None for this one alone. With 0 wanted, large datasets get several."""
    import multiprocess  # what datasets starts processes with

    if multiprocess.get_start_method() != "fork":  # a new process would run the notebook from its start
        if wanted > 1:
            print("--dataset_num_proc has no effect: this system does not fork processes.")
        return None
    count = wanted or (min(os.cpu_count() or 1, 16) if rows >= 5000 else 1)
    return min(count, max(1, rows)) if count > 1 else None


def _prepare_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    row_format: Format,
    limits: LengthLimits,
    pairing: PairingConfig,
    system_prompt: str,
    options: dict[str, Any],
    template: str,
    validate: bool,
    tokenizer_key: str,
) -> Any:
    """Prepare one batch of rows, as an Arrow table. What cannot be used has a drop_reason and no tokens."""
    import multiprocess
    import pyarrow as pa

    if multiprocess.parent_process():  # threads in each of several processes are slower
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = TOKENIZERS[tokenizer_key]
    special, has_system_role = chat.special_token_pattern(tokenizer), chat.supports_system_role(tokenizer)
    prepared, usable = [], []
    for position, index in enumerate(indices):
        for example in row_format.read({column: values[position] for column, values in batch.items()}, pairing):
            row: dict[str, Any] = {"source_index": index, "drop_reason": "", "modification": ""}
            prepared.append(row)
            if isinstance(example, str):
                row["drop_reason"] = example
                continue
            example = dataclasses.replace(example, prompt=add_system_prompt(example.prompt, system_prompt))
            row |= _hashes(example)
            example = bound_texts(tokenizer, example, limits)
            example = dataclasses.replace(example, options=template_options(tokenizer, example, options))
            row["rendered_with"] = describe_rendering(example)
            turns = [turn for side in SIDES for turn in getattr(example, side)]
            more = [example.options.get("tools"), *([turn.get(key) for key in EXTRA_KEYS] for turn in turns)]
            texts = [*(turn["content"] for turn in turns), json.dumps(more, ensure_ascii=False, default=str)]
            if any(map(special.search, texts)):
                row["drop_reason"] = "control token in the text"
            else:
                usable.append((row, example))
    for (row, example), ids in zip(usable, encode(tokenizer, [e for _, e in usable], template, validate), strict=True):
        if isinstance(ids, str):
            row["drop_reason"] = ids
            continue
        try:
            changed = ids.pop("modification", "")
            example, ids, row["drop_reason"], cut = apply_limits(tokenizer, example, ids, limits, template)
        except UserError as error:
            raise UserError(f"row {row['source_index'] + 1} {error}") from None
        prompt = chat.fold_system_message(example.prompt, has_system_role)
        folded = "" if prompt is example.prompt else "system message folded into the first user turn"
        lengths = count_tokens(ids)
        tokens = lengths[0] if row["drop_reason"] == PROMPT_TOO_LONG else sum(lengths)
        row |= {"modification": "; ".join(filter(None, (folded, changed, cut))), "tokens": tokens, **ids}
        row |= {"prompt": prompt, "chosen": example.chosen, "rejected": example.rejected, "margin": example.margin}
        row["messages"] = [*prompt, *example.chosen]
    text, token_ids = pa.string(), pa.list_(pa.int32())
    messages = pa.list_(pa.struct({"role": text, "content": text}))
    columns = {"source_index": pa.int64(), "drop_reason": text, "modification": text, "tokens": pa.int32()}
    columns |= {"rendered_with": text, **{f"{side}_hash": text for side in SIDES}}
    if row_format.use == "pairs":
        columns |= {"margin": pa.float64(), **dict.fromkeys(SIDES, messages)}
        columns |= {f"{side}_ids": token_ids for side in SIDES}
    else:
        columns |= {"messages": messages, "input_ids": token_ids, "labels": token_ids}
    return pa.Table.from_pylist(prepared, schema=pa.schema(columns))


def _hashes(example: Example) -> dict[str, str]:
    """Hashes of the sides, with the tools and variables of a row. A complete conversation is hashed under chosen, and
    its prompt is its opening."""
    options, tools = example.options, {"tools": example.options.get("tools")} if "tools" in example.options else {}
    if example.rejected:
        sides = {f"{side}_hash": conversation_hash(getattr(example, side), options) for side in SIDES}
        return sides | {"prompt_hash": conversation_hash(example.prompt, tools)}
    opening = example.prompt[: 2 if example.prompt[0]["role"] == "system" else 1]
    full = conversation_hash([*example.prompt, *example.chosen], options)
    return {"prompt_hash": conversation_hash(opening, tools), "chosen_hash": full, "rejected_hash": ""}


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """Prepared rows of one split of a dataset, and their format. `numbers` are those of the rows of a source_index."""

    rows: Dataset
    row_format: Format
    numbers: Sequence[int | str]
    label: str = ""
    is_eval: bool = False


def load_preferences(settings: Any, tokenizer: Tokenizer) -> tuple[Dataset, Dataset, RowReport]:
    """Pairs to train on, pairs to evaluate on, and the report on every row. No prompt is in both.

    Columns: prompt, chosen, rejected (lists of {role, content}); prompt_ids, chosen_ids, rejected_ids, the tokens that
    DPOTrainer trains on; margin of the ratings, or null; prompt_hash; tokens of the prompt and the longer answer.
    Raises UserError if a dataset or chat template cannot be used, or with `settings.strict` if a row was dropped.
    """
    return _load(settings, tokenizer, use_pairs=True)


def load_instructions(settings: Any, tokenizer: Tokenizer) -> tuple[Dataset, Dataset, RowReport]:
    """As `load_preferences`, for conversations. A preference dataset gives its chosen answers.

    Columns: messages; input_ids and labels, as SFTTrainer takes them, which learn every assistant turn; prompt_hash;
    tokens.
    """
    return _load(settings, tokenizer, use_pairs=False)


def _load(settings: Any, tokenizer: Tokenizer, use_pairs: bool) -> tuple[Dataset, Dataset, RowReport]:
    split, specs = config_from(settings, Split), parse_dataset_specs(settings)
    options: dict[str, Any] = {"system_prompt": settings.system_prompt, "num_proc": settings.dataset_num_proc}
    options |= {"limits": config_from(settings, LengthLimits), "pairing": config_from(settings, PairingConfig)}
    options |= {"chat_template_kwargs": template_variables(settings), "validate": True}
    splits, names = list[PreparedSplit](), [Path(spec.id).name for spec in specs]
    has_labels = len(specs) > 1 or any(spec.eval_split for spec in specs)
    for spec, short in zip(specs, names, strict=True):
        for name in filter(None, (spec.eval_split, spec.split)):
            is_eval = name == spec.eval_split
            rows, indices = subsample(load_rows(spec, name), 1 if is_eval else spec.fraction, split.seed)
            prepared = tokenize_dataset(rows, tokenizer, use_pairs, data_format=spec.format, **options)
            parts = (short,) if names.count(short) == 1 else (spec.id, spec.config, spec.revision)
            label = " ".join(filter(None, (*parts, name))) if has_labels else ""
            numbers = [f"{label} {index + 1}" if label else index + 1 for index in indices]
            splits.append(PreparedSplit(*prepared, numbers, label, is_eval))
    report, train, held_out = deduplicate(splits)
    report.check(settings.strict, tokenizer)
    if held_out is None:
        train, held_out = split_by_prompt(train, split)
    elif not len(train) or not len(held_out):
        empty = "--dataset_split" if len(held_out) else "--eval_split"
        lost = "; ".join(f"{reason}: {n}" for reason, n in report.dropped.items())
        raise UserError(f"No row of {empty} is left. Use another split. Of all rows, dropped: {lost or 'none'}.")
    else:
        train = train.select(shuffled_indices(train, split.seed)[: split.train_rows or None])
        held_out = held_out.select(shuffled_indices(held_out, split.seed)[: split.eval_rows or None])
    report.train, report.eval, report.hash = len(train), len(held_out), hash_tokens(train, held_out)
    return train, held_out, report


def subsample(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, list[int]]:
    """A seeded share of `rows` in their order, and their indices."""
    if fraction == 1:
        return rows, list(range(len(rows)))
    indices = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return rows.select(indices), indices


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


def prepare_rows(
    rows: Dataset, tokenizer: Tokenizer, limits: LengthLimits, use_pairs: bool = True, **options: Any
) -> tuple[Dataset, RowReport]:
    """Prepared rows of one loaded dataset without duplicates, not split; `options` are those of `tokenize_dataset`."""
    prepared = tokenize_dataset(rows, tokenizer, use_pairs, limits, **options)
    report, kept, _ = deduplicate([PreparedSplit(*prepared, range(1, len(rows) + 1))])
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
    reasons, is_eval = pairs["drop_reason"], pairs["is_eval"]
    prompt, chosen, rejected = (pairs[f"{side}_hash"].fillna("") for side in SIDES)
    pair, swapped = prompt + " " + chosen + " " + rejected, prompt + " " + rejected + " " + chosen
    is_usable = reasons == ""
    reasons = reasons.mask(is_usable & swapped.isin(pair[is_usable]), "the same pair with both labels")
    is_usable = reasons == ""
    is_leak = is_usable & ~is_eval & prompt.isin(prompt[is_usable & is_eval])
    reasons = reasons.mask(is_leak, "prompt is in the evaluation split")
    is_usable = reasons == ""
    is_repeated = is_usable & pair.where(is_usable).duplicated()
    return reasons.mask(is_repeated, np.where(rejected == "", "duplicate conversation", "duplicate pair"))


def _count_rows(pairs: DataFrame, splits: list[PreparedSplit]) -> RowReport:
    """The report on rows, each of which has one or several `pairs`."""
    report, row = RowReport(read=sum(len(split.numbers) for split in splits)), ["split", "row"]
    report.format = ", ".join(dict.fromkeys(str(split.row_format) for split in splits))
    report.unused = list(dict.fromkeys(name for split in splits for name in split.row_format.unused))
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
            report.sets.setdefault(split.label, Counter()).update(counts)
    return report


def split_by_prompt(rows: Dataset, split: Split) -> tuple[Dataset, Dataset]:
    """Train and evaluation rows with no prompt in both, in an order that depends on the seed, not on the file."""
    if not (split.eval_rows or split.eval_fraction):
        raise SettingsError("--eval_rows and --eval_fraction are both 0. Set one: evaluation needs rows.")
    order, prompts = shuffled_indices(rows, split.seed), rows["prompt_hash"][:]
    if (count := split.held_out(len(order))) < split.eval_rows:
        print(f"`--eval_rows {split.eval_rows}` is more than a quarter of {len(order)} rows; using {count}.")
    while 0 < count < len(order) and prompts[order[count]] == prompts[order[count - 1]]:
        count += 1  # all rows of a prompt go to one side
    train = order[count:][: split.train_rows or None]
    if not train:
        raise UserError(
            f"`--eval_rows {count}` leaves no training rows of {len(order)}. Lower it, or add rows with other prompts."
        )
    return rows.select(train), rows.select(order[:count])


def shuffled_indices(rows: Dataset, seed: int) -> list[int]:
    """Row indices in an order given by the seed and the prompts; rows of one prompt are neighbours."""
    prompts = rows["prompt_hash"][:]
    rank = {prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest() for prompt in set(prompts)}
    return sorted(range(len(prompts)), key=lambda i: (rank[prompts[i]], i))
