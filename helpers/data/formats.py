"""Formats of published datasets: their columns, and a reader for each, which turns a row into examples."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from helpers.core import Row, SettingsError, UserError
from helpers.data.messages import (
    MESSAGE_KEYS,
    ROLE_KEYS,
    DropRow,
    Message,
    add_system_prompt,
    conversation_key,
    ends_with_answer,
    holds_lists_as_text,
    parse_hh,
    parse_text,
    to_history,
    to_messages,
    to_objects,
    unusable,
    validation_error,
)
from helpers.settings.fields import RENDERING_ARGUMENTS

if TYPE_CHECKING:
    from datasets import Dataset

# Columns, by what they hold; the first that a row has is read.
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "instruction", "question", "input")
SYSTEM_COLUMNS = ("system", "system_prompt")
MORE_COLUMNS = ("input", "context")  # follow an instruction
MARGIN_COLUMNS = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"),
                  ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
                  ("chosen_score", "rejected_score"))  # fmt: skip
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row that its chat template gets
IMAGE_COLUMNS = ("image", "images")
SCORE_KEYS = ("overall_score", "score", "rating")
ANSWER_KEYS = ("response", "text", "answer", "content")
PROBED_ROWS = 100  # of a dataset, that show what its columns hold


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with a chosen and a rejected answer. A conversation to imitate has no rejected answer.

    `margin` is the rating of the chosen answer minus that of the rejected one, if the dataset has ratings.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message] = dataclasses.field(default_factory=list)
    margin: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # tools, and variables of the chat template


@dataclasses.dataclass(frozen=True)
class PairingConfig:
    """Which answers of ranked and scored rows become pairs (the random one is drawn with `seed`), and which rows are
    kept: those that the card of argilla/distilabel-intel-orca-dpo-pairs recommends, ratings `min_margin` apart."""

    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = "best_vs_worst"
    recommended: bool = False
    min_margin: float = 0.0
    seed: int = 0


# ---- Parts of a row ----


def _prompt(value: Any) -> list[Message]:
    """A prompt as messages, without the empty assistant turn that ends a transcript."""
    messages = to_messages(value, "user")
    if messages[-1:] == [{"role": "assistant", "content": ""}]:
        messages.pop()
    if not messages:
        raise unusable("prompt", value)
    return messages


def _conversation(column: str, answer: Any, prompt: Any, row: Row) -> list[Message]:
    """The conversation that ends with `answer`, a text or messages, which may include the prompt."""
    messages = to_messages(answer, "assistant")
    if not messages:
        raise unusable(column, answer)
    if messages[0]["role"] == "assistant":
        messages = [*_prompt(prompt), *messages]
    system = next(filter(None, map(row.get, SYSTEM_COLUMNS)), "")
    if not isinstance(system, str):
        raise unusable("system", system)
    if history := to_history(row.get("history")):
        first = int(messages[0]["role"] == "system")
        messages = [*messages[:first], *history, *messages[first:]]
    messages = add_system_prompt(messages, system if system.strip() else "")
    if error := validation_error(messages):
        raise DropRow(error)
    return messages


def row_template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets for a row: its tools, a list or one tool, and its variables. Both may be JSON."""
    tools, objects = (to_objects(name, row.get(name)) for name in TEMPLATE_COLUMNS)
    variables = objects[0] if objects else {}
    if len(objects) > 1:
        raise DropRow(f"{TEMPLATE_COLUMNS[1]} with more than one object")
    if taken := sorted({*variables} & RENDERING_ARGUMENTS):
        raise DropRow(f"{TEMPLATE_COLUMNS[1]} with {taken[0]}, which is not a variable of a template")
    return variables | ({"tools": tools} if tools else {})


def template_columns(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `row_template_options` gave, as columns of a row: tools, and the variables as chat_template_kwargs."""
    values = options.get("tools"), {name: value for name, value in options.items() if name != "tools"}
    return {name: value for name, value in zip(TEMPLATE_COLUMNS, values, strict=True) if value}


def _number(value: Any) -> float | None:
    """A finite number, also given as text; None for anything else."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    return None


def _filled(columns: Sequence[str], row: Row, is_prompt: bool = False) -> str:
    """The first of these columns that is not empty in a row, for a prompt also without its answer; else the first that
    it has, "" for none."""
    given = [name for name in columns if name in row]
    for name in given:
        if (value := row.get(name)) not in (None, "", []) and not (is_prompt and ends_with_answer(value)):
            return name
    return next(iter(given), "")


def _question(row: Row, columns: Sequence[str] = PROMPT_COLUMNS) -> Any:
    """The prompt in one of these columns. An instruction is followed by its input if that is not empty."""
    name = _filled(columns, row, is_prompt=True)
    text, rest = row.get(name), (row.get(more) for more in MORE_COLUMNS if name == "instruction")
    parts = [part for part in (text, *rest) if isinstance(part, str) and part.strip()]
    return "\n\n".join(parts) if isinstance(text, str) else text


# ---- Pairs ----


def _pair(prompt: Any, chosen: Any, rejected: Any, row: Row, margin: float | None = None) -> Example:
    """A pair of texts or of messages."""
    better, worse = _conversation("chosen", chosen, prompt, row), _conversation("rejected", rejected, prompt, row)
    if conversation_key(better[:-1]) != conversation_key(worse[:-1]):
        raise DropRow("prompts differ")
    if conversation_key(better[-1:]) == conversation_key(worse[-1:]):
        raise DropRow("chosen equals rejected")
    return Example(better[:-1], better[-1:], worse[-1:], margin, row_template_options(row))


def read_pair(row: Row, config: PairingConfig) -> list[Example]:
    """A prompt and two answers, or two conversations: texts, transcripts (Anthropic/hh-rlhf) or messages."""
    if config.recommended and "status" in row:  # by the card of argilla/distilabel-intel-orca-dpo-pairs
        score = _number(row.get("chosen_score"))
        if row.get("status") == "tie" or score is None or score < 8 or row.get("in_gsm8k_train"):
            raise DropRow("not recommended by the dataset card")
    return [_pair(_question(row), row.get("chosen"), row.get("rejected"), row, _margin(row))]


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
    outputs, preferred = (row.get("output_1"), row.get("output_2")), _number(row.get("preference"))
    if preferred not in (1, 2):
        raise DropRow("no preference")
    return [_pair(_question(row), *(outputs if preferred == 1 else outputs[::-1]), row)]


def read_ranked(row: Row, config: PairingConfig) -> list[Example | str]:
    """berkeley-nest/Nectar: seven answers to one transcript, with ranks; rank 1 is the best."""
    rated = [(text, -rank) for text, rank in _rate("answers", row.get("answers"), ["rank"])]
    pairs = _pairs_of_rated(_prompt(row.get("prompt")), rated, row, config)
    return [p if isinstance(p, str) else dataclasses.replace(p, margin=None) for p in pairs]  # ranks are not ratings


def read_scored(row: Row, config: PairingConfig) -> list[Example | str]:
    """A prompt, several completions and their scores: openbmb/UltraFeedback, or lists of responses and scores."""
    answers = _filled(ANY_ANSWERS.split(" or "), row)
    rated = _rate(answers, row.get(answers), SCORE_KEYS, row.get("scores"))
    return _pairs_of_rated(_prompt(_question(row)), rated, row, config)


def _rate(column: str, answers: Any, score_keys: Sequence[str], scores: Any = None) -> list[tuple[str, float]]:
    """Text and score of each answer. The score is in the answer, or in a separate list."""
    if not isinstance(answers, list):
        raise unusable(column, answers)
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


def _pairs_of_rated(
    prompt: list[Message], rated: list[tuple[str, float]], row: Row, config: PairingConfig
) -> list[Example | str]:
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
    pairs: list[Example | str] = []  # a text is the reason why two answers make no pair
    for (better, high), (worse, low) in candidates:
        try:
            pairs.append(_pair(prompt, better, worse, row, high - low))
        except DropRow as reason:
            pairs.append(str(reason))
    return pairs


def read_conversation(prompts: Sequence[str], answers: Sequence[str], row: Row, config: PairingConfig) -> list[Example]:
    """The first of the columns `prompts` and of `answers` that a row has, texts or messages; the latter may hold both.
    `label` is that of datasets for KTO, if it is true or false."""
    if (label := row.get("label")) is False or label in ("False", "false"):
        raise DropRow("labelled as undesired")
    answer = _filled(answers, row) or answers[0]
    messages = _conversation(answer, row.get(answer), _question(row, prompts), row)
    if not any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages):
        raise DropRow("no turn is trained on")
    return [Example(messages[:-1], messages[-1:], options=row_template_options(row))]


def _margin_error(margin: float | None, min_margin: float) -> str:
    if margin is None or margin >= max(min_margin, math.ulp(0)):
        return ""
    return "tie" if margin == 0 else "rejected answer rated higher" if margin < 0 else "margin below --min_margin"


# ---- Formats ----


@dataclasses.dataclass(frozen=True)
class Format:
    """How the rows of a dataset are read: a reader, the columns that it needs, and the one of them that holds lists.

    "a or b" means one of several columns. `use` is pairs, conversations, or chosen (the chosen side of pairs). Of a
    dataset: `as_text` are columns that hold lists as text, `unused` are columns and keys of messages that are not read.
    """

    name: str
    reader: Callable[[Row, PairingConfig], Sequence[Example | str]] = dataclasses.field(repr=False)  # not fingerprinted
    columns: tuple[str, ...]
    lists: str = ""
    use: Literal["pairs", "conversations", "chosen"] = "pairs"
    as_text: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, the chosen side" if self.use == "chosen" else self.name

    def missing(self, columns: Mapping[str, bool]) -> list[str]:
        """What the reader needs and a dataset with these columns lacks (True: the column holds lists)."""
        needs = {need: [name for name in need.split(" or ") if name in columns] for need in self.columns}
        return [n for n, names in needs.items() if not any(columns[name] or n != self.lists for name in names)]

    def read(self, row: Row, config: PairingConfig) -> list[Example | str]:
        """The examples of a row. A string is the reason to drop the row, or one pair of it."""
        try:
            for name in self.as_text:
                row[name] = parse_text(row.get(name))
            if any(row.get(name) for name in IMAGE_COLUMNS):
                raise DropRow("images")
            examples = self.reader(row, config if self.use == "pairs" else PairingConfig())
        except DropRow as reason:
            return [str(reason)]
        if self.use == "chosen":
            return [e if isinstance(e, str) else Example(e.prompt, e.chosen, options=e.options) for e in examples[:1]]
        return [e if isinstance(e, str) else _margin_error(e.margin, config.min_margin) or e for e in examples]


class TrackedRow(dict[str, Any]):
    """A row that remembers which of its columns were read, with `get`."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def unused_columns(rows: Dataset, row_format: Format, pairing: PairingConfig) -> tuple[str, ...]:
    """Columns of a dataset that reading its first rows does not touch, and such keys of their messages."""
    read, keys = set[str](), dict[str, None]()
    for values in rows.take(min(PROBED_ROWS, len(rows))):
        row = TrackedRow(values)
        row_format.read(row, pairing)
        read |= row.read
        for name, value in row.items():
            for message in (value if isinstance(value, list) else [value]) if name in row.read else ():
                if isinstance(message, dict) and {*ROLE_KEYS} & message.keys():
                    unread = [k for k, v in message.items() if k not in MESSAGE_KEYS and v not in (None, "", [])]
                    keys |= {f"{name}.{key}": None for key in unread}
    return (*(name for name in rows.column_names if name not in read), *keys)


ANY_PROMPT = "prompt or instruction or messages or conversations"
ANY_ANSWERS = "completions or responses"
PAIR_FORMATS = (  # in the order of detection. Known datasets of each: docs/data.md
    Format("messages", read_pair, ("chosen", "rejected"), lists="chosen"),
    Format("pairs", read_pair, (ANY_PROMPT, "chosen", "rejected")),
    Format("orca", read_pair, ("question or input", "chosen", "rejected")),
    Format("ranked", read_ranked, ("prompt", "answers"), lists="answers"),
    Format("hh", read_pair, ("chosen", "rejected")),
    Format("alpaca_farm", read_alpaca_farm, ("instruction", "output_1", "output_2", "preference")),
    Format("scored", read_scored, ("prompt or instruction or question", ANY_ANSWERS), lists=ANY_ANSWERS),
)
CONVERSATION_COLUMNS = {  # prompt and answer, the first that there is of each; messages hold both
    "messages": ((), ("messages",)),
    "sharegpt": ((), ("conversations",)),
    "completion": (("prompt", "question"), ("completion", "response", "answer")),
    "alpaca": (("instruction",), ("output", "response")),
}
INSTRUCTION_FORMATS = tuple(
    Format(name, partial(read_conversation, *columns), tuple(" or ".join(c) for c in columns if c), use="conversations")
    for name, columns in CONVERSATION_COLUMNS.items()
) + tuple(dataclasses.replace(pair_format, use="chosen") for pair_format in PAIR_FORMATS)


def choose_format(rows: Dataset, data_format: str, use_pairs: bool) -> Format:
    """How to read a dataset: as `data_format`, or with "auto" as its columns suggest. Raises SettingsError for an
    unknown format, UserError for columns that do not fit."""
    known, columns = PAIR_FORMATS if use_pairs else INSTRUCTION_FORMATS, dict.fromkeys(rows.column_names, True)
    names = ", ".join(dict.fromkeys(each.name for each in known))
    candidates = known if data_format == "auto" else [each for each in known if each.name == data_format]
    if not candidates:
        raise SettingsError(f"--data_format {data_format!r} is unknown. Use auto, {names}.")
    first = rows[:PROBED_ROWS]
    as_text = tuple(name for name, values in first.items() if holds_lists_as_text(name, values))
    if data_format == "auto":  # a format that is named is taken at its word
        for name, values in first.items():
            lists = sum(isinstance(v, list | dict) for v in values)
            columns[name] = name in as_text or 2 * lists > sum(v is not None for v in values)
        ended = sum(map(ends_with_answer, [*first.get("messages", ()), *first.get("conversations", ())]))
        if not use_pairs and {"chosen", "rejected"} <= columns.keys() and 2 * ended <= min(len(rows), PROBED_ROWS):
            candidates = sorted(candidates, key=lambda each: each.use != "chosen")
    fitting = next((each for each in candidates if not each.missing(columns)), None)
    if fitting and fitting.name == "hh" and data_format == "auto":  # known by the marks of its transcripts
        fitting = fitting if 2 * sum(map(bool, map(parse_hh, first["chosen"]))) >= len(first["chosen"]) else None
    if fitting:
        return dataclasses.replace(fitting, as_text=as_text)
    have = f"the dataset has columns {', '.join(columns)}"
    if data_format != "auto":
        lacking = ", no ".join(candidates[-1].missing(columns))
        raise UserError(
            f"{have}, and no {lacking}, which the format {data_format} needs. Rename them, or use another "
            "`--data_format`."
        )
    needs = "prompt, chosen and rejected" if use_pairs else "messages, prompt and completion, or instruction and output"
    raise UserError(
        f"{have}, which match no known format. Rename them to {needs}, or set `--data_format` to one of {names}."
    )
