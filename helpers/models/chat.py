"""Chat templates: how a conversation becomes one string of tokens, and which tokens are learned."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken

from helpers.core import UserError, find_path, shorten
from helpers.models.adapters import check_model_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FOLDER = Path(__file__).with_name("templates")
# Mistral-7B-Instruct v0.1 and v0.2; OpenAI's ChatML, used by Qwen and Yi; allenai/tulu-2 and Zephyr; Stanford Alpaca
# without its preamble; lmsys/vicuna from v1.1 on; Anthropic/hh-rlhf, which Pythia was aligned with.
CHAT_TEMPLATES = ("mistral", "chatml", "tulu", "alpaca", "vicuna", "hh")
TEMPLATE_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}  # added to a tokenizer that lacks them
TEMPLATE_EOS = {"chatml": "<|im_end|>"}  # ends an answer, instead of the tokenizer's own end-of-sequence token
REFUSED = "the chat template refuses a conversation"
MANY_TURNS = 16  # messages above which `tokenize_with_labels` renders parts of a conversation only
XYZZY = {"name": "xyzzy", "description": "", "parameters": {"type": "object", "properties": {}}}  # a tool
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
        check_model_file(file, ".jinja")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        return file.name, []
    new = [token for token in TEMPLATE_TOKENS.get(chat_template, ()) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    tokenizer.chat_template = read_template(chat_template)
    tokenizer.eos_token = TEMPLATE_EOS.get(chat_template, tokenizer.eos_token)
    return chat_template, new


def name_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the tokenizer's template among CHAT_TEMPLATES, "its own", or "" without one."""
    own = "its own" if tokenizer.chat_template else ""
    return next((name for name in CHAT_TEMPLATES if tokenizer.chat_template == read_template(name)), own)


Messages = list[dict[str, Any]]
Tools = list[Any] | None  # what an assistant may call, as in transformers


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: bool = False, tools: Tools = None) -> str:
    """Render a conversation as text, special tokens included; `prompt` opens the assistant's turn at the end."""
    try:
        return str(tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # jinja2's TemplateError, or whatever a template raises for unexpected messages
        raise UserError(f"{REFUSED}: {shorten(str(error))}") from None


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Messages],
    prompt: bool = False,
    tools: Sequence[Tools] = (),
) -> list[tuple[str, str]]:
    """Render many conversations: the text and "", or "" and the reason why the template refuses it, for each.

    `tools` are those of each conversation; empty if none has any.
    """
    with contextlib.suppress(Exception):  # see `render`
        if not any(tools):
            texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=prompt)
            return [(str(text), "") for text in texts]
    results = []
    for messages, own_tools in itertools.zip_longest(conversations, tools):
        try:
            results.append((render(tokenizer, messages, prompt, own_tools), ""))
        except UserError as error:
            results.append(("", str(error)))
    return results


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize rendered texts, which already contain their special tokens. A third faster than with offsets."""
    if not tokenizer.is_fast:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both settings persist from an earlier call
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Tokenize a conversation that the model is to answer."""
    return tokenize(tokenizer, [render(tokenizer, messages, prompt=True)])[0]


def tokenize_with_labels(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> dict[str, list[int]]:
    """Tokenize a conversation. Labels are -100 except on every assistant turn and its end; a turn of weight 0 is not
    learned either.

    An assistant turn is what its rendering adds to that of the prompt before it. Raises UserError if the template's
    text does not only grow from turn to turn.
    """
    text = render(tokenizer, messages, tools=tools)
    spans = _short_spans(tokenizer, messages, tools, text) if len(messages) > MANY_TURNS else None
    spans = spans if spans is not None else _exact_spans(tokenizer, messages, tools, text)
    ends = [end for i, span in spans.items() for end in span if messages[i].get("weight") != 0]
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    else:  # no offsets: count the tokens up to each end, which must only grow too
        ids, *parts = tokenize(tokenizer, [text, *(text[:end] for end in ends)])
        if any(ids[: len(part)] != part for part in parts):
            raise UserError("the tokens of one turn merge with the next")
        starts, ends = list(range(len(ids))), [len(part) for part in parts]
    # a token is learned if an odd number of ends lies at or before its start
    learned = np.searchsorted(ends, starts, side="right") % 2
    return {"input_ids": ids, "labels": np.where(learned, ids, -100).tolist()}


def _exact_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, text: str
) -> dict[int, tuple[int, int]]:
    """Where each assistant turn starts and ends in `text`, in characters. It renders the conversation up to each turn,
    so its time grows with the square of the turns."""
    spans = {}
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:i], prompt=True, tools=tools)
            after = render(tokenizer, messages[: i + 1], tools=tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(f"the chat template renders turn {i} differently in a longer conversation")
            spans[i] = len(before), len(after)
    return spans


def _short_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, text: str
) -> dict[int, tuple[int, int]] | None:
    """As `_exact_spans`, in time that grows with the turns: each exchange is rendered behind the one before it only.
    None if these parts do not make up `text`, because the template looks further back."""
    first = int(messages[0]["role"] == "system")
    head = messages[:first]
    starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"] + [len(messages)]
    spans, end, after, earlier = {}, 0, "", Messages()
    for start, stop in itertools.pairwise(starts):
        window = [*head, *earlier]
        shift = end - len(render(tokenizer, window, tools=tools)) if earlier else 0
        for i in range(start, stop):
            if messages[i]["role"] == "assistant":
                before = render(tokenizer, [*window, *messages[start:i]], prompt=True, tools=tools)
                after = render(tokenizer, [*window, *messages[start : i + 1]], tools=tools)
                if not after.startswith(before):
                    return None
                spans[i] = len(before) + shift, len(after) + shift
        if text[end : len(after) + shift] != after[end - shift :]:
            return None
        end, earlier = len(after) + shift, messages[start:stop]
    return spans if end == len(text) else None


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[int]:
    """Every token that ends an answer: the generation config's, which may be the base model's, and the tokenizer's."""
    ends = getattr(config, "eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(i) for i in known if i is not None))


def supports_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template accepts a system message and renders its text."""
    ((text, _),) = render_all(tokenizer, [[{"role": "system", "content": "Xyzzy."}, *PROBE[:1]]], prompt=True)
    return "Xyzzy." in text


def not_rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> str:
    """What of a conversation the template leaves out of its text: tools, tool_calls, reasoning_content, or a tool's
    answer; "" if it renders all."""
    if tools and not _renders(tokenizer, PROBE[:1], "xyzzy", [{"type": "function", "function": XYZZY}]):
        return "tools"
    for message in messages:
        call = {"type": "function", "function": {"name": "xyzzy", "arguments": {}}, "id": "xyzzy1234"}
        probe = {"role": "assistant", "content": "", "tool_calls": [call]}
        if "tool_calls" in message and not _renders(tokenizer, [*PROBE[:1], probe], "xyzzy"):
            return "tool_calls"
        answer = {"role": "tool", "content": "Plugh.", "tool_call_id": "xyzzy1234", "name": "xyzzy"}
        if message["role"] == "tool" and not _renders(tokenizer, [*PROBE[:1], probe, answer], "Plugh."):
            return "a tool's answer"
        thought = {"role": "assistant", "content": "Two.", "reasoning_content": "Plugh."}
        if "reasoning_content" in message and not _renders(tokenizer, [*PROBE[:1], thought], "Plugh."):
            return "reasoning_content"
    return ""


def _renders(tokenizer: PreTrainedTokenizerBase, messages: Messages, word: str, tools: Tools = None) -> bool:
    with contextlib.suppress(UserError):
        return word in render(tokenizer, messages, tools=tools)
    return False


def fold_system_message(messages: Messages, supported: bool = False) -> Messages:
    """Move a leading system message into the first user turn, unless the template has a system role (`supported`)."""
    if supported or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern for text in a message that would be read as one of the tokenizer's control tokens."""
    tokens = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
    return re.compile("|".join(tokens) or r"(?!)")


def validate_chat_template(tokenizer: PreTrainedTokenizerBase, conversations: list[Messages]) -> None:
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
