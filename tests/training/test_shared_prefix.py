"""A shared prefix gives the log-probabilities, losses, metrics and gradients of stock DPOTrainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from helpers.models.plan import disable_cpu_4bit_repacking
from tests.training.pairs import KINDS, LENGTHS, VOCABULARY, adapter, build, compare, exactly, rows, step, train_with


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_stock_computes(
    kind: str, peft: bool, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with exactly(dtype):
        found = [
            step(train_with(mode, build(kind, dtype), tokenizer, tmp_path, adapter() if peft else None))
            for mode in ("off", "on")
        ]
        compare(*found, exact=dtype == torch.float64)


def test_on_weights_in_4_bits(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    found = []
    for mode in ("off", "on"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
        )
        disable_cpu_4bit_repacking(model)
        torch.manual_seed(0)
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter())))
    compare(*found)


def test_layers_of_several_kinds_as_gemma_has_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Windows in some layers, norms within attention, and positions that differ by layer."""
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter())))
    compare(*found)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral", "gpt_neox"])
def test_eager_attention_soft_capped_with_sinks_or_plain(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The families whose attention PyTorch's does not compute, and others where eager attention is asked for."""
    more = {
        "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0},
    }
    windows = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]} if kind in more else {}
    heads = {} if kind == "gpt_neox" else {"num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, **heads, **windows, **more.get(kind, {}),
    )  # fmt: skip
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
        targets = {"target_modules": ["q_proj", "v_proj"]} if kind == "gpt_oss" else {}
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter(**targets))))
    compare(*found)


def test_layers_with_windows_of_their_own_and_rows_that_are_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=2,
    )  # fmt: skip
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    for most in (None, 30, 22):  # of the third pair only the prompt is left, or not even that
        found = []
        for mode in ("off", "on"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # TRL writes into it
            found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter(), max_length=most)))
        compare(*found)


LOSSES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        "discopop", "sft", "sigmoid_norm",
    )),
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"label_smoothing": 0.2},
    {"use_weighting": True},
    {"ld_alpha": 0.5},
    *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
]  # fmt: skip


@pytest.mark.parametrize("given", LOSSES, ids=lambda given: " ".join(f"{n}={v}" for n, v in given.items()))
def test_every_loss_is_what_stock_computes(
    given: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = [step(train_with(mode, build(), tokenizer, tmp_path, adapter(), **given)) for mode in ("off", "on")]
    compare(*found)


def test_every_loss_that_trl_has_is_among_them() -> None:
    from helpers.settings.sources import compared_values

    named = [given.get("loss_type", "sigmoid") for given in LOSSES]
    assert {name for names in named for name in ([names] if isinstance(names, str) else names)} == compared_values(
        "loss_type"
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_of_both_kinds_and_an_adapter_that_is_trained_further(
    checkpointing: bool, reentrant: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    given = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = get_peft_model(build(), adapter(use_dora=True))  # TRL keeps a frozen copy of it, "ref"
        trainer = train_with(mode, model, tokenizer, tmp_path, **given)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad and "lora_B" in name:
                    weight += 0.1
        found.append(step(trainer))
    compare(*found)
    assert float(found[0]["rewards/margins"]) != 0


def test_reference_log_probabilities_computed_before_and_evaluation(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = []
    for mode in ("off", "on"):
        data = rows().add_column("mode", [mode] * len(LENGTHS))  # the cache of one does not answer the other
        given = {"precompute_ref_log_probs": True, "per_device_eval_batch_size": 3}
        trainer = train_with(mode, build(), tokenizer, tmp_path, adapter(), data.remove_columns("mode"), **given)
        metrics = {k: torch.tensor(v) for k, v in trainer.evaluate().items() if "eval_" in k and "per_second" not in k}
        metrics = {name: value for name, value in metrics.items() if not name.endswith("time")}
        found.append(step(trainer) | metrics)
        assert trainer.sharing is None if mode == "off" else trainer.sharing.enabled
    compare(*found)


def test_generation_is_left_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    texts = []
    for mode in ("off", "on"):
        trainer = train_with(mode, build(), tokenizer, tmp_path, adapter())
        step(trainer)
        texts.append(trainer.model.eval().generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert texts[0] == texts[1]


def test_a_second_trainer_of_a_model_shares_too_and_nothing_of_it_is_saved(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build()
    keys = set(model.config.to_dict())
    found = []
    for mode in ("on", "on", "off"):
        trainer = train_with(mode, model, tokenizer, tmp_path)
        trainer.ref_model.load_state_dict(build().state_dict())
        model.load_state_dict(build().state_dict())
        found.append(step(trainer))
        model.zero_grad()
    for name, value in found[2].items():
        if not name.startswith("gradient"):
            torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert {k for k in json.loads((tmp_path / "saved" / "config.json").read_text()) if k.startswith("_")} <= keys
    assert "shared_prefix" not in (tmp_path / "saved" / "config.json").read_text()
