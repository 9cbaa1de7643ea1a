"""What a judge is asked, and how its verdict is read. Prompts are rows of FastChat's judge_prompts.jsonl."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.questions import Question, shown_turns
from helpers.rows import Message, read_lines

OURS = Path(__file__).with_name("judge_prompts.jsonl")
# FastChat (llm_judge/common.py) shows a reference in these categories only.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
FASTCHAT = {("pairwise", False): "pair-v2", ("pairwise", True): "pair-math-v1",
            ("single", False): "single-v1", ("single", True): "single-math-v1"}  # fmt: skip


class JudgePrompts:
    """The prompts of a file, ours where none is named; FastChat's are known by their names."""

    def __init__(self, file: Path = OURS) -> None:
        self.rows = {str(row.get("name")): row for row in read_lines(file)}
        self.fastchat = "pair-v2" in self.rows
        self.file = file

    @property
    def most_turns(self) -> int:
        """The last turn that can be judged: FastChat's prompts have room for two."""
        return 2 if self.fastchat else 1000

    def name_for(self, question: Question, turn: int, mode: str) -> str:
        """Which prompt a turn (from 1) of a question is judged with. Raises UserError where the file lacks it."""
        reference = len(question.get("reference", ())) >= turn
        if self.fastchat:
            name = FASTCHAT[mode, reference and question["category"] in REFERENCE_CATEGORIES]
        else:
            name = {"pairwise": "pair", "single": "single"}[mode] + ("-reference" if reference else "")
        name += "-multi-turn" if turn > 1 else ""
        if name not in self.rows:
            raise UserError(f"{self.file} has no prompt named {name}; it has {', '.join(sorted(self.rows))}")
        return name

    def messages(self, name: str, question: Question, turn: int, answers: list[list[str]]) -> list[Message]:
        """System and user message for one model's answers up to `turn`, or two models' in the order they are shown.

        Raises UserError for a template with a field that is not known.
        """
        row = self.rows[name]
        asked, reference = shown_turns(question), question.get("reference", [])
        fields: dict[str, Any] = {"question": asked[turn - 1], "reference": _talk(asked, reference, turn)}
        fields |= {f"question_{i}": text for i, text in enumerate(asked, 1)}
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
        for side, said in zip(("_a", "_b") if len(answers) > 1 else ("",), answers, strict=True):
            fields |= {f"answer{side}": said[turn - 1], f"conversation{side}": _talk(asked, said, turn)}
            fields |= {f"answer{side}_{i}": text for i, text in enumerate(said, 1)}
        try:
            text = row["prompt_template"].format(**fields)
        except (LookupError, ValueError) as error:
            raise UserError(f"{self.file}: the template of {name} cannot be filled in: {error}") from None
        return [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": text}]

    def preview(self, messages: list[list[Message]], left: list[list[Message]]) -> str:
        """One prompt, whole, and what it would be to send those that are left to ask."""
        parts = [f"--- {m['role']} ---\n{m['content']}" for m in messages[0]]
        tokens = sum(len(m["content"]) for each in left for m in each) // 4
        calls = f"{len(left):,} calls like this one, some {tokens:,} tokens to read."
        before = len(messages) - len(left)
        return "\n".join([*parts, "---", calls, *([f"{before:,} more have been judged before."] if before else [])])


def _talk(asked: list[str], said: list[str], turn: int) -> str:
    if turn == 1:
        return "".join(said[:1])
    pairs = zip(asked[:turn], said[:turn], strict=False)
    return "\n\n".join(f"## User\n\n{question}\n\n## Assistant\n\n{answer}" for question, answer in pairs)


def stated(judgment: str) -> str:
    """What a judge said without what it thought: what stands in <think> tags; all before a </think> without its
    opening tag, which many templates put into the prompt; all of a reply that opens with one and never closes it."""
    flags = re.DOTALL | re.IGNORECASE
    whole = re.sub(r"<think(ing)?>.*?</think(ing)?>", "", judgment, flags=flags)
    rest = re.split(r"</think(?:ing)?>", whole, flags=flags)[-1]
    return re.sub(r"^\s*<think(ing)?>.*", "", rest, flags=flags)


def verdict_of(judgment: str) -> str:
    """The last verdict stated: "A", "B" or "tie" ([[C]]); "error" where there is none.

    FastChat takes the first of A, B and C that stands anywhere, so that a quoted [[A]] wins.
    """
    found = re.findall(r"\[\[([ABC])\]\]", stated(judgment))
    return {"C": "tie"}.get(found[-1], found[-1]) if found else "error"


def rating_of(judgment: str) -> float:
    """The last rating stated, from 1 to 10; -1, as FastChat has it, where there is none."""
    found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", stated(judgment)) or re.findall(
        r"\[(\d+(?:\.\d+)?)\]", stated(judgment)
    )
    return value if found and 1 <= (value := float(found[-1])) <= 10 else -1
