"""Tokenize examples with the chat template, and apply the limits on their lengths."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from helpers.core import UserError
from helpers.data.formats import Example
from helpers.data.messages import Message
from helpers.models import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Outcome = TypeVar("Outcome")
TokenIds = dict[str, Any]  # by column; of a changed example also its "modification"
SIDES = ("prompt", "chosen", "rejected")
LAST_LEARNED = "only the last answer is trained on: the chat template renders earlier ones differently"
THOUGHTS_LOST = "the chat template begins with thoughts at generation, but not in training: use another --chat_template"
EMPTY, EMPTY_THOUGHTS = "<think>\n\n</think>\n\n", "empty thoughts added: the chat template begins with thoughts"
NOT_RENDERED = "{}, which the chat template does not render"
TOO_LONG = "longer than max_length"
PROMPT_TOO_LONG = "prompt longer than max_prompt_length"
TRUNCATED_ANSWER = "answer truncated"
# Conversations that show what a template renders: a tool, its call, its answer, and thoughts
NOTHING = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "xyzzy", "description": "", "parameters": NOTHING}}
CALL = {"type": "function", "function": {"name": "xyzzy", "arguments": {}}, "id": "xyzzy1234"}
ASKED: list[Message] = [{**chat.PROBE[0]}]
CALLING = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
ANSWERED = [*CALLING, {"role": "tool", "content": "Plugh.", "tool_call_id": "xyzzy1234", "name": "xyzzy"}]
THINKING = [*ASKED, {"role": "assistant", "content": "Two.", "reasoning_content": "Plugh."}]
ARGUMENT_FORMS: tuple[Callable[[Any], Any], ...] = (  # of tool calls: as they are, an object, JSON
    lambda given: given,
    lambda given: json.loads(given) if isinstance(given, str) else given,
    lambda given: given if isinstance(given, str) else json.dumps(given, ensure_ascii=False),
)
MANY_CHARACTERS = 100_000  # of a row, above which its texts are cut before they are tokenized


def template_options(tokenizer: Tokenizer, example: Example, options: dict[str, Any]) -> dict[str, Any]:
    """What an example is rendered with: its tools, and `options` with its own. For a template that thinks on demand,
    answers without thoughts are rendered with `enable_thinking` false: training then begins as generation does.
    """
    options = options | example.options
    if "enable_thinking" in options or "enable_thinking" not in str(tokenizer.chat_template):
        return options
    answers = [*example.chosen, *example.rejected, *(() if example.rejected else example.prompt)]
    if not any(map(has_thoughts, answers)):
        return options | {"enable_thinking": False}
    prompt = chat.render(tokenizer, chat.PROBE[:1], prompt=True, options=options)
    return options | ({"enable_thinking": True} if prompt.rstrip().endswith("</think>") else {})


def has_thoughts(message: Message) -> bool:
    """Whether a message has thoughts, apart or within its content."""
    return "reasoning_content" in message or "</think>" in message["content"]


def describe_rendering(example: Example) -> str:
    """What an example has besides texts, and in JSON the variables of the chat template: one a line."""
    variables = {name: value for name, value in example.options.items() if name != "tools"}
    messages = [*example.prompt, *example.chosen, *example.rejected]
    names = ["tools"] if "tools" in example.options else []
    names += [name for name in ("tool_calls", "reasoning_content") if any(name in m for m in messages)]
    return "\n".join([*names, json.dumps(variables, sort_keys=True)])


def encode(
    tokenizer: Tokenizer, examples: list[Example], template: str = "", validate: bool = False
) -> list[TokenIds | str]:
    """Token ids of each example by column, or the reason why it cannot be used.

    Conversations are rendered with `template` (`marked_template`). Pairs are rendered with the tokenizer's own, as at
    generation; with `template` only where that fails. The ids of pairs are those of TRL 1.16's DPOTrainer
    (dpo_trainer.py, _prepare_dataset), which lets a completion begin where the tokens of the prompt and those of prompt
    and answer diverge. If that is before the end of the prompt, the prompt in training would differ from the one at
    generation, and the pair cannot be used. With `validate`, a rendering that is not safe to train on is refused too
    (`find_fault`).
    """
    is_pairs, own = bool(examples and examples[0].rejected), {"chat_template": template} if template else {}
    trained = [dataclasses.replace(example, options=example.options | own) for example in examples]
    begun = bool(own) and chat.render(tokenizer, chat.PROBE[:1], True, own).rstrip().endswith("<think>")
    if begun and is_pairs:  # the template drops the thoughts of earlier turns at generation
        trained = [dataclasses.replace(e, prompt=list(map(_without_thoughts, e.prompt))) for e in trained]
    tries = [examples, *([trained] if own else [])] if is_pairs else [trained]
    tries += [list(map(_with_empty_thoughts, trained))] if begun else []
    encoded: list[TokenIds | str] = [""] * len(examples)
    for tried in tries:
        left = [i for i, ids in enumerate(encoded) if isinstance(ids, str)]
        encode_all = _encode_pairs if is_pairs else _encode_conversations
        for i, ids in zip(left, encode_all(tokenizer, [tried[i] for i in left], validate), strict=True):
            encoded[i] = (encoded[i] or ids) if isinstance(ids, str) else ids
    return [THOUGHTS_LOST if begun and ids == chat.PROMPT_DIFFERS else ids for ids in encoded]


def _without_thoughts(message: Message) -> Message:
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return rest | ({"content": message["content"].rpartition("</think>")[2].lstrip()} if has_thoughts(message) else {})


def _with_empty_thoughts(example: Example) -> Example:
    """An example for a template that always begins with thoughts: answers without any have empty ones."""

    def complete(messages: list[Message]) -> list[Message]:
        empty = [m["role"] == "assistant" and not has_thoughts(m) for m in messages]
        return [m | {"content": EMPTY + m["content"]} if e else m for m, e in zip(messages, empty, strict=True)]

    prompt = example.prompt if example.rejected else complete(example.prompt)
    chosen, rejected = complete(example.chosen), complete(example.rejected)
    return dataclasses.replace(example, prompt=prompt, chosen=chosen, rejected=rejected)


def _encode_conversations(tokenizer: Tokenizer, examples: list[Example], validate: bool) -> list[TokenIds | str]:
    has_system_role = chat.supports_system_role(tokenizer)

    def encode_one(example: Example) -> TokenIds:
        options, template = example.options, example.options.get("chat_template", "")
        messages = _fit_template(tokenizer, [*example.prompt, *example.chosen], options, has_system_role)
        try:
            ids: TokenIds = chat.tokenize_with_labels(tokenizer, messages, options, template)
        except UserError as error:
            if not re.fullmatch(chat.TURN_DIFFERS.format(r"\d+"), str(error)):
                raise
            last = [*(message | {"weight": 0} for message in messages[:-1]), messages[-1]]
            ids = chat.tokenize_with_labels(tokenizer, last, options) | {"modification": LAST_LEARNED}
        text, learned = chat.render(tokenizer, messages, options=options), [i for i in ids["labels"] if i != -100]
        if validate and (fault := chat.find_fault(tokenizer, messages, text, ids["input_ids"], learned)):
            raise UserError(chat.UNSAFE.format(fault))
        return ids | ({"modification": EMPTY_THOUGHTS} if any(m["content"].startswith(EMPTY) for m in messages) else {})

    return [_result_or_reason(encode_one, example) for example in examples]


def _encode_pairs(tokenizer: Tokenizer, examples: list[Example], validate: bool) -> list[TokenIds | str]:
    has_system_role, encoded = chat.supports_system_role(tokenizer), list[TokenIds | str]()

    def render_one(example: Example) -> list[tuple[str, list[Message]]]:
        """Text and messages of the prompt, and of prompt and answer for both answers."""
        options = example.options
        chosen, rejected = (
            _fit_template(tokenizer, [*example.prompt, *answer], options, has_system_role)
            for answer in (example.chosen, example.rejected)
        )
        prompt = chosen[:-1]
        pair = [(chat.render(tokenizer, prompt, prompt=True, options=options), prompt)]
        pair += [(chat.render(tokenizer, talk, options=options), talk) for talk in (chosen, [*prompt, rejected[-1]])]
        if not all(text.startswith(pair[0][0]) for text, _ in pair):
            raise UserError(chat.PROMPT_DIFFERS)
        return pair

    rendered = [_result_or_reason(render_one, example) for example in examples]
    ids = iter(chat.tokenize(tokenizer, [text for pair in rendered if not isinstance(pair, str) for text, _ in pair]))
    for pair in rendered:
        if isinstance(pair, str):
            encoded.append(pair)
            continue
        prompt, *both = (next(ids) for _ in pair)
        start, faults = len(prompt), list[str]()
        if not all(answer[:start] == prompt for answer in both):
            faults.append("first token of the answer merges with the prompt")
        for (text, messages), answer in zip(pair[1:], both, strict=True):
            if validate and (fault := chat.find_fault(tokenizer, messages, text, answer, answer[start:])):
                faults.append(chat.UNSAFE.format(fault))
        columns: TokenIds = {"prompt_ids": prompt, "chosen_ids": both[0][start:], "rejected_ids": both[1][start:]}
        if any(messages[-1]["content"].startswith(EMPTY) for _, messages in pair[1:]):
            columns["modification"] = EMPTY_THOUGHTS
        encoded.append(faults[0] if faults else columns)
    return encoded


def _result_or_reason(function: Callable[[Example], Outcome], example: Example) -> Outcome | str:
    try:
        return function(example)
    except UserError as error:
        return str(error)


def _fit_template(
    tokenizer: Tokenizer, messages: list[Message], options: chat.TemplateOptions, has_system_role: bool
) -> list[Message]:
    messages = chat.fold_system_message(messages, has_system_role)
    if lacking := find_unrendered(tokenizer, messages, options):
        raise UserError(NOT_RENDERED.format(lacking))
    return adapt_messages(tokenizer, messages, options)


def find_unrendered(tokenizer: Tokenizer, messages: list[Message], options: chat.TemplateOptions | None = None) -> str:
    """What of a conversation the template leaves out of its text: tools, tool_calls, reasoning_content, or a tool's
    answer; "" if it renders all."""
    options = options or {}
    given = {name for message in messages for name in (*message, message["role"])}
    probes = (  # a part, whether it is there, and a conversation with a word of it
        ("tools", bool(options.get("tools")), ASKED, "xyzzy", {**options, "tools": [TOOL]}),
        ("tool_calls", "tool_calls" in given, CALLING, "xyzzy", options),
        ("a tool's answer", "tool" in given, ANSWERED, "Plugh.", options),
        ("reasoning_content", "reasoning_content" in given, THINKING, "Plugh.", options),
    )
    for name, is_there, talk, word, more in probes:
        if is_there and not _renders(tokenizer, talk, word, more):
            return name
    return ""


def _renders(
    tokenizer: Tokenizer, messages: list[Message], word: str, options: chat.TemplateOptions, adapt: bool = True
) -> bool:
    with contextlib.suppress(UserError):
        messages = adapt_messages(tokenizer, messages, options) if adapt else messages
        return word in chat.render(tokenizer, messages, options=options)
    return False


def adapt_messages(tokenizer: Tokenizer, messages: list[Message], options: chat.TemplateOptions) -> list[Message]:
    """A conversation as the template takes it: arguments of tool calls as they are, or else as an object or as JSON;
    thoughts within the content for a template that knows only these."""
    template = str(options.get("chat_template") or tokenizer.chat_template)
    has_thoughts = any("reasoning_content" in message for message in messages)
    if has_thoughts and "</think>" in template and not _renders(tokenizer, THINKING, "Plugh.", options, adapt=False):
        messages = [_with_inline_thought(message) for message in messages]
    for form in ARGUMENT_FORMS if any("tool_calls" in message for message in messages) else ():
        adapted = [_with_arguments(message, form) for message in messages]
        with contextlib.suppress(UserError):
            chat.render(tokenizer, adapted, options=options)
            return adapted
    return messages


def _with_inline_thought(message: dict[str, Any]) -> dict[str, Any]:
    if "reasoning_content" not in message:
        return message
    content = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"
    return {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": content}


def _with_arguments(message: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with the arguments of its tool calls in another form, where they have it."""
    calls = []
    for call in message.get("tool_calls", ()):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            inner = call.get("function", call)
            inner = inner | {"arguments": form(inner["arguments"])}
            call = call | {"function": inner} if "function" in call else inner
        calls.append(call)
    return message | {"tool_calls": calls} if calls else message


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


def bound_texts(tokenizer: Tokenizer, example: Example, limits: LengthLimits) -> Example:
    """A huge example without text that is beyond the limits for certain: no token has more characters than the longest
    one of the vocabulary. Of each text so much is left that the example is still too long, at the end that is kept."""
    size = sum(len(message["content"]) for side in SIDES for message in getattr(example, side))
    if size < MANY_CHARACTERS or not limits.max_length or limits.overlong == "error":
        return example
    most = 2 * limits.max_length * _longest_token(tokenizer)
    ends = dict.fromkeys(SIDES, slice(most))
    if limits.overlong == "truncate_prompt":
        ends["prompt"] = slice(-most, None)
    cut: dict[str, Any] = {
        side: [m | {"content": m["content"][end]} for m in getattr(example, side)] for side, end in ends.items()
    }
    return dataclasses.replace(example, **cut)


@functools.lru_cache(maxsize=1)
def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token of a tokenizer."""
    return max(map(len, tokenizer.get_vocab()))


def count_tokens(ids: TokenIds) -> tuple[int, int]:
    """Tokens of the prompt and of the longer answer. All tokens of a conversation count as its answer."""
    return len(ids.get("prompt_ids", ())), max(len(i) for name, i in ids.items() if name != "prompt_ids")


def apply_limits(
    tokenizer: Tokenizer, example: Example, ids: TokenIds, limits: LengthLimits, template: str = ""
) -> tuple[Example, TokenIds, str, str]:
    """The example and its ids within the limits, the reason if it is dropped, and how it was modified. Raises UserError
    for an example beyond the limits if `limits.overlong` is "error"."""
    (prompt, answer), (max_prompt, max_total) = count_tokens(ids), limits.bounds
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
            if sum(count_tokens(encoded)) <= max_total:
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
    Removes complete turns first, oldest first, then the beginning of the last turn. A system message stays."""
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
        turns = [*turns[:-1], turns[-1] | {"content": rest.lstrip()}]
    return head + turns


def _prompt_length(tokenizer: Tokenizer, prompt: list[Message], options: dict[str, Any] | None = None) -> int:
    folded = chat.fold_system_message(prompt, chat.supports_system_role(tokenizer))
    return len(chat.encode_prompt(tokenizer, adapt_messages(tokenizer, folded, options or {}), options))
