"""How a model is loaded on which machine, and the fixes to what PEFT, TRL and bitsandbytes do with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.core import UserError
from helpers.models import adapters
from helpers.models import plan as models
from tests.tiny import tiny_mistral


def test_a_7b_from_the_hub_is_refused_without_a_gpu_and_a_small_one_is_not() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    for name in ("mistralai/Mistral-7B-v0.1", "org/model-13b-chat", "Qwen/Qwen3.5-4B", "mistralai/Mixtral-8x7B-v0.1"):
        with pytest.raises(UserError, match="needs a GPU"):
            models.plan_model(name)
    for name in ("org/SmolLM-135M", "Qwen/Qwen2-0.5B", "org/b7b7", "org/model-2.8b"):
        plan = models.plan_model(name)
        assert (plan.device, plan.dtype, plan.bf16, plan.fp16) == ("cpu", torch.float32, False, False)


def test_the_plan_follows_the_tuning() -> None:
    plan = models.plan_model("org/m", "qlora")
    assert plan.quantization.load_in_4bit
    assert plan.quantization.bnb_4bit_use_double_quant
    assert plan.quantization.bnb_4bit_quant_type == "nf4"
    assert models.plan_model("org/m", "lora").quantization is None
    assert models.plan_model("org/m", "lora", "8bit").quantization.load_in_8bit
    assert models.plan_model("org/m", "full").dtype == torch.float32
    assert models.plan_model("org/m", attn_implementation="eager").attn_implementation == "eager"


def test_a_model_that_is_no_text_model_is_refused_in_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("mistral3").save_pretrained(tmp_path / "ministral")
    with pytest.raises(UserError, match="of type mistral3, which transformers does not load as a text model"):
        models.plan_model(str(tmp_path / "ministral"))


class FakeGpu:
    """What plan_model asks PyTorch about a GPU; its answers are all that the plan can follow here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bf16: bool, count: int = 1, kind: str = "cuda") -> None:
        import importlib.util

        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # every package is installed
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_the_plan_on_a_gpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, bf16=True)
    plan = models.plan_model("mistralai/Mistral-7B-v0.1", "qlora")
    assert (plan.device, plan.dtype, plan.bf16, plan.fp16) == ("cuda", torch.bfloat16, True, False)
    assert (plan.attn_implementation, plan.optimizer, plan.device_map) == (
        "flash_attention_2",
        "paged_adamw_8bit",
        {"": 0},
    )
    assert plan.quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert models.plan_model("org/m", "full").dtype == torch.float32  # weights that are trained
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert models.plan_model("org/m").device_map == {"": 3}
    forced = models.plan_model("org/m", trl_args={"use_cpu": True})
    assert (forced.device, forced.optimizer, forced.device_map) == ("cpu", "adamw_torch", {"": "cpu"})


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16_without_flash_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGpu(monkeypatch, bf16=False)
    plan = models.plan_model("org/m", "qlora")
    assert (plan.dtype, plan.bf16, plan.fp16, plan.attn_implementation) == (torch.float16, False, True, "sdpa")
    assert plan.quantization.bnb_4bit_compute_dtype == torch.float16


def test_the_plan_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, bf16=True, kind="mps")
    plan = models.plan_model("org/m")
    assert (plan.device, plan.dtype, plan.bf16, plan.fp16) == ("mps", torch.float32, False, False)
    assert (plan.attn_implementation, plan.optimizer, plan.device_map) == ("sdpa", "adamw_torch", {"": "mps"})
    assert plan.as_dict()["computed in"] == "float32"


def test_several_gpus_need_a_launcher_or_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, bf16=True, count=4)
    monkeypatch.setattr("sys.argv", ["notebooks/02_dpo.py", "--run_name", "two words"])
    with pytest.raises(UserError, match=r"4 GPUs are visible to one process\. Set CUDA_VISIBLE_DEVICES=0") as raised:
        models.plan_model("org/m")
    launch = "accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 4 notebooks/02_dpo.py"
    assert f"{launch} --run_name 'two words'" in str(raised.value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert models.plan_model("org/m").device == "cuda"


def test_adapter_weights_train_in_float32_from_their_exact_values() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_mistral(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.add_adapter("ref", model.peft_config["default"])
    weights = dict(model.named_parameters())
    exact = {}
    for name in [n for n in weights if ".default." in n]:
        exact[name] = torch.randn_like(weights[name])
        weights[name.replace(".default.", ".ref.")].data.copy_(exact[name])
        weights[name].data = exact[name].to(torch.bfloat16)
    adapters.upcast_adapter(model)
    trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
    assert set(trained) == set(exact)
    for name, weight in trained.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.data, exact[name])


def test_4bit_layers_keep_their_gradient_after_an_evaluation() -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    models.disable_cpu_4bit_repacking(torch.nn.Sequential(layer))
    x = torch.randn(4, 64, requires_grad=True)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    trained = layer.train()(x)
    trained.sum().backward()
    assert torch.equal(evaluated, trained)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_the_demo_model_loads_like_any_other(demo_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_folder / "tiny-mistral")
    assert sum(p.numel() for p in model.parameters()) < 3_000_000


def test_attention_is_eager_where_the_class_has_no_sdpa(tmp_path: Path) -> None:
    for kind, attention in (("mistral", "sdpa"), ("bloom", "eager"), ("mpt", "eager")):
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        assert models.plan_model(str(tmp_path / kind)).attn_implementation == attention
    assert models.plan_model(str(tmp_path / "bloom"), attn_implementation="sdpa").attn_implementation == "sdpa"


def test_the_plan_says_what_is_computed_in_when_it_is_set_by_hand(demo_folder: Path) -> None:
    plan = models.plan_model(str(demo_folder / "tiny-mistral"), trl_args={"bf16": True})
    assert (plan.bf16, plan.fp16, plan.as_dict()["computed in"]) == (True, False, "bfloat16")


def test_modules_trained_in_full_and_added_rows_begin_exactly_as_the_base() -> None:
    ids = torch.tensor([[1, 2, 60, 61, 5]])
    for more in (
        {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": {"embed_tokens": [60, 61], "lm_head": [60, 61]}},
    ):  # fmt: skip
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
        model = get_peft_model(tiny_mistral(64), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does
        adapters.upcast_adapter(model)
        with torch.no_grad(), model.disable_adapter():
            base = model(ids).logits
        with torch.no_grad():
            assert torch.equal(model(ids).logits, base), more
