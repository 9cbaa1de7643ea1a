"""Conversations in the rows of a dataset: what they are, what is wrong with them, and a name for what they become."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import UserError
from helpers.processes import one_at_a_time

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic/hh-rlhf, and the prompts of berkeley-nest/Nectar
TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {}  # forked workers inherit them; sending one takes half a second


def content_fingerprint(rows: Dataset, tokenizer: PreTrainedTokenizerBase, work: dict[str, Any]) -> str:
    """A name for what becomes of `rows` under this tokenizer, these arguments and this code.

    datasets makes such names by pickling, which for tokenizers changes from one process to the next.
    """
    code = "".join(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py")))
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # what it was last asked to truncate or pad to is no difference
        tokenizer.backend_tokenizer.no_padding()
        words = tokenizer.backend_tokenizer.to_str()
    else:
        words = repr(sorted(tokenizer.get_vocab().items()))
    parts = [rows._fingerprint, words, tokenizer.chat_template, tokenizer.special_tokens_map, work, code]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def map_rows(
    rows: Dataset,
    read: Callable[..., Any],
    work: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int,
) -> Dataset:
    """`read` over `rows` in batches, a table for each, cached by content; see `worker_count` for `num_proc`.

    `read` takes a batch, the numbers of its rows, `work`, and a key of TOKENIZERS.
    """
    fingerprint = content_fingerprint(rows, tokenizer, work)
    TOKENIZERS[fingerprint] = tokenizer
    count = worker_count(num_proc, len(rows))
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if count:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process of many, each with threads of its own, is slower
    try:
        with one_at_a_time(fingerprint):
            return rows.map(
                read,
                batched=True,
                batch_size=100,
                with_indices=True,
                fn_kwargs=work | {"tokenizer": fingerprint},
                remove_columns=rows.column_names,
                num_proc=count,
                new_fingerprint=fingerprint,
                desc="Reading rows",
            )
    finally:
        del TOKENIZERS[fingerprint]
        if count:
            os.environ.pop("TOKENIZERS_PARALLELISM")
            os.environ.update({"TOKENIZERS_PARALLELISM": before} if before else {})


def worker_count(wanted: int, rows: int) -> int | None:
    """How many processes `Dataset.map` may use for so many rows; None for this one alone.

    Where Python does not fork, a new process would run the whole of a flat notebook again.
    """
    import multiprocess  # what datasets starts processes with

    if multiprocess.get_start_method() != "fork":
        if wanted > 1:
            print("dataset_num_proc: 1, because processes are not forked on this system.")
        return None
    count = wanted or (min(os.cpu_count() or 1, 16) if rows >= 5000 else 1)
    return min(count, max(1, rows)) if count > 1 else None


def is_conversation(value: Any) -> bool:
    """A non-empty list of messages, each with text under role and content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def conversation(value: Any) -> list[Message]:
    """Just role and content of each message: further keys would reach the chat template."""
    return [{"role": m["role"], "content": m["content"]} for m in value]


def transcript(text: Any) -> list[Message]:
    """The turns of a "\\n\\nHuman: ... \\n\\nAssistant: ..." text; [] where it is none."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    parts = TURN.split(text)[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]


def with_system(messages: list[Message], system_prompt: str) -> list[Message]:
    """The conversation behind a system message: its own, or `system_prompt`, if there is one."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def fault_of(messages: list[Message]) -> str:
    """Why a conversation cannot be learned from, or "": it is system?, then user and assistant in turns."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        return "no final assistant turn"
    if any(m["role"] != ("assistant" if i % 2 else "user") for i, m in enumerate(turns)):
        return "roles do not alternate"
    if any(not m["content"].strip() for m in turns):
        return "empty answer" if not turns[-1]["content"].strip() else "empty turn"
    return ""


def key_of(messages: list[Message]) -> str:
    """A conversation as one string that another has only if it is the same."""
    return "\x1f".join(f"{m['role']}\x1e{m['content'].strip()}" for m in messages)


def short_key(messages: list[Message]) -> str:
    """`key_of` in 20 hex digits; "" for no messages."""
    return hashlib.sha1(key_of(messages).encode("utf-8", "surrogatepass")).hexdigest()[:20] if messages else ""


def read_lines(file: Path, end: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of its first `end` bytes.

    Raises UserError with the number of a line that is not UTF-8, or not an object.
    """
    rows = []
    with file.open("rb") as whole:
        lines = whole if end is None else io.BytesIO(whole.read(end))
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(row, dict):
                        raise UserError(f"{file.name}, line {number}, is not a JSON object")
                except UnicodeDecodeError as error:
                    raise UserError(f"{file.name}, line {number}, is not UTF-8: {error.reason}") from None
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{file.name}, line {number}, is not JSON: {error.msg}, column {error.colno}"
                    ) from None
                rows.append(row)
    return rows
