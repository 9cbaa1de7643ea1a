"""Instruction data: conversations → tokens and labels for SFT, with an account of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.chat import encode
from helpers.errors import UserError
from helpers.rows import Account, Message, conversation, fault_of, is_conversation, keep

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def read_conversation(row: dict[str, Any]) -> list[Message] | str:
    """One published row (HuggingFaceH4/ultrachat_200k: `messages`) as a conversation, or the reason why it is none."""
    messages = row.get("messages")
    if not is_conversation(messages):
        return "not text"
    messages = conversation(messages)
    return fault_of(messages) or messages


def prepare_instructions(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, strict: bool = False
) -> tuple[Dataset, Account]:
    """Rows of `input_ids` and `labels` that SFTTrainer takes as they are, with their first prompt, and the account.

    Conversations longer than `max_length` tokens are dropped, not cut; 0 means no limit.
    `strict` makes any drop a UserError.
    """
    if "messages" not in rows.column_names:
        raise UserError(f"the dataset has columns {', '.join(rows.column_names)}; an instruction set needs messages")

    def read(row: dict[str, Any]) -> dict[str, Any]:
        messages = read_conversation(row)
        if isinstance(messages, str):
            return {"prompt": "", "input_ids": [], "labels": [], "fault": messages}
        try:
            encoded = encode(tokenizer, messages)
        except UserError as error:
            return {"prompt": "", "input_ids": [], "labels": [], "fault": str(error)[:80]}
        fault = "over-long" if max_length and len(encoded["input_ids"]) > max_length else ""
        return {"prompt": messages[0]["content"], **encoded, "fault": fault}

    read_rows = rows.map(read, remove_columns=rows.column_names, desc="Reading conversations")
    return keep(read_rows, strict)
