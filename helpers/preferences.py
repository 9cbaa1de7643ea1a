"""Preference data: published rows → prompt, chosen and rejected conversations, with an account of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.chat import render_or_fault
from helpers.errors import UserError
from helpers.rows import Account, Message, conversation, fault_of, is_conversation, keep, key_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Pair = dict[str, list[Message]]


def read_pair(row: dict[str, Any]) -> Pair | str:
    """One published row as an explicit-prompt pair, or the reason why it is none.

    `chosen` and `rejected` are texts beside a `prompt`, or conversations that end with the answer and may hold the
    prompt themselves (argilla/ultrafeedback-binarized-preferences-cleaned, HuggingFaceH4/ultrafeedback_binarized).
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    sides = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        if not is_conversation(value):
            return "not text"
        messages = conversation(value)
        if all(m["role"] == "assistant" for m in messages):
            if not is_conversation(prompt):
                return "not text"
            messages = [*conversation(prompt), *messages]
        if fault := fault_of(messages):
            return fault
        sides.append(messages)
    chosen, rejected = sides
    if key_of(chosen[:-1]) != key_of(rejected[:-1]):
        return "prompts differ"
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        return "chosen equals rejected"
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def prepare_preferences(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, max_length: int, strict: bool = False
) -> tuple[Dataset, Account]:
    """Pairs that DPOTrainer takes as they are, and the account of `rows`.

    Pairs longer than `max_prompt_length` (prompt) or `max_length` (prompt and longer answer, in tokens of `tokenizer`)
    are dropped: cutting them would cut off the end of the answers. 0 means no limit.
    `strict` makes any drop a UserError.
    """
    if missing := {"chosen", "rejected"} - set(rows.column_names):
        have = ", ".join(rows.column_names)
        raise UserError(f"the dataset has columns {have}; a preference set needs {' and '.join(sorted(missing))}")

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = {name: batch[name] for name in ("prompt", "chosen", "rejected") if name in batch}
        pairs = [read_pair(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        fits = iter(_fits(tokenizer, [p for p in pairs if not isinstance(p, str)], max_prompt_length, max_length))
        faults = [p if isinstance(p, str) else next(fits) for p in pairs]
        empty: Pair = {"prompt": [], "chosen": [], "rejected": []}
        out: dict[str, list[Any]] = {
            name: [(empty if isinstance(p, str) else p)[name] for p in pairs] for name in empty
        }
        return out | {"fault": faults}

    message = [{"role": _string(), "content": _string()}]
    read_rows = rows.map(
        read, batched=True, remove_columns=rows.column_names, desc="Reading pairs",
        features=_features({"prompt": message, "chosen": message, "rejected": message, "fault": _string()}),
    )  # fmt: skip
    return keep(read_rows, strict)


def _fits(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], max_prompt: int, max_total: int) -> list[str]:
    """For each pair "", "over-long", or why the chat template refuses it."""
    if not pairs:
        return []
    sides = [[render_or_fault(tokenizer, p["prompt"], prompt=True) for p in pairs]]
    sides += [[render_or_fault(tokenizer, p["prompt"] + p[name]) for p in pairs] for name in ("chosen", "rejected")]
    texts = [text for side in sides for text, _ in side]
    faults = [next((fault for _, fault in row if fault), "") for row in zip(*sides, strict=True)]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    n = len(pairs)
    return [
        fault or ("over-long" if (max_prompt and p > max_prompt) or (max_total and max(c, r) > max_total) else "")
        for fault, p, c, r in zip(faults, lengths[:n], lengths[n : 2 * n], lengths[2 * n :], strict=True)
    ]


def _string() -> Any:
    from datasets import Value

    return Value("string")


def _features(columns: dict[str, Any]) -> Any:
    from datasets import Features

    return Features(columns)
