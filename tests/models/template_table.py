# ruff: noqa: RUF001  (DeepSeek's tokens have full-width bars)
"""python -m tests.models.template_table: write the table of TRL's chat templates in docs/templates.md anew."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers.core import REPO
from helpers.data.encode import LengthLimits
from helpers.data.prepare import prepare_rows, tokenize_dataset
from helpers.data.row_report import RowReport

PAGE = REPO / "docs" / "templates.md"
FOLDER = Path(str((find_spec("trl") or Any).submodule_search_locations[0])) / "chat_templates"
IMAGES = ("idefics3", "llava_next", "smolvlm")  # take lists of parts with images, never a text
NAMES = sorted({file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training")} - {*IMAGES})
CONTROL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|<sop>|<end_of_utterance>"
)
# bos, eos and further ends of generation, as the models of each family have them; the longest prefix of a name counts
TOKENS: dict[str, tuple[str, ...]] = {
    "": ("", "<|im_end|>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<eos>", "<turn|>", "<|tool_response>"),
    "gemma": ("<bos>", "<eos>", "<end_of_turn>"),
    "gemma4": ("<bos>", "<eos>", "<turn|>", "<|tool_response>"),
    "glm4moe": ("", "<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|startoftext|>", "<|return|>", "<|call|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>", "<|end|>"),
}


def byte_tokenizer(template: str, tokens: tuple[str, ...]) -> Any:
    """A tokenizer of bytes with a template's control tokens; `tokens` are bos, eos and further ends of generation."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    control = {*CONTROL.findall(template), *filter(None, tokens)}
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in sorted(control)])
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in marks])
    bos, eos, *ends = tokens
    tokenizer.eos_token = tokenizer.pad_token = eos
    if bos:
        tokenizer.bos_token = bos
    if "bos_token" in template:  # the tokenizer begins all text with it
        special = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=special)
    tokenizer.chat_template = template
    tokenizer.model_eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    return tokenizer


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a template that TRL ships."""
    family = max((prefix for prefix in TOKENS if name.startswith(prefix)), key=len)
    return byte_tokenizer((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), TOKENS[family])


def turn(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


PARAMETERS = {"type": "object", "properties": {"number": {"type": "integer", "description": "which"}}}
TOOLS = [{"type": "function", "function": {"name": "colour_of", "description": "A colour.", "parameters": PARAMETERS}}]
CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "colour_of", "arguments": {"number": 0}}}]
SYSTEM, HISTORY = turn("system", "Be brief."), [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Why?")]
THOUGHT = {"reasoning_content": "Let me see."}
CALLED = [
    turn("user", "Which?"),
    turn("assistant", "", tool_calls=CALL),
    turn("tool", "blue", name="colour_of", tool_call_id="abcdefghi"),
]
ANSWERS = {"chosen": [turn("assistant", "Because.")], "rejected": [turn("assistant", "No.")]}
THOUGHTFUL = {side: [answer | THOUGHT for answer in answers] for side, answers in ANSWERS.items()}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": HISTORY, **ANSWERS},
    "system": {"prompt": [SYSTEM, *HISTORY], **ANSWERS},
    "thoughts": {"prompt": [SYSTEM, HISTORY[0], HISTORY[1] | THOUGHT, HISTORY[2]], **THOUGHTFUL},
    "thinking off": {"prompt": HISTORY, **ANSWERS, "chat_template_kwargs": {"enable_thinking": False}},
    "tools": {"prompt": CALLED, **ANSWERS, "tools": TOOLS},
    "a call": {"prompt": CALLED[:1], "chosen": CALLED[1:2], "rejected": ANSWERS["rejected"], "tools": TOOLS},
}


def prepare_row(tokenizer: Any, row: dict[str, Any], use_pairs: bool) -> tuple[dict[str, Any] | None, RowReport]:
    """A row as 02 prepares it, or with its chosen answer as 01 does; None if it is dropped."""
    if not use_pairs:
        row = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")} | {
            "messages": row["prompt"] + row["chosen"]
        }
    rows, report = prepare_rows(Dataset.from_list([row]), tokenizer, LengthLimits(), use_pairs, validate=True)
    return (rows[0] if len(rows) else None), report


def drop_reasons(tokenizer: Any) -> dict[str, str]:
    """Why 01 or 02 drops each of ROWS, or ""."""
    rows, reasons = list(ROWS.values()), dict.fromkeys(ROWS, "")
    talks = [{k: v for k, v in row.items() if k != "rejected"} | {"completion": row["chosen"]} for row in rows]
    for use_pairs, each in ((False, [{k: v for k, v in row.items() if k != "chosen"} for row in talks]), (True, rows)):
        prepared, _ = tokenize_dataset(Dataset.from_list(each), tokenizer, use_pairs, LengthLimits(), validate=True)
        for kind, reason in zip(ROWS, prepared["drop_reason"], strict=True):
            reasons[kind] = reasons[kind] or reason
    return reasons


def describe(name: str) -> list[str]:
    """A row of the table."""
    from helpers.models.chat import marked_template, supports_system_role

    tokenizer = tokenizer_of(name)
    reasons = drop_reasons(tokenizer)
    marks = marked_template(tokenizer)
    labels = "TRL's marks" if marks and marks != tokenizer.chat_template else "own marks" if marks else "prompts"
    if reasons["plain"]:
        return [name, f"no: {reasons['plain']}", "", "", "", ""]
    system = "" if reasons["system"] else "yes" if supports_system_role(tokenizer) else "into the first turn"
    tools = "yes" if not reasons["tools"] + reasons["a call"] else "no" if reasons["tools"] else "not as an answer"
    return [name, "yes", labels, system, "no" if reasons["thoughts"] else "yes", tools]


def table() -> str:
    """The lines of the table."""
    head = ["template", "01 and 02", "learned by", "system role", "thoughts", "tools"]
    rows = [head, ["---"] * len(head), *map(describe, NAMES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """The page, with the table in the place of the one that is there."""
    return re.sub(r"(?:^\|.*\n)+", lambda _: table(), PAGE.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
