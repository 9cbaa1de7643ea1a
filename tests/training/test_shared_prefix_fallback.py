"""A run detects a wrong packed row, or a model that does not support one, and computes as TRL does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from helpers.core import SettingsError, UserError, read_jsonl
from tests.conftest import REPO
from tests.families import FAMILIES, SHAPE
from tests.training.pairs import (
    FAULTS,
    KINDS,
    VOCABULARY,
    adapter,
    build,
    compare,
    exactly,
    faults_accepted,
    step,
    train_with,
)


@pytest.mark.parametrize("wrong", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_wrong_is_found_by_this_comparison_and_by_the_run_itself(
    wrong: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with exactly(dtype):
        stock = step(train_with("off", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        monkeypatch.setattr(*FAULTS[wrong])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_takes_what_is_right_and_refuses_each_fault(
    kind: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trainer = train_with("on", build(kind, dtype), tokenizer, tmp_path, adapter())
    printed, accepted = faults_accepted(trainer, capsys)
    assert printed.startswith("Shared prefix: on, 148 instead of 416 tokens in the first batch; log-probabilities")
    assert not accepted


@pytest.mark.parametrize("family", ["SmolLM2", "Qwen3 4B (tied)", "OLMo 2", "GPT-NeoX (Pythia)"])
def test_a_random_model_of_small_weights_is_checked_too(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32, where attention changes little: all weights are near 0, and a new adapter changes nothing."""
    kind, _, more = FAMILIES[family]
    shape = SHAPE | more | {"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.02}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    printed, accepted = faults_accepted(
        train_with("on", model, tokenizer, tmp_path, adapter(init_lora_weights=True)), capsys
    )
    assert "Shared prefix: on" in printed
    assert not accepted


def test_the_tolerance_is_what_computing_single_rows_changes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A model whose log-probabilities depend on padding, and by how much for which dtype."""
    for dtype, share, mode in ((torch.float32, 2.0, "on"), (torch.float32, 4.0, "off"), (torch.float64, 2.0, "on"),
                               (torch.bfloat16, 1.2, "on"), (torch.bfloat16, 1.8, "off")):  # fmt: skip
        trainer = train_with("auto", build(dtype=dtype), tokenizer, tmp_path, adapter())
        compute, sharing = trainer._log_probs, trainer.sharing
        assert sharing is not None

        def log_probs(
            model: Any, ids: Any, *rest: Any, compute: Any = compute, sharing: Any = sharing, share: float = share
        ) -> Any:
            stock = compute(model, ids, *rest)
            return stock + (0.2 * share if sharing.enabled else 0.2 * (len(ids) == 1))

        monkeypatch.setattr(trainer, "_log_probs", log_probs)
        trainer._check_first_batch(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
        assert f"Shared prefix: {mode}" in capsys.readouterr().out, (dtype, share)


def test_where_it_does_not_apply_one_line_says_why(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"disable_dropout": False}
    stock = step(train_with("off", build(), tokenizer, tmp_path, adapter(), **given))
    capsys.readouterr()
    compare(stock, step(train_with("auto", build(), tokenizer, tmp_path, adapter(), **given)))
    assert "Shared prefix: off, because dropout would be the same for both answers" in capsys.readouterr().out
    model = build()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="`--shared_prefix on` is not possible because flex_attention attention is not"):
        train_with("on", model, tokenizer, tmp_path, adapter())


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


def build_opt(**more: Any) -> Any:
    """OPT, whose dropout is a function: in attention, after it, and of layers."""
    config = AutoConfig.for_model(
        "opt", vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=64, init_std=0.2, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_dropout_that_trl_does_not_reach_is_set_to_0_and_printed(
    peft: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for mode, more in (("off", {"dropout": 0.0}), ("off", {}), ("on", {}), ("on", {"layerdrop": 0.9})):
        model = build_opt(**{"dropout": 0.3, "attention_dropout": 0.2} | more)
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter() if peft else None)))
        names = "attention_dropout, dropout, layerdrop" if "layerdrop" in more else "attention_dropout, dropout"
        assert f"Dropout: {names} set to 0, because of --disable_dropout." in capsys.readouterr().out
    for other in found[1:]:
        compare(found[0], other)
    mistral = build()
    mistral.config.attention_dropout = mistral.model.layers[0].self_attn.attention_dropout = 0.4
    compare(*(step(train_with(mode, mistral, tokenizer, tmp_path, adapter())) for mode in ("off", "on")))


def test_dropout_stays_where_it_is_asked_for(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build_opt(dropout=0.3, attention_dropout=0.2)
    train_with("auto", model, tokenizer, tmp_path, adapter(), disable_dropout=False)
    assert (model.config.dropout, model.model.decoder.layers[0].self_attn.dropout) == (0.3, 0.2)


ROTARY = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "short_factor": [1.0] * 8,
                 "long_factor": [2.0] * 8, "original_max_position_embeddings": 30},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
def test_the_check_leaves_rotary_embeddings_that_follow_the_length_as_they_were(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = []
    for mode in ("off", "on"):
        config = build().config
        config.rope_parameters, config.max_position_embeddings = dict(ROTARY[kind]), 30
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        trainer = train_with(mode, model, tokenizer, tmp_path, adapter())
        before = model.model.rotary_emb.inv_freq.clone()
        trainer._check_first_batch(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
        assert torch.equal(model.model.rotary_emb.inv_freq, before)
        assert int(model.model.rotary_emb.max_seq_len_cached) == 30
        found.append(step(trainer))
    compare(*found)


@pytest.mark.long
@pytest.mark.parametrize("equal", [False, True], ids=["padded", "of equal lengths"])
def test_real_weights_in_bfloat16_share_and_each_fault_is_refused(
    equal: bool, real_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of equal lengths, rows alone are what they are in the batch, so that no rounding is measured."""
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    data = []
    for row in read_jsonl(REPO / "recipes" / "smollm2" / "pairs.jsonl")[4:6]:
        talk = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        answers = [tokenizer(row[name] + tokenizer.eos_token)["input_ids"] for name in ("chosen", "rejected")]
        length = 40 - len(prompt) if equal else None
        chosen, rejected = ((answer * 9)[:length] if equal else answer for answer in answers)
        data.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.bfloat16)
    given = {"per_device_train_batch_size": 2}
    peft = adapter(init_lora_weights=True)
    trainer = train_with("on", model, tokenizer, tmp_path, peft, Dataset.from_list(data), **given)
    printed, accepted = faults_accepted(trainer, capsys)
    assert printed.startswith("Shared prefix: on, ")
    assert not accepted, printed
