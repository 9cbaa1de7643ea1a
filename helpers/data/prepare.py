"""Preference data: published rows → prompt, chosen and rejected conversations, with an account of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError
from helpers.data.conversations import (
    TOKENIZERS,
    LengthLimits,
    Message,
    Pair,
    Tokens,
    add_system_prompt,
    apply_limits,
    conversation_hash,
    is_conversation,
    role_and_content,
    tokenize_dataset,
    tokenize_pairs,
    truncate_prompt,
    validation_error,
)
from helpers.data.formats import (
    FORMAT_READERS,
    PairingConfig,
    check_columns,
    detect_format,
    list_columns,
    messages_to_arrow,
    not_text,
    token_ids_to_arrow,
)
from helpers.data.loading import DatasetSpec
from helpers.data.row_report import PreparedSplit, RowReport, Split, deduplicate, load_and_split
from helpers.models.chat import (
    VALIDATED_ROWS,
    encode_prompt,
    fold_system_message,
    special_token_pattern,
    supports_system_role,
    tokenize_with_labels,
    validate_chat_template,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_preferences(
    sources: list[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    options: PairingConfig,
    split: Split,
    strict: bool = False,
    num_proc: int = 0,
) -> tuple[Dataset, Dataset, RowReport]:
    """Pairs to train on, pairs held out, and the account of every row of every source; no prompt is on both sides.

    Columns: prompt, chosen, rejected (lists of {role, content}); prompt_ids, chosen_ids, rejected_ids, the tokens that
    DPOTrainer trains on; margin, how much better the chosen one was rated, or null; prompt_key; tokens of prompt and
    longer answer. `num_proc` processes prepare them, 0 for as many as help. What was prepared is cached by the content
    of the rows and all that decides on it. Raises UserError where a set cannot be read or used, where the template is
    not safe to train on (see `chat.check_chat`), or where `strict` and a row was dropped.
    """

    def prepare(rows: Dataset, data_format: str) -> tuple[Dataset, str]:
        return _prepare_preferences(rows, tokenizer, limits, data_format, options, num_proc)

    train, held_out, account = load_and_split(sources, prepare, split, strict)
    first = train.select(range(min(VALIDATED_ROWS, len(train))))
    validate_chat_template(tokenizer, [row["prompt"] + row[side] for row in first for side in ("chosen", "rejected")])
    return train, held_out, account


def prepare_preferences(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    data_format: str = "auto",
    options: PairingConfig | None = None,
    num_proc: int = 0,
) -> tuple[Dataset, RowReport]:
    """`load_preferences` of one set that is loaded already, and not split."""
    made, name = _prepare_preferences(rows, tokenizer, limits, data_format, options or PairingConfig(), num_proc)
    account, pairs, _ = deduplicate([PreparedSplit(made, list(range(len(rows))))])
    account.format = name
    return pairs, account


def _prepare_preferences(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    data_format: str,
    options: PairingConfig,
    num_proc: int,
) -> tuple[Dataset, str]:
    name = data_format if data_format != "auto" else detect_format(list_columns(rows))
    if name and name not in FORMAT_READERS:
        raise SettingsError(f"--data_format {name!r} is not one of auto, {', '.join(FORMAT_READERS)}")
    if options.recommended and "status" not in rows.column_names:
        raise SettingsError("--recommended: this set says of no row whether it is (argilla/distilabel-intel-orca does)")
    if not name:
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}: not one of the formats {', '.join(FORMAT_READERS)}; "
            "a preference set needs prompt, chosen and rejected: rename them, or name one with --data_format"
        )
    check_columns(name, rows.column_names)
    work = {"name": name, "options": options, "limits": limits, "system": supports_system_role(tokenizer)}
    return tokenize_dataset(rows, _read_preference_batch, work, tokenizer, num_proc), name


def _read_preference_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    options: PairingConfig,
    limits: LengthLimits,
    system: bool,
    tokenizer: str,
) -> Any:
    """One batch of published rows as pairs (an Arrow table); a row that gives none stands with its fault."""
    rows: list[int] = []
    found: list[Pair | str] = []
    for position, row in enumerate(indices):
        made = FORMAT_READERS[name]({column: values[position] for column, values in batch.items()}, options)
        for pair in [made] if isinstance(made, str) else made:
            rows.append(row)
            if isinstance(pair, Pair):
                head = add_system_prompt(pair.prompt, options.system_prompt)
                pair = _fault_of_margin(pair.margin, options.min_margin) or dataclasses.replace(pair, prompt=head)
            found.append(pair)
    good = [i for i, pair in enumerate(found) if isinstance(pair, Pair)]
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    tokens: list[Tokens | None] = [None] * len(found)
    changes: list[list[str]] = [[] for _ in found]
    faults = [pair if isinstance(pair, str) else "" for pair in found]
    keys: list[Pair | None] = [pair if isinstance(pair, Pair) else None for pair in found]  # before anything is trimmed
    for i, pair, ids in zip(good, pairs, tokenize_pairs(TOKENIZERS[tokenizer], pairs, system), strict=True):
        if isinstance(ids, str):
            faults[i] = ids
            continue
        if not system and pair.prompt[0]["role"] == "system":
            changes[i].append("system message folded into the first user turn")
        try:
            pair, tokens[i], faults[i], change = apply_limits(TOKENIZERS[tokenizer], pair, ids, limits, system)
        except UserError as error:
            raise UserError(f"row {rows[i]}: {error}") from None
        found[i] = dataclasses.replace(pair, prompt=fold_system_message(pair.prompt, system))
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
        table[f"{side}_key"] = pa.array(
            [conversation_hash(getattr(pair, side)) if pair else "" for pair in keys], pa.string()
        )
        table[side] = messages_to_arrow([getattr(pair, side) if pair else [] for pair in pairs])
        table[f"{side}_ids"] = token_ids_to_arrow([t[i] if t else [] for t in tokens])
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


Row = dict[str, Any]


def read_conversation(row: Row) -> list[Message] | str:
    """HuggingFaceH4/ultrachat_200k, HuggingFaceH4/no_robots, allenai/tulu-v2-sft-mixture: conversations as they are."""
    messages = row.get("messages")
    return role_and_content(messages) if is_conversation(messages) else not_text(messages=messages)


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
        return role_and_content(prompt) + role_and_content(completion)
    return _turns(prompt=prompt, completion=completion)


def _turns(**columns: Any) -> list[Message] | str:
    prompt, answer = columns.values()
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return not_text(**columns)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


INSTRUCTION_READERS: dict[str, tuple[frozenset[str], Callable[[Row], list[Message] | str]]] = {
    "messages": (frozenset({"messages"}), read_conversation),
    "completion": (frozenset({"prompt", "completion"}), read_completion),
    "alpaca": (frozenset({"instruction", "output"}), read_alpaca),
}


def read_chosen(row: Row, name: str) -> list[Message] | str:
    """The better side of a preference row, so that SFT and DPO can run on the same data."""
    pairs = FORMAT_READERS[name](row, PairingConfig())
    return pairs if isinstance(pairs, str) else pairs[0].prompt + pairs[0].chosen


def load_instructions(
    sources: list[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    split: Split,
    strict: bool = False,
    num_proc: int = 0,
    system_prompt: str = "",
) -> tuple[Dataset, Dataset, RowReport]:
    """Conversations to train on, conversations held out, and the account of every row; no prompt is on both sides.

    Columns: messages; input_ids and labels, which SFTTrainer takes as they are: every assistant turn is learned, and
    nothing else; prompt_key; tokens. A preference set gives its chosen answers. `num_proc` processes prepare them, 0
    for as many as help. What was prepared is cached by the content of the rows and all that decides on it. Raises
    UserError where a set cannot be read or used, where the template is not safe to train on (see `chat.check_chat`),
    or where `strict` and a row was dropped.
    """

    def prepare(rows: Dataset, data_format: str) -> tuple[Dataset, str]:
        return _prepare_instructions(rows, tokenizer, limits, data_format, num_proc, system_prompt)

    train, held_out, account = load_and_split(sources, prepare, split, strict)
    validate_chat_template(tokenizer, train.select(range(min(VALIDATED_ROWS, len(train))))["messages"][:])
    return train, held_out, account


def prepare_instructions(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    data_format: str = "auto",
    num_proc: int = 0,
) -> tuple[Dataset, RowReport]:
    """`load_instructions` of one set that is loaded already, and not split."""
    made, name = _prepare_instructions(rows, tokenizer, limits, data_format, num_proc)
    account, kept, _ = deduplicate([PreparedSplit(made, list(range(len(rows))))])
    account.format = name
    return kept, account


def _prepare_instructions(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    data_format: str,
    num_proc: int,
    system_prompt: str = "",
) -> tuple[Dataset, str]:
    columns = set(rows.column_names)
    name = (
        data_format
        if data_format != "auto"
        else next((n for n, (c, _) in INSTRUCTION_READERS.items() if c <= columns), "")
    )
    name = name or detect_format(list_columns(rows))
    if name and name not in INSTRUCTION_READERS and name not in FORMAT_READERS:
        raise SettingsError(
            f"--data_format {name!r} is not one of auto, {', '.join({**INSTRUCTION_READERS, **FORMAT_READERS})}"
        )
    if not name or (
        name in INSTRUCTION_READERS and name not in FORMAT_READERS and not INSTRUCTION_READERS[name][0] <= columns
    ):
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}; an instruction set needs messages, prompt and "
            "completion, or instruction and output: rename them; a preference set gives its chosen answers"
        )
    chosen = (
        name not in INSTRUCTION_READERS or not INSTRUCTION_READERS[name][0] <= columns
    )  # "messages" is a name of both kinds
    if chosen:
        check_columns(name, rows.column_names)
    work = {"name": name, "chosen": chosen, "limits": limits, "system": supports_system_role(tokenizer)}
    work["system_prompt"] = system_prompt
    made = tokenize_dataset(rows, _read_instruction_batch, work, tokenizer, num_proc)
    return made, f"{name}, the chosen side" if chosen else name


def _read_instruction_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    chosen: bool,
    limits: LengthLimits,
    system: bool,
    system_prompt: str,
    tokenizer: str,
) -> Any:
    """One batch of published rows as conversations (an Arrow table); one that cannot be used stands with its fault."""
    import pyarrow as pa

    made: list[tuple[Any, ...]] = []
    special = special_token_pattern(TOKENIZERS[tokenizer])
    for position, number in enumerate(indices):
        row = {column: values[position] for column, values in batch.items()}
        messages = read_chosen(row, name) if chosen else INSTRUCTION_READERS[name][1](row)
        key, fault = ([], messages) if isinstance(messages, str) else (messages, validation_error(messages))
        if any(special.search(m["content"]) for m in key):
            fault = fault or "a control token in its text"
        if fault:
            made.append(([], [], [], fault, "", []))
            continue
        key = add_system_prompt(key, system_prompt)
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
            "prompt_key": pa.array(map(conversation_hash, prompts), pa.string()),
            "chosen_key": pa.array(map(conversation_hash, keys), pa.string()),
            "rejected_key": pa.array([""] * len(made), pa.string()),
            "messages": messages_to_arrow(conversations),
            "input_ids": token_ids_to_arrow(ids),
            "labels": token_ids_to_arrow(labels),
        }
    )


def _read_row(
    messages: list[Message], limits: LengthLimits, system: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Message], list[int], list[int], str, str]:
    """The conversation, its tokens and labels, why it cannot be used, and what was changed."""
    whole = fold_system_message(messages, system)
    change = "system message folded into the first user turn" if whole is not messages else ""
    try:
        encoded = tokenize_with_labels(tokenizer, whole)
    except UserError as error:
        return [], [], [], str(error)[:80], ""
    ids, labels = encoded["input_ids"], encoded["labels"]
    if not limits.total or len(ids) <= limits.total:
        return whole, ids, labels, "", change
    if limits.overlong == "error":
        raise UserError(f"over-long: {len(ids)} tokens, above --max_length {limits.total}: see --overlong")
    if limits.overlong == "truncate_completion" and any(label != -100 for label in labels[: limits.total]):
        inside = labels[limits.total] != -100  # else the cut is in a turn that is only read
        cut = "an answer lost its end" if inside else "turns after the last whole answer cut"
        return whole, ids[: limits.total], labels[: limits.total], "", f"{change}; {cut}" if change else cut
    if limits.overlong == "truncate_prompt":
        answer = len(ids) - len(encode_prompt(tokenizer, whole[:-1]))
        room = limits.total - answer
        prompt = truncate_prompt(tokenizer, messages[:-1], room, system) if room > 0 else []
        short = fold_system_message([*prompt, messages[-1]], system)
        encoded = tokenize_with_labels(tokenizer, short) if prompt else encoded
        if len(encoded["input_ids"]) <= limits.total:
            cut = "prompt trimmed from the left"
            return short, encoded["input_ids"], encoded["labels"], "", f"{change}; {cut}" if change else cut
    return whole, ids, labels, "over-long", ""
