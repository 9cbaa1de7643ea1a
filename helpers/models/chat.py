"""Chat formats: how a conversation becomes one string of tokens, and which of them are learned."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from helpers.core import UserError, find_path

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


VALIDATED_ROWS = 16  # rows whose text and tokens `check_chat` looks at before training
PROBE = [
    {"role": "user", "content": "Apples?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Pears?"},
    {"role": "assistant", "content": "Three."},
]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> tuple[str, list[str]]:
    """Give the tokenizer a template: "auto" keeps its own, and takes mistral where it has none; else one of
    `chat_formats.FORMATS`, or a file of Jinja.

    Returns the name of what is in use, and the tokens that had to be added for it (see `embeddings.fit_embeddings`). A
    tokenizer without a padding token pads with <unk>, or else with the end-of-sequence token: TRL's collators mask
    padding by position, so neither is ever a label. Raises UserError for a format that is not known.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_template == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own", []
        chat_template = "mistral"
    if chat_template not in CHAT_TEMPLATES:
        file = find_path(chat_template)
        if file is None or not file.is_file():
            raise UserError(f"--chat_template {chat_template!r} is not one of {', '.join(CHAT_TEMPLATES)}, nor a file")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        return file.name, []
    new = [token for token in TEMPLATE_TOKENS.get(chat_template, ()) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    tokenizer.chat_template = CHAT_TEMPLATES[chat_template]
    if chat_template in TEMPLATE_EOS:
        tokenizer.eos_token = TEMPLATE_EOS[chat_template]
    return chat_template, new


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False) -> str:
    """The conversation as text, special tokens included; `prompt` opens the assistant's turn at its end."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # jinja2's TemplateError, or whatever a template does to messages it does not expect
        raise UserError(f"the chat template refuses a conversation: {error}") from None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of rendered texts, whose special tokens stand in them already. Without offsets this is a third faster."""
    if not tokenizer.is_fast:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both stay from an earlier call
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def tokenize_with_labels(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
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
    if not tokenizer.is_fast:  # no offsets: by the number of tokens, where they too only grow
        ids, *parts = tokenize(tokenizer, [text, *(text[:end] for span in spans for end in span)])
        if any(ids[: len(part)] != part for part in parts):
            raise UserError(f"the tokens of a turn run into the next: {text!r}")
        ends = [len(part) for part in parts]
        learned = [any(a <= i < b for a, b in zip(ends[::2], ends[1::2], strict=True)) for i in range(len(ids))]
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        learned = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    return {"input_ids": ids, "labels": [i if own else -100 for i, own in zip(ids, learned, strict=True)]}


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[int]:
    """Every token that ends an answer: those of the model's generation config, which may be its base's, and the
    tokenizer's, which a chat format may have changed."""
    ends = (config.eos_token_id if config is not None else None) or []
    known = [int(i) for i in (ends if isinstance(ends, list) else [ends])]
    return list(dict.fromkeys([*known, *([int(i)] if (i := tokenizer.eos_token_id) is not None else [])]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation that the model is to answer."""
    return tokenize(tokenizer, [render(tokenizer, messages, prompt=True)])[0]


def show_labels(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> Any:
    """A row of `encode` as rich text: what is learned stands out, what is read only is dim."""
    from rich.text import Text

    text = Text()
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        text.append(str(tokenizer.decode([token])), style="dim" if label == -100 else "bold green")
    return text


def try_render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False
) -> tuple[str, str]:
    """The text and "", or "" and why the template refuses the conversation."""
    try:
        return render(tokenizer, messages, prompt), ""
    except UserError as error:
        return "", str(error)[:80]


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], prompt: bool = False
) -> list[tuple[str, str]]:
    """`render_or_fault` of many conversations, in one call where none is refused."""
    try:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=prompt)
    except Exception:  # find out which
        return [try_render(tokenizer, messages, prompt) for messages in conversations]
    return [(str(text), "") for text in texts]


def supports_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has a place for a system message: its text appears, and nothing is raised."""
    messages = [{"role": "system", "content": "Xyzzy."}, {"role": "user", "content": "Hello."}]
    try:
        return "Xyzzy." in render(tokenizer, messages, prompt=True)
    except UserError:
        return False


def prepend_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A leading system message as the opening of the first user turn."""
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def fold_system_message(messages: list[dict[str, str]], system: bool) -> list[dict[str, str]]:
    """The conversation as a template takes it that has a place for a system message (`system`) or has none."""
    return messages if system or messages[0]["role"] != "system" else prepend_system(messages)


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds, in a message, text that would be read as one of the tokenizer's control tokens."""
    tokens = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
    return re.compile("|".join(tokens) or r"(?!)")


def validate_chat_template(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]) -> None:
    """Check on real conversations that this template is safe to train on. Raises UserError with the text and the ids.

    Text of every turn is there, in longer conversations too; one beginning-of-sequence token, where the tokenizer puts
    one before other text; the end-of-sequence token closes the answer; and the prompt at generation is what stands
    before the answer in training, as text and as tokens.
    """
    for messages in [*conversations, PROBE]:
        text, prompt = render(tokenizer, messages), render(tokenizer, messages[:-1], prompt=True)
        ids, before = tokenize(tokenizer, [text, prompt])
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        puts_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        count = ids.count(bos) if bos != eos else int(ids[:1] == [bos]) + int(ids[:2] == [bos, bos])
        fault = (
            "a turn is missing from it"
            if any(m["content"].strip() not in text for m in messages)
            else "it has more than one beginning-of-sequence token"
            if bos is not None and count > 1
            else f"it lacks {tokenizer.bos_token}, which this tokenizer puts before every other text"
            if puts_bos and not count
            else "the prompt at generation is not what stands before the answer in training"
            if not text.startswith(prompt) or ids[: len(before)] != before
            else f"the end of the answer is not learned: {tokenizer.eos_token} does not close it"
            if eos not in ids[len(before) :][-3:]
            else ""
        )
        if fault:
            raise UserError(
                f"the chat template is not safe to train on: {fault}. Give another --chat_template, or a file of Jinja. "
                f"Text {text!r}, ids {ids}"
            )


# What a format adds to a tokenizer that lacks it: new tokens, and the one that ends an answer.
TEMPLATE_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
TEMPLATE_EOS = {"chatml": "<|im_end|>"}

_ALTERNATE = (
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}"
    "{%- endif -%}"
)
# A system message that a format has no place for opens the first user turn.
_SYSTEM_FIRST = (
    "{%- set system = messages[0]['content'] + '\\n\\n' if messages and messages[0]['role'] == 'system' else '' -%}"
    "{{- bos_token -}}"
    "{%- for message in (messages[1:] if system else messages) -%}" + _ALTERNATE
)

# Mistral-7B-Instruct v0.1 and v0.2
MISTRAL = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# OpenAI's ChatML, as Qwen, Yi and many others have it
CHATML = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{{- '\\n' if not loop.last or message['role'] != 'assistant' else '' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# allenai/tulu-2 and Zephyr's kin
TULU = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}"
    "{{- eos_token if message['role'] == 'assistant' else '' -}}"
    "{{- '\\n' if not loop.last or message['role'] != 'assistant' else '' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)

# Stanford Alpaca's headings, without its preamble
ALPACA = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- '### Instruction:\\n' + (system if loop.first else '') + message['content'] + '\\n\\n### Response:\\n' -}}"
    "{%- else -%}"
    "{{- message['content'] + eos_token + ('' if loop.last else '\\n\\n') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# lmsys/vicuna v1.1 and later
VICUNA = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' + (system if loop.first else '') + message['content'] + ' ASSISTANT:' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Anthropic/hh-rlhf, the form that Pythia was aligned in
HH = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- '\\n\\nHuman: ' + (system if loop.first else '') + message['content'] + '\\n\\nAssistant:' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

CHAT_TEMPLATES = {"mistral": MISTRAL, "chatml": CHATML, "tulu": TULU, "alpaca": ALPACA, "vicuna": VICUNA, "hh": HH}
