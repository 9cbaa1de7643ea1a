"""Answers of a model, in batches, and how they are shown side by side."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.chat import render
from helpers.errors import UserError
from helpers.fields import RunSettings
from helpers.paths import find_path
from helpers.rows import Message, read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain to a ten-year-old why the sky is blue.",
    "A train leaves at 14:50 and takes 2 hours and 25 minutes. When does it arrive?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a short, polite email that declines a meeting.",
    "List three differences between a lake and a sea, one line each.",
    "Is it safe to eat raw kidney beans?",
    "Continue: The lighthouse keeper had not spoken to anyone for a year when",
)
SAMPLED = ("temperature", "top_p", "top_k")  # have a meaning when sampling only


def read_prompts(prompts: tuple[str, ...], file: str) -> list[dict[str, Any]]:
    """Objects with a field `prompt`, from the command line, from a file (.jsonl, or a line each), or of our own."""
    if not file:
        return [{"prompt": prompt} for prompt in prompts or PROMPTS]
    path = find_path(file)
    if path is None or not path.is_file():
        raise UserError(f"--prompts_file {file!r} is not a file")
    if path.suffix != ".jsonl":
        questions = [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        questions = read_lines(path)
    if not questions or not all(isinstance(q, dict) and isinstance(q.get("prompt"), str) for q in questions):
        raise UserError(f"--prompts_file {file!r} needs at least one line, each with a field prompt")
    return [{"prompt": prompt} for prompt in prompts] + questions


def sampling_of(settings: RunSettings) -> dict[str, Any]:
    """The arguments of `model.generate` among the settings; those of sampling only when it samples."""
    names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty")
    return {name: getattr(settings, name) for name in names + (SAMPLED if settings.values()["do_sample"] else ())}


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    batch_size: int,
    **sampling: Any,
) -> list[str]:
    """One answer a conversation, in their order. `sampling` goes to `model.generate`.

    Batches hold prompts of similar length, padded on the left, so that every answer starts where its prompt ends.
    """
    import torch

    texts = [render(tokenizer, messages, prompt=True) for messages in conversations]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    answers = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[i] for i in batch], add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]  # the stubs call it a tensor
                **inputs, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        new = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(batch, new, strict=True):
            answers[i] = answer.strip()
    return answers


@dataclasses.dataclass
class SideBySide:
    """Prompts and the answers of each model: a table in a terminal, HTML in a notebook."""

    prompts: list[str]
    answers: dict[str, list[str]]

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table("prompt", *self.answers, show_lines=True)
        for prompt, *answers in zip(self.prompts, *self.answers.values(), strict=True):
            table.add_row(*map(Text, (prompt, *answers)))
        return table

    def _repr_html_(self) -> str:
        def row(tag: str, cells: list[str]) -> str:
            style = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:.4em .8em"
            return "<tr>" + "".join(f'<{tag} style="{style}">{html.escape(c)}</{tag}>' for c in cells) + "</tr>"

        body = [row("td", list(cells)) for cells in zip(self.prompts, *self.answers.values(), strict=True)]
        return f"<table>{row('th', ['prompt', *self.answers])}{''.join(body)}</table>"

    def sample(self, rows: int) -> SideBySide:
        """`rows` of the prompts, evenly spread."""
        step = max(1, len(self.prompts) // max(1, rows))
        picked = slice(step // 2, None, step)
        few = {name: answers[picked][:rows] for name, answers in self.answers.items()}
        return SideBySide(self.prompts[picked][:rows], few)

    def save(self, file: Path) -> None:
        """JSONL, a prompt a line: {"prompt": ..., "answers": {model: answer}}."""
        with file.open("w", encoding="utf-8") as out:
            for prompt, *answers in zip(self.prompts, *self.answers.values(), strict=True):
                row = {"prompt": prompt, "answers": dict(zip(self.answers, answers, strict=True))}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
