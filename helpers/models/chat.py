"""Chat templates: how a conversation becomes one string of tokens, and which tokens are learned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken

from helpers.core import UserError, find_path

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

TEMPLATE_FOLDER = Path(__file__).with_name("templates")
# Mistral-7B-Instruct v0.1 and v0.2; OpenAI's ChatML, used by Qwen and Yi; allenai/tulu-2 and Zephyr; Stanford Alpaca
# without its preamble; lmsys/vicuna from v1.1 on; Anthropic/hh-rlhf, which Pythia was aligned with.
CHAT_TEMPLATES = ("mistral", "chatml", "tulu", "alpaca", "vicuna", "hh")
TEMPLATE_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}  # added to a tokenizer that lacks them
TEMPLATE_EOS = {"chatml": "<|im_end|>"}  # ends an answer, instead of the tokenizer's own end-of-sequence token
REFUSED = "the chat template refuses a conversation"
VALIDATED_ROWS = 16  # rows that `validate_chat_template` checks before training
PROBE = [
    {"role": role, "content": text}
    for role, text in (("user", "Apples?"), ("assistant", "Two."), ("user", "Pears?"), ("assistant", "Three."))
]


def read_template(name: str) -> str:
    """Read one of CHAT_TEMPLATES, as a single line: that is the text that saved tokenizers and caches already have."""
    lines = (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").splitlines()
    return "".join(line.strip() for line in lines)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> tuple[str, list[str]]:
    """Set the tokenizer's template: one of CHAT_TEMPLATES, or a Jinja file; "auto" keeps its own, or else uses mistral.

    Returns its name and the tokens added for it, which need rows in the model (`plan.prepare_model`). A missing padding
    token becomes <unk> or the end-of-sequence token: TRL's collators mask padding by position. Raises UserError.
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
            known = ", ".join(CHAT_TEMPLATES)
            raise UserError(f"`--chat_template {chat_template}` is unknown. Use one of {known}, or a Jinja file.")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        return file.name, []
    new = [token for token in TEMPLATE_TOKENS.get(chat_template, ()) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    tokenizer.chat_template = read_template(chat_template)
    tokenizer.eos_token = TEMPLATE_EOS.get(chat_template, tokenizer.eos_token)
    return chat_template, new


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False) -> str:
    """Render a conversation as text, special tokens included; `prompt` opens the assistant's turn at the end."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # jinja2's TemplateError, or whatever a template raises for unexpected messages
        raise UserError(f"{REFUSED}: {error}") from None


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], prompt: bool = False
) -> list[tuple[str, str]]:
    """Render many conversations: the text and "", or "" and the reason why the template refuses it, for each."""
    try:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=prompt)
        return [(str(text), "") for text in texts]
    except Exception as error:  # see `render`
        if len(conversations) == 1:
            return [("", f"{REFUSED}: {error}"[:80])]
        return [result for messages in conversations for result in render_all(tokenizer, [messages], prompt)]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize rendered texts, which already contain their special tokens. A third faster than with offsets."""
    if not tokenizer.is_fast:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both settings persist from an earlier call
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Tokenize a conversation that the model is to answer."""
    return tokenize(tokenizer, [render(tokenizer, messages, prompt=True)])[0]


def tokenize_with_labels(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Tokenize a conversation. Labels are -100 except on every assistant turn and its end.

    An assistant turn is what its rendering adds to that of the prompt before it. Raises UserError if the template's
    text does not only grow from turn to turn.
    """
    text, ends = render(tokenizer, messages), []  # where each assistant turn starts and ends, in characters
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(tokenizer, messages[:i], prompt=True), render(tokenizer, messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(f"the chat template renders turn {i} differently in a longer conversation: {after!r}")
            ends += [len(before), len(after)]
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    else:  # no offsets: count the tokens up to each end, which must only grow too
        ids, *parts = tokenize(tokenizer, [text, *(text[:end] for end in ends)])
        if any(ids[: len(part)] != part for part in parts):
            raise UserError(f"the tokens of one turn merge with the next: {text!r}")
        starts, ends = list(range(len(ids))), [len(part) for part in parts]
    # a token is learned if an odd number of ends lies at or before its start
    learned = np.searchsorted(ends, starts, side="right") % 2
    return {"input_ids": ids, "labels": np.where(learned, ids, -100).tolist()}


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[int]:
    """Every token that ends an answer: the generation config's, which may be the base model's, and the tokenizer's."""
    ends = getattr(config, "eos_token_id", None) or []
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(i) for i in known if i is not None))


def supports_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template accepts a system message and renders its text."""
    ((text, _),) = render_all(tokenizer, [[{"role": "system", "content": "Xyzzy."}, *PROBE[:1]]], prompt=True)
    return "Xyzzy." in text


def fold_system_message(messages: list[dict[str, str]], supported: bool = False) -> list[dict[str, str]]:
    """Move a leading system message into the first user turn, unless the template has a system role (`supported`)."""
    if supported or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern for text in a message that would be read as one of the tokenizer's control tokens."""
    tokens = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
    return re.compile("|".join(tokens) or r"(?!)")


def validate_chat_template(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]) -> None:
    """Check on real conversations that the template is safe to train on.

    It renders every turn, begins as the tokenizer begins other text, closes the answer with the end-of-sequence token,
    and its prompt at generation is how the conversation begins. Raises UserError with the text and the ids.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    needs_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    for messages in [*conversations, PROBE]:
        text, prompt = render(tokenizer, messages), render(tokenizer, messages[:-1], prompt=True)
        ids, before = tokenize(tokenizer, [text, prompt])
        count = ids.count(bos) if bos != eos else int(ids[:1] == [bos]) + int(ids[:2] == [bos, bos])
        if any(m["content"].strip() not in text for m in messages):
            fault = "a turn is missing"
        elif bos is not None and count > 1:
            fault = "it has more than one beginning-of-sequence token"
        elif needs_bos and not count:
            fault = f"{tokenizer.bos_token} is missing, which this tokenizer puts before any other text"
        elif not text.startswith(prompt) or ids[: len(before)] != before:
            fault = "the prompt at generation differs from the text before the answer in training"
        elif eos not in ids[len(before) :][-3:]:
            fault = f"the end of the answer is not learned: {tokenizer.eos_token} does not close it"
        else:
            continue
        raise UserError(
            f"the chat template is not safe to train on: {fault}. Use another `--chat_template`, or a Jinja file. "
            f"Text {text!r}, ids {ids}"
        )
