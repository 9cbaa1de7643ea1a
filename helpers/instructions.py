"""Instruction data: published rows → tokens and labels for SFT, with an account of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from helpers.chat import encode, fold_system, takes_system
from helpers.columns import list_columns, recognise
from helpers.errors import UserError
from helpers.formats import ADAPTERS, Options
from helpers.rows import Account, Message, content_fingerprint, conversation, fault_of, is_conversation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def read_messages(row: Row) -> list[Message] | str:
    """HuggingFaceH4/ultrachat_200k, HuggingFaceH4/no_robots, allenai/tulu-v2-sft-mixture: conversations as they are."""
    messages = row.get("messages")
    return conversation(messages) if is_conversation(messages) else "not text"


def read_alpaca(row: Row) -> list[Message] | str:
    """tatsu-lab/alpaca: instruction, input and output; its `text`, rendered already, is left alone."""
    text, more = row.get("instruction"), row.get("input")
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"
    return _turns(text, row.get("output"))


def read_completion(row: Row) -> list[Message] | str:
    """A prompt and its completion, as texts or as messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if is_conversation(prompt) and is_conversation(completion):
        return conversation(prompt) + conversation(completion)
    return _turns(prompt, completion)


def _turns(prompt: Any, answer: Any) -> list[Message] | str:
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return "not text"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


READERS: dict[str, tuple[frozenset[str], Callable[[Row], list[Message] | str]]] = {
    "messages": (frozenset({"messages"}), read_messages),
    "completion": (frozenset({"prompt", "completion"}), read_completion),
    "alpaca": (frozenset({"instruction", "output"}), read_alpaca),
}


def read_chosen(row: Row, name: str) -> list[Message] | str:
    """The better side of a preference row, so that SFT and DPO can run on the same data."""
    pairs = ADAPTERS[name](row, Options())
    return pairs if isinstance(pairs, str) else pairs[0].prompt + pairs[0].chosen


def prepare_instructions(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> tuple[Dataset, Account]:
    """Rows of `input_ids` and `labels` that SFTTrainer takes as they are, with their first prompt, and the account.

    Every assistant turn is learned, and nothing else. Conversations longer than `max_length` tokens are dropped, not
    cut; 0 means no limit. A preference set gives its chosen answers. The result is cached by the content of the rows
    and all that decides on it. Raises UserError where the format is not known.
    """
    columns = set(rows.column_names)
    name = next((name for name, (needed, _) in READERS.items() if needed <= columns), "") or recognise(
        list_columns(rows)
    )
    if not name:
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}; an instruction set needs messages, prompt and "
            "completion, or instruction and output; a preference set gives its chosen answers"
        )
    preference = not any(needed <= columns for needed, _ in READERS.values())
    work = {"name": name, "preference": preference, "max_length": max_length, "system": takes_system(tokenizer)}
    made = rows.map(
        _read_row,
        fn_kwargs={**work, "tokenizer": tokenizer},
        remove_columns=rows.column_names,
        num_proc=num_proc,
        new_fingerprint=content_fingerprint(rows, tokenizer, work),
        desc=f"Reading {name} rows",
    )
    account = Account(read=len(rows), format=f"{name}, the chosen side" if preference else name)
    good = []
    for number, (fault, change) in enumerate(zip(made["fault"], made["change"], strict=True)):
        if fault:
            account.drop(fault, number)
            continue
        good.append(number)
        if change:
            account.change(change, number)
    account.kept = len(good)
    return made.select(good).select_columns(["prompt", "input_ids", "labels"]), account


def _read_row(
    row: Row, name: str, preference: bool, max_length: int, system: bool, tokenizer: PreTrainedTokenizerBase
) -> Row:
    empty: Row = {"prompt": "", "input_ids": [], "labels": [], "fault": "", "change": ""}
    messages = read_chosen(row, name) if preference else READERS[name][1](row)
    if isinstance(messages, str):
        return empty | {"fault": messages}
    if fault := fault_of(messages):
        return empty | {"fault": fault}
    change = ""
    if not system and messages[0]["role"] == "system":
        messages, change = fold_system(messages), "system message folded into the first user turn"
    try:
        encoded = encode(tokenizer, messages)
    except UserError as error:
        return empty | {"fault": str(error)[:80]}
    fault = "over-long" if max_length and len(encoded["input_ids"]) > max_length else ""
    first = next(m["content"] for m in messages if m["role"] == "user")
    return {"prompt": first, **encoded, "fault": fault, "change": change}
