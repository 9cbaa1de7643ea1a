"""Examples as token ids, as the chat template renders them: what it leaves out, and in which form it takes the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from helpers.core import UserError
from helpers.data.formats import Example
from helpers.data.messages import Message
from helpers.models.chat import (
    PROBE,
    PROMPT_DIFFERS,
    TURN_DIFFERS,
    UNSAFE,
    TemplateOptions,
    find_fault,
    fold_system_message,
    render,
    supports_system_role,
    tokenize,
    tokenize_with_labels,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TokenIds = dict[str, Any]  # by column; of a changed example also its "modification"
LAST_LEARNED = "only the last answer is learned: the chat template renders earlier ones differently"
THOUGHTS_LOST = "the chat template begins with thoughts at generation, but not in training: use another --chat_template"
EMPTY, EMPTY_THOUGHTS = "<think>\n\n</think>\n\n", "empty thoughts added: the chat template begins with thoughts"
NOT_RENDERED = "{}, which the chat template does not render"
XYZZY = {"name": "xyzzy", "description": "", "parameters": {"type": "object", "properties": {}}}  # a tool
THINKING = [*PROBE[:1], {"role": "assistant", "content": "Two.", "reasoning_content": "Plugh."}]
ARGUMENT_FORMS: tuple[Callable[[Any], Any], ...] = (  # of tool calls: as they are, an object, JSON
    lambda given: given,
    lambda given: json.loads(given) if isinstance(given, str) else given,
    lambda given: given if isinstance(given, str) else json.dumps(given, ensure_ascii=False),
)


def template_options(tokenizer: Tokenizer, example: Example, options: dict[str, Any]) -> dict[str, Any]:
    """What an example is rendered with: its tools, and `options` with its own. A template that thinks on demand is not
    asked to if the answers have no thoughts: training begins as generation does. If they have, its prompt leaves room.
    """
    options = options | example.options
    if "enable_thinking" in options or "enable_thinking" not in str(tokenizer.chat_template):
        return options
    answers = [*example.chosen, *example.rejected, *(() if example.rejected else example.prompt)]
    if not any(map(has_thoughts, answers)):
        return options | {"enable_thinking": False}
    prompt = render(tokenizer, PROBE[:1], prompt=True, options=options)
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

    Conversations are rendered with `template` (`marked_template`). Pairs are with the tokenizer's, whose prompt is that
    at generation; with `template` only those that it spoils. The ids of pairs are those of TRL 1.16's DPOTrainer
    (dpo_trainer.py, _prepare_dataset), which lets a completion begin where the tokens of the prompt and those of prompt
    and answer diverge. If that is before the end of the prompt, the prompt in training would differ from the one at
    generation, and the pair cannot be used. With `validate`, a rendering that is not safe to train on is refused too
    (`find_fault`).
    """
    is_pairs, own = bool(examples and examples[0].rejected), {"chat_template": template} if template else {}
    trained = [dataclasses.replace(example, options=example.options | own) for example in examples]
    begun = render(tokenizer, PROBE[:1], prompt=True, options=own).rstrip().endswith("<think>") if own else False
    if begun and is_pairs:  # the template drops the thoughts of earlier turns at generation
        trained = [dataclasses.replace(e, prompt=list(map(_without_thoughts, e.prompt))) for e in trained]
    tries = [examples, *([trained] if own else [])] if is_pairs else [trained]
    tries += [list(map(_with_empty_thoughts, trained))] if begun else []
    encoded: list[TokenIds | str] = [""] * len(examples)
    for tried in tries:
        left = [i for i, ids in enumerate(encoded) if isinstance(ids, str)]
        results = (_encode_pairs if is_pairs else _encode_conversations)(tokenizer, [tried[i] for i in left], validate)
        for i, ids in zip(left, results, strict=True):
            encoded[i] = (encoded[i] or ids) if isinstance(ids, str) else ids
    return [THOUGHTS_LOST if begun and ids == PROMPT_DIFFERS else ids for ids in encoded]


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
    return [_encode_conversation(tokenizer, example, validate) for example in examples]


def _encode_conversation(tokenizer: Tokenizer, example: Example, validate: bool) -> TokenIds | str:
    options, template = example.options, example.options.get("chat_template", "")
    messages = [*fold_system_message(example.prompt, supports_system_role(tokenizer)), *example.chosen]
    if lacking := not_rendered(tokenizer, messages, options):
        return NOT_RENDERED.format(lacking)
    messages = adapt_messages(tokenizer, messages, options)
    try:
        try:
            ids: TokenIds = tokenize_with_labels(tokenizer, messages, options, template)
        except UserError as error:
            if not re.fullmatch(TURN_DIFFERS.format(r"\d+"), str(error)):
                raise
            last = [*(message | {"weight": 0} for message in messages[:-1]), messages[-1]]
            ids = tokenize_with_labels(tokenizer, last, options) | {"modification": LAST_LEARNED}
        text = render(tokenizer, messages, options=options)
    except UserError as error:
        return str(error)
    learned = [label for label in ids["labels"] if label != -100]
    if validate and (fault := find_fault(tokenizer, messages, text, ids["input_ids"], learned)):
        return UNSAFE.format(fault)
    return ids | ({"modification": EMPTY_THOUGHTS} if any(m["content"].startswith(EMPTY) for m in messages) else {})


def _encode_pairs(tokenizer: Tokenizer, examples: list[Example], validate: bool) -> list[TokenIds | str]:
    has_system_role, encoded = supports_system_role(tokenizer), list[TokenIds | str]()
    rendered = [_render_pair(tokenizer, example, has_system_role) for example in examples]
    ids = iter(tokenize(tokenizer, [text for pair in rendered if not isinstance(pair, str) for text, _ in pair]))
    for pair in rendered:
        if isinstance(pair, str):
            encoded.append(pair)
            continue
        prompt, *both = (next(ids) for _ in pair)
        start, faults = len(prompt), list[str]()
        if not all(answer[:start] == prompt for answer in both):
            faults.append("first token of the answer merges with the prompt")
        for (text, messages), answer in zip(pair[1:], both, strict=True):
            if validate and (fault := find_fault(tokenizer, messages, text, answer, answer[start:])):
                faults.append(UNSAFE.format(fault))
        columns: TokenIds = {"prompt_ids": prompt, "chosen_ids": both[0][start:], "rejected_ids": both[1][start:]}
        if any(messages[-1]["content"].startswith(EMPTY) for _, messages in pair[1:]):
            columns["modification"] = EMPTY_THOUGHTS
        encoded.append(faults[0] if faults else columns)
    return encoded


def _render_pair(
    tokenizer: Tokenizer, example: Example, has_system_role: bool
) -> list[tuple[str, list[Message]]] | str:
    """Text and messages of the prompt, and of prompt and answer for both answers; or why they cannot be used."""
    options, prompt = example.options, fold_system_message(example.prompt, has_system_role)
    if lacking := not_rendered(tokenizer, [*prompt, *example.chosen, *example.rejected], options):
        return NOT_RENDERED.format(lacking)
    *prompt, chosen = adapt_messages(tokenizer, [*prompt, *example.chosen], options)
    rejected = adapt_messages(tokenizer, [*prompt, *example.rejected], options)[-1]
    try:
        pair = [(render(tokenizer, prompt, prompt=True, options=options), prompt)]
        pair += [(render(tokenizer, talk, options=options), talk) for talk in ([*prompt, chosen], [*prompt, rejected])]
    except UserError as error:
        return str(error)
    return pair if all(text.startswith(pair[0][0]) for text, _ in pair) else PROMPT_DIFFERS


def not_rendered(tokenizer: Tokenizer, messages: list[Message], options: TemplateOptions | None = None) -> str:
    """What of a conversation the template leaves out of its text: tools, tool_calls, reasoning_content, or a tool's
    answer; "" if it renders all."""
    options = options or {}
    tools = {"tools": [{"type": "function", "function": XYZZY}]}
    if options.get("tools") and not _renders(tokenizer, PROBE[:1], "xyzzy", {**options, **tools}):
        return "tools"
    for message in messages:
        call = {"type": "function", "function": {"name": "xyzzy", "arguments": {}}, "id": "xyzzy1234"}
        probe = {"role": "assistant", "content": "", "tool_calls": [call]}
        if "tool_calls" in message and not _renders(tokenizer, [*PROBE[:1], probe], "xyzzy", options):
            return "tool_calls"
        answer = {"role": "tool", "content": "Plugh.", "tool_call_id": "xyzzy1234", "name": "xyzzy"}
        if message["role"] == "tool" and not _renders(tokenizer, [*PROBE[:1], probe, answer], "Plugh.", options):
            return "a tool's answer"
        if "reasoning_content" in message and not _renders(tokenizer, THINKING, "Plugh.", options):
            return "reasoning_content"
    return ""


def _renders(
    tokenizer: Tokenizer, messages: list[Message], word: str, options: TemplateOptions, adapt: bool = True
) -> bool:
    with contextlib.suppress(UserError):
        messages = adapt_messages(tokenizer, messages, options) if adapt else messages
        return word in render(tokenizer, messages, options=options)
    return False


def adapt_messages(tokenizer: Tokenizer, messages: list[Message], options: TemplateOptions) -> list[Message]:
    """A conversation as the template takes it: arguments of tool calls as they are, or else as an object or as JSON;
    thoughts within the content for a template that knows only these."""
    template = str(options.get("chat_template") or tokenizer.chat_template)
    has_thoughts = any("reasoning_content" in message for message in messages)
    if has_thoughts and "</think>" in template and not _renders(tokenizer, THINKING, "Plugh.", options, adapt=False):
        messages = [_with_inline_thought(message) for message in messages]
    for form in ARGUMENT_FORMS if any("tool_calls" in message for message in messages) else ():
        adapted = [_with_arguments(message, form) for message in messages]
        with contextlib.suppress(UserError):
            render(tokenizer, adapted, options=options)
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
