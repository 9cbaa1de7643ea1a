"""Answers to questions: asked turn by turn, kept as they come, and shown side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from helpers.core import Interrupted, UserError, read_jsonl, safe_file_name, short_path
from helpers.data.conversations import Message
from helpers.evaluation.generators import Generator
from helpers.evaluation.questions import Question, turns_of
from helpers.runs.run import Run

# FastChat's temperatures for MT-Bench (llm_judge/common.py), by category; 0 is greedy, others are asked at 0.7.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                "stem": 0.1, "humanities": 0.1}  # fmt: skip


class AnswerStore:
    """What each model answered: FOLDER/model_answer/NAME.jsonl, FastChat's layout, beside FOLDER/question.jsonl."""

    def __init__(self, folder: Path, questions: list[Question]) -> None:
        self.folder, self.questions = folder, questions
        self._files: dict[str, JsonlStore] = {}

    def of(self, name: str) -> JsonlStore:
        """The file of a model, by question_id."""
        if name not in self._files:
            file = self.folder / "model_answer" / f"{safe_file_name(name)}.jsonl"
            self._files[name] = JsonlStore(file, lambda row: row["question_id"])
        return self._files[name]

    def missing(self, name: str) -> list[Question]:
        """The questions that a model has not answered yet, in their order."""
        return [q for q in self.questions if q["question_id"] not in self.of(name)]

    def turns(self, name: str) -> dict[Any, list[str]]:
        """A model's answers to the questions there are, one a turn, by question_id."""
        rows = self.of(name).rows
        return {q["question_id"]: turns_of(rows[i]) for q in self.questions if (i := q["question_id"]) in rows}

    def save_questions(self) -> None:
        """question.jsonl beside the answers, for 05_judge.py and FastChat."""
        text = "".join(json.dumps(q, ensure_ascii=False, default=str) + "\n" for q in self.questions)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "question.jsonl").write_text(text, encoding="utf-8", errors="backslashreplace")

    def mean_length(self, names: list[str]) -> dict[str, float]:
        """Characters of an answer to one question, in the mean, by model."""
        said = {name: self.turns(name).values() for name in names}
        return {name: sum(len("".join(turns)) for turns in each) / max(1, len(each)) for name, each in said.items()}

    def play(
        self, name: str, speaker: Generator, batch_size: int, seed: int, by_category: bool, **sampling: Any
    ) -> None:
        """Ask a model what it has not answered yet, batch by batch, each conversation turn by turn.

        A batch is made of all questions, not of the missing ones, and has a seed of its own: a run that was stopped
        and goes on gives the answers of one that was not. `by_category` asks at FastChat's `TEMPERATURES`.
        """
        from tqdm.auto import tqdm

        self.save_questions()
        missing = {str(q["question_id"]) for q in self.missing(name)}
        batches = list(_batches(self.questions, batch_size, by_category))
        for number, (temperature, batch) in enumerate(tqdm(batches, desc=name, unit="batch")):
            if missing.isdisjoint(str(q["question_id"]) for q in batch):
                continue
            words = sampling if temperature is None else sampling | _at(temperature)
            rows = _conversations(batch, speaker, seed + number, words)
            self.of(name).add(*(
                {
                    "question_id": question["question_id"],
                    "answer_id": uuid.uuid4().hex[:22],
                    "model_id": name,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
                for question, turns in zip(batch, rows, strict=True)
                if turns is not None and str(question["question_id"]) in missing
            ))  # fmt: skip


def _at(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature, "top_p": 1.0} if temperature else {"do_sample": False}


def _batches(
    questions: list[Question], batch_size: int, by_category: bool
) -> Iterator[tuple[float | None, list[Question]]]:
    """Questions of one temperature, of as many turns and of similar length; None is the temperature of the settings."""
    groups: dict[tuple[float | None, int], list[Question]] = {}
    for q in questions:
        temperature = TEMPERATURES.get(q["category"], 0.7) if by_category else None
        groups.setdefault((temperature, len(q["turns"])), []).append(q)
    for (temperature, _), group in groups.items():
        group.sort(key=lambda q: sum(map(len, q["turns"])), reverse=True)
        for start in range(0, len(group), batch_size):
            yield temperature, group[start : start + batch_size]


def _conversations(
    batch: list[Question], speaker: Generator, seed: int, sampling: dict[str, Any]
) -> list[list[str] | None]:
    """The answers to each question of a batch, turn by turn; all have as many turns. None where one was refused."""
    talks: list[list[Message]] = [
        [{"role": "system", "content": q["system"]}] if q.get("system") else [] for q in batch
    ]
    answers: list[list[str] | None] = [[] for _ in batch]
    for turn in range(len(batch[0]["turns"])):
        going = [i for i, own in enumerate(answers) if own is not None]
        for i in going:
            talks[i].append({"role": "user", "content": batch[i]["turns"][turn]})
        said = speaker.answer([talks[i] for i in going], seed + turn, **sampling) if going else []
        for i, text in zip(going, said, strict=True):
            if text is None:
                answers[i] = None
            else:
                talks[i].append({"role": "assistant", "content": text})
                answers[i] = [*(answers[i] or []), text]
    return answers


@dataclasses.dataclass
class SideBySide:
    """Prompts and the answers of each model: a table in a terminal, HTML in a notebook."""

    prompts: list[str]
    answers: dict[str, list[str]]

    @classmethod
    def of(cls, answers: AnswerStore, names: list[str], rows: int) -> SideBySide:
        """`rows` of the questions, evenly spread; a conversation is one text."""
        step = max(1, len(answers.questions) // max(1, rows))
        picked = answers.questions[step // 2 :: step][:rows]
        said = {name: answers.turns(name) for name in names}
        return cls(
            [_joined(q["turns"]) for q in picked],
            {name: [_joined(said[name].get(q["question_id"], [])) for q in picked] for name in names},
        )

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table("prompt", show_lines=True)
        for name in self.answers:
            table.add_column(Text(name))
        for prompt, *answers in zip(self.prompts, *self.answers.values(), strict=True):
            table.add_row(*map(Text, (prompt, *answers)))
        return table

    def _repr_html_(self) -> str:
        def row(tag: str, cells: list[str]) -> str:
            style = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:.4em .8em"
            return "<tr>" + "".join(f'<{tag} style="{style}">{html.escape(c)}</{tag}>' for c in cells) + "</tr>"

        body = [row("td", list(cells)) for cells in zip(self.prompts, *self.answers.values(), strict=True)]
        return f"<table>{row('th', ['prompt', *self.answers])}{''.join(body)}</table>"


def _joined(turns: list[str]) -> str:
    return turns[0] if len(turns) == 1 else "\n\n".join(f"[{i}] {turn}" for i, turn in enumerate(turns, 1))


Row = dict[str, Any]


class JsonlStore:
    """A JSONL file of rows, each under a key: `rows[key]`. Of two rows with one key the later holds.

    A last line that was cut short, by a kill or a full disk, is taken off when the file is next written to. Raises
    UserError for a line that is not an object, or that `key` cannot read.
    """

    def __init__(self, file: Path, key: Callable[[Row], Hashable]) -> None:
        self.file, self.key = file, key
        self.rows: dict[Hashable, Row] = {}
        self._end = 0  # of the last whole line
        if file.is_file():
            content = file.read_bytes()
            self._end = content.rfind(b"\n") + 1
            if b"{" in content[self._end :] and _is_object(
                content[self._end :]
            ):  # written by hand, without its newline
                self._end = len(content)
            for row in read_jsonl(file, end=self._end):
                try:
                    self.rows[key(row)] = row
                except (LookupError, TypeError, AttributeError) as error:
                    raise UserError(f"{file}: a row is not of this file's kind ({error!r}): {str(row)[:80]}") from None

    def __contains__(self, key: Hashable) -> bool:
        return key in self.rows

    def add(self, *rows: Row) -> None:
        """Append rows, in one write that reaches the disk before this returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
        with self.file.open("a+b") as out:
            if os.name == "posix":  # another process may be adding to it
                import fcntl

                fcntl.flock(out, fcntl.LOCK_EX)
            out.seek(self._end)
            rest = out.read()  # whole lines of another process, or one that was cut short
            whole = self._end + rest.rfind(b"\n") + 1
            out.truncate(whole)
            out.seek(max(0, whole - 1))
            if out.read() not in (b"", b"\n"):
                text = b"\n" + text
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            self._end = out.tell()
        self.rows |= {self.key(row): row for row in rows}


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextlib.contextmanager
def resumable(run: Run) -> Iterator[None]:
    """Work that the same command goes on with, should it be stopped: what was added to a ledger by then is kept."""
    finished = run.finished
    try:
        if not finished:
            run.save(status="running")
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        with contextlib.suppress(OSError):  # a full disk has no room for this either
            if not finished:
                run.save(status="interrupted" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            kept = f"what was done by then is kept in {short_path(run.folder)}, and the same command goes on with it"
            raise Interrupted(f"stopped by SIGINT: {kept}", signal.SIGINT) from None
        if isinstance(error, UserError) and type(error) is UserError:
            error.args = (f"{error} (what was done by then is kept; the same command goes on)",)
        raise
