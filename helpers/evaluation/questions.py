"""Questions to ask models, in FastChat's layout: {"question_id", "category", "turns", "reference"?, ...}."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.core import UserError, find_path, read_jsonl
from helpers.data.conversations import is_conversation
from helpers.data.loading import DatasetSpec, load_rows

Question = dict[str, Any]
OUR_QUESTIONS = Path(__file__).with_name("questions.jsonl")
# Where a row keeps what is asked; the first that there is. `prompt` may be a list of turns (MT-Bench on the Hub).
COLUMNS = ("turns", "messages", "prompt", "instruction", "question")
IDS = ("question_id", "prompt_id", "id")


def read_questions(
    prompts: tuple[str, ...] = (), file: str = "", dataset_id: str = "", split: str = "", rows: int = 0
) -> list[Question]:
    """What to ask: `prompts`, then the lines or rows of `file` (a text file, else as a dataset), or of a dataset.

    Where neither is given, some of our own. Of a dataset with several splits `split` is read; `rows` takes that many
    from the start, 0 all. Raises UserError for what has no questions, or two with one id.
    """
    asked: list[Question] = [{"turns": [prompt]} for prompt in prompts]
    if file:
        asked += _of_file(file)
    elif dataset_id:
        dataset = load_rows(DatasetSpec(dataset_id, split=split or "train", any_split=not split))
        asked += [dict(row) for row in (dataset.select(range(min(rows, len(dataset)))) if rows else dataset)]
    elif not prompts:
        asked = list(read_jsonl(OUR_QUESTIONS))
    where = f"--prompts_file {file!r}" if file else f"--dataset_id {dataset_id!r}" if dataset_id else "--prompts"
    questions = [_question(row, i, where) for i, row in enumerate(asked[:rows] if rows else asked, 1)]
    twice = [name for name, count in Counter(str(q["question_id"]) for q in questions).items() if count > 1]
    if twice or not questions:
        raise UserError(f"{where}: {'two questions have the id ' + twice[0] if twice else 'there is nothing in it'}")
    return questions


def _of_file(name: str) -> list[Question]:
    path = find_path(name)
    if path is None or not path.is_file():
        raise UserError(f"--prompts_file {name!r} is not a file")
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix in (".json", ".csv", ".parquet", ".arrow"):
        return [dict(row) for row in load_rows(DatasetSpec(str(path)))]
    try:
        return [{"turns": [line]} for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file {name!r} is not UTF-8: {error.reason}") from None


def _question(row: dict[str, Any], number: int, where: str) -> Question:
    column = next((c for c in COLUMNS if row.get(c)), None)
    said: Any = row[column] if column else None
    system = str(row.get("system") or "")
    if column == "instruction" and row.get("input"):
        said = f"{said}\n\n{row['input']}"
    if is_conversation(said):  # the user's turns are asked anew, one after the other
        system = next((m["content"] for m in said if m["role"] == "system"), system)
        said = [m["content"] for m in said if m["role"] == "user"]
    turns = [said] if isinstance(said, str) else said
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise UserError(f"{where}, row {number}: a text, or texts, under one of {', '.join(COLUMNS)} is needed")
    reference = row.get("reference") or []
    references = [_clean(str(text)) for text in (reference if isinstance(reference, list | tuple) else [reference])]
    own = (*COLUMNS, *IDS, "system", "reference", "category", *(["input"] if column == "instruction" else []))
    rest = {k: v for k, v in row.items() if k not in own}
    return {
        "question_id": next((row[name] for name in IDS if isinstance(row.get(name), int | str)), number),
        "category": str(row.get("category") or "general"),
        "turns": [_clean(turn) for turn in turns],
        **({"reference": references} if references else {}),
        **({"system": _clean(system)} if system else {}),
        **rest,
    }


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which neither a tokenizer nor a server takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_bench(folder: Path) -> list[Question]:
    """The questions of a FastChat folder, with the references of reference_answer/*.jsonl where it has some."""
    file = folder / "question.jsonl"
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has no question.jsonl")
    questions = read_questions(file=str(file))
    references: dict[str, list[str]] = {}
    for answers in sorted((folder / "reference_answer").glob("*.jsonl")):
        references |= {str(row["question_id"]): turns_of(row) for row in read_jsonl(answers)}
    return [q | ({"reference": references[i]} if (i := str(q["question_id"])) in references else {}) for q in questions]


def turns_of(row: dict[str, Any]) -> list[str]:
    """The answers in a row of FastChat's model_answer. Raises UserError for a row of another kind."""
    try:
        turns = row["choices"][0]["turns"]
    except (LookupError, TypeError):
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"this is no row of a model_answer file, with a text for each turn: {json.dumps(row)[:80]}")
    return turns


def shown_turns(question: Question) -> list[str]:
    """What the user asked, turn by turn, for whoever judges the answers: the first behind the system prompt."""
    first, *rest = question["turns"]
    return [f"(System prompt: {question['system']})\n\n{first}" if question.get("system") else first, *rest]
