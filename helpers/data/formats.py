"""Preference data as it is published: one pure adapter a format, row in, pairs or a reason out."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from helpers.core import UserError
from helpers.data.conversations import (
    Message,
    Pair,
    conversation_key,
    is_conversation,
    parse_hh,
    role_and_content,
    validation_error,
)

Row = dict[str, Any]
SCORES = ("overall_score", "score", "rating")
ANSWERS = ("response", "text", "answer", "content")


@dataclasses.dataclass(frozen=True)
class PairingConfig:
    """`pairing` of ranked and scored rows: best against worst, against a random other (seeded), or all pairs;
    `recommended` keeps only the rows that argilla/distilabel-intel-orca-dpo-pairs recommends; pairs rated closer than
    `min_margin` are dropped, ties always; `system_prompt` goes before pairs without a system message of their own."""

    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = "best_vs_worst"
    recommended: bool = False
    min_margin: float = 0.0
    system_prompt: str = ""
    seed: int = 0


FormatReader = Callable[[Row, PairingConfig], list[Pair] | str]


def read_messages(row: Row, options: PairingConfig) -> list[Pair] | str:
    """Conversations under chosen and rejected, holding the prompt or beside one: UltraFeedback and its kin."""
    sides = []
    for name in ("chosen", "rejected"):
        messages = _with_prompt(row.get("prompt"), name, row.get(name))
        if isinstance(messages, str):
            return messages
        sides.append(messages)
    chosen, rejected = sides
    if conversation_key(chosen[:-1]) != conversation_key(rejected[:-1]):
        return "prompts differ"
    scores = [_number(row.get(n)) for n in ("score_chosen", "score_rejected")]
    if None in scores:
        scores = [_number(row.get(n)) for n in ("chosen-rating", "rejected-rating")]
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], *scores)


def read_pairs(row: Row, options: PairingConfig) -> list[Pair] | str:
    """Three texts: prompt, chosen, rejected; a text under system, where there is one, goes before them."""
    return _texts(row.get("prompt"), row.get("chosen"), row.get("rejected"), row.get("system"))


def read_orca(row: Row, options: PairingConfig) -> list[Pair] | str:
    """Intel/orca_dpo_pairs (question) and argilla/distilabel-intel-orca-dpo-pairs (input, rating, chosen_score)."""
    if options.recommended and "status" in row:
        score = _number(row.get("chosen_score"))
        if row.get("status") == "tie" or score is None or score < 8 or row.get("in_gsm8k_train"):
            return "not recommended by its card"
    prompt = row["question"] if "question" in row else row.get("input")
    rating = row.get("rating")
    scores = [_number(r) for r in rating] if isinstance(rating, list) and len(rating) == 2 else [None, None]
    if None not in scores:
        scores = sorted(scores, reverse=True)  # type: ignore[type-var]  # in the order of generations, not of chosen
    return _texts(prompt, row.get("chosen"), row.get("rejected"), row.get("system"), *scores)


def read_ranked(row: Row, options: PairingConfig) -> list[Pair] | str:
    """berkeley-nest/Nectar: seven answers with ranks, 1 the best, to one transcript."""
    prompt = _transcript_or_user(row.get("prompt"))
    answers = row.get("answers")
    if not prompt or not isinstance(answers, list):
        return not_text(prompt=row.get("prompt"), answers=answers)
    rated = []
    for answer in answers:
        text, rank = (answer.get("answer"), _number(answer.get("rank"))) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or rank is None:
            return "not text"
        rated.append((text, -rank))
    return _pairings(prompt, rated, options, margins=False)


def read_hh(row: Row, options: PairingConfig) -> list[Pair] | str:
    """Anthropic/hh-rlhf: two transcripts; the prompt is the shared turns up to the last "Assistant:"."""
    chosen, rejected = parse_hh(row.get("chosen")), parse_hh(row.get("rejected"))
    if not chosen or not rejected:
        return not_text(chosen=row.get("chosen"), rejected=row.get("rejected"))
    for messages in (chosen, rejected):
        if fault := validation_error(messages):
            return fault
    if conversation_key(chosen[:-1]) != conversation_key(rejected[:-1]):
        return "prompts differ"
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def read_alpaca_farm(row: Row, options: PairingConfig) -> list[Pair] | str:
    """tatsu-lab/alpaca_farm: instruction and input, two outputs, and which of them (1 or 2) is preferred."""
    text, more = row.get("instruction"), row.get("input")
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"
    preferred = _number(row.get("preference"))
    if preferred not in (1, 2):
        return "no preference"
    outputs = [row.get("output_1"), row.get("output_2")]
    return _texts(text, outputs[int(preferred) - 1], outputs[2 - int(preferred)])


def read_scored(row: Row, options: PairingConfig) -> list[Pair] | str:
    """A prompt with several completions and their scores: openbmb/UltraFeedback, or lists of responses and scores."""
    prompt = next((row[n] for n in ("prompt", "instruction", "question") if n in row), None)
    messages = role_and_content(prompt) if is_conversation(prompt) else _user(prompt)
    answers, scores = row.get("completions", row.get("responses")), row.get("scores")
    if not messages or not isinstance(answers, list):
        return not_text(prompt=prompt, completions=answers)
    rated = []
    for i, answer in enumerate(answers):
        text, score = answer, scores[i] if isinstance(scores, list) and i < len(scores) else None
        if isinstance(answer, dict):
            text = next((answer[n] for n in ANSWERS if isinstance(answer.get(n), str)), None)
            score = next((answer[n] for n in SCORES if _number(answer.get(n)) is not None), score)
        if not isinstance(text, str):
            return "not text"
        if (number := _number(score)) is None:
            return "no score"
        rated.append((text, number))
    return _pairings(messages, rated, options, margins=True)


FORMAT_READERS: dict[str, FormatReader] = {
    "messages": read_messages,
    "triplet": read_pairs,
    "orca": read_orca,
    "ranked": read_ranked,
    "transcript": read_hh,
    "alpaca_farm": read_alpaca_farm,
    "scored": read_scored,
}


def _with_prompt(prompt: Any, side: str, answer: Any) -> list[Message] | str:
    """A whole conversation that ends with the answer of this side, or the reason why it is none."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not is_conversation(answer):
        return not_text(**{side: answer})
    messages = role_and_content(answer)
    if all(m["role"] == "assistant" for m in messages):
        before = role_and_content(prompt) if is_conversation(prompt) else _user(prompt)
        if not before:
            return not_text(prompt=prompt)
        messages = [*before, *messages]
    return validation_error(messages) or messages


def _texts(prompt: Any, chosen: Any, rejected: Any, system: Any = None, *scores: float | None) -> list[Pair] | str:
    messages = role_and_content(prompt) if is_conversation(prompt) else _transcript_or_user(prompt)
    if not messages or not isinstance(chosen, str) or not isinstance(rejected, str):
        return not_text(prompt=prompt, chosen=chosen, rejected=rejected)
    if isinstance(system, str) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    return _pair(messages, chosen, rejected, *scores)


def _pair(
    prompt: list[Message], chosen: str, rejected: str, better: float | None = None, worse: float | None = None
) -> list[Pair] | str:
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    for side in sides:
        if fault := validation_error([*prompt, *side]):
            return fault
    if chosen.strip() == rejected.strip():
        return "chosen equals rejected"
    margin = better - worse if better is not None and worse is not None else None
    return [Pair(prompt, sides[0], sides[1], margin)]


def _pairings(
    prompt: list[Message], rated: list[tuple[str, float]], options: PairingConfig, margins: bool
) -> list[Pair] | str:
    """Pairs of rated answers; the higher score is chosen."""
    if len(rated) < 2:
        return "fewer than two answers"
    order = sorted(rated, key=lambda answer: -answer[1])
    if options.pairing == "all_pairs":
        pairs = [(a, b) for a, b in itertools.combinations(order, 2) if a[1] > b[1]]
    else:
        others = [answer for answer in order[1:] if answer[1] < order[0][1]]
        seed = f"{options.seed} {conversation_key(prompt)}"
        other = random.Random(seed).choice(others) if options.pairing == "best_vs_random" and others else order[-1]
        pairs = [(order[0], other)]
    if not pairs or pairs[0][0][1] == pairs[0][1][1]:
        return "tie"
    found: list[Pair] = []
    fault = ""
    for (better, high), (worse, low) in pairs:
        made = _pair(prompt, better, worse, *((high, low) if margins else ()))
        if isinstance(made, str):
            fault = fault or made
        else:
            found += made
    return found or fault


def _transcript_or_user(prompt: Any) -> list[Message]:
    """A text as a user's turn; "Human: ... Assistant:" turns as these, but for the one that the answers fill."""
    messages = parse_hh(prompt) or _user(prompt)
    return messages[:-1] if messages[-1:] == [{"role": "assistant", "content": ""}] else messages


def not_text(**columns: Any) -> str:
    """The reason for a row whose columns are not all texts: numbers and dates are what files are often mistaken for."""
    for name, value in columns.items():
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            return f"no {name}"
    mistaken = any(isinstance(v, int | float | datetime.date | datetime.time) for v in columns.values())
    return "a number or a date, not text" if mistaken else "not text"


def _user(text: Any) -> list[Message]:
    return [{"role": "user", "content": text}] if isinstance(text, str) and text.strip() else []


def _number(value: Any) -> float | None:
    """A finite number, also as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# What each format of preference data reads, or of several names one.
REQUIRED_COLUMNS = {
    "messages": ("chosen", "rejected"),
    "triplet": ("prompt", "chosen", "rejected"),
    "orca": ("question or input", "chosen", "rejected"),
    "ranked": ("prompt", "answers"),
    "transcript": ("chosen", "rejected"),
    "alpaca_farm": ("instruction", "output_1", "output_2", "preference"),
    "scored": ("prompt or instruction or question", "completions or responses"),
}
LOOKED_AT = 100  # rows that show what a column of mixed types mostly holds


def list_columns(rows: Any) -> dict[str, bool]:
    """Columns of a dataset, and whether each holds lists."""
    kinds = {name: str(kind) for name, kind in rows.features.items()}
    found = {name: kind.startswith(("List", "LargeList", "[")) for name, kind in kinds.items()}
    for name in [name for name, kind in kinds.items() if kind.startswith("Json")]:  # a few rows are not like the rest
        values = rows.select(range(min(LOOKED_AT, len(rows))))[name][:]
        found[name] = 2 * sum(isinstance(value, list) for value in values) > len(values)
    return found


def detect_format(columns: dict[str, bool]) -> str:
    """The format of a dataset with these columns (True where a column holds lists), or "" where it is none of ours."""
    have = set(columns)
    if {"chosen", "rejected"} <= have:
        if columns["chosen"]:
            return "messages"
        if "question" in have or ("input" in have and "prompt" not in have):
            return "orca"
        return "triplet" if "prompt" in have else "transcript"
    if {"instruction", "output_1", "output_2", "preference"} <= have:
        return "alpaca_farm"
    if {"prompt", "answers"} <= have and columns["answers"]:
        return "ranked"
    if {"prompt", "instruction", "question"} & have and (columns.get("completions") or {"responses", "scores"} <= have):
        return "scored"
    return ""


def check_columns(name: str, columns: Collection[str]) -> None:
    """Raise UserError where a set has not the columns of the format that it is said to have."""
    if lacking := [one for one in REQUIRED_COLUMNS[name] if not set(one.split(" or ")) & set(columns)]:
        raise UserError(
            f"the dataset has columns {', '.join(columns)}, and no {', no '.join(lacking)}, which the format {name} "
            "needs: rename them, or name another with --data_format"
        )


def messages_to_arrow(conversations: list[list[Message]]) -> Any:
    """Lists of {role, content} as an Arrow array, made from its columns rather than from dicts one by one."""
    import pyarrow as pa

    messages = list(itertools.chain.from_iterable(conversations))
    fields = [pa.array([m[name] for m in messages], pa.string()) for name in ("role", "content")]
    struct = pa.StructArray.from_arrays(fields, ["role", "content"])
    return pa.ListArray.from_arrays(_offsets(conversations), struct)


def token_ids_to_arrow(lists: list[list[int]]) -> Any:
    """Lists of token ids as an Arrow array of int32."""
    import pyarrow as pa

    flat = pa.array(list(itertools.chain.from_iterable(lists)), pa.int32())
    return pa.ListArray.from_arrays(_offsets(lists), flat)


def _offsets(lists: Sequence[Sequence[Any]]) -> Any:
    import pyarrow as pa

    return pa.array([0, *itertools.accumulate(map(len, lists))], pa.int32())
