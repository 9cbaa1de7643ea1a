# ruff: noqa: RUF001  (DeepSeek's tokens have full-width bars)
"""Every text template that TRL ships: what is trained on is what the model sees, and what TRL would train on."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from helpers.core import UserError
from helpers.data.encode import LengthLimits
from helpers.data.prepare import prepare_rows
from helpers.models.chat import (
    PROBE,
    find_template_fault,
    marked_template,
    render,
    set_chat_template,
    suggest_template,
)
from tests.models.template_table import (
    ANSWERS,
    CALLED,
    FOLDER,
    HISTORY,
    PAGE,
    ROWS,
    SYSTEM,
    THOUGHT,
    THOUGHTFUL,
    TOOLS,
    byte_tokenizer,
    page,
    prepare_row,
    tokenizer_of,
    turn,
)  # fmt: skip

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def test_the_table_of_templates_is_what_they_do() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")


def trl_pairs(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens of TRL's DPOTrainer, by its own method."""
    from trl import DPOTrainer

    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    return [{name: row[name] for name in IDS} for row in prepared]


TOOL_PROMPT = [SYSTEM, *CALLED]
EQUAL = [  # and whether it has thoughts
    ("gemma4_v5", True), ("gptoss", True), ("lfm2_2_5_v2", True), ("llama3_1", False), ("muse_glimmer", True),
    ("nemotron_3_nano", True), ("qwen2_5", False), ("qwen3", True), ("qwen3_5_think", True), ("qwen3_6", True),
    ("qwen3_8", True), ("qwen3_instruct_2507", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "has_thoughts"), EQUAL)
def test_pairs_have_the_tokens_of_trl(name: str, has_thoughts: bool) -> None:
    tokenizer = tokenizer_of(name)
    thought = THOUGHT if has_thoughts else {}
    answers = THOUGHTFUL if has_thoughts else ANSWERS
    talk = [SYSTEM, HISTORY[0], HISTORY[1] | thought, HISTORY[2]]
    call = CALLED[1] | ({} if name == "gptoss" else thought)  # gpt-oss drops it once an answer follows
    mixed = [
        {"prompt": talk, **answers, "tools": json.dumps(TOOLS)},
        {"prompt": [SYSTEM, CALLED[0], call, CALLED[2]], **answers, "tools": json.dumps(TOOLS)},
    ]
    off = [{"prompt": [SYSTEM, *HISTORY], **ANSWERS, "chat_template_kwargs": {"enable_thinking": False}}]
    for rows in (mixed, off):
        ours, report = prepare_rows(Dataset.from_list(rows), tokenizer, LengthLimits(), validate=True)
        assert dict(report.dropped) == {}
        assert [{side: row[side] for side in IDS} for row in ours] == trl_pairs(tokenizer, rows)


BEGINNINGS = ("<|start|>assistant", "<think>\n\n</think>\n\n", "<think></think>", "<think>\n", "\n")  # in TRL's marks


@pytest.mark.parametrize(
    "name", ["gemma", "gptoss", "llama3", "nemotron_3_nano", "phi3_5", "qwen2_5", "qwen3", "qwen3_6"]
)
def test_conversations_learn_what_trl_marks_but_for_what_generation_begins_with(name: str) -> None:
    tokenizer = tokenizer_of(name)
    template = marked_template(tokenizer)
    for kind in ("plain", "system", "thoughts", "tools"):
        row, report = prepare_row(tokenizer, ROWS[kind], use_pairs=False)
        if row is None:
            assert name in ("gemma", "llama3", "phi3_5", "qwen2_5"), report.dropped
            continue
        variables = json.loads(next(iter(set(report.rendered_with) - {"tools", "tool_calls", "reasoning_content"})))
        talk = ROWS[kind]["prompt"] + ROWS[kind]["chosen"]
        if kind == "system" and name == "gemma":
            talk = [turn("user", f"{SYSTEM['content']}\n\nHi"), *talk[2:]]
        marked = tokenizer.apply_chat_template(
            talk, tools=ROWS[kind].get("tools"), chat_template=template, return_dict=True,
            return_assistant_tokens_mask=True, **variables,
        )  # fmt: skip
        assert row["input_ids"] == marked["input_ids"]
        learned = [label != -100 for label in row["labels"]]
        both = zip(row["input_ids"], marked["assistant_masks"], learned, strict=True)
        unlike = tokenizer.decode([i for i, mask, own in both if mask != own])
        assert re.fullmatch(rf"(?:{'|'.join(map(re.escape, BEGINNINGS))})*", unlike), (kind, unlike)


def test_an_answer_without_thoughts_follows_the_empty_ones_of_its_prompt() -> None:
    tokenizer = tokenizer_of("qwen3")
    pair, report = prepare_row(tokenizer, ROWS["plain"], use_pairs=True)
    assert pair is not None
    prompt = render(tokenizer, HISTORY, prompt=True, options={"enable_thinking": False})
    assert tokenizer.decode(pair["prompt_ids"]) == prompt
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(pair["chosen_ids"]) == "Because.<|im_end|>\n"
    assert report.rendered_with == {'{"enable_thinking": false}': 1}
    talk, _ = prepare_row(tokenizer, ROWS["plain"], use_pairs=False)
    assert talk is not None
    assert tokenizer.decode([i for i in talk["labels"] if i != -100]) == "Hello.<|im_end|>\nBecause.<|im_end|>\n"


def test_a_template_that_always_thinks_gets_empty_thoughts_where_there_are_none() -> None:
    tokenizer = tokenizer_of("deepseek_r1_distill")
    pair, report = prepare_row(tokenizer, ROWS["plain"], use_pairs=True)
    assert pair is not None
    assert tokenizer.decode(pair["prompt_ids"]) == render(tokenizer, HISTORY, prompt=True)
    assert tokenizer.decode(pair["chosen_ids"]) == "\n</think>\n\nBecause.<｜end▁of▁sentence｜>"
    assert dict(report.changed) == {"empty thoughts added: the chat template begins with thoughts": 1}
    pair, _ = prepare_row(tokenizer, ROWS["thoughts"], use_pairs=True)
    assert pair is not None
    assert tokenizer.decode(pair["prompt_ids"]) == render(tokenizer, [SYSTEM, *HISTORY], prompt=True)
    assert tokenizer.decode(pair["chosen_ids"]) == "Let me see.\n</think>\n\nBecause.<｜end▁of▁sentence｜>"
    _, report = prepare_row(tokenizer_of("deepseekv3"), ROWS["plain"], use_pairs=True)
    assert list(report.dropped) == [
        "the chat template begins with thoughts at generation, but not in training: use another --chat_template"
    ]


def test_a_turn_of_weight_0_is_not_learned_where_the_template_has_marks() -> None:
    tokenizer = tokenizer_of("qwen3_6")
    row = ROWS["plain"] | {"prompt": [HISTORY[0], HISTORY[1] | {"weight": 0}, HISTORY[2]]}
    talk, _ = prepare_row(tokenizer, row, use_pairs=False)
    assert talk is not None
    assert "Hello." in tokenizer.decode(talk["input_ids"])
    assert tokenizer.decode([i for i in talk["labels"] if i != -100]) == "Because.<|im_end|>\n"


def test_an_unknown_template_that_changes_earlier_answers_learns_the_last(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("# Tools", "# My tools")
    monkeypatch.setattr("transformers.utils.chat_template_utils.logger.warning_once", print)
    assert marked_template(tokenizer) == ""
    assert "generation" not in capfd.readouterr().out  # no library says that the template lacks marks
    talk, report = prepare_row(tokenizer, ROWS["thoughts"], use_pairs=False)
    assert talk is not None
    assert tokenizer.decode([i for i in talk["labels"] if i != -100]) == (
        "<think>\nLet me see.\n</think>\n\nBecause.<|im_end|>\n"
    )
    assert dict(report.changed) == {
        "only the last answer is trained on: the chat template renders earlier ones differently": 1
    }


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "llama3_1"])
def test_arguments_of_a_call_are_an_object_or_json_as_the_template_takes_them(name: str) -> None:
    tokenizer = tokenizer_of(name)
    call = [{"type": "function", "function": {"name": "colour_of", "arguments": '{"number": 0}'}}]
    row = {
        "prompt": CALLED[:1],
        "chosen": [turn("assistant", "", tool_calls=call)],
        **{"rejected": ANSWERS["rejected"]},
    }
    pair, report = prepare_row(tokenizer, row, use_pairs=True)
    assert pair is not None, report.dropped
    assert "colour_of" in tokenizer.decode(pair["chosen_ids"])


CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_beginning_of_sequence_token_that_opens_turns_is_no_fault() -> None:
    tokenizer = byte_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))  # SmolLM2's
    assert prepare_row(tokenizer, ROWS["system"], use_pairs=True)[0] is not None
    assert prepare_row(tokenizer, ROWS["system"], use_pairs=False)[0] is not None
    assert not find_template_fault(tokenizer, [*HISTORY, *ANSWERS["chosen"]])


def test_the_end_of_a_turn_may_be_one_of_the_models_generation_config() -> None:
    tokenizer = tokenizer_of("gemma")
    assert prepare_row(tokenizer, ROWS["plain"], use_pairs=True)[0] is not None
    tokenizer.model_eos_token_id = None
    _, report = prepare_row(tokenizer, ROWS["plain"], use_pairs=True)
    with pytest.raises(UserError) as raised:
        report.check(strict=False, tokenizer=tokenizer)
    said = str(raised.value)
    assert "the answer does not end with <eos>, so the model would not learn to stop" in said
    assert "; use `--eos_token '<end_of_turn>'`: 1 (row 1)" in said
    assert "(row 1)" in said
    assert "Use `--chat_template mistral`, or a Jinja file." in said


def test_a_refused_template_names_one_whose_tokens_are_there() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", ""), ("", "<|im_end|>"))
    _, report = prepare_row(tokenizer, ROWS["plain"], use_pairs=True)
    with pytest.raises(UserError, match=r"\(row 1\)\. Use `--chat_template chatml`, or a Jinja file\."):
        report.check(strict=False, tokenizer=tokenizer)


def test_chatml_is_named_to_a_tokenizer_whose_first_token_opens_turns() -> None:
    tokenizer = byte_tokenizer(CHATML, ("<|im_start|>", "<|endoftext|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert find_template_fault(tokenizer, PROBE).endswith("use `--eos_token '<|im_end|>'`")
    assert suggest_template(tokenizer) == "Use `--chat_template chatml`, or a Jinja file."
    set_chat_template(tokenizer, "chatml")
    assert render(tokenizer, PROBE[:1]) == "<|im_start|>user\nApples?<|im_end|>\n"
    assert prepare_row(tokenizer, ROWS["system"], use_pairs=True)[0] is not None


def test_rows_are_prepared_again_for_another_template_or_other_variables() -> None:
    tokenizer, rows = tokenizer_of("qwen3"), Dataset.from_list([ROWS["thoughts"]])
    first, _ = prepare_rows(rows, tokenizer, LengthLimits())
    on, report = prepare_rows(rows, tokenizer, LengthLimits(), chat_template_kwargs={"enable_thinking": True})
    assert on[0]["prompt_ids"] == first[0]["prompt_ids"]
    assert report.rendered_with['{"enable_thinking": true}'] == 1
    _, report = prepare_rows(rows, tokenizer, LengthLimits(), chat_template_kwargs={"enable_thinking": False})
    assert list(report.dropped) == ["the chat template renders the prompt differently before an answer"]
    tokenizer.chat_template = (FOLDER / "qwen3_6.jinja").read_text(encoding="utf-8")
    other, _ = prepare_rows(rows, tokenizer, LengthLimits())
    assert other[0]["prompt_ids"] != first[0]["prompt_ids"]


def test_rows_that_differ_in_their_tools_are_two_rows() -> None:
    other = [TOOLS[0] | {"function": TOOLS[0]["function"] | {"name": "shape_of"}}]
    rows = [{"prompt": HISTORY, **ANSWERS, "tools": json.dumps(tools)} for tools in (TOOLS, other, TOOLS)]
    good, report = prepare_rows(Dataset.from_list(rows), tokenizer_of("qwen2_5"), LengthLimits())
    assert (len(good), dict(report.dropped)) == (2, {"duplicate pair": 1})
    assert report.rendered_with["tools"] == 2
