"""Pairs as tokens, and what becomes of those that are too long: no answer is cut unless that is asked for by name."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

from helpers.chat import encode_prompt, render_all, tokenize
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


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> list[Tokens | str]:
    """Tokens of prompt, chosen and rejected answers, or why the template refuses a pair.

    They are those of TRL 1.16's DPOTrainer (dpo_trainer.py, _prepare_dataset): a completion begins where the tokens
    of the prompt and those of prompt and answer diverge.
    """
    prompts = render_all(tokenizer, [p.prompt for p in pairs], prompt=True)
    chosen = render_all(tokenizer, [[*p.prompt, *p.chosen] for p in pairs])
    rejected = render_all(tokenizer, [[*p.prompt, *p.rejected] for p in pairs])
    ids = tokenize(tokenizer, [text for text, _ in prompts + chosen + rejected])
    found: list[Tokens | str] = []
    for i in range(len(pairs)):
        if fault := prompts[i][1] or chosen[i][1] or rejected[i][1]:
            found.append(fault)
            continue
        p, c, r = ids[i], ids[i + len(pairs)], ids[i + 2 * len(pairs)]
        at = min(_common_prefix(p, c), _common_prefix(p, r))
        found.append((c[:at], c[at:], r[at:]))
    return found


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def within(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, tokens: Tokens, limits: Limits
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
        short = trim_prompt(tokenizer, pair.prompt, most)
        if short:
            pair = dataclasses.replace(pair, prompt=short)
            shorter = encode_pairs(tokenizer, [pair])[0]
            if not isinstance(shorter, str):
                return pair, shorter, "", "prompt trimmed from the left"
    if limits.overlong == "cut_answer" and len(prompt) < (limits.total or sys.maxsize):
        room = limits.total - len(prompt) if limits.total else sys.maxsize
        cut = longest > room
        return pair, (prompt, chosen[:room], rejected[:room]), "", "an answer lost its end" if cut else ""
    return pair, tokens, "over-long", ""


def trim_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], most: int) -> list[Message]:
    """The end of a prompt that fits into `most` tokens: whole turns go first, from the left, then the beginning of the
    last user turn; a system message stays. [] where nothing of the last turn would be left."""

    head = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(head) :]
    while len(turns) > 1 and len(encode_prompt(tokenizer, head + turns)) > most:
        turns = turns[2:]
    text, start = turns[-1]["content"], 0
    if tokenizer.is_fast:
        words = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    else:
        words = [(i, i + 1) for i in range(len(text))]
    while (over := len(encode_prompt(tokenizer, [*head, *turns])) - most) > 0:
        start += over
        if start >= len(words):
            return []
        rest = text[words[start][0] :]
        if not text[words[start][0] - 1].isspace():
            rest = rest[len(rest.split(maxsplit=1)[0]) :] if len(rest.split(maxsplit=1)) > 1 else rest  # a whole word
        turns = [*turns[:-1], {"role": "user", "content": rest.lstrip()}]
    return [*head, *turns]
