"""Each model has its own answers, whatever it is called, and whoever wrote the files."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.core import UserError
from helpers.data.messages import Message
from helpers.evaluation.answers import AnswerStore, Generator
from helpers.evaluation.judgments import AnswerSet, find_answers
from helpers.evaluation.questions import file_name_key, safe_file_name
from helpers.models.resolve import resolve_models
from helpers.runs.start import start_run
from helpers.settings.load import load_settings
from tests.evaluation.judging import questions_of
from tests.settings.notebook import VibesSettings

QUESTIONS = questions_of(3)
LONG = "org-" + "x" * 300
ALIKE = [
    ["org:m", "org-m"],
    ["llama3-8b", "llama3:8b"],
    ["Mistral", "mistral", "MISTRAL"],
    [f"{LONG}a", f"{LONG}b"],
    ["ä" * 130, "ä" * 129 + "b"],
    ["caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")],
    ["a|b", "a?b", "a*b", "a\nb", "a-b"],
    ["m (1)", "m"],
    ["question", "Question"],
]


class Named(Generator):
    """Answers with its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def generate(self, conversations: list[list[Message]], seed: int = 0, **kwargs: Any) -> list[str]:
        return [f"I am {self.name!r}" for _ in conversations]


def found_in(folder: Path, **given: Any) -> AnswerSet:
    values: dict[str, Any] = {
        "answers_dir": str(folder),
        "judgments": "",
        "models": (),
        "bench_dir": "",
        "baseline": "",
        "bench": (),
    }
    return find_answers(SimpleNamespace(**values | given, output_dir=folder, is_set=lambda name: True))


def write_rows(file: Path, *rows: tuple[str | None, int, str]) -> None:
    """A row for each model, question and text, as FastChat writes it."""
    file.parent.mkdir(exist_ok=True)
    (file.parent.parent / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    content = [
        {"question_id": i, "choices": [{"index": 0, "turns": [text]}]} | ({"model_id": model} if model else {})
        for model, i, text in rows
    ]
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in content)


@pytest.mark.parametrize("names", ALIKE, ids=lambda names: ascii(names[0])[:9])
def test_models_with_names_alike_have_a_file_and_answers_each(names: list[str], tmp_path: Path) -> None:
    for _ in range(2):  # in a second process too
        store = AnswerStore(tmp_path, QUESTIONS)
        for name in names[::-1]:
            assert store.file(name)  # all are opened before any is written
        for name in names:
            store.generate_missing(name, Named(name))
            assert [*store.answers(name).values()] == [[f"I am {name!r}"]] * 3
    files = [file.name for file in (tmp_path / "model_answer").iterdir()]
    assert len({file_name_key(name) for name in files}) == len(files) == len(names)
    assert all(len(name.encode()) < 140 for name in files)
    assert found_in(tmp_path).answers == {name: {i: [f"I am {name!r}"] for i in range(3)} for name in names}
    page = store.write_vote_page(names, "t", {})
    content = (tmp_path / "answers.html").read_text()
    assert page in content
    assert all(json.dumps(name) in content for name in names)


def test_a_name_alone_keeps_its_plain_file(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, QUESTIONS)
    store.generate_missing("llama3:8b", Named("x"))
    assert [file.name for file in (tmp_path / "model_answer").iterdir()] == ["llama3-8b.jsonl"]
    assert safe_file_name("org/Model-7B") == "org-Model-7B"


def test_a_file_that_an_older_run_shared_is_read_row_by_row(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "model_answer" / "org-m.jsonl"
    write_rows(file, ("org:m", 0, "mine"), ("org:m", 1, "mine"), ("org-m", 1, "other"))
    assert found_in(tmp_path).answers == {"org:m": {0: ["mine"], 1: ["mine"]}, "org-m": {1: ["other"]}}
    assert "note: org-m.jsonl has rows of org-m, org:m. Each counts for its model." in capsys.readouterr().out
    store = AnswerStore(tmp_path, QUESTIONS)
    for name in ("org:m", "org-m"):  # and resumed
        store.generate_missing(name, Named(name))
    found = found_in(tmp_path).answers
    assert found["org:m"] == {0: ["mine"], 1: ["mine"], 2: ["I am 'org:m'"]}
    assert found["org-m"] == {i: ["I am 'org-m'"] for i in range(3)}  # its own file


def test_answers_that_an_older_run_gave_to_one_model_are_not_those_of_both(tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path / "model_answer" / "org-m.jsonl", ("org:m", 0, "mine"))
    (tmp_path / "run.json").write_text(json.dumps({"models": ["org:m", "org-m"], "step": "vibes"}))
    assert found_in(tmp_path).answers == {"org:m": {0: ["mine"]}}
    assert "has no answers of org-m" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"There are no answers of org-m\. Use one of: org:m"):
        found_in(tmp_path, models=("org-m",))
    store = AnswerStore(tmp_path, QUESTIONS)
    assert [q["question_id"] for q in store.missing("org:m")] == [1, 2]
    assert len(store.missing("org-m")) == 3
    assert len(store.missing("ORG-M")) == 3


def test_a_file_of_fastchats_has_the_name_that_somebody_gave_it(tmp_path: Path) -> None:
    place = tmp_path / "model_answer"
    write_rows(place / "vicuna-new.jsonl", ("vicuna", 0, "new"))
    write_rows(place / "vicuna.jsonl", ("vicuna", 0, "old"))
    write_rows(place / "gpt:4.jsonl", ("gpt:4", 0, "four"))
    write_rows(place / "gpt-4.jsonl", ("gpt-4", 0, "4"))
    write_rows(place / "nobody.jsonl", (None, 0, "?"))
    write_rows(place / "all.jsonl", ("one", 0, "1"), ("two", 0, "2"))
    assert found_in(tmp_path).answers == {
        "vicuna-new": {0: ["new"]}, "vicuna": {0: ["old"]}, "gpt:4": {0: ["four"]}, "gpt-4": {0: ["4"]},
        "nobody": {0: ["?"]}, "one": {0: ["1"]}, "two": {0: ["2"]},
    }  # fmt: skip


def test_numbered_names_are_no_other_models(tmp_path: Path) -> None:
    url = "@http://127.0.0.1:1/v1"
    refs = resolve_models((f"a/m{url}", f"b/m{url}", f"m (1){url}"), tmp_path)
    assert len({ref.name for ref in refs}) == 3
    with pytest.raises(UserError, match="a model is called 'error', which is also a verdict"):
        resolve_models((f"org/error{url}",), tmp_path)


def test_a_run_of_a_model_with_a_very_long_name_has_a_folder(tmp_path: Path) -> None:
    settings = load_settings(VibesSettings, {}, ["--output_dir", str(tmp_path)])
    run = start_run(settings, base_model=f"org/{'ö' * 200}", origin="x")
    run.save()
    assert (tmp_path / run.name / "run.json").is_file()
