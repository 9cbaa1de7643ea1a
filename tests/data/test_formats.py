"""Each published format, row by row; and that no junk in a row ever raises."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.data.formats import (
    INSTRUCTION_FORMATS,
    PAIR_FORMATS,
    Example,
    PairingConfig,
    choose_format,
    read_pair,
    read_ranked,
    read_scored,
)
from helpers.data.messages import DropRow, parse_hh, validation_error

PAIRS = {row_format.name: row_format for row_format in PAIR_FORMATS}
CONVERSATIONS = {row_format.name: row_format for row_format in INSTRUCTION_FORMATS if row_format.use == "conversations"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(prompt: str = "Why?", chosen: str = "Because.", rejected: str = "No.", margin: float | None = None) -> Example:
    return Example([user(prompt)], [bot(chosen)], [bot(rejected)], margin)


TALK = [user("Why?"), bot("Because.")]
ULTRA = {"prompt": "Why?", "chosen": TALK, "rejected": [user("Why?"), bot("No.")]}
# One row of each set as its card gives it, and the pair that it means.
ROWS: dict[str, tuple[str, dict[str, Any], list[Example]]] = {
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        "messages",
        ULTRA | {"source": "flan", "chosen-rating": 5.0, "chosen-model": "a", "rejected-rating": 3.5, "rejected-model": "b"},
        [pair(margin=1.5)],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "messages",
        ULTRA | {"prompt_id": "0", "messages": TALK, "score_chosen": 8.0, "score_rejected": 7.5},
        [pair(margin=0.5)],
    ),
    "trl-lib/ultrafeedback_binarized": (
        "messages",
        {k: v for k, v in ULTRA.items() if k != "prompt"} | {"score_chosen": 8.0, "score_rejected": 8.0},
        [pair(margin=0.0)],
    ),
    "HuggingFaceH4/orca_dpo_pairs": (
        "messages",
        {"prompt": "Why?", "chosen": [{"role": "system", "content": "Be kind."}, *TALK],
         "rejected": [{"role": "system", "content": "Be kind."}, user("Why?"), bot("No.")]},
        [Example([{"role": "system", "content": "Be kind."}, user("Why?")], [bot("Because.")], [bot("No.")])],
    ),
    "pairs": ("pairs", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [pair()]),
    "Intel/orca_dpo_pairs": (
        "orca", {"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No."}, [pair()],
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "orca",
        {"system": "Be kind.", "input": "Why?", "chosen": "Because.", "rejected": "No.", "generations": ["No.", "Because."],
         "rating": [7.0, 9.0], "status": "swapped", "chosen_score": 9.0, "in_gsm8k_train": False},
        [Example([{"role": "system", "content": "Be kind."}, user("Why?")], [bot("Because.")], [bot("No.")], 2.0)],
    ),
    "berkeley-nest/Nectar": (
        "ranked",
        {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "turns": 1, "num_responses": 3, "source": ["x"], "good_natured": True,
         "answers": [{"answer": "Maybe.", "model": "b", "rank": 2.0}, {"answer": "Because.", "model": "a", "rank": 1.0},
                     {"answer": "No.", "model": "c", "rank": 3.0}]},
        [pair()],
    ),
    "Anthropic/hh-rlhf": (
        "hh",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because.",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: No."},
        [Example([user("Hi"), bot("Hello."), user("Why?")], [bot("Because.")], [bot("No.")])],
    ),
    "tatsu-lab/alpaca_farm": (
        "alpaca_farm",
        {"instruction": "Why?", "input": "", "output_1": "No.", "output_2": "Because.", "preference": 2},
        [pair()],
    ),
    "tatsu-lab/alpaca_farm with input": (
        "alpaca_farm",
        {"instruction": "Sum up.", "input": "A text.", "output_1": "Because.", "output_2": "No.", "preference": 1},
        [pair("Sum up.\n\nA text.")],
    ),
    "openbmb/UltraFeedback": (
        "scored",
        {"source": "flan", "instruction": "Why?", "models": ["a", "b", "c"], "completions": [
            {"model": "a", "response": "No.", "overall_score": 2.0}, {"model": "b", "response": "Hm.", "overall_score": 5.0},
            {"model": "c", "response": "Because.", "overall_score": 8.5}]},
        [pair(margin=6.5)],
    ),
    "lists of responses and scores": (
        "scored", {"prompt": "Why?", "responses": ["No.", "Because."], "scores": [1, 4]}, [pair(margin=3.0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_its_card_gives_it_is_recognised_and_read(name: str) -> None:
    expected, row, pairs = ROWS[name]
    row_format = choose_format(Dataset.from_list([row]), "auto", use_pairs=True)
    assert row_format == PAIRS[expected]
    assert row_format.reader(row, PairingConfig()) == pairs


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("pairs", {"chosen": "No. "}, "chosen equals rejected"),
        ("pairs", {"rejected": ""}, "empty answer"),
        ("pairs", {"prompt": None}, "no prompt"),
        ("pairs", {"chosen": None}, "no chosen"),
        ("pairs", {"prompt": " ", "rejected": None}, "no prompt"),
        ("pairs", {"rejected": 7}, "a number or a date, not text"),
        ("pairs", {"rejected": {"x": "y"}}, "no content"),
        ("trl-lib/ultrafeedback_binarized", {"rejected": None}, "no rejected"),
        ("HuggingFaceH4/ultrafeedback_binarized", {"prompt": None, "chosen": [bot("x")]}, "no prompt"),
        ("berkeley-nest/Nectar", {"answers": None}, "no answers"),
        ("Anthropic/hh-rlhf", {"rejected": None}, "no rejected"),
        ("openbmb/UltraFeedback", {"completions": None}, "no completions"),
        ("trl-lib/ultrafeedback_binarized", {"rejected": [user("What?"), bot("No.")]}, "prompts differ"),
        ("trl-lib/ultrafeedback_binarized", {"chosen": [user("Why?")]}, "no final assistant turn"),
        ("trl-lib/ultrafeedback_binarized", {"chosen": [user("Why?"), *TALK]}, "roles do not alternate"),
        ("berkeley-nest/Nectar", {"answers": [{"answer": "x", "rank": 1}]}, "fewer than two answers"),
        ("berkeley-nest/Nectar", {"answers": [{"answer": "x", "rank": 1}, {"answer": "y", "rank": 1}]}, "tie"),
        ("Anthropic/hh-rlhf", {"chosen": "\n\nHuman: Why?\n\nAssistant: Because."}, "prompts differ"),
        ("Anthropic/hh-rlhf", {"chosen": "\n\nHuman: Hi\n\nHuman: Why?\n\nAssistant: No."}, "roles do not alternate"),
        ("Anthropic/hh-rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant:"}, "empty answer"),
        ("tatsu-lab/alpaca_farm", {"preference": 0}, "no preference"),
        ("openbmb/UltraFeedback", {"completions": [{"response": "x"}, {"response": "y"}]}, "no score"),
        ("lists of responses and scores", {"scores": [4]}, "no score"),
        ("lists of responses and scores", {"scores": [4, 4]}, "tie"),
    ],
)
def test_a_fault_is_named(name: str, change: dict[str, Any], reason: str) -> None:
    read, row, _ = ROWS[name]
    assert PAIRS[read].read(row | change, PairingConfig()) == [reason]


def test_the_recommended_rows_of_distilabel_s_card() -> None:
    _, row, pairs = ROWS["argilla/distilabel-intel-orca-dpo-pairs"]
    options = PairingConfig(recommended=True)
    assert read_pair(row, options) == pairs
    for change in ({"status": "tie"}, {"chosen_score": 7.5}, {"chosen_score": None}, {"in_gsm8k_train": True}):
        with pytest.raises(DropRow, match="not recommended by the dataset card"):
            read_pair(row | change, options)
        assert read_pair(row | change, PairingConfig()) == pairs


def test_ranked_answers_pair_best_against_worst_random_or_all() -> None:
    _, row, worst = ROWS["berkeley-nest/Nectar"]
    assert read_ranked(row, PairingConfig()) == worst
    everything = read_ranked(row, PairingConfig("all_pairs"))
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in everything] == [
        ("Because.", "Maybe."), ("Because.", "No."), ("Maybe.", "No."),
    ]  # fmt: skip
    drawn = {
        read_ranked(row, PairingConfig("best_vs_random", seed=seed))[0].rejected[0]["content"] for seed in range(20)
    }
    assert drawn == {"Maybe.", "No."}
    assert read_ranked(row, PairingConfig("best_vs_random", seed=3)) == read_ranked(
        row, PairingConfig("best_vs_random", seed=3)
    )
    scored = ROWS["openbmb/UltraFeedback"][1]
    assert [p.margin for p in read_scored(scored, PairingConfig("all_pairs"))] == [3.5, 6.5, 3.0]


def test_a_transcript_keeps_every_turn_and_what_looks_like_one_inside() -> None:
    assert parse_hh("\n\nHuman: a\nHuman: b\n\nAssistant: c") == [user("a\nHuman: b"), bot("c")]
    assert parse_hh("Human: a") == parse_hh(None) == parse_hh("") == []


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "user", "assistant", "nan", "1e999"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "answer", "rank", "score", "response"]), inner, max_size=3)
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": inner}), max_size=3),
    max_leaves=12,
)  # fmt: skip
NAMES = ["prompt", "chosen", "rejected", "system", "question", "input", "answers", "instruction", "output_1", "output_2",
         "preference", "completions", "responses", "scores", "score_chosen", "score_rejected", "rating", "status",
         "chosen_score"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    row=st.dictionaries(st.sampled_from(NAMES), JUNK),
    pairing=st.sampled_from(["best_vs_worst", "best_vs_random", "all_pairs"]),
)
def test_no_junk_makes_a_reader_raise_and_what_it_gives_can_be_trained_on(row: dict[str, Any], pairing: Any) -> None:
    for row_format in PAIR_FORMATS:
        examples = row_format.read(row, PairingConfig(pairing, recommended=True))
        assert all(examples)
        for example in examples:
            if isinstance(example, Example):
                assert example.prompt[-1]["role"] == "user"
                assert [m["role"] for m in example.chosen + example.rejected] == ["assistant", "assistant"]
                assert example.chosen[0]["content"].strip() != example.rejected[0]["content"].strip()
                assert all(m["content"].strip() for m in example.prompt[-1:] + example.chosen + example.rejected)


def test_a_column_that_instructions_lack_is_named() -> None:
    def reason(name: str, row: dict[str, Any]) -> list[Example | str]:
        return CONVERSATIONS[name].read(row, PairingConfig())

    assert reason("messages", {"messages": None}) == ["no messages"]
    assert reason("completion", {"prompt": "Why?", "completion": None}) == ["no completion"]
    assert reason("alpaca", {"instruction": "Why?", "output": 7}) == ["a number or a date, not text"]


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from([*NAMES, "messages", "completion", "output", "label"]), JUNK))
def test_no_junk_makes_an_instruction_reader_raise(row: dict[str, Any]) -> None:
    for row_format in INSTRUCTION_FORMATS:
        (example,) = row_format.read(row, PairingConfig())
        assert example
        if isinstance(example, Example):
            messages = example.prompt + example.chosen
            assert all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in messages)
            assert (validation_error(messages), example.rejected) == ("", [])
