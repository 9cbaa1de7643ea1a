"""Models' answers: asked batch by batch, stored as they arrive, found again, and shown side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from helpers.core import Interrupted, SettingsError, UserError, find_path, read_jsonl, safe_file_name, short_path
from helpers.data.formats import Message
from helpers.evaluation.questions import Question, answer_turns, read_bench
from helpers.runs.run import Run, find_run, read_run

Row = dict[str, Any]
ModelAnswers = dict[str, dict[Any, list[str]]]  # model → question_id → its answers, one per turn
# FastChat's temperatures for MT-Bench (llm_judge/common.py), by category; 0 is greedy, any other category has 0.7.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


class JsonlStore:
    """A JSONL file of rows, each under a key: `rows[key]`. A later row replaces an earlier one with the same key.

    An incomplete last line, from a kill or a full disk, is removed by the next write. Raises UserError for a line that
    is not an object or has no key.
    """

    def __init__(self, file: Path, key: Callable[[Row], Hashable]) -> None:
        self.file, self.key = file, key
        self.rows: dict[Hashable, Row] = {}
        self._end = 0  # of the last complete line
        if not file.is_file():
            return
        content = file.read_bytes()
        self._end = content.rfind(b"\n") + 1
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(content[self._end :]), dict):  # written by hand, without its newline
                self._end = len(content)
        for row in read_jsonl(file, end=self._end):
            try:
                self.rows[key(row)] = row
            except (LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{file} has a row of another kind ({error!r}): {str(row)[:80]}") from None

    def add(self, *rows: Row) -> None:
        """Append rows in one write that reaches the disk before this returns. Several processes may share the file."""
        if not rows:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
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


@contextlib.contextmanager
def resumable(run: Run) -> Iterator[None]:
    """Work that the same command resumes after an interruption: rows in a JsonlStore are kept."""
    finished = run.finished
    try:
        if not finished:
            run.save(status="running")
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        with contextlib.suppress(OSError):  # the disk may be full
            if not finished:
                run.save(status="interrupted" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            where = f"Finished parts are saved in {short_path(run.folder)}. Run the same command again to resume."
            raise Interrupted(f"stopped by SIGINT. {where}", signal.SIGINT) from None
        if type(error) is UserError:
            error.args = (f"{error} (Finished parts are saved. Run the same command again to resume.)",)
        raise


class Generator(Protocol):
    """Generates answers to conversations."""

    def generate(self, conversations: list[list[Message]], seed: int, **kwargs: Any) -> Sequence[str | None]:
        """One answer per conversation, in order; None where the server refuses one. `kwargs` as `model.generate`'s."""

    def stream(self, conversation: list[Message], seed: int, **kwargs: Any) -> str:
        """Print and return one answer."""


class AnswerStore:
    """What each model answered: FOLDER/model_answer/NAME.jsonl, FastChat's layout, next to FOLDER/question.jsonl.

    `batch_size` questions are asked at a time. `by_category` samples at FastChat's temperatures for MT-Bench.
    """

    def __init__(
        self, folder: Path, questions: list[Question], batch_size: int = 8, seed: int = 0, by_category: bool = False
    ) -> None:
        self.folder, self.questions = folder, questions
        self.batch_size, self.seed, self.by_category = batch_size, seed, by_category
        self._files: dict[str, JsonlStore] = {}

    def file(self, name: str) -> JsonlStore:
        """The rows of a model, by question_id."""
        if name not in self._files:
            file = self.folder / "model_answer" / f"{safe_file_name(name)}.jsonl"
            self._files[name] = JsonlStore(file, lambda row: row["question_id"])
        return self._files[name]

    def missing(self, name: str) -> list[Question]:
        """The questions that a model has not answered yet, in order."""
        return [q for q in self.questions if q["question_id"] not in self.file(name).rows]

    def answers(self, name: str) -> dict[Any, list[str]]:
        """A model's answers to the questions, one per turn, by question_id."""
        rows = self.file(name).rows
        return {i: answer_turns(rows[i]) for q in self.questions if (i := q["question_id"]) in rows}

    def mean_length(self, names: list[str]) -> dict[str, float]:
        """The mean number of characters in the answers to one question, by model."""
        answers = {name: self.answers(name).values() for name in names}
        return {name: sum(len("".join(turns)) for turns in each) / max(1, len(each)) for name, each in answers.items()}

    def generate_missing(self, name: str, generator: Generator, **generation_kwargs: Any) -> None:
        """Ask a model what it has not answered yet, batch by batch, each conversation turn by turn.

        Batches are formed from all questions, and each has its own seed: a resumed run gives the same answers.
        """
        from tqdm.auto import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(q, ensure_ascii=False, default=str) + "\n" for q in self.questions)
        (self.folder / "question.jsonl").write_text(text, encoding="utf-8", errors="backslashreplace")
        missing = {str(q["question_id"]) for q in self.missing(name)}
        for number, (temperature, batch) in enumerate(tqdm(self._batches(), desc=name, unit="batch")):
            if missing.isdisjoint(str(q["question_id"]) for q in batch):
                continue
            kwargs = generation_kwargs
            if temperature is not None:
                kwargs = kwargs | {"do_sample": temperature > 0}
                kwargs |= {"temperature": temperature, "top_p": 1.0} if temperature else {}
            answers = _play(batch, generator, self.seed + number, kwargs)
            rows = [
                {
                    "question_id": question["question_id"],
                    "answer_id": uuid.uuid4().hex[:22],
                    "model_id": name,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
                for question, turns in zip(batch, answers, strict=True)
                if turns is not None and str(question["question_id"]) in missing
            ]
            self.file(name).add(*rows)

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


def _play(batch: list[Question], generator: Generator, seed: int, kwargs: dict[str, Any]) -> list[list[str] | None]:
    """The answers to each question of a batch, turn by turn; None for a question that the server refused."""
    talks: list[list[Message]] = [
        [{"role": "system", "content": q["system"]}] if q.get("system") else [] for q in batch
    ]
    answers: list[list[str] | None] = [[] for _ in batch]
    for turn in range(len(batch[0]["turns"])):
        active = [i for i, turns in enumerate(answers) if turns is not None]
        for i in active:
            talks[i].append({"role": "user", "content": batch[i]["turns"][turn]})
        texts = generator.generate([talks[i] for i in active], seed + turn, **kwargs) if active else []
        for i, text in zip(active, texts, strict=True):
            talks[i].append({"role": "assistant", "content": text or ""})
            answers[i] = None if text is None else [*(answers[i] or []), text]
    return answers


@dataclasses.dataclass
class SideBySide:
    """A row per prompt with each model's answer: a table in a terminal, HTML in a notebook."""

    head: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, store: AnswerStore, names: list[str], rows: int) -> SideBySide:
        """`rows` of the questions, evenly spread; the turns of a conversation are joined."""
        step = max(1, len(store.questions) // max(1, rows))
        columns = [store.answers(name) for name in names]
        picked = [
            [q["turns"], *(column.get(q["question_id"], []) for column in columns)]
            for q in store.questions[step // 2 :: step][:rows]
        ]
        return cls(["prompt", *names], [[_join(turns) for turns in row] for row in picked])

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True)
        for name in self.head:
            table.add_column(Text(name))
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _repr_html_(self) -> str:
        return render_template("side_by_side.jinja", head=self.head, rows=self.rows)


def render_template(name: str, escape: bool = True, **values: Any) -> str:
    """A template of this folder with its values, escaped for HTML or as they are."""
    from jinja2 import Environment

    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return str(Environment(autoescape=escape).from_string(text).render(**values))


def _join(turns: list[str]) -> str:
    return turns[0] if len(turns) == 1 else "\n\n".join(f"[{i}] {turn}" for i, turn in enumerate(turns, 1))


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Questions and what each model answered: what 05_judge.py judges."""

    questions: list[Question]
    answers: ModelAnswers
    folder: Path = Path()
    page: str = ""  # the id of the folder's vote page

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "questions answered", "mean characters per answer", box=None, pad_edge=False)
        for model, answers in self.answers.items():
            texts = [text for turns in answers.values() for text in turns]
            mean = sum(map(len, texts)) / max(1, len(texts))
            table.add_row(Text(model), f"{len(answers)} of {len(self.questions)}", f"{mean:.0f}")
        rows = [[own.get(q["question_id"]) for own in self.answers.values()] for q in self.questions]
        complete = [row for row in rows if None not in row]
        same = sum(len(row) > 1 and row.count(row[0]) == len(row) for row in complete)
        notes = []
        if len(complete) < len(rows):
            unfinished = read_run(self.folder).get("status") == "interrupted"
            notes.append(f"note: {len(rows) - len(complete)} questions are not answered by every model and are not "
                         f"compared there{'; the run of 04_vibes.py is not finished' * unfinished}")  # fmt: skip
        if same:
            notes.append(f"note: {same} questions have identical answers; the vote page of 04 skips them")
        return Group(table, *map(Text, notes))


def find_answers(settings: Any) -> AnswerSet:
    """The answers that the settings of 05_judge.py name, in the order in which models are compared. Raises UserError.

    --answers_dir is a run of 04_vibes.py or a folder of model_answer files; --bench_dir one of FastChat's folders.
    """
    bench = _find_folder("--bench_dir", settings.bench_dir) if settings.bench_dir else None
    if settings.judgments and not bench and not settings.is_set("answers_dir"):  # the file has all there is to count
        return AnswerSet([], {}, settings.output_dir)
    if bench and not settings.is_set("answers_dir"):
        folder = bench
    elif settings.answers_dir == "latest":
        folder = find_run(settings.output_dir, "latest", "vibes").folder
    else:
        folder = settings.output_dir / settings.answers_dir
        folder = folder if folder.is_dir() else _find_folder("--answers_dir", settings.answers_dir)
    place = folder / "model_answer" if (folder / "model_answer").is_dir() else folder
    files = {_model_name(file): file for file in sorted(place.glob("*.jsonl")) if file.name != "question.jsonl"}
    if not files:
        raise UserError(f"{str(place)!r} has no answers. Give a folder with FastChat's NAME.jsonl for each model.")
    questions = read_bench(bench or (folder if (folder / "question.jsonl").is_file() else folder.parent))
    record = read_run(folder)
    in_order = [name for name in record.get("models", []) if name in files]  # a model after the one it started from
    names = list(settings.models) or list(dict.fromkeys([*in_order, *files]))
    if settings.baseline:
        names = list(dict.fromkeys([settings.baseline, *names]))
    if unknown := [name for name in names if name not in files]:
        raise SettingsError(f"there are no answers of {', '.join(unknown)}; there are of {', '.join(files)}")
    return AnswerSet(questions, {n: _read_answers(files[n], questions) for n in names}, folder, record.get("page", ""))


def _find_folder(flag: str, name: str) -> Path:
    path = find_path(name)
    if path is None or not path.is_dir():
        raise UserError(f"{flag} {name!r} is not a folder")
    return path.resolve()


def _model_name(file: Path) -> str:
    """The model whose answers these are; a file's name may lack some of its characters."""
    models = [str(row.get("model_id") or "") for row in read_jsonl(file)[:1]]
    return models[0] if models and safe_file_name(models[0]) == file.stem else file.stem


def _read_answers(file: Path, questions: list[Question]) -> dict[Any, list[str]]:
    rows = {str(row.get("question_id")): row for row in read_jsonl(file)}
    answers = {q["question_id"]: answer_turns(rows[i]) for q in questions if (i := str(q["question_id"])) in rows}
    return {i: turns for i, turns in answers.items() if turns}
