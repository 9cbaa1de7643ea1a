"""A run detects a wrong packed row, or a model that does not support one, and computes as TRL does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from helpers.core import SettingsError, UserError
from helpers.training import trainer as shared_prefix
from helpers.training.prefix_sharing import PackingPlan, pack_pairs
from tests.training.pairs import VOCABULARY, adapter, build, compare, exactly, step, train_with

TAILS = PackingPlan.tails


def rejected_sees_chosen(self: PackingPlan) -> Iterator[tuple[int, int]]:
    for row, _ in TAILS(self):
        yield row, self.sizes[row]


def a_prompt_token_is_dropped(self: PackingPlan) -> Iterator[tuple[int, int]]:
    for row, seen in TAILS(self):
        yield row, seen - 1


def positions_go_on(*words: Any) -> Any:
    batch = pack_pairs(*words)
    return dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


WRONG: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rejected attends to chosen": (PackingPlan, "tails", rejected_sees_chosen),
    "positions are not restarted": (shared_prefix, "pack_pairs", positions_go_on),
    "one prompt token is dropped": (PackingPlan, "tails", a_prompt_token_is_dropped),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_wrong_is_found_by_this_comparison_and_by_the_run_itself(
    wrong: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with exactly(dtype):
        stock = step(train_with("off", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        monkeypatch.setattr(*WRONG[wrong])
        trainer = train_with("on", build(dtype=dtype), tokenizer, tmp_path, adapter())
        trainer._is_compared = True  # go on without the run's own comparison
        with pytest.raises(AssertionError):
            compare(stock, step(trainer), exact=dtype == torch.float64)
        with pytest.raises(
            UserError, match=r"`--shared_prefix on` is not possible because log-prob.*\(tested with 1.16"
        ):
            step(train_with("on", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        capsys.readouterr()
        compare(
            stock, step(train_with("auto", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        )  # it goes on, as stock
        assert "Shared prefix: off, because log-probabilities differ from TRL's by" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", WRONG)
def test_in_bfloat16_a_run_finds_what_is_wrong_and_takes_what_is_right(
    wrong: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step(train_with("on", build(dtype=torch.bfloat16), tokenizer, tmp_path, adapter()))
    assert "Shared prefix: on, 148 instead of 416 tokens in the first batch; log-prob" in capsys.readouterr().out
    monkeypatch.setattr(*WRONG[wrong])
    with pytest.raises(UserError, match=r"`--shared_prefix on` is not possible because log-probabilities differ"):
        step(train_with("on", build(dtype=torch.bfloat16), tokenizer, tmp_path, adapter()))


def test_where_it_does_not_apply_one_line_says_why(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = step(train_with("off", build(attention="eager"), tokenizer, tmp_path, adapter()))
    capsys.readouterr()
    compare(stock, step(train_with("auto", build(attention="eager"), tokenizer, tmp_path, adapter())))
    assert "Shared prefix: off, because eager attention is not supported, only sdpa" in capsys.readouterr().out
    with pytest.raises(UserError, match="`--shared_prefix on` is not possible because eager attention is not"):
        train_with("on", build(attention="eager"), tokenizer, tmp_path, adapter())


def test_a_model_that_does_not_pass_the_plan_on_goes_on_as_stock(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(
        "stablelm", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    found = []
    for mode in ("off", "auto"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # TRL writes into it
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter())))
    compare(*found)
    assert "Shared prefix: off, because the model does not accept a packed row (" in capsys.readouterr().out


def test_other_words_and_settings_that_cannot_be_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"--shared_prefix 'onn' is unknown\. Use auto, on or off\."):
        train_with("onn", build(), tokenizer, tmp_path, adapter())
    with pytest.raises(UserError, match="torch_compile would recompile the model"):
        train_with("on", build(), tokenizer, tmp_path, adapter(), torch_compile=True)
    with pytest.raises(UserError, match="dropout would be the same for both answers"):
        train_with("on", build(), tokenizer, tmp_path, adapter(), disable_dropout=False)
