"""Prepare rows for training: read, check, add the system prompt, tokenize and apply the length limits, in one pass."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from helpers.core import SettingsError, UserError, process_lock
from helpers.data.encode import TokenIds, adapt_messages, describe_rendering, encode, template_options
from helpers.data.formats import MARGIN_COLUMNS, Example, Format, PairingConfig
from helpers.data.loading import choose_format, unused_columns
from helpers.data.messages import Message, add_system_prompt, conversation_hash
from helpers.models.chat import (
    encode_prompt,
    eos_token_ids,
    fold_system_message,
    marked_template,
    special_token_pattern,
    supports_system_role,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


TOKENIZERS: dict[str, Tokenizer] = {}  # forked workers inherit them; sending one takes half a second
SIDES = ("prompt", "chosen", "rejected")
MANY_CHARACTERS = 100_000  # of a row, above which its length is bounded before it is tokenized
TOO_LONG = "longer than max_length"
PROMPT_TOO_LONG = "prompt longer than max_prompt_length"
TRUNCATED_ANSWER = "answer truncated"


@dataclasses.dataclass(frozen=True)
class LengthLimits:
    """Maximum tokens of a prompt, and of a prompt with its answer (0: no limit); what happens to longer rows."""

    max_prompt_length: int = 0
    max_length: int = 0
    overlong: Literal["drop", "truncate_prompt", "truncate_completion", "error"] = "drop"

    @property
    def bounds(self) -> tuple[int, int]:
        """Both limits as numbers to compare with."""
        return self.max_prompt_length or sys.maxsize, self.max_length or sys.maxsize


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
    messages, input_ids and labels. Both have tokens, prompt_hash and `row_report.INTERNAL_COLUMNS`. With `validate`,
    rows that the chat template makes unsafe to train on are dropped.
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
    config |= {"options": chat_template_kwargs or {}, "template": marked_template(tokenizer)}
    config["validate"] = validate
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
    here = Path(__file__).parent
    own = [here / f"{name}.py" for name in ("messages", "formats", "encode", "prepare")]
    code = [file.read_text() for file in (*own, here.parent / "models/chat.py")]
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # left from an earlier call, and without effect here
        tokenizer.backend_tokenizer.no_padding()
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [rows._fingerprint, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map, config, *code]
    parts.append(eos_token_ids(tokenizer))
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
    special, has_system_role = special_token_pattern(tokenizer), supports_system_role(tokenizer)
    prepared, usable = [], []
    for position, index in enumerate(indices):
        for example in row_format.read({column: values[position] for column, values in batch.items()}, pairing):
            row: dict[str, Any] = {"source_index": index, "drop_reason": "", "modification": ""}
            prepared.append(row)
            if isinstance(example, str):
                row["drop_reason"] = example
                continue
            example = dataclasses.replace(example, prompt=add_system_prompt(example.prompt, system_prompt))
            example, least = bound_texts(example, limits, tokenizer_key)
            if least:
                if limits.overlong == "error":
                    raise UserError(f"row {index + 1} has at least {least} tokens, more than the limits. Raise them.")
                row |= {"drop_reason": TOO_LONG, "tokens": least}
                continue
            row |= _hashes(example)
            example = dataclasses.replace(example, options=template_options(tokenizer, example, options))
            row["rendered_with"] = describe_rendering(example)
            if any(special.search(m["content"]) for side in SIDES for m in getattr(example, side)):
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
        prompt = fold_system_message(example.prompt, has_system_role)
        folded = "" if prompt is example.prompt else "system message folded into the first user turn"
        tokens = _lengths(ids)[0] if row["drop_reason"] == PROMPT_TOO_LONG else sum(_lengths(ids))
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


def bound_texts(example: Example, limits: LengthLimits, tokenizer_key: str) -> tuple[Example, int]:
    """The example without text that is beyond the limits for certain, and the least number of its tokens if that drops
    it. No token has more characters than the longest one of the vocabulary, so a huge text needs no tokens to be seen
    as too long."""
    characters, (_, max_total) = sum(len(m["content"]) for s in SIDES for m in getattr(example, s)), limits.bounds
    is_cut = limits.overlong == "truncate_completion" and not example.rejected  # a conversation, after its tokens
    if characters < MANY_CHARACTERS or max_total == sys.maxsize or is_cut:
        return example, 0
    most = max_total * _longest_token(tokenizer_key)
    prompt, chosen, rejected = (sum(len(m["content"]) for m in getattr(example, side)) for side in SIDES)
    if prompt + max(chosen, rejected) <= most:
        return example, 0
    if limits.overlong == "truncate_prompt" and max(chosen, rejected) <= most and example.prompt[-1]["role"] == "user":
        head = example.prompt[:1] if example.prompt[0]["role"] == "system" else []
        turns = example.prompt[len(head) :]
        while len(turns) > 1 and sum(len(m["content"]) for m in turns[1:]) > most:
            turns = turns[1:]
        last = turns[-1] | {"content": turns[-1]["content"][-2 * most :]}
        return dataclasses.replace(example, prompt=[*head, *turns[:-1], last]), 0
    if limits.overlong == "truncate_completion" and prompt <= most:
        cut = [[m | {"content": m["content"][: 2 * most]} for m in getattr(example, side)] for side in SIDES[1:]]
        return dataclasses.replace(example, chosen=cut[0], rejected=cut[1]), 0
    return example, (prompt + max(chosen, rejected)) // _longest_token(tokenizer_key)


@functools.cache
def _longest_token(tokenizer_key: str) -> int:
    """Characters of the longest token of a tokenizer."""
    return max(map(len, TOKENIZERS[tokenizer_key].get_vocab()))


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


def _lengths(ids: TokenIds) -> tuple[int, int]:
    """Tokens of the prompt and of the longer answer. All tokens of a conversation count as its answer."""
    return len(ids.get("prompt_ids", ())), max(len(i) for name, i in ids.items() if name != "prompt_ids")


def apply_limits(
    tokenizer: Tokenizer, example: Example, ids: TokenIds, limits: LengthLimits, template: str = ""
) -> tuple[Example, TokenIds, str, str]:
    """The example and its ids within the limits, the reason if it is dropped, and how it was modified.

    Raises UserError for an example beyond the limits if `limits.overlong` is "error".
    """
    (prompt, answer), (max_prompt, max_total) = _lengths(ids), limits.bounds
    total, is_conversation = prompt + answer, "labels" in ids
    if prompt <= max_prompt and total <= max_total:
        return example, ids, "", ""
    if limits.overlong == "error":
        raise UserError(
            f"has {total} tokens ({prompt} in the prompt), more than --max_length {limits.max_length} or "
            f"--max_prompt_length {limits.max_prompt_length}. Raise the limit, or use another `--overlong`."
        )
    if limits.overlong == "truncate_prompt":
        if is_conversation:
            answer -= _prompt_length(tokenizer, example.prompt, example.options)
        short = truncate_prompt(tokenizer, example.prompt, min(max_prompt, max_total - answer), example.options)
        shorter = dataclasses.replace(example, prompt=short)
        encoded = encode(tokenizer, [shorter], template)[0] if shorter.prompt else ""
        if not isinstance(encoded, str):
            encoded.pop("modification", None)  # as of `ids`
            if sum(_lengths(encoded)) <= max_total:
                return shorter, encoded, "", "prompt truncated from the left"
    elif limits.overlong == "truncate_completion" and is_conversation:
        if any(label != -100 for label in ids["labels"][:max_total]):
            is_in_answer = ids["labels"][max_total] != -100
            cut = TRUNCATED_ANSWER if is_in_answer else "turns after the last complete answer removed"
            return example, {name: values[:max_total] for name, values in ids.items()}, "", cut
    elif limits.overlong == "truncate_completion" and prompt <= max_prompt and prompt < max_total:
        rest = {name: values[: max_total - prompt] for name, values in ids.items() if name != "prompt_ids"}
        return example, ids | rest, "", TRUNCATED_ANSWER
    return example, ids, TOO_LONG if total > max_total else PROMPT_TOO_LONG, ""


def truncate_prompt(
    tokenizer: Tokenizer, prompt: list[Message], max_tokens: int, options: dict[str, Any] | None = None
) -> list[Message]:
    """The end of a prompt, rendered with `options` in at most `max_tokens` tokens; [] if nothing of the last turn fits.

    Removes complete turns first, oldest first, then the beginning of the last user turn. A system message stays.
    """
    head = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(head) :]
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]  # a prompt begins with one of them
    length = functools.partial(_prompt_length, tokenizer, options=options)
    fits = bisect.bisect_left(users[:-1], True, key=lambda i: length(head + turns[i:]) <= max_tokens)
    turns = turns[users[fits] :]
    text, start, starts = turns[-1]["content"], 0, list(range(len(turns[-1]["content"])))
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [begin for begin, _ in encoding["offset_mapping"]]
    while (over := length(head + turns) - max_tokens) > 0:
        start += over
        if start >= len(starts):
            return []
        at = starts[start]
        rest = text[at:]
        if at and not rest[:1].isspace() and not text[at - 1].isspace():  # inside a word: begin with the next one
            rest = [*rest.split(maxsplit=1), rest][1]
        turns = [*turns[:-1], {"role": "user", "content": rest.lstrip()}]
    return head + turns


def _prompt_length(tokenizer: Tokenizer, prompt: list[Message], options: dict[str, Any] | None = None) -> int:
    folded = fold_system_message(prompt, supports_system_role(tokenizer))
    return len(encode_prompt(tokenizer, adapt_messages(tokenizer, folded, options or {}), options))
