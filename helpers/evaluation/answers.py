"""Models' answers: asked batch by batch, stored as they arrive, shown side by side and on a page to vote on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from helpers.core import Row, UserError, atomic_write, fingerprint, printable, read_jsonl
from helpers.data.formats import row_template_options, template_columns
from helpers.data.messages import Message
from helpers.evaluation.questions import (
    Answer,
    Question,
    answer_turns,
    file_name_key,
    file_owner,
    question_turns,
    safe_file_name,
)
from helpers.runs.run import Run

ModelAnswers = dict[str, dict[Any, list[Any]]]  # model → question_id → its answers (Answer or str), one per turn
FOLDED = {"tools": "Tools", "chat_template_kwargs": "Variables of the chat template"}  # on the page
MARKS = ("empty", "cut", "with thoughts")  # of answers, as in `count_marks`
# FastChat's temperatures for MT-Bench (llm_judge/common.py), by category; 0 is greedy, any other category has 0.7.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


class JsonlStore:
    """A JSONL file of rows, each under a key: `rows[key]`. A later row replaces an earlier one with the same key.

    An incomplete last line, from a kill or a full disk, is removed by the next write. Raises UserError for a line that
    is not an object or has no key.
    """

    def __init__(self, file: Path, key: Callable[[Row], Hashable]) -> None:
        self.file, self.key = file, key
        content = file.read_bytes() if file.is_file() else b""
        self._end = content.rfind(b"\n") + 1  # of the last complete line
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(content[self._end :])  # only its newline is missing
            self._end = len(content)
        try:
            self.rows = {key(row): row for row in (read_jsonl(file, end=self._end) if content else ())}
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} has a row of another kind: {error!r}") from None

    def add(self, *rows: Row) -> None:
        """Append rows in one write that reaches the disk before this returns. Several processes may share the file."""
        if not rows:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self.file.open("a+b") as out:
            if os.name == "posix":
                import fcntl

                fcntl.flock(out, fcntl.LOCK_EX)
            out.seek(self._end)
            end = self._end + out.read().rfind(b"\n") + 1  # after the complete lines of other processes
            out.truncate(end)
            out.seek(max(0, end - 1))
            if out.read() not in (b"", b"\n"):
                text = b"\n" + text
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            self._end = out.tell()
        self.rows |= {self.key(row): row for row in rows}


class Generator:
    """Generates answers to conversations."""

    in_batches = True  # whether an answer may depend on the other conversations of its batch

    def generate(self, conversations: list[list[Message]], seed: int = 0, **kwargs: Any) -> Sequence[str]:
        """One answer per conversation, in order: an Answer, or a str. `kwargs` as `model.generate`'s, and where a
        question has tools or variables, `options`: what the chat template is given for each conversation."""
        raise NotImplementedError

    def sample(self, conversations: list[list[Message]], seeds: list[list[int]], **kwargs: Any) -> list[list[Answer]]:
        """Several answers per conversation, one for each of its seeds. `kwargs` as those of `generate`."""
        raise NotImplementedError

    def stream(self, conversation: list[Message], seed: int, **kwargs: Any) -> str:
        """Print one answer, word by word where that is possible, and return it. Raises UserError if it is refused."""
        [answer] = self.generate([conversation], seed, **kwargs)
        if reason := getattr(answer, "refused", ""):
            raise UserError(reason)
        print(printable(answer))
        return answer


@dataclasses.dataclass
class AnswerStore:
    """What each model answered: FOLDER/model_answer/NAME.jsonl, FastChat's layout, next to FOLDER/question.jsonl.

    Of two models whose names are one file name on some system, the second has NAME-HASH.jsonl. `refusals` has why a
    model has no answer to a question, by their names.
    `batch_size` questions are asked at a time. `by_category` samples at FastChat's temperatures for MT-Bench.
    """

    folder: Path
    questions: list[Question]
    batch_size: int = 8
    seed: int = 0
    by_category: bool = False
    refusals: dict[str, dict[Any, str]] = dataclasses.field(default_factory=dict, init=False)
    _files: dict[str, JsonlStore] = dataclasses.field(default_factory=dict, init=False)

    def file(self, name: str) -> JsonlStore:
        """The rows of a model, by question_id."""

        def key(row: Row) -> Any:  # older runs wrote rows of two models into one file
            own = row.get("model_id", name) == name
            return row["question_id"] if own else (row["model_id"], row["question_id"])

        if name not in self._files:
            self._files[name] = JsonlStore(self._find_file(name), key)
        return self._files[name]

    def _find_file(self, name: str) -> Path:
        place, stems = self.folder / "model_answer", {file_name_key(s.file.stem) for s in self._files.values()}
        for file in sorted(place.glob("*.jsonl")):
            rows = JsonlStore(file, lambda row: uuid.uuid4()).rows  # all of them, but for a line that was cut short
            if file_owner([*rows.values()], file.stem) == name:
                return file
            stems |= {file_name_key(file.stem)} if rows else set()
        is_taken = file_name_key(safe_file_name(name)) in stems
        return place / f"{safe_file_name(name, unique=is_taken)}.jsonl"

    def missing(self, name: str) -> list[Question]:
        """The questions that a model has not answered yet, in order."""
        return [q for q in self.questions if q["question_id"] not in self.file(name).rows]

    def answers(self, name: str) -> dict[Any, list[Answer]]:
        """A model's answers to the questions, one per turn, by question_id."""
        rows = self.file(name).rows
        return {i: answer_turns(rows[i]) for q in self.questions if (i := q["question_id"]) in rows}

    def write_questions(self) -> None:
        """Write question.jsonl."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(q, ensure_ascii=False, default=str) + "\n" for q in self.questions)
        (self.folder / "question.jsonl").write_text(text, encoding="utf-8", errors="backslashreplace")

    def generate_missing(self, name: str, generator: Generator, **generation_kwargs: Any) -> None:
        """Ask a model what it has not answered yet, batch by batch, each conversation turn by turn.

        Batches are formed from all questions, and each has its own seed: a resumed run gives the same answers. Raises
        UserError if every question was refused.
        """
        from tqdm.auto import tqdm

        self.write_questions()
        missing = {q["question_id"] for q in self.missing(name)}
        for number, (temperature, batch) in enumerate(tqdm(self._batches(), desc=name, unit="batch")):
            left = [q for q in batch if q["question_id"] in missing]
            if not left:
                continue
            batch = batch if generator.in_batches else left
            kwargs = generation_kwargs
            if temperature is not None:
                kwargs = kwargs | {"do_sample": temperature > 0}
                kwargs |= {"temperature": temperature, "top_p": 1.0} if temperature else {}
            answers = zip(batch, self._ask(batch, generator, self.seed + number, kwargs), strict=True)
            self._add(name, [(i, turns) for q, turns in answers if (i := q["question_id"]) in missing])
        if not self.answers(name):
            reason = next(iter(self.refusals.get(name, {}).values()), "there are none")
            raise UserError(f"{name} has answered none of {len(self.questions)} questions: {reason}")

    def _ask(
        self, batch: list[Question], generator: Generator, seed: int, kwargs: dict[str, Any]
    ) -> list[list[Answer]]:
        """The answers to each question of a batch, turn by turn, up to one that is refused."""
        talks: list[list[Message]] = [
            [{"role": "system", "content": q["system"]}] if q.get("system") else [] for q in batch
        ]
        answers: list[list[Answer]] = [[] for _ in batch]
        for turn in range(len(batch[0]["turns"])):
            active = [i for i, turns in enumerate(answers) if not (turns and turns[-1].refused)]
            for i in active:
                talks[i].append({"role": "user", "content": batch[i]["turns"][turn]})
            options = [row_template_options(batch[i]) for i in active]
            more = {"options": options} if any(options) else {}
            texts = generator.generate([talks[i] for i in active], seed + turn, **kwargs, **more) if active else []
            for i, text in zip(active, texts, strict=True):
                answers[i].append(text if isinstance(text, Answer) else Answer(text))
                talks[i].append({"role": "assistant", "content": str(answers[i][-1])})
        return answers

    def _add(self, name: str, answers: list[tuple[Any, list[Answer]]]) -> None:
        """Store answers by question_id; a question with a refused turn has none, and is asked again next time."""
        refused = {i: turns[-1].refused for i, turns in answers if turns[-1].refused}
        self.refusals.setdefault(name, {}).update(refused)
        for i, reason in refused.items():
            print(printable(f"note: question {i} has no answer: {reason}"))
        self.file(name).add(*(self._row(name, i, turns) for i, turns in answers if i not in refused))

    def _row(self, name: str, question_id: Any, turns: list[Answer]) -> Row:
        row = {"question_id": question_id, "answer_id": uuid.uuid4().hex[:22], "model_id": name}
        return row | {"choices": self._choices(turns), "tstamp": time.time()}

    def _choices(self, turns: list[Answer]) -> list[Row]:
        choice: dict[str, Any] = {"index": 0, "turns": turns}
        choice |= {"raw": [a.raw for a in turns]} if any(a != a.raw for a in turns) else {}
        choice |= {"cut": [a.cut for a in turns]} if any(a.cut for a in turns) else {}
        return [choice]

    def count(self, name: str) -> dict[str, int]:
        """How many questions a model answered and how many were refused, and what is to be known of the answers."""
        answers = self.answers(name)
        return {"answered": len(answers), "refused": len(self.questions) - len(answers)} | count_marks(answers)

    def finish(self, run: Run, names: list[str], **fields: Any) -> None:
        """Finish a run, with the counts of each model as its metrics. Raises UserError if no answer has any text."""
        counts = {name: self.count(name) for name in names}
        if any(text.strip() for name in names for turns in self.answers(name).values() for text in turns):
            return run.finish(metrics=counts, **fields)
        cut = sum(own["cut"] for own in counts.values())
        fix = "Raise --max_new_tokens" if cut else "Check the models, their chat templates and the server"
        error = f"{len(self.questions)} questions have no answer with any text; {cut} were cut off. {fix}."
        run.save(status="failed", error=error, metrics=counts, **fields)
        raise UserError(error)

    def side_by_side(self, names: list[str], rows: int) -> SideBySide:
        """`rows` of the questions, evenly spread, with each model's answer; the turns of a conversation are joined."""
        step = max(1, len(self.questions) // max(1, rows))
        shown = self.questions[step // 2 :: step][:rows]
        columns = [{q["question_id"]: q["turns"] for q in shown}, *map(self.answers, names)]
        cells = [[column.get(q["question_id"], ["(no answer)"]) for column in columns] for q in shown]
        thoughts = [["\n\n".join(filter(None, (getattr(t, "thoughts", "") for t in turns))) for turns in row]
                    for row in cells]  # fmt: skip
        notes = [note for name in names if (note := describe_counts(name, self.count(name)))]
        return SideBySide(["prompt", *names], [[_join(turns) for turns in row] for row in cells], notes, thoughts)

    def write_vote_page(self, names: list[str], title: str, settings: dict[str, Any]) -> str:
        """Write answers.html, a page to read and vote on that makes no network request, and return its id.

        A model without an answer to a question is omitted there. `settings` says how the answers were made. The seed
        and the question's id decide whose answer is on the left. No vote is asked for where all answers are the same.

        The page exports {"format": "votes-1", "page": id, "voter": name, "voter_id": of the browser, "exported": when,
        "votes": [{"question_id", "order", "winner": a model or "tie", "blind", "voted"}]}.
        """
        answers = {name: self.answers(name) for name in names}
        shown = []
        for question in self.questions:
            i, given = _to_json(question["question_id"]), template_columns(row_template_options(question))
            columns: list[dict[str, Any]] = []
            for name in (name for name in names if answers[name].get(question["question_id"])):
                own = answers[name][question["question_id"]]
                cut = {"cut": [text.cut for text in own]} if any(text.cut for text in own) else {}
                thoughts = [text.thoughts for text in own]
                columns.append(
                    {"model": name, "answers": own} | cut | ({"thoughts": thoughts} if any(thoughts) else {})
                )
            random.Random(f"{self.seed} {i}").shuffle(columns)
            shown.append(
                {
                    "id": i,  # as JSON, which the export repeats: JavaScript would round a long number
                    "name": str(question["question_id"]),
                    "category": question.get("category") or "",
                    "turns": question_turns(question, with_tools=False),
                    "options": {
                        FOLDED[n]: json.dumps(value, indent=2, ensure_ascii=False) for n, value in given.items()
                    },
                    "reference": question.get("reference") or [],
                    "columns": columns,
                }
            )
        values = {name: value if isinstance(value, str) else _to_json(value) for name, value in settings.items()}
        content = _to_json({"settings": values, "models": names, "questions": shown})
        page = hashlib.sha256(content.encode()).hexdigest()[:12]
        text = render_template("vote_page.html", title=title, page=page, content=content)
        atomic_write(self.folder / "answers.html", text.encode("utf-8", errors="replace"))
        return page

    def _batches(self) -> list[tuple[float | None, list[Question]]]:
        """Questions with the same temperature (None: that of the settings) and turns, and of similar length."""
        groups: dict[tuple[float | None, int], list[Question]] = {}
        for q in self.questions:
            temperature = TEMPERATURES.get(q["category"], 0.7) if self.by_category else None
            groups.setdefault((temperature, len(q["turns"])), []).append(q)
        batches, size = [], self.batch_size
        for (temperature, _), group in groups.items():
            group.sort(key=lambda q: sum(map(len, q["turns"])), reverse=True)
            batches += [(temperature, group[start : start + size]) for start in range(0, len(group), size)]
        return batches


def count_marks(answers: dict[Any, list[Any]]) -> dict[str, int]:
    """How many of a model's answers, one per turn, are empty, are cut off, and had thoughts."""
    every = [text for turns in answers.values() for text in turns]
    has_thoughts = [getattr(text, "raw", text) != text for text in every]
    cut = [getattr(text, "cut", False) for text in every]
    return dict(zip(MARKS, (sum(not text.strip() for text in every), sum(cut), sum(has_thoughts)), strict=True))


def describe_counts(name: str, counts: dict[str, int]) -> str:
    """What to know of a model's answers, in one line; "" if there is nothing."""
    texts = {
        "refused": "questions have no answer: they were refused",
        "empty": "answers are empty",
        "cut": "answers are cut off at --max_new_tokens",
        "with thoughts": "answers had thoughts, which are left out",
    }
    found = "; ".join(f"{counts[key]} {text}" for key, text in texts.items() if counts[key])
    return found and f"note: {name}: {found}"


@dataclasses.dataclass
class SideBySide:
    """A row per prompt with each model's answer: a table in a terminal, HTML in a notebook. `thoughts` of the cells are
    folded in HTML, and counted in a terminal."""

    head: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)
    thoughts: list[list[str]] = dataclasses.field(default_factory=list)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        rows = [[f"{describe_thoughts(thought)} {text}".strip() for text, thought in cells] for cells in self._cells()]
        return Group(make_table(self.head, rows, show_lines=True), *map(Text, self.notes))

    def _repr_html_(self) -> str:
        rows = [[(text, thought, describe_thoughts(thought)) for text, thought in cells] for cells in self._cells()]
        return render_template("side_by_side.jinja", head=self.head, rows=rows, notes=self.notes)

    def _cells(self) -> list[list[tuple[str, str]]]:
        thoughts = self.thoughts or [[""] * len(row) for row in self.rows]
        return [list(zip(*pair, strict=True)) for pair in zip(self.rows, thoughts, strict=True)]


def hash_answers(answers: ModelAnswers) -> dict[str, str]:
    """What identifies each model's answers, by their texts and question ids."""
    return {name: fingerprint(sorted((str(i), turns) for i, turns in own.items())) for name, own in answers.items()}


def describe_thoughts(text: str) -> str:
    """A short mark in place of thoughts; "" for none."""
    return f"(thought: {len(text.split()):,} words)" if text else ""


def make_table(head: list[str], rows: Iterable[Iterable[Any]], show_lines: bool = False) -> Any:
    """A table of texts with lines between its cells, or of names on the left and numbers on the right."""
    from rich.table import Table
    from rich.text import Text

    style: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 1), "header_style": "underline"}
    table = Table(show_lines=True) if show_lines else Table(**style)
    for i, name in enumerate(head):
        is_number = bool(i) and not show_lines
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def render_template(name: str, escape: bool = True, **values: Any) -> str:
    """A template of this folder with its values, escaped for HTML or as they are."""
    from jinja2 import Environment

    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return str(Environment(autoescape=escape).from_string(text).render(**values))


def _join(turns: list[str]) -> str:
    marked = [(t if t.strip() else "(empty answer)") + " (cut off)" * getattr(t, "cut", False) for t in turns]
    return marked[0] if len(marked) == 1 else "\n\n".join(f"[{i}] {turn}" for i, turn in enumerate(marked, 1))


def _to_json(value: Any) -> str:
    r"""ASCII JSON that cannot end a <script>: U+2028, lone surrogates and "<" are \u escapes."""
    return json.dumps(value, default=str).replace("<", "\\u003c")
