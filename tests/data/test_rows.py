"""Rows in, rows out: every row is kept or dropped with a reason, and no prompt is on both sides of the split."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.core import UserError, read_jsonl
from helpers.data.encode import LengthLimits
from helpers.data.prepare import prepare_rows, split_by_prompt
from helpers.data.row_report import Split
from helpers.models.chat import read_template, render


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


prepare_instructions = functools.partial(prepare_rows, use_pairs=False)
ASK = [user("What is 2 plus 3?")]


def test_instructions_become_tokens_and_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": "x", "prompt_id": "1", "messages": [*ASK, bot("5.")]},
        {"prompt": "x", "prompt_id": "2", "messages": ASK},
        {"prompt": "x", "prompt_id": "3", "messages": [user("Why? " * 100), bot("5.")]},
    ]
    good, report = prepare_instructions(Dataset.from_list(rows), tokenizer, LengthLimits(max_length=64))
    assert good.column_names == ["tokens", "prompt_hash", "messages", "input_ids", "labels"]
    assert good[0]["messages"] == [*ASK, bot("5.")]
    assert good[0]["tokens"] == len(good[0]["input_ids"]) == len(good[0]["labels"])
    assert tokenizer.decode([i for i in good[0]["labels"] if i != -100]) == " 5.</s>"
    assert report.as_dict()["reasons"] == {"no final assistant turn": 1, "longer than max_length": 1}
    assert report.read == report.kept + sum(report.dropped.values()) == 3


def test_a_row_that_the_template_refuses_is_dropped_and_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    strict = AutoTokenizer.from_pretrained(tmp_path)
    strict.chat_template = "{{ raise_exception('no odd talk') if 'odd' in messages[0]['content'] }}" + read_template(
        "mistral"
    )
    odd = [user("an odd question")]
    rows = [{"prompt": p, "chosen": [bot("5.")], "rejected": [bot("6.")]} for p in (ASK, odd, ASK)]
    rows[2]["chosen"] = [bot("7.")]
    pairs, report = prepare_rows(Dataset.from_list(rows), strict, LengthLimits())
    assert len(pairs) == 2
    assert report.examples["the chat template refuses a conversation: no odd talk"] == [2]
    rows = [{"messages": [*p, bot("5.")]} for p in (ASK, odd)]
    assert prepare_instructions(Dataset.from_list(rows), strict, LengthLimits())[1].dropped == report.dropped


@pytest.mark.parametrize(
    ("row", "name", "learned"),
    [
        ({"messages": [*ASK, bot("5."), user("And?"), bot("6.")], "prompt": "x"}, "messages", " 5.</s> 6.</s>"),
        ({"prompt": "What is 2 plus 3?", "completion": "5."}, "completion", " 5.</s>"),
        ({"prompt": ASK, "completion": [bot("5.")]}, "completion", " 5.</s>"),
        ({"instruction": "Add.", "input": "2 and 3", "output": "5.", "text": "x"}, "alpaca", " 5.</s>"),
        ({"prompt": "What is 2 plus 3?", "chosen": "5.", "rejected": "6."}, "pairs, the chosen side", " 5.</s>"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
             "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"},
            "hh, the chosen side", " b</s> d</s>",
        ),
    ],
)  # fmt: skip
def test_instruction_formats_and_the_chosen_side_of_pairs(
    row: dict[str, Any], name: str, learned: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    made, report = prepare_instructions(Dataset.from_list([row]), tokenizer, LengthLimits())
    assert (report.format, report.kept) == (name, 1)
    assert tokenizer.decode([i for i in made[0]["labels"] if i != -100]) == learned


def test_a_system_message_is_folded_where_the_template_has_no_place(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    plain.chat_template = "{% for m in messages %}[{{ m['content'] if m['role'] != 'system' }}]{% endfor %}"
    talk = [{"role": "system", "content": "Be kind."}, *ASK, bot("5.")]
    made, report = prepare_instructions(Dataset.from_list([{"messages": talk}]), plain, LengthLimits())
    assert dict(report.changed) == {"system message folded into the first user turn": 1}
    assert tokenizer.decode(made[0]["input_ids"]).startswith("[Be kind.\n\nWhat is 2 plus 3?]")


def test_columns_that_cannot_be_used_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"has columns question, which match no known format. Rename them to messages"):
        prepare_instructions(Dataset.from_list([{"question": "x"}]), tokenizer, LengthLimits())


def test_no_prompt_is_on_both_sides_and_the_split_is_the_seed_s() -> None:
    prompts = [f"prompt {i % 40}" for i in range(100)]
    rows = Dataset.from_dict({"prompt_hash": prompts, "row": list(range(100))})
    train, held_out = split_by_prompt(rows, Split(0, 20, 0.5, seed=1))
    assert not set(train["prompt_hash"]) & set(held_out["prompt_hash"])
    assert 20 <= len(held_out) <= 22
    assert sorted(train["row"][:] + held_out["row"][:]) == list(range(100))
    again, _ = split_by_prompt(rows, Split(0, 20, 0.5, seed=1))
    other, _ = split_by_prompt(rows, Split(0, 20, 0.5, seed=2))
    assert again["row"][:] == train["row"][:] != other["row"][:]
    few, _ = split_by_prompt(rows, Split(30, 20, 0.5, seed=1))
    assert few["row"][:] == train["row"][:][:30]
    _, half = split_by_prompt(rows, Split(0, 0, 0.5, seed=1))
    assert 50 <= len(half) <= 52


def test_no_more_is_held_out_than_a_small_set_can_spare(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Dataset.from_dict({"prompt_hash": [str(i) for i in range(2000)]})
    train, held_out = split_by_prompt(rows, Split(11_000, 2_750, 0.2))
    assert (len(train), len(held_out)) == (1500, 500)
    assert "`--eval_rows 2750` is more than a quarter of 2000 rows; using 500." in capsys.readouterr().out
    train, held_out = split_by_prompt(rows.select(range(4)), Split(0, 0, 0.1))
    assert (len(train), len(held_out)) == (3, 1)


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    _, one = split_by_prompt(Dataset.from_dict({"prompt_hash": prompts}), Split(0, 10, 0, seed=3))
    _, two = split_by_prompt(Dataset.from_dict({"prompt_hash": prompts[::-1]}), Split(0, 10, 0, seed=3))
    assert one["prompt_hash"][:] == two["prompt_hash"][:]


def test_a_conversation_that_is_too_long_is_dropped_trimmed_or_cut_as_told(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [user("one " * 40), bot("two."), user("What is 2 plus 3?"), bot("It is 5.")]
    rows = Dataset.from_list([{"messages": talk}, {"messages": [user("What is 1?"), bot("6.")]}])

    def made(overlong: Any, total: int) -> tuple[Any, Any]:
        return prepare_instructions(rows, tokenizer, LengthLimits(max_length=total, overlong=overlong))

    kept, report = made("drop", 60)
    assert (len(kept), report.examples) == (1, {"longer than max_length": [1]})
    assert report.lengths["longer than max_length"][0] > 60
    kept, report = made("truncate_prompt", 60)
    assert (kept[0]["messages"], report.examples) == (talk[2:], {"prompt truncated from the left": [1]})
    assert tokenizer.decode([i for i in kept[0]["labels"] if i != -100]) == " It is 5.</s>"
    kept, report = made("truncate_completion", len(tokenizer(render(tokenizer, talk))["input_ids"]) - 3)
    assert report.examples == {"answer truncated": [1]}
    assert kept[0]["labels"][-1] not in (-100, tokenizer.eos_token_id)
    with pytest.raises(UserError, match=r"row 1 has \d+ tokens .* more than --max_length 60"):
        made("error", 60)


def test_a_conversation_that_stands_there_twice_is_kept_once(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list([{"messages": [*ASK, bot(answer)]} for answer in ("5.", "5.", "Five.")])
    kept, report = prepare_instructions(rows, tokenizer, LengthLimits())
    assert report.examples == {"duplicate conversation": [2], "duplicate prompt": [3]}
    assert (len(kept), report.dropped.total()) == (2, 1)


def test_a_broken_line_of_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}) + "\n\n{broken\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 3, is not JSON: Expecting property name .*, column 2$"):
        read_jsonl(tmp_path / "x.jsonl")
