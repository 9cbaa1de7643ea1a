"""What the tests of pairs share: settings of 06, files of rows, and answers in FastChat's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.runs.start import settings_of
from helpers.settings.load import load_settings
from tests.conftest import REPO


def pairs_settings(folder: Path, *words: str) -> Any:
    """Settings of 06_pairs.py, whose runs are in FOLDER/outputs."""
    cls = settings_of(REPO / "notebooks" / "06_pairs.py")
    return load_settings(cls, {}, ["--output_dir", str(folder / "outputs"), *words])


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_answers(folder: Path, answers: dict[str, list[list[str]]], **record: Any) -> Path:
    """Questions 0, 1 ... and each model's choices of answers to them; with `record`, as a run."""
    count = max(map(len, answers.values()))
    write_rows(folder / "question.jsonl", [{"question_id": i, "turns": [f"question {i}"]} for i in range(count)])
    for model, own in answers.items():
        rows = [
            {"question_id": i, "model_id": model,
             "choices": [{"index": k, "turns": [text]} for k, text in enumerate(texts)]}
            for i, texts in enumerate(own)
        ]  # fmt: skip
        write_rows(folder / "model_answer" / f"{model}.jsonl", rows)
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    return folder
