"""Formats of published datasets: their columns, and a reader for each, which turns a row into examples."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from helpers.core import Row

Message = dict[str, str]
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic/hh-rlhf, and the prompts of berkeley-nest/Nectar
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")  # the first that a row has
MARGIN_COLUMNS = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))
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


# ---- Messages ----


def is_conversation(value: Any) -> bool:
    """Whether `value` is a non-empty list of messages, each with text under role and content."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in value)


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


def add_system_prompt(messages: list[Message], system_prompt: str) -> list[Message]:
    """The conversation behind `system_prompt`, unless that is empty or the conversation has a system message."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _messages(value: Any, role: str) -> list[Message]:
    """Messages without other keys, which a chat template would see. A text is a transcript, or one turn of `role`."""
    if is_conversation(value):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    return parse_hh(value) or ([{"role": role, "content": value}] if isinstance(value, str) else [])


def _prompt(value: Any) -> list[Message]:
    """A prompt as messages, without the empty assistant turn that ends a transcript."""
    messages = _messages(value, "user")
    if messages[-1:] == [{"role": "assistant", "content": ""}]:
        messages = messages[:-1]
    if not messages or not str(value).strip():
        raise _unusable("prompt", value)
    return messages


def _conversation(column: str, answer: Any, prompt: Any, system: Any = None) -> list[Message]:
    """The conversation that ends with `answer`, a text or messages. These may include the prompt."""
    messages = _messages(answer, "assistant")
    if not messages:
        raise _unusable(column, answer)
    if messages[0]["role"] == "assistant":
        messages = [*_prompt(prompt), *messages]
    messages = add_system_prompt(messages, system if isinstance(system, str) and system.strip() else "")
    if error := validation_error(messages):
        raise DropRow(error)
    return messages


def _unusable(column: str, value: Any) -> DropRow:
    """The reason to drop a row whose column is not text: it is empty, or a file was read with other types."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return DropRow(f"no {column}")
    is_number = isinstance(value, int | float | datetime.date | datetime.time)
    return DropRow("a number or a date, not text" if is_number else "not text")


def _number(value: Any) -> float | None:
    """A finite number, also given as text; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _question(row: Row, columns: Sequence[str] = PROMPT_COLUMNS) -> Any:
    """The first of these columns that a row has. Alpaca's instruction is followed by its input if that is not empty."""
    name = next((name for name in columns if name in row), "")
    text, more = row.get(name), row.get("input") if name == "instruction" else None
    return f"{text}\n\n{more}" if isinstance(text, str) and isinstance(more, str) and more.strip() else text


# ---- Pairs ----


def _pair(prompt: Any, chosen: Any, rejected: Any, system: Any = None, margin: float | None = None) -> Example:
    """A pair of texts or of messages."""
    better, worse = (
        _conversation(name, answer, prompt, system) for name, answer in (("chosen", chosen), ("rejected", rejected))
    )
    if conversation_key(better[:-1]) != conversation_key(worse[:-1]):
        raise DropRow("prompts differ")
    if better[-1]["content"].strip() == worse[-1]["content"].strip():
        raise DropRow("chosen equals rejected")
    return Example(better[:-1], better[-1:], worse[-1:], margin)


def read_pair(row: Row, config: PairingConfig) -> list[Example]:
    """A prompt and two answers, or two conversations: texts, transcripts (Anthropic/hh-rlhf) or messages."""
    if config.recommended and "status" in row:  # by the card of argilla/distilabel-intel-orca-dpo-pairs
        score = _number(row.get("chosen_score"))
        if row.get("status") == "tie" or score is None or score < 8 or row.get("in_gsm8k_train"):
            raise DropRow("not recommended by the dataset card")
    return [_pair(_question(row), row.get("chosen"), row.get("rejected"), row.get("system"), _margin(row))]


def _margin(row: Row) -> float | None:
    """The difference of the ratings of a pair, if it has both."""
    rating = row.get("rating")
    if isinstance(rating, list) and len(rating) == 2:  # in the order of generations, not of chosen and rejected
        high, low = map(_number, rating)
        return None if high is None or low is None else abs(high - low)
    for names in MARGIN_COLUMNS:
        high, low = (_number(row.get(name)) for name in names)
        if high is not None and low is not None:
            return high - low
    return None


def read_alpaca_farm(row: Row, config: PairingConfig) -> list[Example]:
    """tatsu-lab/alpaca_farm: instruction and input, two outputs, and the number (1 or 2) of the preferred output."""
    preferred = _number(row.get("preference"))
    if preferred not in (1, 2):
        raise DropRow("no preference")
    first, second = row.get("output_1"), row.get("output_2")
    chosen, rejected = (first, second) if preferred == 1 else (second, first)
    return [_pair(_question(row), chosen, rejected)]


def read_ranked(row: Row, config: PairingConfig) -> list[Example]:
    """berkeley-nest/Nectar: seven answers to one transcript, with ranks; rank 1 is the best."""
    rated = [(text, -rank) for text, rank in _rate("answers", row.get("answers"), ["rank"])]
    pairs = _pairs_of_rated(_prompt(row.get("prompt")), rated, config)
    return [dataclasses.replace(pair, margin=None) for pair in pairs]  # ranks are not ratings


def read_scored(row: Row, config: PairingConfig) -> list[Example]:
    """A prompt, several completions and their scores: openbmb/UltraFeedback, or lists of responses and scores."""
    answers = row.get("completions", row.get("responses"))
    rated = _rate("completions", answers, SCORE_KEYS, row.get("scores"))
    return _pairs_of_rated(_prompt(_question(row)), rated, config)


def _rate(column: str, answers: Any, score_keys: Sequence[str], scores: Any = None) -> list[tuple[str, float]]:
    """Text and score of each answer. The score is in the answer, or in a separate list."""
    if not isinstance(answers, list):
        raise _unusable(column, answers)
    scores, rated = scores[: len(answers)] if isinstance(scores, list) else [], []
    for answer, score in itertools.zip_longest(answers, scores):
        fields = answer if isinstance(answer, dict) else {"text": answer}
        text = next((fields[key] for key in ANSWER_KEYS if isinstance(fields.get(key), str)), None)
        numbers = [_number(value) for value in (*map(fields.get, score_keys), score)]
        number = next((n for n in numbers if n is not None), None)
        if text is None or number is None:
            raise DropRow("not text" if text is None else "no score")
        rated.append((text, number))
    return rated


def _pairs_of_rated(prompt: list[Message], rated: list[tuple[str, float]], config: PairingConfig) -> list[Example]:
    """Pairs of rated answers; the higher rating is chosen."""
    if len(rated) < 2:
        raise DropRow("fewer than two answers")
    order = sorted(rated, key=lambda answer: -answer[1])
    lower = [answer for answer in order if answer[1] < order[0][1]]
    if not lower:
        raise DropRow("tie")
    candidates = [(order[0], order[-1])]
    if config.pairing == "all_pairs":
        candidates = [(a, b) for a, b in itertools.combinations(order, 2) if a[1] > b[1]]
    elif config.pairing == "best_vs_random":
        seed = f"{config.seed} {conversation_key(prompt)}"
        candidates = [(order[0], random.Random(seed).choice(lower))]
    pairs, reasons = [], []
    for (better, high), (worse, low) in candidates:
        try:
            pairs.append(_pair(prompt, better, worse, margin=high - low))
        except DropRow as reason:
            reasons.append(reason)
    if not pairs:
        raise reasons[0]
    return pairs


def read_conversation(prompt: str, answer: str, row: Row, config: PairingConfig) -> list[Example]:
    """The columns `prompt` and `answer`, texts or messages; the latter may hold both. `label` is that of KTO."""
    if row.get("label") is False:
        raise DropRow("labelled as undesired")
    messages = _conversation(answer, row.get(answer), _question(row, [prompt]))
    return [Example(messages[:-1], messages[-1:])]


def _margin_error(margin: float | None, min_margin: float) -> str:
    if margin is None or margin >= max(min_margin, math.ulp(0)):
        return ""
    return "tie" if margin == 0 else "rejected answer rated higher" if margin < 0 else "margin below --min_margin"


# ---- Formats ----


@dataclasses.dataclass(frozen=True)
class Format:
    """How the rows of a dataset are read: a reader, the columns that it needs, and the one of them that holds lists.

    "a or b" means one of two columns. `use` is pairs, conversations, or chosen (the chosen side of pairs).
    """

    name: str
    reader: Callable[[Row, PairingConfig], list[Example]] = dataclasses.field(repr=False)  # repr is in a fingerprint
    columns: tuple[str, ...]
    lists: str = ""
    use: Literal["pairs", "conversations", "chosen"] = "pairs"

    def __str__(self) -> str:
        return f"{self.name}, the chosen side" if self.use == "chosen" else self.name

    def missing(self, columns: Mapping[str, bool]) -> list[str]:
        """What the reader needs and a dataset with these columns lacks (True: the column holds lists)."""
        needs = {need: [name for name in need.split(" or ") if name in columns] for need in self.columns}
        return [n for n, names in needs.items() if not any(columns[name] or n != self.lists for name in names)]

    def read(self, row: Row, config: PairingConfig) -> list[Example | str]:
        """The examples of a row. A string is the reason to drop the row, or one pair of it."""
        try:
            examples = self.reader(row, config if self.use == "pairs" else PairingConfig())
        except DropRow as reason:
            return [str(reason)]
        if self.use == "chosen":
            return [Example(examples[0].prompt, examples[0].chosen)]
        return [_margin_error(example.margin, config.min_margin) or example for example in examples]


PAIR_FORMATS = (  # in the order of detection. Known datasets of each: docs/data.md
    Format("messages", read_pair, ("chosen", "rejected"), lists="chosen"),
    Format("pairs", read_pair, ("prompt", "chosen", "rejected")),
    Format("orca", read_pair, ("question or input", "chosen", "rejected")),
    Format("ranked", read_ranked, ("prompt", "answers"), lists="answers"),
    Format("hh", read_pair, ("chosen", "rejected")),
    Format("alpaca_farm", read_alpaca_farm, ("instruction", "output_1", "output_2", "preference")),
    Format(
        "scored",
        read_scored,
        ("prompt or instruction or question", "completions or responses"),
        lists="completions or responses",
    ),
)
CONVERSATION_COLUMNS = {  # prompt and answer; messages hold both
    "messages": ("", "messages"),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
INSTRUCTION_FORMATS = (
    *(
        Format(name, partial(read_conversation, *columns), tuple(filter(None, columns)), use="conversations")
        for name, columns in CONVERSATION_COLUMNS.items()
    ),
    *(dataclasses.replace(pair_format, use="chosen") for pair_format in PAIR_FORMATS),
)
