"""Conversations in the rows of a dataset: what they are, what is wrong with them, and a name for what they become."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from helpers.core import UserError, process_lock
from helpers.models.chat import encode_prompt, fold_system_message, render_all, special_token_pattern, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


Message = dict[str, str]
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic/hh-rlhf, and the prompts of berkeley-nest/Nectar
TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {}  # forked workers inherit them; sending one takes half a second


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and two answers, as conversations; `margin` is how much better the chosen one was rated, if it was."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | None = None


def content_fingerprint(rows: Dataset, tokenizer: PreTrainedTokenizerBase, work: dict[str, Any]) -> str:
    """A name for what becomes of `rows` under this tokenizer, these arguments and this code.

    datasets makes such names by pickling, which for tokenizers changes from one process to the next.
    """
    here = Path(__file__).parent
    sources = [here / f"{name}.py" for name in ("conversations", "formats", "prepare")] + [
        here.parent / "models/chat.py"
    ]
    code = "".join(file.read_text() for file in sources)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # what it was last asked to truncate or pad to is no difference
        tokenizer.backend_tokenizer.no_padding()
        words = tokenizer.backend_tokenizer.to_str()
    else:
        words = repr(sorted(tokenizer.get_vocab().items()))
    parts = [rows._fingerprint, words, tokenizer.chat_template, tokenizer.special_tokens_map, work, code]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def tokenize_dataset(
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
        with process_lock(fingerprint):
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


def role_and_content(value: Any) -> list[Message]:
    """Just role and content of each message: further keys would reach the chat template."""
    return [{"role": m["role"], "content": m["content"]} for m in value]


def parse_hh(text: Any) -> list[Message]:
    """The turns of a "\\n\\nHuman: ... \\n\\nAssistant: ..." text; [] where it is none."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    parts = TURN.split(text)[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]


def add_system_prompt(messages: list[Message], system_prompt: str) -> list[Message]:
    """The conversation behind a system message: its own, or `system_prompt`, if there is one."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def validation_error(messages: list[Message]) -> str:
    """Why a conversation cannot be learned from, or "": it is system?, then user and assistant in turns."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        return "no final assistant turn"
    if any(m["role"] != ("assistant" if i % 2 else "user") for i, m in enumerate(turns)):
        return "roles do not alternate"
    if any(not m["content"].strip() for m in turns):
        return "empty answer" if not turns[-1]["content"].strip() else "empty turn"
    return ""


def conversation_key(messages: list[Message]) -> str:
    """A conversation as one string that another has only if it is the same."""
    return "\x1f".join(f"{m['role']}\x1e{m['content'].strip()}" for m in messages)


def conversation_hash(messages: list[Message]) -> str:
    """`key_of` in 20 hex digits; "" for no messages."""
    return (
        hashlib.sha1(conversation_key(messages).encode("utf-8", "surrogatepass")).hexdigest()[:20] if messages else ""
    )


Overlong = Literal["drop", "truncate_prompt", "truncate_completion", "error"]
Tokens = tuple[list[int], list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class LengthLimits:
    """Tokens of a prompt, and of a prompt with its answer (0: no limit), and what becomes of a pair beyond them."""

    prompt: int = 0
    total: int = 0
    overlong: Overlong = "drop"


def tokenize_pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], system: bool = True) -> list[Tokens | str]:
    """Tokens of prompt, chosen and rejected answers, or why a pair cannot be used.

    They are those of TRL 1.16's DPOTrainer (dpo_trainer.py, _prepare_dataset), which lets a completion begin where the
    tokens of the prompt and those of prompt and answer diverge. Where that is before the prompt's end, the model would
    be trained after another prompt than it is asked with: that is a fault here. `system` is whether the template has a
    place for a system message.
    """
    special = special_token_pattern(tokenizer)
    heads = [fold_system_message(pair.prompt, system) for pair in pairs]
    prompts = render_all(tokenizer, heads, prompt=True)
    chosen = render_all(tokenizer, [[*h, *p.chosen] for h, p in zip(heads, pairs, strict=True)])
    rejected = render_all(tokenizer, [[*h, *p.rejected] for h, p in zip(heads, pairs, strict=True)])
    ids = tokenize(tokenizer, [text for text, _ in prompts + chosen + rejected])
    found: list[Tokens | str] = []
    for i, pair in enumerate(pairs):
        p, c, r = ids[i], ids[i + len(pairs)], ids[i + 2 * len(pairs)]
        fault = prompts[i][1] or chosen[i][1] or rejected[i][1]
        if not fault and any(special.search(m["content"]) for m in [*heads[i], *pair.chosen, *pair.rejected]):
            fault = "a control token in its text"
        if not fault and (c[: len(p)] != p or r[: len(p)] != p):
            fault = "the answer's first token runs into the prompt"
        found.append(fault or (p, c[len(p) :], r[len(p) :]))
    return found


def apply_limits(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, tokens: Tokens, limits: LengthLimits, system: bool = True
) -> tuple[Pair, Tokens, str, str]:
    """The pair and its tokens inside the limits; a fault where it is dropped, and what was changed where it was."""
    prompt, chosen, rejected = tokens
    longest = max(len(chosen), len(rejected))
    most = min(limits.prompt or sys.maxsize, (limits.total or sys.maxsize) - longest)
    if len(prompt) <= most:
        return pair, tokens, "", ""
    if limits.overlong == "error":
        said = f"{len(prompt)} tokens of prompt and {longest} of answer"
        raise UserError(f"over-long: {said}, above {limits.prompt} or {limits.total}: see --overlong")
    if limits.overlong == "truncate_prompt" and most > 0:
        short = truncate_prompt(tokenizer, pair.prompt, most, system)
        if short:
            pair = dataclasses.replace(pair, prompt=short)
            shorter = tokenize_pairs(tokenizer, [pair], system)[0]
            if not isinstance(shorter, str):
                return pair, shorter, "", "prompt trimmed from the left"
    fits = len(prompt) <= (limits.prompt or sys.maxsize)
    if limits.overlong == "truncate_completion" and fits and len(prompt) < limits.total:
        room = limits.total - len(prompt)
        return pair, (prompt, chosen[:room], rejected[:room]), "", "an answer lost its end"
    too_long = len(prompt) + longest > (limits.total or sys.maxsize)
    return pair, tokens, "over-long" if too_long else "prompt over-long", ""


def truncate_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], most: int, system: bool = True
) -> list[Message]:
    """The end of a prompt that fits into `most` tokens: whole turns go first, from the left, then the beginning of the
    last user turn; a system message stays. [] where nothing of the last turn would be left."""

    def length(messages: list[Message]) -> int:
        return len(encode_prompt(tokenizer, fold_system_message(messages, system)))

    head = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(head) :]
    while len(turns) > 1 and length(head + turns) > most:
        turns = turns[2:]
    text, start = turns[-1]["content"], 0
    if tokenizer.is_fast:
        words = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    else:
        words = [(i, i + 1) for i in range(len(text))]
    while (over := length([*head, *turns]) - most) > 0:
        start += over
        if start >= len(words):
            return []
        at = words[start][0]
        rest = text[at:]
        if at and not rest[:1].isspace() and not text[at - 1].isspace():  # inside a word: begin with the next
            rest = [*rest.split(maxsplit=1), rest][1]
        turns = [*turns[:-1], {"role": "user", "content": rest.lstrip()}]
    return [*head, *turns]
