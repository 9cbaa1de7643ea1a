"""A merge tensor by tensor equals PEFT's merge bit for bit, or is left to PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from helpers.core import UserError
from helpers.merging.merge import (
    Adapter,
    adapter_as_run,
    merge_with_peft,
)
from helpers.merging.weights import (
    QuantizedBase,
    StreamingMerger,
    UnsupportedAdapter,
    write_merged,
)
from helpers.models.plan import resize_embeddings
from tests.merging.models import LORA, VOCABULARY, build, logits, our_merge, peft_merge, save, tensors

KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True, "lora_alpha": 3},
    "dora": LORA | {"use_dora": True},
    "patterns": LORA | {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.*": 5}},
    "modules to save": LORA | {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings": LORA | {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "token rows": LORA | {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
}


TIED: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "token rows": LORA | {"trainable_token_indices": {"embed_tokens": [3, 7]}},
    "head to save": LORA | {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(("given", "tied"), [
    *((given, False) for given in KINDS.values()), *((given, True) for given in TIED.values()),
], ids=[*KINDS, *(f"tied {name}" for name in TIED)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_peft_s(given: dict[str, Any], tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(tied=tied, dtype=dtype), given)
    theirs, model = peft_merge(base, adapter)
    ours = tensors(folder := our_merge(base, adapter))
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert set(ours) == set(theirs)
    before = tensors(base)
    assert any(not torch.equal(ours[name], weight) for name, weight in before.items())
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(ours[name], weight), name
        else:  # to one unit in the last place, of the larger of what is there and what was
            largest = torch.maximum(weight.abs(), before[name].abs() if name in before else weight.abs()).float()
            assert float(((ours[name].float() - weight.float()).abs() / largest).nan_to_num().max()) <= 2**-7, name
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    within = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits(loaded), logits(model), atol=within, rtol=within)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_other_models_too(kind: str, tmp_path: Path) -> None:
    given = LORA | ({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if kind == "gpt2" else {})
    base, adapter = save(tmp_path, build(kind), given)
    theirs, _ = peft_merge(base, adapter)
    ours = tensors(our_merge(base, adapter))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_of_one_of_two_tied_weights_unties_them(tmp_path: Path) -> None:
    """PEFT adds it to both, and merges another model than the one that was trained."""
    base, adapter = save(tmp_path, build(tied=True), LORA | {"target_modules": ["embed_tokens", "q_proj"]})
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    folder = our_merge(base, adapter)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(policy), atol=1e-4, rtol=1e-4)
    assert float((logits(policy.merge_and_unload()) - logits(merged)).abs().max()) > 0.1


def test_rows_for_added_tokens_are_those_of_training(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<|one|>", "<|two|>"])
    resize_embeddings(model, tokenizer)
    rows = list(range(len(tokenizer) - 2, len(tokenizer)))
    given = LORA | {"trainable_token_indices": {"embed_tokens": rows, "lm_head": rows}}
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    policy.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merge = StreamingMerger(tmp_path / "base", tmp_path / "adapter", len(tokenizer))
    write_merged(tmp_path / "merged", merge, 10**9)
    merge.config.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().num_embeddings == len(tokenizer)
    torch.testing.assert_close(logits(merged), logits(policy), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_base_is_what_the_quantized_one_computes_with(bits: int, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    change = QuantizedBase(model, config, torch.float32)
    assert {name.rpartition(".")[2] for name in change.names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    dequantized = quantized.dequantize()
    for name, weight in dequantized.state_dict().items():
        ours = change.dequantize(name, model.state_dict()[name])
        torch.testing.assert_close(ours, weight.float(), atol=1e-6 if bits == 4 else 2e-3, rtol=0, msg=name)


def test_unsupported_adapters_are_merged_by_peft(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base, adapter = save(tmp_path, build(), LORA | {"lora_bias": True, "target_modules": ["q_proj"]})
    with pytest.raises(UnsupportedAdapter, match="an adapter with lora_bias=True"):
        StreamingMerger(base, adapter)
    base, adapter = save(tmp_path / "less", build(), LORA)
    weights = load_file(next(base.glob("*1-of*.safetensors")))
    (name, *_), index = weights, base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{name}"', '"another"'))
    save_file({"another" if n == name else n: w for n, w in weights.items()}, next(base.glob("*1-of*.safetensors")))
    with pytest.raises(UnsupportedAdapter, match=f"a base without {name}"):
        StreamingMerger(base, adapter)
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    base, adapter = save(tmp_path / "other", model, LORA)
    found = Adapter(adapter, adapter_as_run(adapter), str(base))
    found.tokenizer = tokenizer
    merge_with_peft(tmp_path / "out", found, "1GB", torch.bfloat16)
    theirs, _ = peft_merge(base, adapter)
    assert all(torch.equal(weight, theirs[name].bfloat16()) for name, weight in tensors(tmp_path / "out").items())


def test_embeddings_that_are_in_the_adapter_are_merged_from_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """PEFT saves them whole by itself where tokens were added."""
    model = build()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    with torch.no_grad():
        policy.get_input_embeddings().weight += 0.1
    policy.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    merge = StreamingMerger(tmp_path / "base", tmp_path / "adapter")
    write_merged(tmp_path / "merged", merge, 10**9)
    merge.config.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(policy), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("given", "message"), [
    (LORA | {"init_lora_weights": "pissa"}, "an adapter initialized by pissa"),
    (LORA | {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]}, "that contains all of .*self_attn"),
    (LORA | {"bias": "all"}, "an adapter with bias='all'"),
])  # fmt: skip
def test_adapters_that_would_be_merged_wrong_are_not_supported(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, adapter = save(tmp_path, build(), given)
    with pytest.raises(UnsupportedAdapter, match=message):
        StreamingMerger(base, adapter)


def test_an_adapter_with_something_missing_or_left_over(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({n: w for n, w in weights.items() if n != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not fit its base .*: 1 of 28 weights of its layers are missing"):
        StreamingMerger(base, adapter)
    save_file(weights | {"base_model.model.model.layers.9.x.lora_A.weight": weights[name].clone()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"1 of its weights are not in that model \(.*\.layers\.9\.x\.lora_A"):
        StreamingMerger(base, adapter)
    given = LORA | {"trainable_token_indices": {"embed_tokens": [VOCABULARY + 3]}}
    config = json.loads((adapter / "adapter_config.json").read_text()) | given
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="The adapter has a row for token 131, but the tokenizer has 128 tokens"):
        StreamingMerger(base, adapter)


def test_a_base_that_is_quantized_itself_is_refused(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"base of the adapter is quantized \(.*base, .*itsandbytes\)\. It has no original .*`--base_model_id`",
    ):
        StreamingMerger(base, adapter)
