"""Preference sets as a whole: the report of every row, over-long rows, and the same tokens as TRL's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.core import UserError
from helpers.data.encode import LengthLimits, truncate_prompt
from helpers.data.formats import PAIR_FORMATS, Format, PairingConfig
from helpers.data.messages import parse_text
from helpers.data.prepare import prepare_rows, split_by_prompt
from helpers.data.row_report import Split
from helpers.models.chat import read_template, render, set_chat_template
from tests.data.test_formats import JUNK, ROWS, bot, user

NO_LIMITS = LengthLimits()


def pair_rows(*rows: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def test_every_fault_of_a_bad_set_is_named_once_by_reason_and_row(tokenizer: PreTrainedTokenizerBase) -> None:
    good = [
        {"prompt": f"What is {i} plus 1?", "chosen": [bot(f"{i + 1}.")], "rejected": [bot("0.")]} for i in range(30)
    ]
    bad: dict[str, dict[str, Any]] = {
        "chosen equals rejected": {"prompt": "a?", "chosen": [bot("x")], "rejected": [bot("x ")]},
        "empty answer": {"prompt": "b?", "chosen": [bot("")], "rejected": [bot("y")]},
        "prompts differ": {"prompt": None, "chosen": [user("c?"), bot("x")], "rejected": [user("d?"), bot("y")]},
        "no final assistant turn": {"prompt": None, "chosen": [user("e?")], "rejected": [user("e?"), bot("y")]},
        "roles do not alternate": {
            "prompt": None, "chosen": [user("f?"), user("f?"), bot("x")], "rejected": [user("f?"), bot("y")],
        },
        "duplicate pair": good[3],
        "tie": {
            "prompt": "g?", "chosen": [bot("x")], "rejected": [bot("y")], "score_chosen": 5.0, "score_rejected": 5.0,
        },
        "margin below --min_margin": {
            "prompt": "h?", "chosen": [bot("x")], "rejected": [bot("y")], "score_chosen": 5.0, "score_rejected": 4.8,
        },
        "longer than max_length": {"prompt": "i? " * 200, "chosen": [bot("x")], "rejected": [bot("y")]},
        "no chosen": {"prompt": "j?", "chosen": None, "rejected": [bot("y")]},
    }  # fmt: skip
    rows = Dataset.from_list([{"score_chosen": None, "score_rejected": None} | row for row in (*good, *bad.values())])
    assert len(rows) == 40
    pairs, report = prepare_rows(rows, tokenizer, LengthLimits(64, 128), pairing=PairingConfig(min_margin=0.5))
    assert dict(report.dropped) == dict.fromkeys(bad, 1)
    assert {reason: report.examples[reason] for reason in bad} == {r: [31 + i] for i, r in enumerate(bad)}
    assert (report.read, report.kept, len(pairs), report.format) == (40, 30, 30, "messages")
    with pytest.raises(UserError, match=r"10 of 40 rows cannot be used"):
        report.check(strict=True)
    report.check(strict=False)


def test_the_same_pair_with_both_labels_is_dropped_both_times(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = pair_rows(("a?", "x", "y"), ("b?", "x", "y"), ("a?", "y", "x"), ("b?", "x", "z"))
    pairs, report = prepare_rows(rows, tokenizer, NO_LIMITS)
    assert report.examples == {"the same pair with both labels": [1, 3], "duplicate prompt": [4]}
    assert [p[0]["content"] for p in pairs["prompt"]] == ["b?", "b?"]
    assert (report.dropped.total(), report.flagged.total(), report.kept) == (2, 1, 2)


def test_a_row_that_gives_several_pairs_is_one_row(tokenizer: PreTrainedTokenizerBase) -> None:
    _, row, _ = ROWS["openbmb/UltraFeedback"]
    pairs, report = prepare_rows(Dataset.from_list([row]), tokenizer, NO_LIMITS, pairing=PairingConfig("all_pairs"))
    assert (len(pairs), report.read, report.kept) == (3, 1, 1)
    pairs, report = prepare_rows(
        Dataset.from_list([row]), tokenizer, NO_LIMITS, pairing=PairingConfig("all_pairs", min_margin=3.2)
    )
    assert (len(pairs), report.kept, report.dropped.total()) == (2, 1, 0)


@pytest.mark.parametrize("name", ROWS)
def test_every_published_format_becomes_pairs(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    expected, row, found = ROWS[name]
    if name == "trl-lib/ultrafeedback_binarized":
        row = row | {"score_rejected": 7.0}
    Dataset.from_list([row]).to_json(tmp_path / "rows.jsonl")
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    pairs, report = prepare_rows(rows, tokenizer, NO_LIMITS)
    assert report.format == expected
    assert pairs[0]["prompt"] == found[0].prompt
    assert pairs[0]["chosen"] == found[0].chosen
    assert tokenizer.decode(pairs[0]["chosen_ids"]) == f" {found[0].chosen[0]['content']}</s>"


def test_a_set_of_no_known_format_is_refused_with_its_columns(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="has columns text, label, which match no known format"):
        prepare_rows(Dataset.from_list([{"text": "a", "label": 1}]), tokenizer, NO_LIMITS)
    with pytest.raises(
        UserError, match="Rename them to prompt, chosen and rejected, or set `--data_format` to one of messages, pairs"
    ):
        prepare_rows(Dataset.from_list([{"question": "a", "good": "b", "bad": "c"}]), tokenizer, NO_LIMITS)
    half = Dataset.from_list([{"prompt": "a", "good": "b", "rejected": "c"}])
    for name, lacking in (("pairs", "no chosen"), ("orca", "no question or input, no chosen")):
        said = f"has columns prompt, good, rejected, and {lacking}, which the format {name} needs. Rename them"
        with pytest.raises(UserError, match=said):
            prepare_rows(half, tokenizer, NO_LIMITS, data_format=name)
    with pytest.raises(UserError, match="no row of 1 can be used"):
        prepare_rows(pair_rows(("a?", "x", "x")), tokenizer, NO_LIMITS)[1].check(strict=False)


# Over-long rows


def test_a_trimmed_prompt_keeps_its_end_and_the_answers_theirs(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = pair_rows(("start " * 100 + "What is 2 plus 3?", "It is 5.", "It is 6, and that is that."))
    pairs, report = prepare_rows(rows, tokenizer, LengthLimits(32, 64, "truncate_prompt"))
    assert dict(report.changed) == {"prompt truncated from the left": 1}
    text = pairs[0]["prompt"][0]["content"]
    assert text.endswith("What is 2 plus 3?")
    assert text.startswith("start")
    assert 28 <= len(pairs[0]["prompt_ids"]) <= 32
    assert tokenizer.decode(pairs[0]["chosen_ids"]) == " It is 5.</s>"
    assert pairs[0]["rejected_ids"][-1] == tokenizer.eos_token_id


def test_whole_turns_are_trimmed_first_and_a_system_message_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [
        {"role": "system", "content": "Be kind."},
        user("one " * 30),
        bot("two"),
        user("three"),
        bot("four"),
        user("five?"),
    ]
    short = truncate_prompt(tokenizer, talk, 60)
    assert short == [talk[0], *talk[3:]]
    assert truncate_prompt(tokenizer, talk, 30)[0] == talk[0]
    assert truncate_prompt(tokenizer, talk, 1) == []
    assert truncate_prompt(tokenizer, talk, 10_000) == talk


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt"])
def test_a_pair_whose_answer_alone_is_too_long_is_dropped_not_cut(
    overlong: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = pair_rows(("a?", "x " * 100, "y"), ("b?", "x", "y"))
    pairs, report = prepare_rows(rows, tokenizer, LengthLimits(32, 64, overlong))
    assert report.examples == {"longer than max_length": [1]}
    assert len(pairs) == 1


def test_answers_are_cut_only_when_that_is_asked_for_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = pair_rows(("a?", "x " * 100, "y"), ("b? " * 100, "x", "y"))
    pairs, report = prepare_rows(rows, tokenizer, LengthLimits(0, 64, "truncate_completion"))
    assert report.examples == {"answer truncated": [1], "longer than max_length": [2]}
    assert len(pairs[0]["prompt_ids"]) + len(pairs[0]["chosen_ids"]) == 64
    assert pairs[0]["chosen_ids"][-1] != tokenizer.eos_token_id
    assert pairs[0]["rejected_ids"][-1] == tokenizer.eos_token_id


def test_an_over_long_pair_stops_everything_when_told(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"row 1 has \d+ tokens \(\d+ in the prompt\)"):
        prepare_rows(pair_rows(("a? " * 100, "x", "y")), tokenizer, LengthLimits(32, 64, "error"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(min_size=1, max_size=80).filter(str.strip),
    answers=st.lists(st.text(min_size=1, max_size=60).filter(str.strip), min_size=2, max_size=2, unique_by=str.strip),
    limit=st.integers(12, 60),
    overlong=st.sampled_from(["drop", "truncate_prompt"]),
)
def test_no_kept_answer_ever_loses_its_end(
    prompt: str, answers: list[str], limit: int, overlong: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs, report = prepare_rows(pair_rows((prompt, *answers)), tokenizer, LengthLimits(limit, 2 * limit, overlong))
    assert report.kept + report.dropped.total() == report.read == 1
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            assert pair[side][-1] == tokenizer.eos_token_id
            assert len(pair["prompt_ids"]) + len(pair[side]) <= 2 * limit
        assert len(pair["prompt_ids"]) <= limit


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_format=st.sampled_from(PAIR_FORMATS), junk=st.lists(JUNK, min_size=1, max_size=4))
def test_the_report_of_junk_adds_up(row_format: Format, junk: list[Any], tokenizer: PreTrainedTokenizerBase) -> None:
    columns = [one.split(" or ")[0] for one in row_format.columns]
    rows = Dataset.from_list(
        [dict.fromkeys(columns, str(j)) | {"prompt": json.dumps(j), "rejected": "x"} for j in junk]
    )
    pairs, report = prepare_rows(rows, tokenizer, NO_LIMITS, data_format=row_format.name)
    assert report.kept + report.dropped.total() == report.read == len(junk)
    assert len(pairs) >= report.kept


# Tokens


def trl_tokens(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """What stock DPOTrainer makes of the same conversations."""
    from types import SimpleNamespace

    from trl.trainer.dpo_trainer import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = pairs.select_columns(["prompt", "chosen", "rejected"])
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")


@pytest.mark.parametrize("chat_template", ["auto", "mistral", "chatml", "tulu", "alpaca", "vicuna", "hh"])
def test_tokens_are_those_of_stock_trl(chat_template: str, demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_chat_template(tokenizer, chat_template)
    long = [user("Hi"), bot("Hello."), user("Why is it so?\n\nTell me:  ")]
    rows = Dataset.from_list(
        [
            {"prompt": user_text, "chosen": [bot(a)], "rejected": [bot(b)]}
            for user_text, a, b in (
                ([user("What is 2 plus 3?")], "It is 5.", "6"),
                (long, "  Because\n", "No"),
                ([user("naïve ¿? 日本語")], "日", "\u200bあ"),
                ([{"role": "system", "content": "Be kind."}, user("Hm?")], "Hm.", "Hm!"),
            )
        ]
    )
    pairs, _ = prepare_rows(rows, tokenizer, NO_LIMITS)
    stock = trl_tokens(pairs, tokenizer)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert pairs[column][:] == stock[column][:]
    assert len(pairs) == 4
    for pair in pairs:
        assert tokenizer.decode(pair["prompt_ids"]) == render(tokenizer, pair["prompt"], prompt=True)


def test_a_pair_whose_answer_runs_into_its_prompt_is_dropped(demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    tokenizer.chat_template = "{{ messages[0]['content'] }}: {{ messages[1]['content'] + eos_token if messages[1:] }}"
    rows = pair_rows(("What is 2 plus 3?", "It is 5.", "It is 6."), ("Hm?", "(It is 5.", "(It"))
    assert len(tokenizer.tokenize(": It")) < len(tokenizer.tokenize(": ") + tokenizer.tokenize("It"))
    pairs, report = prepare_rows(rows, tokenizer, NO_LIMITS)
    assert report.examples["first token of the answer merges with the prompt"][0] == 1
    for pair in pairs:
        assert tokenizer.decode(pair["prompt_ids"]) == render(tokenizer, pair["prompt"], prompt=True)


def test_text_that_would_be_read_as_a_control_token_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = pair_rows(("a?", "It is 5.</s>", "y"), ("b?", "x", "<unk> y"), ("c? <s>", "x", "y"), ("d?", "x < s >", "y"))
    _, report = prepare_rows(rows, tokenizer, NO_LIMITS)
    assert (report.examples, report.kept) == ({"control token in the text": [1, 2, 3]}, 1)


def test_a_trimmed_prompt_is_still_the_prompt_that_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [(f"{'word ' * 60}What is {i}?", "x " * (1 + j), "y") for i in range(30) for j in (0, 5, 20)]
    pairs, report = prepare_rows(pair_rows(*rows), tokenizer, LengthLimits(0, 60, "truncate_prompt"))
    assert (report.changed["prompt truncated from the left"], report.flagged["duplicate prompt"]) == (90, 60)
    train, held_out = split_by_prompt(pairs, Split(0, 20, 0.2, seed=1))
    numbers = [{p[-1]["content"].split()[-1] for p in side["prompt"]} for side in (train, held_out)]
    assert not numbers[0] & numbers[1]
    for prompt in pairs["prompt"]:  # whole words alone
        assert set(prompt[0]["content"].split()[:-3]) <= {"word"}, prompt


def test_all_that_was_changed_in_a_row_is_counted(demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    tokenizer.chat_template = read_template("mistral").replace(
        "messages[0]['content'] + '\\n\\n'", "raise_exception('no system')"
    )
    row = {"system": "Be kind.", "question": "What? " * 60 + "Why?", "chosen": "x " * 9, "rejected": "y"}
    rows = Dataset.from_list([row])
    pairs, report = prepare_rows(rows, tokenizer, LengthLimits(40, 60, "truncate_prompt"))
    folded = "system message folded into the first user turn"
    assert (dict(report.changed), report.changed_rows) == ({folded: 1, "prompt truncated from the left": 1}, 1)
    text = pairs[0]["prompt"][0]["content"]
    assert text.startswith("Be kind.\n\nWhat?")
    assert text.endswith("Why?")
    short = Dataset.from_list([row | {"question": "Why?", "chosen": "x " * 60}])
    _, report = prepare_rows(short, tokenizer, LengthLimits(40, 60, "truncate_completion"))
    assert dict(report.changed) == {folded: 1, "answer truncated": 1}


def test_pairs_lost_from_rows_that_are_kept_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    _, row, _ = ROWS["openbmb/UltraFeedback"]
    long = json.loads(json.dumps(row))
    long["completions"][0]["response"] = "No, " * 60
    pairs, report = prepare_rows(
        Dataset.from_list([long]), tokenizer, LengthLimits(0, 60), pairing=PairingConfig("all_pairs")
    )
    lost = "longer than max_length (other pairs of the row are kept)"
    assert (len(pairs), report.kept, dict(report.dropped_pairs)) == (1, 1, {lost: 2})
    with pytest.raises(UserError, match=re.escape(f"{lost}: 2")):
        report.check(strict=True)
    report.check(strict=False)


def test_a_prompt_beyond_its_own_limit_is_not_the_answer_s_fault(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = pair_rows(("a? " * 40, "x", "y"), ("b?", "x", "y"), ("c? " * 90, "x", "y"))
    for overlong in ("drop", "truncate_completion"):
        _, report = prepare_rows(rows, tokenizer, LengthLimits(40, 150, overlong))
        assert report.examples == {"prompt longer than max_prompt_length": [1], "longer than max_length": [3]}
        (prompt,), (row,) = (
            report.lengths["prompt longer than max_prompt_length"],
            report.lengths["longer than max_length"],
        )
        assert 40 < prompt < 150 < row


def test_what_a_setting_means_is_checked_by_name_first(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"--data_format 'triplets' is unknown. Use auto, messages, pairs"):
        prepare_rows(pair_rows(("a?", "x", "y")), tokenizer, NO_LIMITS, data_format="triplets")
    with pytest.raises(UserError, match="--recommended needs a dataset with a status column"):
        prepare_rows(pair_rows(("a?", "x", "y")), tokenizer, NO_LIMITS, pairing=PairingConfig(recommended=True))
    with pytest.raises(UserError, match="row 2 has "):
        prepare_rows(pair_rows(("a?", "x", "y"), ("a? " * 90, "x", "y")), tokenizer, LengthLimits(32, 64, "error"))


def test_prompts_in_turns_and_sets_for_kto(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs, _ = prepare_rows(pair_rows(("\n\nHuman: Why?\n\nAssistant:", "x", "y")), tokenizer, NO_LIMITS)
    assert pairs[0]["prompt"] == [user("Why?")]
    rows = Dataset.from_list([{"prompt": f"{i}?", "completion": "x", "label": i > 0} for i in range(3)])
    assert prepare_rows(rows, tokenizer, NO_LIMITS, use_pairs=False)[1].examples == {"labelled as undesired": [1]}


def test_the_trainer_takes_tokens_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    from types import SimpleNamespace

    from helpers.training.trainer import TokenizedDPOTrainer

    pairs, _ = prepare_rows(pair_rows(("a?", "x", "y")), tokenizer, NO_LIMITS)
    trainer = TokenizedDPOTrainer.__new__(TokenizedDPOTrainer)
    assert trainer._prepare_dataset(pairs, tokenizer, SimpleNamespace(), "train") is pairs


def test_a_second_preparation_comes_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.data import prepare

    pair_rows(*[(f"{i}?", "x", "y") for i in range(20)]).to_json(tmp_path / "rows.jsonl")
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    first, report = prepare_rows(rows, tokenizer, NO_LIMITS)
    tokenizer("something else", truncation=True, max_length=3)  # what a tokenizer was last used for is no difference
    monkeypatch.setattr(prepare, "encode", lambda *_: pytest.fail("tokenized again"))
    again, report_again = prepare_rows(rows, tokenizer, NO_LIMITS)
    assert again.to_list() == first.to_list()
    assert report_again.as_dict() == report.as_dict()
    monkeypatch.undo()
    other, _ = prepare_rows(rows, tokenizer, LengthLimits(4, 8, "truncate_completion"))
    assert len(other) < len(first)


def test_a_repr_with_missing_numbers_is_read() -> None:
    text = "[{'role': 'user', 'content': 'nan?', 'weight': nan}, {'content': inf}]"
    assert parse_text(text) == [{"role": "user", "content": "nan?", "weight": None}, {"content": None}]
