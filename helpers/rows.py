"""Rows in, rows out: loading a dataset from anywhere, the account of what became of each row, and the split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import SettingsError, UserError
from helpers.paths import find_path

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
Message = dict[str, str]


@dataclasses.dataclass
class Account:
    """What became of every row: `kept + sum(dropped) == read`, each reason with a count and up to three row numbers."""

    read: int = 0
    kept: int = 0
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    noted: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    format: str = ""

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] += 1
        self._example(reason, row)

    def change(self, reason: str, row: int) -> None:
        self.changed[reason] += 1
        self._example(reason, row)

    def note(self, reason: str, row: int) -> None:
        """Something worth knowing of a row that is kept as it is."""
        self.noted[reason] += 1
        self._example(reason, row)

    def _example(self, reason: str, row: int) -> None:
        if len(numbers := self.examples.setdefault(reason, [])) < 3:
            numbers.append(row)

    def check(self, strict: bool) -> None:
        """Raise SettingsError where nothing is left, or where `strict` and a row was dropped."""
        if self.kept and not (strict and self.dropped):
            return
        reasons = "; ".join(f"{reason}: {n} (row {self.examples[reason][0]})" for reason, n in self.dropped.items())
        lost = self.dropped.total()
        who = f"{lost} of {self.read} rows cannot" if self.kept else f"no row of {self.read} can"
        raise SettingsError(f"{who} be used. {reasons}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "read": self.read,
            "kept": self.kept,
            "changed": sum(self.changed.values()),
            "dropped": sum(self.dropped.values()),
            "reasons": dict(self.changed + self.dropped + self.noted),
            "examples": self.examples,
        }

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("rows", "count", "example rows", box=None, pad_edge=False)
        table.add_row("read", f"{self.read:,}", "")
        for label, reasons in (("changed", self.changed), ("dropped", self.dropped), ("noted", self.noted)):
            for reason, count in reasons.most_common():
                table.add_row(f"  {label}: {reason}", f"{count:,}", ", ".join(map(str, self.examples[reason])))
        table.add_row("kept", f"{self.kept:,}", "", style="bold")
        return table


def load_rows(dataset_id: str, config: str = "", split: str = "train", revision: str = "") -> Dataset:
    """One split of a Hub dataset, a local file, a folder of files, or a `save_to_disk` folder. Raises UserError."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = find_path(dataset_id)
    try:
        if path is None:
            return load_dataset(dataset_id, config or None, split=split, revision=revision or None)
        if path.is_file():
            if path.suffix not in READERS:
                raise UserError(f"dataset {dataset_id!r}: a file is one of {', '.join(READERS)}")
            return load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            return saved if isinstance(saved, Dataset) else DatasetDict(saved)[split]
        return load_dataset(str(path), config or None, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # datasets' and the Hub client's errors are of these
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"dataset {dataset_id!r}, split {split!r}, cannot be loaded: {reason}") from None


def split_by_prompt(
    rows: Dataset, column: str, eval_rows: int, eval_fraction: float, train_rows: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Train and evaluation rows with no prompt (text of `column`) in both; the order is the seed's, not the file's.

    `eval_rows` wins over `eval_fraction`; 0 for `train_rows` means all that are left.
    """
    prompts = rows[column][:]
    rank = {p: hashlib.sha256(f"{seed} {p}".encode()).digest() for p in set(prompts)}
    order = sorted(range(len(prompts)), key=lambda i: (rank[prompts[i]], i))
    if not (eval_rows or eval_fraction):
        raise UserError("--eval_rows 0 and --eval_fraction 0: something has to be held out, to see what is learned")
    wanted = min(eval_rows or round(eval_fraction * len(order)), len(order) - 1)
    while 0 < wanted < len(order) and prompts[order[wanted]] == prompts[order[wanted - 1]]:
        wanted += 1  # the prompt at the border goes to the evaluation rows as a whole
    chosen = order[wanted : wanted + train_rows] if train_rows else order[wanted:]
    if not chosen:
        raise UserError(f"{len(prompts)} rows are too few for --eval_rows {wanted}: nothing is left to train on")
    return rows.select(chosen), rows.select(order[:wanted])


def content_fingerprint(rows: Dataset, tokenizer: PreTrainedTokenizerBase, work: dict[str, Any]) -> str:
    """A name for what becomes of `rows` under this tokenizer, these arguments and this code.

    datasets makes such names by pickling, which for tokenizers changes from one process to the next.
    """
    code = "".join(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py")))
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    parts = [rows._fingerprint, json.dumps(backend), tokenizer.chat_template, tokenizer.special_tokens_map, work, code]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def is_conversation(value: Any) -> bool:
    """A non-empty list of messages, each with text under role and content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def conversation(value: Any) -> list[Message]:
    """Just role and content of each message: further keys would reach the chat template."""
    return [{"role": m["role"], "content": m["content"]} for m in value]


def fault_of(messages: list[Message]) -> str:
    """Why a conversation cannot be learned from, or "": it is system?, then user and assistant in turns."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        return "no final assistant turn"
    if any(m["role"] != ("assistant" if i % 2 else "user") for i, m in enumerate(turns)):
        return "roles do not alternate"
    if any(not m["content"].strip() for m in turns):
        return "empty answer" if not turns[-1]["content"].strip() else "empty turn"
    return ""


def key_of(messages: list[Message]) -> str:
    """A conversation as one string that another has only if it is the same."""
    return json.dumps([[m["role"], m["content"].strip()] for m in messages])


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError with the line's number."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{file.name}, line {number}, is not JSON: {error}") from None
    return rows
