"""Formats of published datasets: one reader each, which turns a row into examples or says why it cannot be used."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from helpers.core import Row

Message = dict[str, str]
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic/hh-rlhf, and the prompts of berkeley-nest/Nectar
SCORE_KEYS = ("overall_score", "score", "rating")
ANSWER_KEYS = ("response", "text", "answer", "content")


class DropRow(Exception):
    """A row cannot be used. The message is the reason, as the row report shows it."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with a chosen and a rejected answer. A conversation to imitate has no rejected answer.

    `margin` is the rating of the chosen answer minus that of the rejected one, if the dataset has ratings.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message] = dataclasses.field(default_factory=list)
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class PairingConfig:
    """Which answers of ranked and scored rows become pairs (the random one is drawn with `seed`), and which rows are
    kept: those that the card of argilla/distilabel-intel-orca-dpo-pairs recommends, ratings `min_margin` apart."""

    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = "best_vs_worst"
    recommended: bool = False
    min_margin: float = 0.0
    seed: int = 0


Reader = Callable[[Row, PairingConfig], list[Example]]


def is_conversation(value: Any) -> bool:
    """Whether `value` is a non-empty list of messages, each with text under role and content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def parse_hh(text: Any) -> list[Message]:
    """Messages of a "\\n\\nHuman: ... \\n\\nAssistant: ..." text; [] for anything else."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    parts = TURN.split(text)[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]


def validation_error(messages: list[Message]) -> str:
    """Why a conversation (system message or none, then user and assistant in turns) cannot be learned from, or ""."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        return "no final assistant turn"
    if any(m["role"] != ("assistant" if i % 2 else "user") for i, m in enumerate(turns)):
        return "roles do not alternate"
    if any(not m["content"].strip() for m in turns):
        return "empty answer" if not turns[-1]["content"].strip() else "empty turn"
    return ""


def conversation_key(messages: list[Message]) -> str:
    """One string per distinct conversation. Surrounding whitespace in a message does not count."""
    return "\x1f".join(f"{m['role']}\x1e{m['content'].strip()}" for m in messages)


def conversation_hash(messages: list[Message]) -> str:
    """The hash of `conversation_key` in 20 hex digits; "" for no messages."""
    key = conversation_key(messages).encode("utf-8", "surrogatepass")
    return hashlib.sha1(key).hexdigest()[:20] if messages else ""


def read_messages(row: Row, config: PairingConfig) -> list[Example]:
    """UltraFeedback and its derivatives: conversations under chosen and rejected, with or without a prompt column."""
    chosen, rejected = (_with_prompt(row.get("prompt"), side, row.get(side)) for side in ("chosen", "rejected"))
    scores = [_number(row.get(name)) for name in ("score_chosen", "score_rejected")]
    if None in scores:
        scores = [_number(row.get(name)) for name in ("chosen-rating", "rejected-rating")]
    return [_pair_of_conversations(chosen, rejected, *scores)]


def read_pairs(row: Row, config: PairingConfig) -> list[Example]:
    """Three texts: prompt, chosen, rejected; optionally a fourth under system."""
    return [_pair_of_texts(row.get("prompt"), row.get("chosen"), row.get("rejected"), row.get("system"))]


def read_orca(row: Row, config: PairingConfig) -> list[Example]:
    """Intel/orca_dpo_pairs (question) and argilla/distilabel-intel-orca-dpo-pairs (input, rating, chosen_score)."""
    if config.recommended and "status" in row:
        score = _number(row.get("chosen_score"))
        if row.get("status") == "tie" or score is None or score < 8 or row.get("in_gsm8k_train"):
            raise DropRow("not recommended by the dataset card")
    rating = row.get("rating")
    scores = [_number(r) for r in rating] if isinstance(rating, list) and len(rating) == 2 else [None, None]
    if None not in scores:
        scores = sorted(scores, reverse=True)  # type: ignore[type-var]  # in the order of generations, not of chosen
    prompt = row["question"] if "question" in row else row.get("input")
    return [_pair_of_texts(prompt, row.get("chosen"), row.get("rejected"), row.get("system"), *scores)]


def read_ranked(row: Row, config: PairingConfig) -> list[Example]:
    """berkeley-nest/Nectar: seven answers to one transcript, with ranks; rank 1 is the best."""
    prompt, answers = row.get("prompt"), row.get("answers")
    if not _prompt(prompt) or not isinstance(answers, list):
        raise _not_text(prompt=prompt, answers=answers)
    rated = [(text, -rank) for text, rank in _rate(answers, ["rank"], [])]
    return _pairs_of_rated(_prompt(prompt), rated, config, has_margins=False)


def read_hh(row: Row, config: PairingConfig) -> list[Example]:
    """Anthropic/hh-rlhf: two transcripts; the prompt is everything before their last answers."""
    chosen, rejected = parse_hh(row.get("chosen")), parse_hh(row.get("rejected"))
    if not chosen or not rejected:
        raise _not_text(chosen=row.get("chosen"), rejected=row.get("rejected"))
    return [_pair_of_conversations(_validated(chosen), _validated(rejected))]


def read_alpaca_farm(row: Row, config: PairingConfig) -> list[Example]:
    """tatsu-lab/alpaca_farm: instruction and input, two outputs, and the number (1 or 2) of the preferred output."""
    preferred = _number(row.get("preference"))
    if preferred not in (1, 2):
        raise DropRow("no preference")
    outputs = [row.get("output_1"), row.get("output_2")]
    return [_pair_of_texts(_instruction(row), outputs[int(preferred) - 1], outputs[2 - int(preferred)])]


def read_scored(row: Row, config: PairingConfig) -> list[Example]:
    """A prompt, several completions and their scores: openbmb/UltraFeedback, or lists of responses and scores."""
    prompt = next((row[name] for name in ("prompt", "instruction", "question") if name in row), None)
    answers, scores = row.get("completions", row.get("responses")), row.get("scores")
    if not _messages(prompt) or not isinstance(answers, list):
        raise _not_text(prompt=prompt, completions=answers)
    rated = _rate(answers, SCORE_KEYS, scores if isinstance(scores, list) else [])
    return _pairs_of_rated(_messages(prompt), rated, config, has_margins=True)


def read_conversation(row: Row, config: PairingConfig) -> list[Example]:
    """HuggingFaceH4/ultrachat_200k, HuggingFaceH4/no_robots, allenai/tulu-v2-sft-mixture: a list of messages."""
    if not is_conversation(row.get("messages")):
        raise _not_text(messages=row.get("messages"))
    return _conversation(_messages(row["messages"]))


def read_alpaca(row: Row, config: PairingConfig) -> list[Example]:
    """tatsu-lab/alpaca: instruction, input and output. Its `text` column, a rendered template, is ignored."""
    return _conversation(_turns(instruction=_instruction(row), output=row.get("output")))


def read_completion(row: Row, config: PairingConfig) -> list[Example]:
    """A prompt and its completion, as texts or as messages; a `label` as in datasets for KTO."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:
        raise DropRow("labelled as undesired")
    if is_conversation(prompt) and is_conversation(completion):
        return _conversation(_messages(prompt) + _messages(completion))
    return _conversation(_turns(prompt=prompt, completion=completion))


PAIR_READERS = (read_messages, read_pairs, read_orca, read_ranked, read_hh, read_alpaca_farm, read_scored)
FORMAT_READERS: dict[str, Reader] = {reader.__name__.removeprefix("read_"): reader for reader in PAIR_READERS}
INSTRUCTION_READERS = {"messages": read_conversation, "completion": read_completion, "alpaca": read_alpaca}


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How the rows of a dataset are read. `use` is pairs, conversations, or chosen (the chosen side of pairs)."""

    name: str
    use: Literal["pairs", "conversations", "chosen"] = "pairs"

    def __str__(self) -> str:
        return f"{self.name}, the chosen side" if self.use == "chosen" else self.name

    def read(self, row: Row, config: PairingConfig) -> list[Example | str]:
        """The examples of a row. A string is the reason to drop the row, or one pair of it."""
        try:
            if self.use == "conversations":
                return list(INSTRUCTION_READERS[self.name](row, config))
            pairs = FORMAT_READERS[self.name](row, config if self.use == "pairs" else PairingConfig())
        except DropRow as reason:
            return [str(reason)]
        if self.use == "chosen":
            return [Example(pairs[0].prompt, pairs[0].chosen)]
        return [_margin_error(pair.margin, config.min_margin) or pair for pair in pairs]


def _with_prompt(prompt: Any, side: str, answer: Any) -> list[Message]:
    """The full conversation that ends with the answer of this side."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not is_conversation(answer):
        raise _not_text(**{side: answer})
    messages = _messages(answer)
    if all(m["role"] == "assistant" for m in messages):
        opening = _messages(prompt)
        if not opening:
            raise _not_text(prompt=prompt)
        messages = [*opening, *messages]
    return _validated(messages)


def _validated(messages: list[Message]) -> list[Message]:
    if error := validation_error(messages):
        raise DropRow(error)
    return messages


def _conversation(messages: list[Message]) -> list[Example]:
    _validated(messages)
    return [Example(messages[:-1], messages[-1:])]


def _pair_of_conversations(chosen: list[Message], rejected: list[Message], *scores: float | None) -> Example:
    if conversation_key(chosen[:-1]) != conversation_key(rejected[:-1]):
        raise DropRow("prompts differ")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], *scores)


def _pair_of_texts(prompt: Any, chosen: Any, rejected: Any, system: Any = None, *scores: float | None) -> Example:
    messages = _prompt(prompt)
    if not messages or not isinstance(chosen, str) or not isinstance(rejected, str):
        raise _not_text(prompt=prompt, chosen=chosen, rejected=rejected)
    if isinstance(system, str) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    return _pair(messages, chosen, rejected, *scores)


def _pair(
    prompt: list[Message], chosen: str, rejected: str, better: float | None = None, worse: float | None = None
) -> Example:
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    for side in sides:
        _validated([*prompt, *side])
    if chosen.strip() == rejected.strip():
        raise DropRow("chosen equals rejected")
    margin = None if better is None or worse is None else better - worse
    return Example(prompt, sides[0], sides[1], margin)


def _rate(answers: list[Any], score_keys: Sequence[str], scores: list[Any]) -> list[tuple[str, float]]:
    """Text and score of each answer. The score is in the answer, or in a separate list."""
    rated = []
    for answer, score in itertools.zip_longest(answers, scores[: len(answers)]):
        fields = answer if isinstance(answer, dict) else {"text": answer}
        text = next((fields[key] for key in ANSWER_KEYS if isinstance(fields.get(key), str)), None)
        numbers = [_number(value) for value in (*map(fields.get, score_keys), score)]
        number = next((n for n in numbers if n is not None), None)
        if text is None or number is None:
            raise DropRow("not text" if text is None else "no score")
        rated.append((text, number))
    return rated


def _pairs_of_rated(
    prompt: list[Message], rated: list[tuple[str, float]], config: PairingConfig, has_margins: bool
) -> list[Example]:
    """Pairs of rated answers; the higher rating is chosen."""
    if len(rated) < 2:
        raise DropRow("fewer than two answers")
    order = sorted(rated, key=lambda answer: -answer[1])
    lower = [answer for answer in order if answer[1] < order[0][1]]
    if config.pairing == "all_pairs":
        candidates = [(a, b) for a, b in itertools.combinations(order, 2) if a[1] > b[1]]
    elif config.pairing == "best_vs_random" and lower:
        seed = f"{config.seed} {conversation_key(prompt)}"
        candidates = [(order[0], random.Random(seed).choice(lower))]
    else:
        candidates = [(order[0], order[-1])]
    if not lower:
        raise DropRow("tie")
    pairs, reasons = [], []
    for (better, high), (worse, low) in candidates:
        try:
            pairs.append(_pair(prompt, better, worse, *((high, low) if has_margins else ())))
        except DropRow as reason:
            reasons.append(reason)
    if not pairs:
        raise reasons[0]
    return pairs


def _margin_error(margin: float | None, min_margin: float) -> str:
    if margin is None or margin >= max(min_margin, math.ulp(0)):
        return ""
    return "tie" if margin == 0 else "rejected answer rated higher" if margin < 0 else "margin below --min_margin"


def _prompt(prompt: Any) -> list[Message]:
    """A prompt as messages; a "Human: ... Assistant:" text gives its turns, without the empty one at its end."""
    messages = parse_hh(prompt) or _messages(prompt)
    return messages[:-1] if messages[-1:] == [{"role": "assistant", "content": ""}] else messages


def _messages(value: Any) -> list[Message]:
    """Messages with nothing but role and content (a chat template would see more keys); a text as a user's turn."""
    if is_conversation(value):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    return [{"role": "user", "content": value}] if isinstance(value, str) and value.strip() else []


def _turns(**columns: Any) -> list[Message]:
    prompt, answer = columns.values()
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise _not_text(**columns)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _instruction(row: Row) -> Any:
    """Alpaca's instruction, followed by its input if that is not empty."""
    text, more = row.get("instruction"), row.get("input")
    return f"{text}\n\n{more}" if isinstance(text, str) and isinstance(more, str) and more.strip() else text


def _not_text(**columns: Any) -> DropRow:
    """The reason to drop a row whose columns are not all text: one is missing, or a file was read with other types."""
    for name, value in columns.items():
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            return DropRow(f"no {name}")
    is_number = any(isinstance(v, int | float | datetime.date | datetime.time) for v in columns.values())
    return DropRow("a number or a date, not text" if is_number else "not text")


def _number(value: Any) -> float | None:
    """A finite number, also given as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
