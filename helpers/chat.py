"""Chat formats: how a conversation becomes one string of tokens, and which of them are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Mistral-7B-Instruct v0.1/v0.2, token for token what mistral-common encodes. A system message, which these models never
# saw, opens the first user turn.
MISTRAL = (
    "{%- set system = messages[0]['content'] + '\\n\\n' if messages and messages[0]['role'] == 'system' else '' -%}"
    "{{- bos_token -}}"
    "{%- for message in (messages[1:] if system else messages) -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

FORMATS = {"mistral": MISTRAL}


def apply_chat_format(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> str:
    """Give the tokenizer the template named `chat_format`; "auto" keeps its own, and mistral where it has none.

    Returns the name of what is in use. A tokenizer without a padding token pads with <unk>, or else with the
    end-of-sequence token: TRL's collators mask padding by position, so neither is ever a label.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_format == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own"
        chat_format = "mistral"
    tokenizer.chat_template = FORMATS[chat_format]
    return chat_format


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False) -> str:
    """The conversation as text, special tokens included; `prompt` opens the assistant's turn at its end."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # jinja2's TemplateError, or whatever a template does to messages it does not expect
        raise UserError(f"the chat template refuses a conversation: {error}") from None


def render_or_fault(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False
) -> tuple[str, str]:
    """The text and "", or "" and why the template refuses the conversation."""
    try:
        return render(tokenizer, messages, prompt), ""
    except UserError as error:
        return "", str(error)[:80]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Tokens of a conversation, and labels that are -100 except on every assistant turn and its end.

    An assistant turn is what its rendering adds to the rendering of the prompt before it, so any template works whose
    text only grows from turn to turn. Raises UserError where it does not.
    """
    text, spans = render(tokenizer, messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(tokenizer, messages[:i], prompt=True), render(tokenizer, messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(f"the chat template renders turn {i} differently in a longer conversation: {after!r}")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    learned = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    return {"input_ids": ids, "labels": [i if own else -100 for i, own in zip(ids, learned, strict=True)]}


def show_labels(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> Any:
    """A row of `encode` as rich text: what is learned stands out, what is read only is dim."""
    from rich.text import Text

    text = Text()
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        text.append(str(tokenizer.decode([token])), style="dim" if label == -100 else "bold green")
    return text
