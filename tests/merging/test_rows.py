"""The adapter's own number of embedding rows decides, in the merge, in the proof and where PEFT merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from helpers.merging.merge import Adapter, LoadPrecision, merge_adapter, merge_with_peft
from helpers.models.plan import embedding_layers
from helpers.runs.run import Run
from tests.merging.models import logits
from tests.merging.test_families import QUANTIZED, SHAPE

BASE = 1024
LAYERS = {
    "mistral": ("model.embed_tokens", "lm_head", ["q_proj"]),
    "gpt_neox": ("gpt_neox.embed_in", "lm_head", ["dense"]),
    "gpt2": ("transformer.wte", "lm_head", ["c_attn"]),
    "phi": ("model.embed_tokens", "lm_head", ["q_proj"]),  # its head has a bias
    "bloom": ("transformer.word_embeddings", "lm_head", ["query_key_value"]),
}
WAYS = ("whole", "to save", "lora", "rows")


def trained(
    folder: Path, kind: str, rows: int, way: str, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]
) -> tuple[Adapter, Any]:
    """An adapter that was trained with `rows` embeddings on a base with BASE of them, and its policy."""
    *embeddings, targets = LAYERS[kind]
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else SHAPE
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, vocab_size=BASE))
    base.save_pretrained(folder / "base")
    model = copy.deepcopy(base)
    assert embedding_layers(model) == embeddings
    model.resize_token_embeddings(rows, mean_resizing=False)
    names = [name.rpartition(".")[2] for name in embeddings]
    given: dict[str, Any] = {"target_modules": targets}
    if way == "to save":
        given["modules_to_save"] = names
    elif way == "lora":
        given["target_modules"] = targets + names
    elif way == "rows":
        given["trainable_token_indices"] = {names[0]: [5, 7], names[1]: [5, 7]}
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **given))
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.01 * torch.randn(weight.shape) if weight.requires_grad else 0
        if way == "whole":
            policy.get_input_embeddings().weight += 0.1
    policy.save_pretrained(str(folder / "adapter"), save_embedding_layers=way != "to save")
    tokenizer.save_pretrained(folder / "adapter")
    return Adapter(folder / "adapter", Run(folder / "adapter", record), str(folder / "base")), policy


EACH = [(kind, rows, way) for kind in LAYERS for rows in (983, 1000, 1024, 1088) for way in WAYS]
QUICK = [each for each in EACH if each[:2] in (("gpt_neox", 983), ("phi", 1088)) or each[1:] == (1088, "whole")]


@pytest.mark.parametrize(("kind", "rows", "way"), [
    each if each in QUICK else pytest.param(*each, marks=pytest.mark.long) for each in EACH
])  # fmt: skip
def test_the_merge_has_the_rows_of_training(
    kind: str, rows: int, way: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(tokenizer) == 983
    adapter, policy = trained(tmp_path, kind, rows, way, tokenizer, {})
    expected = logits(policy)
    assert expected.shape[-1] == rows
    proof = adapter.load_policy(LoadPrecision(), "cpu")
    torch.testing.assert_close(logits(proof), expected, atol=1e-5, rtol=1e-5)
    folder = merge_adapter(adapter, Run(tmp_path / "merged", {})).folder
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.config.vocab_size == rows
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [983, 1088])
@pytest.mark.parametrize("record", [{}, QUANTIZED], ids=["original", "dequantized"])
def test_so_has_the_merge_of_peft_and_that_into_a_dequantized_base(
    rows: int, record: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    adapter, _ = trained(tmp_path, "gpt_neox", rows, "whole", tokenizer, record)
    precision = LoadPrecision.from_run(adapter.run)
    expected = logits(adapter.load_policy(precision, "cpu"))
    merge_with_peft(tmp_path / "by-peft", adapter, "1GB", None, precision if record else None)
    ours = merge_adapter(adapter, Run(tmp_path / "merged", {})).folder
    for folder in (tmp_path / "by-peft", ours):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
        assert expected.shape[-1] == rows
