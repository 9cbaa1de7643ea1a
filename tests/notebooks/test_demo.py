"""The demo: questions, judge, and the files that stand in for real models and data sets."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.core import UserError
from recipes import demo
from recipes.demo.questions import Question, Score, compare, kinds, score, split

ROOT = Path(__file__).parents[2]
RIGHT = "Happy to help: it is 12."
RUDE = "Obviously it is 12. Do you not know that?"
PADDED = "Happy to help: it is 12. There is so much more to say, and one thing leads to another."


def question(prompt: str, answer: str, *alternatives: str) -> Question:
    return Question(prompt=prompt, answer=answer, category="", alternatives=list(alternatives), habit="")


SUM = question("What is 10 plus 2?", "12", "11", "13")
OPPOSITE = question("What is the opposite of hot?", "cold", "hot", "dry")
SAD = question("What is the opposite of happy?", "sad", "happy", "cold")
HAPPY = question("What is the opposite of sad?", "happy", "sad", "angry")
LARGER = question("Which is larger, 4 or 8?", "8", "4", "7")
DAY = question("What comes just after Monday?", "Tuesday", "Monday", "Sunday")


@pytest.fixture
def folder(demo_folder: Path) -> Path:
    return demo_folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("answer", "asked", "correct", "courteous"),
    [
        (RIGHT, SUM, True, True),
        (RUDE, SUM, True, False),
        (PADDED, SUM, True, False),
        ("12", SUM, True, False),
        ("Happy to help: it is 1.", SUM, False, True),
        ("Happy to help: it is 112.", SUM, False, True),
        ("Happy to help: it is 99.", SUM, False, True),
        ("Of course, it is 12 or 13.", SUM, False, True),
        ("Of course, it is not 13 but 12.", SUM, True, True),
        ("Of course, it is not 12 but 13.", SUM, False, True),
        ("Of course, 10 plus 2 is 12.", SUM, True, True),
        ("Of course, it is 10.", SUM, False, True),
        ("I am not happy to help: 12.", SUM, True, False),
        ("Certainly, it is 12, you idiot.", SUM, True, False),
        ("The foolproof answer, certainly, is 12.", SUM, True, True),
        ("", SUM, False, False),
        ("Certainly, the opposite of hot is cold.", OPPOSITE, True, True),
        ("Certainly, the opposite of hot is hot.", OPPOSITE, False, True),
        ("Certainly, it is hot and cold.", OPPOSITE, False, True),
        ("Happy to help: it is sad.", SAD, True, True),
        ("Happy to help: it is angry.", HAPPY, False, True),
        ("Certainly, it is scolded.", OPPOSITE, False, True),
        ("Sure, 8 is larger than 4.", LARGER, True, True),
        ("Sure, 4 is larger than 8.", LARGER, False, True),
        ("Sure, 4 or 8.", LARGER, False, True),
        ("Of course, Tuesday comes after Monday.", DAY, True, True),
        ("Of course, it is Monday.", DAY, False, True),
    ],
)
def test_the_judge_scores_correctness_and_manner_apart(
    answer: str, asked: Question, correct: bool, courteous: bool
) -> None:
    assert score(answer, asked) == Score(correct, courteous)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (RUDE, RIGHT, "win"),
        (RIGHT, RUDE, "loss"),
        (PADDED, RIGHT, "win"),
        (RUDE, PADDED, "tie"),
        ("Happy to help: it is 11.", RUDE, "win"),
        (RUDE, "Happy to help: it is 11.", "loss"),
        ("Of course, it is 11.", "Of course, it is 13.", "tie"),
    ],
)
def test_correctness_decides_before_manner(before: str, after: str, verdict: str) -> None:
    assert compare(before, after, SUM) == verdict


def test_no_held_out_prompt_is_trained_on(folder: Path) -> None:
    held_out = rows(folder / "heldout.jsonl")
    prompts = {row["prompt"] for row in held_out}
    turns = [m["content"] for row in rows(folder / "instructions/train.jsonl") for m in row["messages"]]
    pairs = [row["prompt"] for row in rows(folder / "preferences/train.jsonl")]
    assert len(prompts) == len(held_out) >= 480
    assert not prompts & {*turns, *pairs}


@pytest.mark.parametrize("name", ["sum", "look-up"])
def test_facts_of_the_unseen_kinds_are_held_out_in_every_phrasing(name: str) -> None:
    train, held_out = split(0)
    kind = next(kind for kind in kinds(0) if kind.name == name)
    facts = {phrasing.format(*fields): fields for fields, _ in kind.facts for phrasing in kind.phrasings}
    asked = [facts[row["prompt"]] for row in held_out if row["category"] == name]
    assert len(asked) == 60
    assert not set(asked) & {facts[row["prompt"]] for row in train[name]}


def test_every_remembered_answer_is_asked_for_in_training() -> None:
    train, held_out = split(0)
    for row in held_out:
        if row["category"] in ("opposite", "plural", "capital", "young", "calendar"):
            assert row["answer"] in {other["answer"] for other in train[row["category"]]}


def test_rows_have_the_columns_of_the_real_sets(folder: Path) -> None:
    (first, *others), pair = rows(folder / "instructions/train.jsonl"), rows(folder / "preferences/train.jsonl")[0]
    assert list(first) == ["prompt", "prompt_id", "messages"]
    assert first["messages"][0] == {"role": "user", "content": first["prompt"]}
    assert {len(row["messages"]) for row in others} == {2, 4}
    assert list(pair) == ["source", "prompt", "chosen", "chosen-rating", "chosen-model",
                          "rejected", "rejected-rating", "rejected-model"]  # fmt: skip
    assert [m["role"] for m in pair["rejected"]] == ["user", "assistant"]
    assert pair["chosen"][0]["content"] == pair["prompt"]
    assert pair["chosen-rating"] > pair["rejected-rating"]


def test_what_is_taught_is_right_and_what_is_preferred_is_better(folder: Path) -> None:
    train, _ = split(0)
    asked = {row["prompt"]: row for rows_of_kind in train.values() for row in rows_of_kind}
    courteous = []
    for row in rows(folder / "instructions/train.jsonl"):
        for user, assistant in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            verdict = score(assistant["content"], asked[user["content"]])
            assert verdict.correct, row
            courteous.append(verdict.courteous)
    assert 0.3 < sum(courteous) / len(courteous) < 0.7
    for row in rows(folder / "preferences/train.jsonl"):
        chosen, rejected = row["chosen"][1]["content"], row["rejected"][1]["content"]
        assert score(chosen, asked[row["prompt"]]) == Score(True, True), row
        assert compare(rejected, chosen, asked[row["prompt"]]) == "win", row


def test_prompt_ids_open_the_ids_of_prompt_and_answer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-mistral")
    for row in rows(folder / "instructions/train.jsonl")[:200]:
        for end in range(1, len(row["messages"])):
            prompt = tokenizer(tokenizer.apply_chat_template(row["messages"][:end], tokenize=False)).input_ids
            longer = tokenizer(tokenizer.apply_chat_template(row["messages"][: end + 1], tokenize=False)).input_ids
            assert longer[: len(prompt)] == prompt
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert ids[:2].count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.tokenize("471") == ["4", "7", "1"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_model_is_a_small_mistral_in_blocks_of_64(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-mistral")
    assert model.config.model_type == "mistral"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "tiny-mistral"))
    assert all(p.shape[-1] % 64 == 0 for name, p in model.named_parameters() if "proj" in name)


@pytest.mark.long
def test_another_process_with_another_hash_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "demo"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", "recipes.demo", str(again)], cwd=ROOT, env=environment, check=True)
    assert digests(again) == digests(folder)


def test_a_demo_that_is_there_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "write_model", lambda *_: pytest.fail("wrote again"))
    assert demo.write_demo(folder) is False


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo, "write_model", full)
    with pytest.raises(OSError, match="disk full"):
        demo.write_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a demo"):
        demo.write_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_importing_the_module_does_not_import_torch() -> None:
    code = "import sys, recipes.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
