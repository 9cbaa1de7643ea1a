"""A merge tensor by tensor is PEFT's merge, bit for bit; and what is written is whole or not there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from helpers.core import SettingsError, UserError
from helpers.merging.merge import QuantizedBase, StreamingMerger, UnsupportedAdapter
from helpers.merging.verify import check_kl, compare_layers
from helpers.merging.weights import (
    TensorSpec,
    WeightFiles,
    adapter_as_run,
    merge_with_peft,
    parse_size,
    plan_shards,
    write_merged,
)
from helpers.models.plan import resize_embeddings

VOCABULARY = 128
LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
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


def build(kind: str = "mistral", tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else shape
    if kind in ("mistral", "llama", "qwen2"):
        shape["num_key_value_heads"] = 2
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=0.2, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def save(folder: Path, model: Any, given: dict[str, Any], shards: str = "20KB") -> tuple[Path, Path]:
    """A base in several files, and an adapter whose every weight has moved."""
    model.save_pretrained(folder / "base", max_shard_size=shards)
    policy = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **given))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += (0.1 * torch.randn(weight.shape, generator=draw)).to(weight.dtype)
    policy.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "base", folder / "adapter"


def peft_merge(base: Path, adapter: Path) -> tuple[dict[str, torch.Tensor], Any]:
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    merged = merged.merge_and_unload()
    merged.save_pretrained(base.parent / "by-peft")
    return load_file(base.parent / "by-peft" / "model.safetensors"), merged


def our_merge(base: Path, adapter: Path, largest: int = 20_000, dtype: torch.dtype | None = None) -> Path:
    folder = base.parent / "merged"
    merge = StreamingMerger(base, adapter)
    write_merged(folder, merge, {}, largest, dtype)
    merge.config.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(folder)
    return {name: files[name] for name in files}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return found


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
    write_merged(tmp_path / "merged", merge, {}, 10**9, None)
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
    assert {name.rpartition(".")[2] for name in change.quantized} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    dequantized = quantized.dequantize()
    for name, weight in dequantized.state_dict().items():
        ours = change(name, model.state_dict()[name])
        torch.testing.assert_close(ours, weight.float(), atol=1e-6 if bits == 4 else 2e-3, rtol=0, msg=name)


def test_what_is_not_known_is_handed_to_peft(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base, adapter = save(tmp_path, build(), LORA | {"lora_bias": True, "target_modules": ["q_proj"]})
    with pytest.raises(UnsupportedAdapter, match="an adapter with lora_bias=True"):
        StreamingMerger(base, adapter)
    base, adapter = save(tmp_path / "neox", build("gpt_neox"), LORA)
    with pytest.raises(UnsupportedAdapter, match="a checkpoint whose names are not the model's"):
        StreamingMerger(base, adapter)
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    base, adapter = save(tmp_path / "other", model, LORA)
    merge_with_peft(tmp_path / "out", base, adapter, tokenizer, torch.bfloat16, 10**9)
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
    write_merged(tmp_path / "merged", merge, {}, 10**9, None)
    merge.config.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(policy), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("given", "said"), [
    (LORA | {"init_lora_weights": "pissa"}, "an adapter that was initialized by pissa"),
    (LORA | {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]}, "an adapter that brings .*self_attn"),
    (LORA | {"bias": "all"}, "an adapter with bias='all'"),
])  # fmt: skip
def test_what_would_be_merged_wrong_is_not(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), given)
    with pytest.raises(UnsupportedAdapter, match=said):
        StreamingMerger(base, adapter)


def test_an_adapter_with_something_missing_or_left_over(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({n: w for n, w in weights.items() if n != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapter, match="an adapter without"):
        StreamingMerger(base, adapter)
    save_file(weights | {"base_model.model.model.layers.9.x.lora_A.weight": weights[name].clone()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UnsupportedAdapter, match="has no place in the model"):
        StreamingMerger(base, adapter)
    given = LORA | {"trainable_token_indices": {"embed_tokens": [VOCABULARY + 3]}}
    config = json.loads((adapter / "adapter_config.json").read_text()) | given
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the adapter has a row for token 131 and the tokenizer 128 tokens"):
        StreamingMerger(base, adapter)


def test_layers_are_compared_where_a_model_is_too_large(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    folder = our_merge(base, adapter)
    good = compare_layers(StreamingMerger(base, adapter), folder)
    assert good["layers"] == 14  # two of each of seven kinds
    assert good["relative"] < 1e-5
    for wrong in ("v_proj", "down_proj"):
        copied = tmp_path / f"without-{wrong}"
        weights = tensors(folder)
        weights |= {n: w for n, w in tensors(base).items() if wrong in n}
        copied.mkdir()
        save_file(weights, copied / "model.safetensors")
        assert compare_layers(StreamingMerger(base, adapter), copied)["relative"] > 0.05
    with pytest.raises(UserError, match=r"merged layers differ by 1.0e-01, which is more than rounding"):
        check_kl({"layers": 14, "relative": 0.1}, 0.01, copied)
    assert not copied.exists()
    with pytest.raises(UserError, match="the merged model's KL is nan, above --max_kl"):
        check_kl({"kl": float("nan")}, 0.01, folder)


def test_another_adapter_in_the_same_place_is_another_start(tmp_path: Path) -> None:
    _, adapter = save(tmp_path, build(), LORA)
    first = adapter_as_run(adapter).record["fingerprint"]
    assert adapter_as_run(adapter).record["fingerprint"] == first
    weights = {n: w + 1 for n, w in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    assert adapter_as_run(adapter).record["fingerprint"] != first


def test_a_base_that_is_quantized_itself_is_refused(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the adapter's base is quantized itself.*--base_model_id"):
        StreamingMerger(base, adapter)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("after", range(0, 20, 4))
def test_a_merge_that_was_stopped_goes_on_with_the_files_that_are_missing(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    whole = tensors(our_merge(base, adapter))
    (tmp_path / "merged").rename(tmp_path / "before")
    tensor, calls = StreamingMerger.tensor, []

    def stop(self: StreamingMerger, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) > after:
            raise Stopped
        return tensor(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(StreamingMerger, "tensor", stop)
        with pytest.raises(Stopped):
            our_merge(base, adapter)
    there = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "merged").glob("*.safetensors")}
    assert (len(there) > 0) == (after > 0)
    folder = our_merge(base, adapter)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there
    assert not list(folder.glob("*.part"))
    again = tensors(folder)
    assert set(again) == set(whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert (folder / "model.safetensors.index.json").read_text() == (
        tmp_path / "before" / "model.safetensors.index.json"
    ).read_text()


def test_what_another_merge_left_is_not_gone_on_with(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    our_merge(base, adapter)
    half = our_merge(base, adapter, dtype=torch.float16)
    assert {weight.dtype for weight in tensors(half).values()} == {torch.float16}


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 50_000}))
    with pytest.raises(UserError, match=r"the merged weights need 0.00 GB and the disk has 0.00 GB free"):
        our_merge(base, adapter)
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_sizes_and_shards() -> None:
    assert [parse_size(text) for text in ("2GB", "500 mb", "1GiB", "7")] == [2 * 10**9, 5 * 10**8, 2**30, 7]
    with pytest.raises(SettingsError, match="--max_shard_size takes a size such as 2GB or 500MB, not 'big'"):
        parse_size("big")
    entries = [TensorSpec(name, (10,), torch.float32) for name in "abc"] + [TensorSpec("d", (50,), torch.float16)]
    assert [[e.name for e in shard] for shard in plan_shards(entries, 80).values()] == [["a", "b"], ["c"], ["d"]]
    assert list(plan_shards(entries, 10**6)) == ["model.safetensors"]
