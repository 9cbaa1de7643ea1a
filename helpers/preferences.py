"""Preference data: published rows → prompt, chosen and rejected conversations, with an account of each row."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from helpers.chat import fold_system, takes_system
from helpers.columns import list_columns, recognise
from helpers.errors import UserError
from helpers.formats import ADAPTERS, Options, Pair
from helpers.lengths import Limits, encode_pairs, within
from helpers.rows import Account, content_fingerprint, key_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids")


def prepare_preferences(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    data_format: str = "auto",
    options: Options | None = None,
    min_margin: float = 0.0,
    num_proc: int | None = None,
) -> tuple[Dataset, Account]:
    """Pairs of `rows` as conversations and as the tokens that DPOTrainer trains on, and the account of every row.

    `data_format` is one of `formats.ADAPTERS`, or "auto": by the columns. Pairs rated closer than `min_margin`, and
    ties, are dropped. The result is cached by the content of the rows and all that decides on it, so a second call
    starts at once. Columns: prompt, chosen, rejected (lists of {role, content}); prompt_ids, chosen_ids, rejected_ids.
    Raises UserError where the format is not known or no row can be used.
    """
    name = data_format if data_format != "auto" else recognise(list_columns(rows))
    if name not in ADAPTERS:
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}: not one of the formats {', '.join(ADAPTERS)}; "
            "a preference set needs prompt, chosen and rejected, or name one with --data_format"
        )
    work = {
        "name": name,
        "options": options or Options(),
        "min_margin": min_margin,
        "limits": limits,
        "system": takes_system(tokenizer),
    }
    made = rows.map(
        _read_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={**work, "tokenizer": tokenizer},
        remove_columns=rows.column_names,
        features=_features(),
        num_proc=num_proc,
        new_fingerprint=content_fingerprint(rows, tokenizer, work),
        desc=f"Reading {name} rows",
    )
    account, good = _account(made, len(rows))
    account.format = name
    return made.select(good).select_columns(["prompt_key", *COLUMNS]), account


def _read_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    options: Options,
    min_margin: float,
    limits: Limits,
    system: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[Any]]:
    """One batch of published rows as pairs; a row that gives none stands with its fault."""
    out: dict[str, list[Any]] = {column: [] for column in _features()}
    pairs: list[Pair] = []
    for position, row in enumerate(indices):
        found = ADAPTERS[name]({column: values[position] for column, values in batch.items()}, options)
        for pair in [found] if isinstance(found, str) else found:
            fault = pair if isinstance(pair, str) else _fault_of_margin(pair.margin, min_margin)
            if isinstance(pair, str) or fault:
                _append(out, row, fault=fault)
                continue
            change = ""
            if not system and pair.prompt[0]["role"] == "system":
                pair = dataclasses.replace(pair, prompt=fold_system(pair.prompt))
                change = "system message folded into the first user turn"
            pairs.append(pair)
            _append(out, row, change=change)
    kept = [i for i, fault in enumerate(out["fault"]) if not fault]
    for i, pair, tokens in zip(kept, pairs, encode_pairs(tokenizer, pairs), strict=True):
        if isinstance(tokens, str):
            out["fault"][i] = tokens
            continue
        pair, tokens, fault, change = within(tokenizer, pair, tokens, limits)
        out["fault"][i] = fault
        out["change"][i] = out["change"][i] or change
        out["prompt_key"][i], out["chosen_key"][i], out["rejected_key"][i] = (
            hashlib.sha1(key_of(side).encode()).hexdigest()[:20] for side in (pair.prompt, pair.chosen, pair.rejected)
        )
        out["prompt"][i], out["chosen"][i], out["rejected"][i] = pair.prompt, pair.chosen, pair.rejected
        out["prompt_ids"][i], out["chosen_ids"][i], out["rejected_ids"][i] = tokens
    return out


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


def _account(made: Dataset, read: int) -> tuple[Account, list[int]]:
    """The account of all rows, with what only shows between rows, and the numbers of the pairs that are kept."""
    account = Account(read=read)
    keys = list(zip(made["prompt_key"], made["chosen_key"], made["rejected_key"], strict=True))
    faults = list(made["fault"])
    labels = {key for key, fault in zip(keys, faults, strict=True) if not fault}
    seen: set[tuple[str, str, str]] = set()
    prompts: dict[str, int] = {}
    kept_rows: dict[int, str] = {}
    dropped: dict[int, str] = {}
    good = []
    for i, (row, fault, change, key) in enumerate(zip(made["row"], faults, made["change"], keys, strict=True)):
        if not fault and (key[0], key[2], key[1]) in labels:
            fault = "the same pair with both labels"
        elif not fault and key in seen:
            fault = "duplicate pair"
        if fault:
            dropped.setdefault(row, fault)
            continue
        seen.add(key)
        if prompts.setdefault(key[0], row) != row:
            account.note("duplicate prompt", row)
        kept_rows[row] = kept_rows.get(row) or change
        good.append(i)
    for row, fault in dropped.items():
        if row not in kept_rows:
            account.drop(fault, row)
    for row, change in kept_rows.items():
        if change:
            account.change(change, row)
    account.kept = len(kept_rows)
    return account, good


def _append(out: dict[str, list[Any]], row: int, **values: Any) -> None:
    empty = {"row": row, "fault": "", "change": "", "prompt_key": "", "chosen_key": "", "rejected_key": ""}
    for column, cells in out.items():
        cells.append(values.get(column, empty.get(column, [])))


def _features() -> Any:
    from datasets import Features, Value

    text, ids = Value("string"), [Value("int32")]
    messages = [{"role": text, "content": text}]
    keys = ("fault", "change", "prompt_key", "chosen_key", "rejected_key")
    return Features(
        {"row": Value("int64")}
        | dict.fromkeys(keys, text)
        | dict.fromkeys(COLUMNS[:3], messages)
        | dict.fromkeys(COLUMNS[3:], ids)
    )
