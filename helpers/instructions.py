"""Instruction data: published rows → tokens and labels for SFT, with an account of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from helpers.accounts import Account, Part, mix, settle
from helpers.chat import CHECKED, check_chat, encode, encode_prompt, folded, special_text, takes_system
from helpers.columns import list_columns, message_column, recognise, refuse_lacking, token_column
from helpers.errors import SettingsError, UserError
from helpers.formats import ADAPTERS, Options, not_text
from helpers.lengths import Limits, trim_prompt
from helpers.loading import Source
from helpers.rows import TOKENIZERS, Message, conversation, fault_of, is_conversation, map_rows, short_key, with_system
from helpers.split import Split

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def read_messages(row: Row) -> list[Message] | str:
    """HuggingFaceH4/ultrachat_200k, HuggingFaceH4/no_robots, allenai/tulu-v2-sft-mixture: conversations as they are."""
    messages = row.get("messages")
    return conversation(messages) if is_conversation(messages) else not_text(messages=messages)


def read_alpaca(row: Row) -> list[Message] | str:
    """tatsu-lab/alpaca: instruction, input and output; its `text`, rendered already, is left alone."""
    text, more = row.get("instruction"), row.get("input")
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"
    return _turns(instruction=text, output=row.get("output"))


def read_completion(row: Row) -> list[Message] | str:
    """A prompt and its completion, as texts or as messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:  # of a set for KTO: an answer that is not wanted
        return "labelled as not wanted"
    if is_conversation(prompt) and is_conversation(completion):
        return conversation(prompt) + conversation(completion)
    return _turns(prompt=prompt, completion=completion)


def _turns(**columns: Any) -> list[Message] | str:
    prompt, answer = columns.values()
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return not_text(**columns)
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


def load_instructions(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    split: Split,
    strict: bool = False,
    num_proc: int = 0,
    system_prompt: str = "",
) -> tuple[Dataset, Dataset, Account]:
    """Conversations to train on, conversations held out, and the account of every row; no prompt is on both sides.

    Columns: messages; input_ids and labels, which SFTTrainer takes as they are: every assistant turn is learned, and
    nothing else; prompt_key; tokens. A preference set gives its chosen answers. `num_proc` processes prepare them, 0
    for as many as help. What was prepared is cached by the content of the rows and all that decides on it. Raises
    UserError where a set cannot be read or used, where the template is not safe to train on (see `chat.check_chat`),
    or where `strict` and a row was dropped.
    """

    def prepare(rows: Dataset, data_format: str) -> tuple[Dataset, str]:
        return _prepare(rows, tokenizer, limits, data_format, num_proc, system_prompt)

    train, held_out, account = mix(sources, prepare, split, strict)
    check_chat(tokenizer, train.select(range(min(CHECKED, len(train))))["messages"][:])
    return train, held_out, account


def prepare_instructions(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits, data_format: str = "auto", num_proc: int = 0
) -> tuple[Dataset, Account]:
    """`load_instructions` of one set that is loaded already, and not split."""
    made, name = _prepare(rows, tokenizer, limits, data_format, num_proc)
    account, kept, _ = settle([Part(made, list(range(len(rows))))])
    account.format = name
    return kept, account


def _prepare(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    data_format: str,
    num_proc: int,
    system_prompt: str = "",
) -> tuple[Dataset, str]:
    columns = set(rows.column_names)
    name = data_format if data_format != "auto" else next((n for n, (c, _) in READERS.items() if c <= columns), "")
    name = name or recognise(list_columns(rows))
    if name and name not in READERS and name not in ADAPTERS:
        raise SettingsError(f"--data_format {name!r} is not one of auto, {', '.join({**READERS, **ADAPTERS})}")
    if not name or (name in READERS and name not in ADAPTERS and not READERS[name][0] <= columns):
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}; an instruction set needs messages, prompt and "
            "completion, or instruction and output: rename them; a preference set gives its chosen answers"
        )
    chosen = name not in READERS or not READERS[name][0] <= columns  # "messages" is a name of both kinds
    if chosen:
        refuse_lacking(name, rows.column_names)
    work = {"name": name, "chosen": chosen, "limits": limits, "system": takes_system(tokenizer)}
    work["system_prompt"] = system_prompt
    made = map_rows(rows, _read_batch, work, tokenizer, num_proc)
    return made, f"{name}, the chosen side" if chosen else name


def _read_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    chosen: bool,
    limits: Limits,
    system: bool,
    system_prompt: str,
    tokenizer: str,
) -> Any:
    """One batch of published rows as conversations (an Arrow table); one that cannot be used stands with its fault."""
    import pyarrow as pa

    made: list[tuple[Any, ...]] = []
    special = special_text(TOKENIZERS[tokenizer])
    for position, number in enumerate(indices):
        row = {column: values[position] for column, values in batch.items()}
        messages = read_chosen(row, name) if chosen else READERS[name][1](row)
        key, fault = ([], messages) if isinstance(messages, str) else (messages, fault_of(messages))
        if any(special.search(m["content"]) for m in key):
            fault = fault or "a control token in its text"
        if fault:
            made.append(([], [], [], fault, "", []))
            continue
        key = with_system(key, system_prompt)
        try:
            done = _read_row(key, limits, system, TOKENIZERS[tokenizer])
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        made.append((*done, key))
    conversations, ids, labels, faults, changes, keys = map(list, zip(*made, strict=True))
    prompts = [m[: 2 if m[0]["role"] == "system" else 1] if m else [] for m in keys]
    return pa.table(
        {
            "row": pa.array(indices, pa.int64()),
            "fault": pa.array(faults, pa.string()),
            "change": pa.array(changes, pa.string()),
            "tokens": pa.array(map(len, ids), pa.int32()),
            "prompt_key": pa.array(map(short_key, prompts), pa.string()),
            "chosen_key": pa.array(map(short_key, keys), pa.string()),
            "rejected_key": pa.array([""] * len(made), pa.string()),
            "messages": message_column(conversations),
            "input_ids": token_column(ids),
            "labels": token_column(labels),
        }
    )


def _read_row(
    messages: list[Message], limits: Limits, system: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Message], list[int], list[int], str, str]:
    """The conversation, its tokens and labels, why it cannot be used, and what was changed."""
    whole = folded(messages, system)
    change = "system message folded into the first user turn" if whole is not messages else ""
    try:
        encoded = encode(tokenizer, whole)
    except UserError as error:
        return [], [], [], str(error)[:80], ""
    ids, labels = encoded["input_ids"], encoded["labels"]
    if not limits.total or len(ids) <= limits.total:
        return whole, ids, labels, "", change
    if limits.overlong == "error":
        raise UserError(f"over-long: {len(ids)} tokens, above --max_length {limits.total}: see --overlong")
    if limits.overlong == "cut_answer" and any(label != -100 for label in labels[: limits.total]):
        inside = labels[limits.total] != -100  # else the cut is in a turn that is only read
        cut = "an answer lost its end" if inside else "turns after the last whole answer cut"
        return whole, ids[: limits.total], labels[: limits.total], "", f"{change}; {cut}" if change else cut
    if limits.overlong == "trim_prompt":
        answer = len(ids) - len(encode_prompt(tokenizer, whole[:-1]))
        room = limits.total - answer
        prompt = trim_prompt(tokenizer, messages[:-1], room, system) if room > 0 else []
        short = folded([*prompt, messages[-1]], system)
        encoded = encode(tokenizer, short) if prompt else encoded
        if len(encoded["input_ids"]) <= limits.total:
            cut = "prompt trimmed from the left"
            return short, encoded["input_ids"], encoded["labels"], "", f"{change}; {cut}" if change else cut
    return whole, ids, labels, "over-long", ""
