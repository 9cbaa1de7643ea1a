"""Chat templates: how a conversation becomes one string of tokens, and which tokens are learned."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken

from helpers.core import UserError, find_path, shorten
from helpers.models.adapters import check_model_file, display_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TEMPLATE_FOLDER = Path(__file__).with_name("templates")
# Mistral-7B-Instruct v0.1 and v0.2; OpenAI's ChatML, used by Qwen and Yi; allenai/tulu-2 and Zephyr; Stanford Alpaca
# without its preamble; lmsys/vicuna from v1.1 on; Anthropic/hh-rlhf, which Pythia was aligned with.
CHAT_TEMPLATES = ("mistral", "chatml", "tulu", "alpaca", "vicuna", "hh")
TEMPLATE_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}  # added to a tokenizer that lacks them
TEMPLATE_EOS = {"chatml": "<|im_end|>"}  # ends an answer, instead of the tokenizer's own end-of-sequence token
UNSAFE = "the chat template is not safe to train on: {}"
PROMPT_DIFFERS = "the chat template renders the prompt differently before an answer"
TURN_DIFFERS = "the chat template renders turn {} differently in a longer conversation"
MANY_TURNS = 16  # messages above which `tokenize_with_labels` renders parts of a conversation only
PROBE = [
    {"role": role, "content": text}
    for role, text in (("user", "Apples?"), ("assistant", "Two."), ("user", "Pears?"), ("assistant", "Three."))
]
THOUGHT_MARK = re.compile(r"\W*think\W*", re.IGNORECASE)  # <think>, </think>, [THINK] ...


def read_template(name: str) -> str:
    """Read one of CHAT_TEMPLATES, as a single line: that is the text that saved tokenizers and caches already have."""
    lines = (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").splitlines()
    return "".join(line.strip() for line in lines)


def set_chat_template(tokenizer: Tokenizer, chat_template: str, is_of_run: bool = False) -> tuple[str, list[str]]:
    """Set the tokenizer's template: one of CHAT_TEMPLATES, or a Jinja file; "auto" keeps its own, or else uses mistral.
    Returns its name and the tokens added for it, which need rows in the model (`plan.prepare_model`). A missing padding
    token becomes <unk> or the end-of-sequence token: TRL masks padding by position. Raises UserError."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_template == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own", []
        name = display_name(tokenizer.name_or_path)
        if is_of_run:  # each run saves the template that it trained with
            fix = "Restore chat_template.jinja, or name the template with `--chat_template`."
            raise UserError(f"{name} has lost its chat template. {fix}")
        print(f"note: {name} has no chat template. Mistral's is used, and saved.")
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
    if tokenizer.bos_token in TEMPLATE_TOKENS.get(chat_template, ()):  # SmolLM2's opens each turn
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{- bos_token -}}")
    tokenizer.eos_token = TEMPLATE_EOS.get(chat_template, tokenizer.eos_token)
    return chat_template, new


def name_template(tokenizer: Tokenizer) -> str:
    """The name of the tokenizer's template among CHAT_TEMPLATES, "its own", or "" without one."""
    own = "its own" if tokenizer.chat_template else ""
    return next((name for name in CHAT_TEMPLATES if tokenizer.chat_template == read_template(name)), own)


Messages = list[dict[str, Any]]
TemplateOptions = Mapping[str, Any]  # further arguments of apply_chat_template: tools, and variables of the template
Options = TemplateOptions | None
EachOptions = Sequence[TemplateOptions] | None  # of several conversations, in their order
Span = tuple[int, int]  # start and end in a text, in characters


def render(tokenizer: Tokenizer, messages: Messages, prompt: bool = False, options: Options = None) -> str:
    """Render a conversation as text, special tokens included; `prompt` opens the assistant's turn at the end."""
    arguments: Any = {"tokenize": False, "add_generation_prompt": prompt, **(options or {})}
    with _template_errors():
        return str(tokenizer.apply_chat_template(messages, **arguments))


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # jinja2's TemplateError, or whatever a template raises for unexpected messages
        raise UserError(f"the chat template refuses a conversation: {shorten(str(error))}") from None


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokenize rendered texts, which already contain their special tokens. A third faster than with offsets."""
    if not tokenizer.is_fast:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both settings persist from an earlier call
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer: Tokenizer, messages: Messages, options: Options = None) -> list[int]:
    """Tokenize a conversation that the model is to answer."""
    return tokenize(tokenizer, [render(tokenizer, messages, prompt=True, options=options)])[0]


def marked_template(tokenizer: Tokenizer) -> str:
    """The template to train conversations with, which marks what is learned with {% generation %}: TRL's own for the
    tokenizer's, or the tokenizer's. "" if neither does, or ends of turns are outside the marks."""
    if name_template(tokenizer) in CHAT_TEMPLATES:  # without marks; TRL's import takes seconds
        return ""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    with contextlib.suppress(Exception):  # ValueError for an unknown template, and what templates raise for its probes
        if template := get_training_chat_template(tokenizer):
            return template
    with contextlib.suppress(Exception):
        own = str(tokenizer.get_chat_template())
        if re.search(r"{%-?\s*generation\b", own) and is_chat_template_stop_token_trained(tokenizer):
            return own
    return ""


def tokenize_with_labels(
    tokenizer: Tokenizer, messages: Messages, options: Options = None, template: str = ""
) -> dict[str, list[int]]:
    """Tokenize a conversation. Labels are -100 except on every assistant turn and its end, but for turns of weight 0.

    An assistant turn is what `template` marks (`marked_template`), without what the prompt at generation has of it; or
    without marks, what its rendering adds to that of the prompt before it. Raises UserError if the text before the
    last answer is not its prompt at generation, or without marks, if the text does not only grow from turn to turn.
    """
    options = dict(options or {})
    if template:
        text, found = _marked_spans(tokenizer, messages, options | {"chat_template": template})
    else:
        text = render(tokenizer, messages, options=options)
        spans = _short_spans(tokenizer, messages, options, text) if len(messages) > MANY_TURNS else None
        spans = spans if spans is not None else _exact_spans(tokenizer, messages, options, text)
        found = [span for i, span in spans.items() if messages[i].get("weight") != 0]
    ends = [end for span in found for end in span]
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


def _marked_spans(tokenizer: Tokenizer, messages: Messages, options: dict[str, Any]) -> tuple[str, list[Span]]:
    """The text of a conversation, and what is learned of it by the marks of the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def mark(talk: Messages) -> tuple[str, list[Span]]:
        with _template_errors():
            arguments: Any = {"return_assistant_tokens_mask": True, **tokenizer.special_tokens_map, **options}
            rendered: Any = render_jinja_template([talk], **arguments)
        return rendered[0][0], rendered[1][0]

    text, spans = mark(messages)
    if not text.startswith(render(tokenizer, messages[:-1], prompt=True, options=options)):
        raise UserError(PROMPT_DIFFERS)
    skipped = set[int]()
    for i, message in enumerate(messages):
        if message.get("weight") == 0:  # its spans are those that change with its text
            other, changed = mark([*messages[:i], message | {"content": f"x{message['content']}"}, *messages[i + 1 :]])
            pairs = enumerate(zip(spans, changed, strict=True))
            skipped |= {n for n, (a, b) in pairs if text[slice(*a)] != other[slice(*b)]}
    learned = [span for n, span in enumerate(spans) if n not in skipped]
    for mode in ({}, {"enable_thinking": False}):  # a turn without thoughts begins as the prompt without them ends
        plain, prompt = (render(tokenizer, PROBE[:1], prompt, mode | options) for prompt in (False, True))
        same = next((i for i, (a, b) in enumerate(zip(plain, prompt, strict=False)) if a != b), len(plain))
        cue = prompt[same:]
        for n, (start, end) in enumerate(learned):
            if cue and (at := text.find(cue, max(0, start - len(cue)), start + len(cue))) >= 0:
                learned[n] = max(start, at + len(cue)), end
    return text, learned


def _exact_spans(tokenizer: Tokenizer, messages: Messages, options: Options, text: str) -> dict[int, Span]:
    """Where each assistant turn that is learned is in `text`. The time grows with the square of the turns."""
    spans = {}
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != 0:
            before = render(tokenizer, messages[:i], prompt=True, options=options)
            after = render(tokenizer, messages[: i + 1], options=options)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(PROMPT_DIFFERS if i == len(messages) - 1 else TURN_DIFFERS.format(i))
            spans[i] = len(before), len(after)
    return spans


def _short_spans(tokenizer: Tokenizer, messages: Messages, options: Options, text: str) -> dict[int, Span] | None:
    """As `_exact_spans`, in time that grows with the turns: each exchange is rendered behind the one before it only.
    None if these parts do not make up `text`, because the template looks further back."""
    first = int(messages[0]["role"] == "system")
    head = messages[:first]
    starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"] + [len(messages)]
    spans, end, after, earlier = {}, 0, "", Messages()
    for start, stop in itertools.pairwise(starts):
        window = [*head, *earlier]
        shift = end - len(render(tokenizer, window, options=options)) if earlier else 0
        for i in range(start, stop):
            if messages[i]["role"] == "assistant":
                before = render(tokenizer, [*window, *messages[start:i]], prompt=True, options=options)
                after = render(tokenizer, [*window, *messages[start : i + 1]], options=options)
                if not after.startswith(before):
                    return None
                spans[i] = len(before) + shift, len(after) + shift
        if text[end : len(after) + shift] != after[end - shift :]:
            return None
        end, earlier = len(after) + shift, messages[start:stop]
    return spans if end == len(text) else None


def eos_token_ids(tokenizer: Tokenizer, config: Any = None) -> list[int]:
    """Every token that ends an answer: the generation config's, which may be the base model's, and the tokenizer's.
    Without `config`, that of the model if `load_tokenizer` has read it."""
    ends = getattr(config, "eos_token_id", None) if config else getattr(tokenizer, "model_eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(i) for i in known if i is not None))


def supports_system_role(tokenizer: Tokenizer) -> bool:
    """Whether the template accepts a system message and renders its text."""
    with contextlib.suppress(UserError):
        return "Xyzzy." in render(tokenizer, [{"role": "system", "content": "Xyzzy."}, *PROBE[:1]], prompt=True)
    return False


def fold_system_message(messages: Messages, supported: bool = False) -> Messages:
    """Move a leading system message into the first user turn, unless the template has a system role (`supported`)."""
    if supported or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]


def special_token_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """A pattern for text in a message that would be read as a control token; thoughts may have their marks."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
    tokens = [re.escape(token) for token in tokens if not THOUGHT_MARK.fullmatch(token)]
    return re.compile("|".join(tokens) or r"(?!)")


def find_fault(tokenizer: Tokenizer, messages: Messages, text: str, ids: list[int], learned: Sequence[int]) -> str:
    """Why the rendering of a conversation is not safe to train on, or "". `learned` are the last tokens of its ids.
    It shows each message (of an assistant without its thoughts), begins as the tokenizer begins other text, and its
    last answer ends with a token that ends generation; whitespace may follow."""
    bos, ends = tokenizer.bos_token_id, eos_token_ids(tokenizer)
    if any(m["role"] != "tool" and m["content"].rpartition("</think>")[2].strip() not in text for m in messages):
        return "a turn is missing"
    if bos is not None and ids[:2] == [bos, bos]:
        return "it has more than one beginning-of-sequence token"
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        return f"{tokenizer.bos_token} is missing, which this tokenizer puts before any other text"
    last = next((i for i in reversed(learned) if i in ends or str(tokenizer.decode([i])).strip()), None)
    if last not in ends:
        names = " or ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
        closing = "" if last is None else str(tokenizer.convert_ids_to_tokens(last))
        is_special = closing in tokenizer.get_added_vocab()
        fix = f"; use `--eos_token '{closing}'`" if is_special else ""
        return f"the answer does not end with {names}, so the model would not learn to stop{fix}"
    return ""


def find_template_fault(tokenizer: Tokenizer, messages: Messages) -> str:
    """`find_fault` in a conversation as the tokenizer's template renders it, or that it begins otherwise than at
    generation; "" for none."""
    text, prompt = render(tokenizer, messages), render(tokenizer, messages[:-1], prompt=True)
    ids, before = tokenize(tokenizer, [text, prompt])
    fault = find_fault(tokenizer, messages, text, ids, ids[len(before) :])
    if not fault and not (text.startswith(prompt) and ids[: len(before)] == before):
        fault = "the prompt at generation differs from the text before the answer in training"
    return fault


def suggest_template(tokenizer: Tokenizer) -> str:
    """What to use instead of the tokenizer's template: the first of CHAT_TEMPLATES that is safe with it, where those
    whose tokens it has come first."""
    has_tokens = {n: set(tokens) <= tokenizer.get_vocab().keys() for n, tokens in TEMPLATE_TOKENS.items()}
    for name in sorted(CHAT_TEMPLATES, key=lambda name: not has_tokens.get(name)):
        other = copy.deepcopy(tokenizer)
        set_chat_template(other, name)
        if not find_template_fault(other, PROBE):
            return f"Use `--chat_template {name}`, or a Jinja file."
    return "Use another `--chat_template`, or a Jinja file."
