"""Pairs as tokens, and what becomes of those that are too long: no answer is cut unless that is asked for by name."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

from helpers.chat import encode_prompt, folded, render_all, special_text, tokenize
from helpers.errors import UserError
from helpers.formats import Pair
from helpers.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "trim_prompt", "cut_answer", "error"]
Tokens = tuple[list[int], list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Tokens of a prompt, and of a prompt with its answer (0: no limit), and what becomes of a pair beyond them."""

    prompt: int = 0
    total: int = 0
    overlong: Overlong = "drop"


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], system: bool = True) -> list[Tokens | str]:
    """Tokens of prompt, chosen and rejected answers, or why a pair cannot be used.

    They are those of TRL 1.16's DPOTrainer (dpo_trainer.py, _prepare_dataset), which lets a completion begin where the
    tokens of the prompt and those of prompt and answer diverge. Where that is before the prompt's end, the model would
    be trained after another prompt than it is asked with: that is a fault here. `system` is whether the template has a
    place for a system message.
    """
    special = special_text(tokenizer)
    heads = [folded(pair.prompt, system) for pair in pairs]
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


def within(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, tokens: Tokens, limits: Limits, system: bool = True
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
    if limits.overlong == "trim_prompt" and most > 0:
        short = trim_prompt(tokenizer, pair.prompt, most, system)
        if short:
            pair = dataclasses.replace(pair, prompt=short)
            shorter = encode_pairs(tokenizer, [pair], system)[0]
            if not isinstance(shorter, str):
                return pair, shorter, "", "prompt trimmed from the left"
    fits = len(prompt) <= (limits.prompt or sys.maxsize)
    if limits.overlong == "cut_answer" and fits and len(prompt) < limits.total:
        room = limits.total - len(prompt)
        return pair, (prompt, chosen[:room], rejected[:room]), "", "an answer lost its end"
    too_long = len(prompt) + longest > (limits.total or sys.maxsize)
    return pair, tokens, "over-long" if too_long else "prompt over-long", ""


def trim_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], most: int, system: bool = True
) -> list[Message]:
    """The end of a prompt that fits into `most` tokens: whole turns go first, from the left, then the beginning of the
    last user turn; a system message stays. [] where nothing of the last turn would be left."""

    def length(messages: list[Message]) -> int:
        return len(encode_prompt(tokenizer, folded(messages, system)))

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
