"""Messages of a conversation: every shape in which datasets write them becomes one, or says why it cannot."""

from __future__ import annotations

import ast
import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from helpers.core import UserError

# role and content; of some also tool_calls, tool_call_id, name and reasoning_content, which a chat template may render,
# and weight: 0 for a turn that is not learned
Message = dict[str, Any]
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
         "chatgpt": "assistant", "model": "assistant", "ai": "assistant", "system": "system", "developer": "system",
         "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool"}  # fmt: skip
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *EXTRA_KEYS, *THOUGHT_KEYS, "weight", "train"}
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic/hh-rlhf, and the prompts of berkeley-nest/Nectar
LIST_AS_TEXT = re.compile(  # JSON, or the repr of Python: a key of messages comes first, or a role that is known later
    r"\s*+[\[{]\s*+(\{\s*+)?[\"'](role|from|content|value)[\"']|"
    r"\s*+(\[\s*+)?\{((?P<mark>[\"'])((?!(?P=mark))[^\\]|\\.)*+(?P=mark)|[^{}\[\]\"'])*?"
    r"[\"'](role|from)[\"']\s*:\s*[\"'](?i:" + "|".join(ROLES) + r")[\"']"
)
LIST_COLUMNS = ("completions", "responses", "answers", "scores", "rating", "history")


class DropRow(Exception):
    """A row cannot be used. The message is the reason, as the row report shows it."""


def is_list_as_text(value: Any) -> bool:
    """Whether a text begins as a list of messages, or one message, that a CSV or JSON file holds as text."""
    return isinstance(value, str) and bool(LIST_AS_TEXT.match(value))


def parse_text(value: Any) -> Any:
    """A value that was written as JSON or as the repr of Python. Raises DropRow if it is neither."""
    if not isinstance(value, str) or not value.strip():
        return value
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, _read_repr)
    for parse in parsers:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(value)
    raise DropRow("a list as text that cannot be parsed")


def holds_lists_as_text(column: str, values: list[Any]) -> bool:
    """Whether most values of a column are lists that a CSV or JSON file holds as text. Raises UserError if they begin
    as lists and most cannot be parsed."""
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    lists = [t for t in texts if is_list_as_text(t) or (column in LIST_COLUMNS and t.lstrip().startswith("["))]
    parsed = 0
    for text in lists:
        with contextlib.suppress(DropRow):
            parsed += isinstance(parse_text(text), list | dict)
    is_most = 2 * len(lists) > len(texts)
    if is_most and 2 * parsed <= len(lists) and column not in LIST_COLUMNS:
        raise UserError(f"column {column} holds lists as text that cannot be parsed: {lists[0][:60]!r}. Write JSON.")
    return is_most and 2 * parsed > len(lists)


def _read_repr(text: str) -> Any:
    """Read a literal of Python; nan and inf, which pandas writes for what is missing, become None."""

    class Missing(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Constant(None) if node.id in ("nan", "inf") else node

    return ast.literal_eval(Missing().visit(ast.parse(text.strip(), mode="eval")))


def to_messages(value: Any, role: str) -> list[Message]:
    """A list of messages, one message, a transcript, or a text, which is one turn of `role`; [] for nothing.

    Roles and keys of other conventions become those of transformers. Raises DropRow.
    """
    if isinstance(value, str):
        return parse_hh(value) or ([{"role": role, "content": value}] if value.strip() or role == "assistant" else [])
    if isinstance(value, dict):
        return [to_message(value, role)]
    return [to_message(message) for message in value if message is not None] if isinstance(value, list) else []


def ends_with_answer(value: Any) -> bool:
    """Whether a value is messages, or a text of them, of which the last one is an assistant's and not empty."""
    with contextlib.suppress(DropRow):
        last = to_messages(parse_text(value) if is_list_as_text(value) else value, "user")[-1:]
        return any(m["role"] == "assistant" and (m["content"].strip() or "tool_calls" in m) for m in last)
    return False


def to_message(message: Any, default_role: str = "") -> Message:
    """One message with the keys of transformers. Raises DropRow."""
    if isinstance(message, str):
        raise DropRow("a list of texts, not of messages")
    if not isinstance(message, dict):
        raise unusable("message", message)
    given = next((message[key] for key in ROLE_KEYS if isinstance(message.get(key), str)), default_role)
    role = ROLES.get(given.strip().lower())
    if not role:
        raise DropRow(f"unknown role {given!r}" if given else "a message without a role")
    content = next((message[key] for key in CONTENT_KEYS if message.get(key) is not None), None)
    extras: Message = {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
    thoughts = next(filter(str.strip, (to_text(message.get(key) or "") for key in THOUGHT_KEYS)), "")
    own = {"tool_calls": to_objects("tool_calls", message.get("tool_calls") or None), "reasoning_content": thoughts}
    extras |= {key: value for key, value in own.items() if value}
    if role != "assistant" and (taken := [key for key in own if key in extras]):
        raise DropRow(f"{taken[0]} of another role than the assistant")
    if message.get("weight") in (0, "0") or message.get("train") in (False, "false", "False"):
        extras["weight"] = 0
    if content is None and "tool_calls" in extras:
        content = ""
    return {"role": role, "content": to_text(content), **extras}


def to_objects(column: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, or one. It and its items may be JSON; [] for nothing. Raises DropRow."""
    with contextlib.suppress(DropRow):
        value = without_nulls(parse_text(value))
        objects = list(map(parse_text, value if isinstance(value, list) else [value] * (value not in (None, "", {}))))
        if all(isinstance(each, dict) for each in objects):
            return objects
    raise DropRow(f"{column} that are not JSON objects")


def to_text(content: Any) -> str:
    """The text of a message, which may be a list of parts. Raises DropRow for images and what else is no text."""
    if isinstance(content, list) and content and all(isinstance(part, dict | str) for part in content):
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)} - {"text"}
        if kinds:
            raise DropRow("images" if any("image" in str(kind) for kind in kinds) else f"content of type {min(kinds)}")
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise unusable("content", content)
    return content


def without_nulls(value: Any) -> Any:
    """A nested value without the nulls that Arrow adds for keys that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_hh(text: Any) -> list[Message]:
    """Messages of a "\\n\\nHuman: ... \\n\\nAssistant: ..." text; [] for anything else."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    parts = TURN.split(text)[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]


def to_history(value: Any) -> list[Message]:
    """Earlier turns: [user, assistant] pairs of texts, as in Alpaca's and LLaMA-Factory's files, or messages."""
    value = parse_text(value)
    if not value:
        return []
    if not isinstance(value, list):
        raise unusable("history", value)
    if all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
        texts = [text for turn in value for text in turn]
        return [{"role": "assistant" if i % 2 else "user", "content": to_text(text)} for i, text in enumerate(texts)]
    return to_messages(value, "user")


def validation_error(messages: list[Message]) -> str:
    """Why a conversation (system message or none, then user and assistant in turns) cannot be learned from, or "".

    An assistant may call tools, whose messages follow, and then the assistant again.
    """
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        return "no final assistant turn"
    before = "assistant"
    for message in turns:
        role = message["role"]
        follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}.get(role, ())
        if before not in follows or (message is turns[0] and role != "user"):
            return "roles do not alternate"
        before = role
    if any(not m["content"].strip() and not m.get("tool_calls") for m in turns):
        return "empty answer" if not turns[-1]["content"].strip() else "empty turn"
    return ""


def conversation_key(messages: list[Message]) -> str:
    """One string per distinct conversation. Surrounding whitespace in a message does not count."""
    keys = []
    for m in messages:
        extras = {key: m[key] for key in EXTRA_KEYS if key in m}
        more = f"\x1d{json.dumps(extras, sort_keys=True, default=str)}" if extras else ""
        keys.append(f"{m['role']}\x1e{m['content'].strip()}{more}")
    return "\x1f".join(keys)


def conversation_hash(messages: list[Message], options: dict[str, Any] | None = None) -> str:
    """The hash of `conversation_key`, and of tools and variables, in 20 hex digits; "" for no messages."""
    more = json.dumps(options, sort_keys=True, default=str) if options else ""
    key = (conversation_key(messages) + more).encode("utf-8", "surrogatepass")
    return hashlib.sha1(key).hexdigest()[:20] if messages else ""


def add_system_prompt(messages: list[Message], system_prompt: str) -> list[Message]:
    """The conversation behind `system_prompt`, unless that is empty or the conversation has a system message."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def unusable(column: str, value: Any) -> DropRow:
    """The reason to drop a row whose column is not text: it is empty, or a file was read with other types."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return DropRow(f"no {column}")
    is_number = isinstance(value, int | float | datetime.date | datetime.time)
    return DropRow("a number or a date, not text" if is_number else "not text")
