"""Families whose tensors have other names on disk than in the model: each merge is the policy that was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerBase

from helpers.merging.merge import Adapter, LoadPrecision, merge_adapter
from helpers.merging.weights import WeightFiles
from helpers.runs.run import Run
from tests.merging.models import logits, tensors

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 64,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
               "image_size": 32, "patch_size": 8},
    "qwen3_5": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64},
}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
ATTENTION = ["q_proj", "v_proj", "o_proj"]
# Family → what is adapted, and a name on disk that is not the model's.
STREAMED: dict[str, tuple[Any, str]] = {
    "gpt_neox": ("all-linear", "embed_out.weight"),
    "mixtral": (ATTENTION, "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
    "qwen3_moe": (ATTENTION, "model.layers.1.mlp.experts.0.down_proj.weight"),
    "granitemoe": (ATTENTION, "model.layers.0.block_sparse_moe.router.layer.weight"),
    "gemma3": ("all-linear", "language_model.model.layers.0.self_attn.q_proj.weight"),
    "qwen3_5": ("all-linear", "model.language_model.layers.1.mlp.up_proj.weight"),
}
QUANTIZED = {"plan": {"weights": "float32", "computed in": "float32", "quantization": "4-bit NF4, double"}}


def save_base(folder: Path, kind: str, vocabulary: int) -> None:
    """A random tiny model, with the vision part where the family has one."""
    shape = SHAPE | {"vocab_size": vocabulary}
    torch.manual_seed(0)
    if kind in VISION:
        text = AutoConfig.for_model(f"{kind}_text", **shape, **(LINEAR if kind == "qwen3_5" else {}))
        more = {"mm_tokens_per_image": 4} if kind == "gemma3" else {}
        config = AutoConfig.for_model(kind, text_config=text.to_dict(), vision_config=VISION[kind], **more)
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    model.save_pretrained(folder, max_shard_size="100KB")


def trained(
    folder: Path, kind: str, targets: Any, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]
) -> Adapter:
    """An adapter that changes every layer that it targets."""
    save_base(folder / "base", kind, len(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    policy = get_peft_model(model, config)
    policy.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    tokenizer.save_pretrained(folder / "adapter")
    return Adapter(folder / "adapter", Run(folder / "adapter", record), str(folder / "base"))


def merged(adapter: Adapter, folder: Path) -> Path:
    return merge_adapter(adapter, Run(folder / "merged", {}), max_shard_size="100KB").folder


@pytest.mark.parametrize("kind", STREAMED)
def test_a_merge_keeps_the_names_on_disk_and_is_the_policy(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    targets, name = STREAMED[kind]
    adapter = trained(tmp_path, kind, targets, tokenizer, {})
    before, after = tensors(tmp_path / "base"), tensors(folder := merged(adapter, tmp_path))
    assert "PEFT merges" not in capsys.readouterr().out
    assert name in before
    assert set(after) == set(before)
    changed = {each for each in before if not torch.equal(before[each], after[each])}
    assert 4 <= len(changed) < len(before)
    one, two = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "base", folder))
    assert (one["model_type"], one["architectures"]) == (two["model_type"], two["architectures"])
    policy = adapter.load_policy(LoadPrecision(), "cpu")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), logits(policy), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", STREAMED)
def test_a_merge_into_the_dequantized_base_is_the_policy_on_the_quantized_one(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    targets, _ = STREAMED[kind]
    adapter = trained(tmp_path, kind, targets, tokenizer, QUANTIZED)
    folder = merged(adapter, tmp_path)
    assert re.fullmatch("Merging .*adapter into the dequantized weights of .*base.\n", capsys.readouterr().out)
    policy = adapter.load_policy(LoadPrecision.from_run(adapter.run), "cpu")
    ours = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(ours, logits(policy), atol=1e-3, rtol=1e-3)
    original = logits(adapter.load_policy(LoadPrecision(), "cpu"))
    assert float((ours - original).abs().max()) > 0.01
    assert set(WeightFiles(folder)) == set(WeightFiles(tmp_path / "base"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("record", [{}, QUANTIZED], ids=["original", "dequantized"])
def test_adapted_experts_in_one_tensor_are_merged_by_peft(
    kind: str, record: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = trained(tmp_path, kind, "all-linear", tokenizer, record)
    folder = merged(adapter, tmp_path)
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) / 1e6
    assert f"It takes {size:.2f} MB of memory" in capsys.readouterr().out
    assert set(WeightFiles(folder)) == set(WeightFiles(tmp_path / "base"))
    policy = adapter.load_policy(LoadPrecision.from_run(adapter.run), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in loaded.config.to_dict()
    torch.testing.assert_close(logits(loaded), logits(policy), atol=1e-3, rtol=1e-3)
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter.folder)


def test_tied_weights_that_an_adapter_makes_different_have_names_of_the_family(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = AutoConfig.for_model("gpt_neox", **SHAPE, vocab_size=len(tokenizer), tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    policy = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["dense"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        policy.base_model.model.lm_head.modules_to_save["default"].weight += 0.1
    policy.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = merged(Adapter(tmp_path / "adapter", Run(tmp_path / "adapter", {}), str(tmp_path / "base")), tmp_path)
    assert set(WeightFiles(folder)) - set(WeightFiles(tmp_path / "base")) == {"embed_out.weight"}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), logits(policy), atol=1e-4, rtol=1e-4
    )
