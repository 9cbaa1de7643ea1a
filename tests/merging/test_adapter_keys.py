"""Every weight of an adapter is used and every layer that it wraps is filled, wherever it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from helpers.core import UserError
from helpers.evaluation.generators import Generators
from helpers.merging.merge import Adapter, adapter_as_run, merge_adapter, merge_with_peft
from helpers.merging.verify import verify_merge
from helpers.models import load_adapter
from helpers.models.resolve import ModelRef
from helpers.runs.run import Run
from tests.evaluation.test_generation import settings_of
from tests.merging.models import LORA, build, logits, save

Weights = dict[str, torch.Tensor]
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def edit(adapter: Path, change: Callable[[Weights], Weights]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: weight.clone() for name, weight in change(load_file(file)).items()}, file)


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}


WRONG: dict[str, tuple[Callable[[Weights], Weights], str, str]] = {
    "a foreign prefix": (renamed("model.layers", "language_model.layers"), "28 of its weights are not in that model",
                         "28 of 28 weights of its layers are missing"),
    "a wrapper's prefix": (renamed("base_model.", "module.base_model."), "28 of its weights", "28 of 28 weights"),
    "another adapter's name": (renamed("lora_A.weight", "lora_A.ref.weight"), "14 of its weights", "14 of 28 weights"),
    "half the layers": (lambda w: {n: v for n, v in w.items() if ".layers.0." in n}, "", "14 of 28 weights"),
    "A without B": (lambda w: {n: v for n, v in w.items() if "lora_A" in n}, "", "14 of 28 weights"),
    "one B is missing": (lambda w: {n: v for n, v in w.items() if "layers.1.mlp.up_proj.lora_B" not in n}, "",
                         "1 of 28 weights of its layers are missing (base_model.model.model.layers.1.mlp.up_proj."),
    "a deeper model": (lambda w: w | renamed("layers.1.", "layers.2.")({n: v for n, v in w.items() if "s.1." in n}),
                       "14 of its weights", ""),
    "another head": (lambda w: w | {"base_model.model.score.weight": torch.ones(2, 32)}, "1 of its weights", ""),
    "another rank": (lambda w: {n: v[:4] if "lora_A" in n else v for n, v in w.items()}, "size mismatch", ""),
    "nothing": (lambda w: {"x": torch.ones(1)}, "1 of its weights", "28 of 28 weights"),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, Path]:
    """A base with a tokenizer, and an adapter on it."""
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    base, adapter = save(tmp_path, model, LORA | {"target_modules": PARTS})
    tokenizer.save_pretrained(base)
    return base, adapter


def found(base: Path, adapter: Path) -> Adapter:
    return Adapter(adapter, adapter_as_run(adapter), str(base))


@pytest.mark.parametrize("kind", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_wherever_it_is_loaded(
    kind: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (base, adapter), (change, unused, missing) = pair, WRONG[kind]
    edit(adapter, change)

    def answer() -> None:
        next(Generators([ModelRef("x", str(base), str(adapter))], settings_of()).load())

    model = AutoModelForCausalLM.from_pretrained
    ways: dict[str, Callable[[], object]] = {
        "merge": lambda: merge_adapter(found(base, adapter), Run(tmp_path / "merge", {})),
        "PEFT": lambda: merge_with_peft(tmp_path / "peft", found(base, adapter), "1GB"),
        "train further": lambda: load_adapter(model(base), adapter, is_trainable=True),
        "answer": answer,
    }
    for way, load in ways.items():
        with pytest.raises(UserError) as error:
            load()
        text = str(error.value)
        assert f"adapter does not fit its base {base}" in text, way
        assert unused in text, way
        assert missing in text, way
        assert "`--base_model_id`" in text, way
    assert not list(tmp_path.glob("**/model*.safetensors.part"))
    assert not (tmp_path / "merge").exists()
    assert not (tmp_path / "peft").exists()


def test_an_adapter_for_other_layers_names_its_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    text = re.escape(f"does not fit its base {base}: Target modules")
    with pytest.raises(UserError, match=text):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    with pytest.raises(UserError, match=text):
        merge_adapter(found(base, adapter), Run(tmp_path / "merge", {}))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 7)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(f"does not fit its base {base}: Error while deserializing")):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.mark.parametrize("given", [
    {"target_modules": PARTS}, {"target_modules": [*PARTS, "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    {"target_modules": ["q_proj"], "use_dora": True},
])  # fmt: skip
def test_copies_of_the_embeddings_are_allowed(given: dict[str, object], tmp_path: Path) -> None:
    """PEFT saves them by itself where it believes that the vocabulary has changed."""
    base = build()
    base.save_pretrained(tmp_path / "base")
    policy = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **given))
    policy.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(policy))


def small(adapter: Path, factor: float) -> None:
    edit(adapter, lambda w: {n: v * factor if "lora_B" in n else v for n, v in w.items()})


def test_an_adapter_that_rounding_hides_is_merged_in_float32(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(dtype=torch.bfloat16)
    model.resize_token_embeddings(len(tokenizer))
    base, adapter = save(tmp_path, model, LORA)
    tokenizer.save_pretrained(base)

    def verified(dtype: str) -> tuple[str, dict[str, dict[str, float]]]:
        run = Run(tmp_path / dtype, {})
        merged = merge_adapter(found(base, adapter), run, dtype=dtype)
        verification = verify_merge(merged, found(base, adapter), max_kl=1.0)
        if verification.problem:
            with pytest.raises(UserError, match="The merge was deleted: "):
                merged.finalize(verification)
        else:
            merged.finalize(verification)
        assert (tmp_path / dtype).exists() == (not verification.problem)
        return verification.problem, verification.rows

    problem, rows = verified("auto")
    assert problem == ""
    assert list(rows) == ["merged into original", "base alone", "computed in bfloat16"]
    assert rows["merged into original"]["kl"] < rows["base alone"]["kl"] / 100  # of rounded weights alone
    small(adapter, 1e-3)
    problem, rows = verified("bfloat16")
    assert problem == (
        "inconclusive: the adapter changes the model less than rounding to bfloat16 does. Use `--merge_dtype float32`."
    )
    assert rows["base alone"]["kl"] < rows["computed in bfloat16"]["kl"]
    problem, rows = verified("float32")
    assert problem == ""
    assert list(rows) == ["merged into original", "base alone"]
    assert rows["merged into original"]["kl"] < rows["base alone"]["kl"] / 100
    small(adapter, 0.0)
    problem, _ = verified("float16")
    assert problem.startswith("inconclusive: the adapter changes the model less than rounding to float16 does")


@pytest.mark.parametrize("bits", ["4-bit NF4, double", "8-bit"])
def test_a_policy_quantized_in_bfloat16_computes_in_float32_as_its_merge(
    bits: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(dtype=torch.bfloat16)
    model.resize_token_embeddings(len(tokenizer))
    base, adapter = save(tmp_path, model, LORA)
    tokenizer.save_pretrained(base)
    plan = {"weights": "bfloat16", "computed in": "bfloat16", "quantization": bits}
    trained = Adapter(adapter, Run(adapter, {"plan": plan}), str(base))
    merged = merge_adapter(trained, Run(tmp_path / "merge", {}), dtype="float32")
    assert merged.merge_base == "dequantized"
    verification = verify_merge(merged, trained)
    kl = {name: row["kl"] for name, row in verification.rows.items()}
    assert list(kl) == ["merged into dequantized", "base alone"]
    assert kl["merged into dequantized"] < (1e-9 if bits.startswith("4") else 1e-3)  # 8 bits round the inputs as well
    assert kl["base alone"] > 0.1
    assert verification.problem == ""
