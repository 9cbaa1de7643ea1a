"""Rows in, rows out: every row is kept or dropped with a reason, and no prompt is on both sides of the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.chat import MISTRAL
from helpers.errors import UserError
from helpers.instructions import prepare_instructions
from helpers.preferences import prepare_preferences, read_pair
from helpers.rows import load_rows, read_lines, split_by_prompt


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ASK = [user("What is 2 plus 3?")]
PAIR = {"prompt": ASK, "chosen": [bot("5.")], "rejected": [bot("6.")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "What is 2 plus 3?", "chosen": [*ASK, bot("5.")], "rejected": [*ASK, bot("6.")]}, PAIR),
        ({"chosen": [*ASK, bot("5.")], "rejected": [*ASK, bot("6.")]}, PAIR),
        ({"prompt": "What is 2 plus 3?", "chosen": "5.", "rejected": "6."}, PAIR),
        ({"prompt": ASK, "chosen": [bot("5.")], "rejected": [bot("6.")]}, PAIR),
        ({"chosen": [*ASK, bot("5.") | {"extra": None}], "rejected": [*ASK, bot("6.")]}, PAIR),
        ({"chosen": [*ASK, bot("5.")], "rejected": [user("What?"), bot("6.")]}, "prompts differ"),
        ({"chosen": [*ASK, bot("5.")], "rejected": [*ASK, bot(" 5.\n")]}, "chosen equals rejected"),
        ({"chosen": [*ASK, bot(" ")], "rejected": [*ASK, bot("6.")]}, "empty answer"),
        ({"chosen": ASK, "rejected": [*ASK, bot("6.")]}, "no final assistant turn"),
        ({"chosen": [*ASK, *ASK, bot("5.")], "rejected": [*ASK, bot("6.")]}, "roles do not alternate"),
        ({"chosen": [*ASK, bot(5)], "rejected": [*ASK, bot("6.")]}, "not text"),
        ({"chosen": None, "rejected": [*ASK, bot("6.")]}, "not text"),
        ({"chosen": "5.", "rejected": "6."}, "not text"),
    ],
)
def test_a_published_row_becomes_a_pair_or_a_reason(row: dict[str, Any], expected: Any) -> None:
    assert read_pair(row) == expected


def test_the_account_of_pairs_adds_up_and_names_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": "What is 2 plus 3?", "chosen": "5.", "rejected": "6."},
        {"prompt": "What is 2 plus 3?", "chosen": "5.", "rejected": "5."},
        {"prompt": "What is 2 plus 3? " * 40, "chosen": "5.", "rejected": "6."},
        {"prompt": "What is 2 plus 4?", "chosen": "6. " * 100, "rejected": "7."},
        {"prompt": "What is 2 plus 5?", "chosen": "7.", "rejected": "7."},
    ]
    pairs, account = prepare_preferences(Dataset.from_list(rows), tokenizer, 64, 128)
    assert pairs.to_list() == [PAIR]
    assert account.as_dict() == {
        "read": 5,
        "kept": 1,
        "changed": 0,
        "dropped": 4,
        "reasons": {"chosen equals rejected": 2, "over-long": 2},
        "examples": {"chosen equals rejected": [1, 4], "over-long": [2, 3]},
    }
    with pytest.raises(UserError, match=r"4 of 5 rows cannot be used\. chosen equals rejected: 2 \(row 1"):
        prepare_preferences(Dataset.from_list(rows), tokenizer, 64, 128, strict=True)
    assert len(prepare_preferences(Dataset.from_list(rows), tokenizer, 0, 0)[0]) == 3


def test_pairs_train_as_they_are_in_trl(tokenizer: PreTrainedTokenizerBase) -> None:
    from trl.data_utils import is_conversational

    pairs, _ = prepare_preferences(
        Dataset.from_list([{"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}]), tokenizer, 0, 0
    )
    assert is_conversational(pairs[0])
    assert pairs.column_names == ["prompt", "chosen", "rejected"]


def test_instructions_become_tokens_and_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": "x", "prompt_id": "1", "messages": [*ASK, bot("5.")]},
        {"prompt": "x", "prompt_id": "2", "messages": ASK},
        {"prompt": "x", "prompt_id": "3", "messages": [user("Why? " * 100), bot("5.")]},
    ]
    good, account = prepare_instructions(Dataset.from_list(rows), tokenizer, 64)
    assert good.column_names == ["prompt", "input_ids", "labels"]
    assert good[0]["prompt"] == "What is 2 plus 3?"
    assert tokenizer.decode([i for i in good[0]["labels"] if i != -100]) == " 5.</s>"
    assert account.as_dict()["reasons"] == {"no final assistant turn": 1, "over-long": 1}
    assert account.read == account.kept + sum(account.dropped.values()) == 3


def test_a_row_that_the_template_refuses_is_dropped_and_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    strict = AutoTokenizer.from_pretrained(tmp_path)
    strict.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + MISTRAL
    talk = [{"role": "system", "content": "Be kind."}, *ASK]
    rows = [{"prompt": p, "chosen": [bot("5.")], "rejected": [bot("6.")]} for p in (ASK, talk, ASK)]
    pairs, account = prepare_preferences(Dataset.from_list(rows), strict, 0, 0)
    assert len(pairs) == 2
    assert account.examples == {"the chat template refuses a conversation: no system": [1]}
    rows = [{"messages": [*p, bot("5.")]} for p in (ASK, talk)]
    assert prepare_instructions(Dataset.from_list(rows), strict, 0)[1].dropped == account.dropped


def test_columns_that_cannot_be_used_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list([{"question": "x", "chosen": "y"}])
    with pytest.raises(UserError, match="has columns question, chosen; a preference set needs rejected"):
        prepare_preferences(rows, tokenizer, 0, 0)
    with pytest.raises(UserError, match="an instruction set needs messages"):
        prepare_instructions(rows, tokenizer, 0)


def test_no_prompt_is_on_both_sides_and_the_split_is_the_seed_s() -> None:
    prompts = [f"prompt {i % 40}" for i in range(100)]
    rows = Dataset.from_dict({"prompt": prompts, "row": list(range(100))})
    train, held_out = split_by_prompt(rows, prompts, 20, 0.5, 0, seed=1)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert 20 <= len(held_out) <= 22
    assert sorted(train["row"][:] + held_out["row"][:]) == list(range(100))
    again, _ = split_by_prompt(rows, prompts, 20, 0.5, 0, seed=1)
    other, _ = split_by_prompt(rows, prompts, 20, 0.5, 0, seed=2)
    assert again["row"][:] == train["row"][:] != other["row"][:]
    few, _ = split_by_prompt(rows, prompts, 20, 0.5, 30, seed=1)
    assert few["row"][:] == train["row"][:][:30]
    _, half = split_by_prompt(rows, prompts, 0, 0.5, 0, seed=1)
    assert 50 <= len(half) <= 52


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    _, one = split_by_prompt(Dataset.from_dict({"p": prompts}), prompts, 10, 0, 0, seed=3)
    _, two = split_by_prompt(Dataset.from_dict({"p": prompts[::-1]}), prompts[::-1], 10, 0, 0, seed=3)
    assert one["p"][:] == two["p"][:]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "folder", "saved"])
def test_rows_load_from_files_and_folders(suffix: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
    )
    file = tmp_path / f"rows.{suffix}"
    if suffix in ("json", "jsonl"):
        rows.to_json(file)
    elif suffix == "csv":
        rows.to_csv(file)
    elif suffix == "parquet":
        rows.to_parquet(file)
    elif suffix == "saved":
        rows.save_to_disk(file)
    else:
        file.mkdir()
        rows.to_json(file / "train.jsonl")
    assert load_rows(str(file)).to_list() == rows.to_list()


def test_a_dataset_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    for name in (str(tmp_path / "rows.txt"), "no such/data set/at all"):
        with pytest.raises(UserError) as raised:
            load_rows(name)
        assert "\n" not in str(raised.value)
        assert name in str(raised.value)


def test_a_broken_line_of_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}) + "\n\n{broken\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 3, is not JSON"):
        read_lines(tmp_path / "x.jsonl")
