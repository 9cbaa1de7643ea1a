"""Preference data: published rows → prompt, chosen and rejected conversations, with an account of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from helpers.accounts import Account, Part, mix, settle
from helpers.chat import CHECKED, check_chat, folded, takes_system
from helpers.columns import list_columns, message_column, recognise, refuse_lacking, token_column
from helpers.errors import SettingsError, UserError
from helpers.formats import ADAPTERS, Options, Pair
from helpers.lengths import Limits, Tokens, encode_pairs, within
from helpers.loading import Source
from helpers.rows import TOKENIZERS, map_rows, short_key, with_system
from helpers.split import Split

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_preferences(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    options: Options,
    split: Split,
    strict: bool = False,
    num_proc: int = 0,
) -> tuple[Dataset, Dataset, Account]:
    """Pairs to train on, pairs held out, and the account of every row of every source; no prompt is on both sides.

    Columns: prompt, chosen, rejected (lists of {role, content}); prompt_ids, chosen_ids, rejected_ids, the tokens that
    DPOTrainer trains on; margin, how much better the chosen one was rated, or null; prompt_key; tokens of prompt and
    longer answer. `num_proc` processes prepare them, 0 for as many as help. What was prepared is cached by the content
    of the rows and all that decides on it. Raises UserError where a set cannot be read or used, where the template is
    not safe to train on (see `chat.check_chat`), or where `strict` and a row was dropped.
    """

    def prepare(rows: Dataset, data_format: str) -> tuple[Dataset, str]:
        return _prepare(rows, tokenizer, limits, data_format, options, num_proc)

    train, held_out, account = mix(sources, prepare, split, strict)
    first = train.select(range(min(CHECKED, len(train))))
    check_chat(tokenizer, [row["prompt"] + row[side] for row in first for side in ("chosen", "rejected")])
    return train, held_out, account


def prepare_preferences(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    data_format: str = "auto",
    options: Options | None = None,
    num_proc: int = 0,
) -> tuple[Dataset, Account]:
    """`load_preferences` of one set that is loaded already, and not split."""
    made, name = _prepare(rows, tokenizer, limits, data_format, options or Options(), num_proc)
    account, pairs, _ = settle([Part(made, list(range(len(rows))))])
    account.format = name
    return pairs, account


def _prepare(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits, data_format: str, options: Options, num_proc: int
) -> tuple[Dataset, str]:
    name = data_format if data_format != "auto" else recognise(list_columns(rows))
    if name and name not in ADAPTERS:
        raise SettingsError(f"--data_format {name!r} is not one of auto, {', '.join(ADAPTERS)}")
    if options.recommended and "status" not in rows.column_names:
        raise SettingsError("--recommended: this set says of no row whether it is (argilla/distilabel-intel-orca does)")
    if not name:
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}: not one of the formats {', '.join(ADAPTERS)}; "
            "a preference set needs prompt, chosen and rejected: rename them, or name one with --data_format"
        )
    refuse_lacking(name, rows.column_names)
    work = {"name": name, "options": options, "limits": limits, "system": takes_system(tokenizer)}
    return map_rows(rows, _read_batch, work, tokenizer, num_proc), name


def _read_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    options: Options,
    limits: Limits,
    system: bool,
    tokenizer: str,
) -> Any:
    """One batch of published rows as pairs (an Arrow table); a row that gives none stands with its fault."""
    rows: list[int] = []
    found: list[Pair | str] = []
    for position, row in enumerate(indices):
        made = ADAPTERS[name]({column: values[position] for column, values in batch.items()}, options)
        for pair in [made] if isinstance(made, str) else made:
            rows.append(row)
            if isinstance(pair, Pair):
                head = with_system(pair.prompt, options.system_prompt)
                pair = _fault_of_margin(pair.margin, options.min_margin) or dataclasses.replace(pair, prompt=head)
            found.append(pair)
    good = [i for i, pair in enumerate(found) if isinstance(pair, Pair)]
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    tokens: list[Tokens | None] = [None] * len(found)
    changes: list[list[str]] = [[] for _ in found]
    faults = [pair if isinstance(pair, str) else "" for pair in found]
    keys: list[Pair | None] = [pair if isinstance(pair, Pair) else None for pair in found]  # before anything is trimmed
    for i, pair, ids in zip(good, pairs, encode_pairs(TOKENIZERS[tokenizer], pairs, system), strict=True):
        if isinstance(ids, str):
            faults[i] = ids
            continue
        if not system and pair.prompt[0]["role"] == "system":
            changes[i].append("system message folded into the first user turn")
        try:
            pair, tokens[i], faults[i], change = within(TOKENIZERS[tokenizer], pair, ids, limits, system)
        except UserError as error:
            raise UserError(f"row {rows[i]}: {error}") from None
        found[i] = dataclasses.replace(pair, prompt=folded(pair.prompt, system))
        changes[i] += [change] if change else []
    return _table(rows, found, keys, tokens, faults, ["; ".join(c) for c in changes])


def _table(
    rows: list[int],
    found: Sequence[Pair | str],
    keys: Sequence[Pair | None],
    tokens: Sequence[Tokens | None],
    faults: list[str],
    changes: list[str],
) -> Any:
    import pyarrow as pa

    pairs = [pair if isinstance(pair, Pair) and ids else None for pair, ids in zip(found, tokens, strict=True)]
    table: dict[str, Any] = {
        "row": pa.array(rows, pa.int64()),
        "fault": pa.array(faults, pa.string()),
        "change": pa.array(changes, pa.string()),
        "margin": pa.array([pair.margin if pair else None for pair in pairs], pa.float64()),
        "tokens": pa.array([len(t[0]) + max(len(t[1]), len(t[2])) if t else 0 for t in tokens], pa.int32()),
    }
    for i, side in enumerate(("prompt", "chosen", "rejected")):
        table[f"{side}_key"] = pa.array([short_key(getattr(pair, side)) if pair else "" for pair in keys], pa.string())
        table[side] = message_column([getattr(pair, side) if pair else [] for pair in pairs])
        table[f"{side}_ids"] = token_column([t[i] if t else [] for t in tokens])
    return pa.table(table)


def _fault_of_margin(margin: float | None, least: float) -> str:
    if margin is None:
        return ""
    return (
        "tie"
        if margin == 0
        else "rejected is rated higher"
        if margin < 0
        else "margin below --min_margin"
        if margin < least
        else ""
    )
