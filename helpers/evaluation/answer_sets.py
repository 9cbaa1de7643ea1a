"""Where the answers to be judged are: a run of 04_vibes.py, a folder of FastChat's files, or MT-Bench's own."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

from helpers.core import SettingsError, UserError, find_path, read_jsonl, safe_file_name
from helpers.evaluation.judges import OUR_PROMPTS, ModelAnswers
from helpers.evaluation.questions import Question, read_bench, turns_of
from helpers.runs.run import find_run, read_run


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Questions, what each model said to them, and the judge prompts that stood beside them."""

    folder: Path  # of the answers
    questions: list[Question]
    said: ModelAnswers
    prompts_file: Path
    page: str = ""  # of a run of 04: the page that votes on these answers come from

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "questions answered", "characters of an answer", box=None, pad_edge=False)
        for model, answers in self.said.items():
            texts = [text for turns in answers.values() for text in turns]
            mean = sum(map(len, texts)) / max(1, len(texts))
            table.add_row(Text(model), f"{len(answers)} of {len(self.questions)}", f"{mean:.0f}")
        answered = [[own.get(q["question_id"]) for own in self.said.values()] for q in self.questions]
        whole = [answers for answers in answered if None not in answers]
        same = sum(len(answers) > 1 and answers.count(answers[0]) == len(answers) for answers in whole)
        notes = []
        if len(whole) < len(answered):
            left = f"{len(answered) - len(whole)} questions are not answered by all of them, and are left out there"
            unfinished = read_run(self.folder).get("status") == "interrupted"
            notes.append(f"note: {left}{'; the run of 04_vibes.py is not finished' * unfinished}")
        if same:
            notes.append(f"note: in {same} questions all answers are the same; the page of 04 asks for no vote there")
        return Group(table, *map(Text, notes))


def find_answers(settings: Any) -> AnswerSet:
    """What the settings of 05_judge.py name: answers_dir, bench_dir, models, judge_prompts. Raises UserError."""
    bench = _folder("--bench_dir", settings.bench_dir) if settings.bench_dir else None
    if settings.judgments and not bench and not settings.is_set("answers_dir"):  # which has what there is to count
        return AnswerSet(settings.output_dir, [], {}, OUR_PROMPTS)
    if bench and not settings.is_set("answers_dir"):
        folder = bench
    elif settings.answers_dir == "latest":
        folder = find_run(settings.output_dir, "latest", "vibes").folder
    else:
        given = settings.output_dir / settings.answers_dir
        folder = given if given.is_dir() else _folder("--answers_dir", settings.answers_dir)
    answers = folder / "model_answer" if (folder / "model_answer").is_dir() else folder
    files = {_model_of(file): file for file in sorted(answers.glob("*.jsonl")) if file.name != "question.jsonl"}
    if not files:
        raise UserError(f"{str(answers)!r} has no answers: a file NAME.jsonl for each model, in FastChat's layout")
    questions = read_bench(bench or (folder if (folder / "question.jsonl").is_file() else folder.parent))
    made = read_run(folder).get("models", [])  # in the order that 04 had them in: what came before stands first
    names = list(settings.models) or [n for n in made if n in files] + [n for n in files if n not in made]
    if settings.baseline:  # what the others are compared with stands first
        names = list(dict.fromkeys([settings.baseline, *names]))
    if unknown := [name for name in (*names, settings.baseline) if name and name not in files]:
        raise SettingsError(f"there are no answers of {', '.join(unknown)}; there are of {', '.join(files)}")
    said = {name: _answers_of(files[name], questions) for name in names}
    return AnswerSet(folder, questions, said, _prompts_file(settings, bench), read_run(folder).get("page", ""))


def _model_of(file: Path) -> str:
    """The model whose answers these are: not every name is a file's."""
    for row in read_jsonl(file)[:1]:
        model = str(row.get("model_id") or "")
        if safe_file_name(model) == file.stem:
            return model
    return file.stem


def model_pairs(said: ModelAnswers, mode: str, baseline: str = "") -> list[tuple[str, ...]]:
    """What is judged together: every pair of models, each with `baseline`, or each alone. Raises SettingsError."""
    if mode == "single":
        return [(name,) for name in said]
    pairs: list[tuple[str, ...]] = (
        [(baseline, name) for name in said if name != baseline] if baseline else list(combinations(said, 2))
    )
    if said and not pairs:
        raise SettingsError(f"two models are compared, and there is one: {', '.join(said)}; --mode single rates it")
    return pairs


def _folder(flag: str, name: str) -> Path:
    path = find_path(name)
    if path is None or not path.is_dir():
        raise UserError(f"{flag} {name!r} is not a folder")
    return path.resolve()


def _prompts_file(settings: Any, bench: Path | None) -> Path:
    if settings.judge_prompts:
        path = find_path(settings.judge_prompts)
        if path is None or not path.is_file():
            raise UserError(f"--judge_prompts {settings.judge_prompts!r} is not a file")
        return path
    beside = bench / "judge_prompts.jsonl" if bench else OUR_PROMPTS
    return beside if beside.is_file() else OUR_PROMPTS


def _answers_of(file: Path, questions: list[Question]) -> dict[Any, list[str]]:
    rows = {str(row.get("question_id")): row for row in read_jsonl(file)}
    said = {q["question_id"]: turns_of(rows[i]) for q in questions if (i := str(q["question_id"])) in rows}
    return {i: turns for i, turns in said.items() if turns}
