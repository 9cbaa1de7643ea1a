"""How a model is loaded on which machine, and the fixes to what PEFT, TRL and bitsandbytes do with it."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.core import REPO, UserError
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
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_the_plan_on_a_gpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, bf16=True)
    plan = models.plan_model("mistralai/Mistral-7B-v0.1", "qlora")
    assert (plan.device, plan.dtype, plan.bf16, plan.fp16) == ("cuda", torch.bfloat16, True, False)
    assert (plan.attn_implementation, plan.optimizer, plan.device_map) == ("sdpa", "paged_adamw_8bit", {"": 0})
    assert plan.quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert models.plan_model("org/m", "full").dtype == torch.float32  # weights that are trained
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert models.plan_model("org/m").device_map == {"": 3}
    forced = models.plan_model("org/m", trl_args={"use_cpu": True})
    assert (forced.device, forced.optimizer, forced.device_map) == ("cpu", "adamw_torch", {"": "cpu"})


def install(folder: Path, name: str, module: str, version: str, code: str = "") -> None:
    """Put a package into `folder`, which is searched for packages."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(f"__version__ = '{version}'\n{code}\n")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\n")


GPU_PACKAGES = (REPO / "requirements-gpu.txt").read_text()
FLASH_ATTN = "flash-attn", "flash_attn", GPU_PACKAGES.partition("flash-attn==")[2].split()[0]  # as it is named there


@pytest.mark.parametrize(("package", "code", "attention"), [
    (FLASH_ATTN, "", "flash_attention_2"),
    (FLASH_ATTN, "raise ImportError('undefined symbol: _ZN3c10')", "sdpa"),
    pytest.param(("flash-attn", "flash_attn", "2.3.0"), "", "sdpa", marks=pytest.mark.long),  # older than 2.3.3
    pytest.param(("kernels", "kernels", "0.17.2"), "", "sdpa", marks=pytest.mark.long),
    (("kernels", "kernels", "0.18.2"), "", "sdpa"),  # a kernel of the Hub is used only if it is named
])  # fmt: skip
def test_flash_attention_is_used_where_transformers_takes_it_and_it_can_be_imported(
    package: tuple[str, str, str], code: str, attention: str, tmp_path: Path
) -> None:
    """In a process of its own, because transformers looks once for what is installed."""
    install(tmp_path, *package, code)
    program = """
import sys, torch
from types import SimpleNamespace
torch.cuda.is_available = lambda: True
from transformers.utils import import_utils
import_utils.is_torch_cuda_available = lambda: True
from helpers.models import plan
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda: torch.device("cuda")
torch.cuda.device_count = lambda: 1
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
print(plan.plan_model("org/m").attn_implementation)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == [attention], done.stderr[-2000:]
    assert ("flash-attn cannot be imported (undefined symbol: _ZN3c10)" in done.stdout) is bool(code)


def test_optional_packages_are_those_that_the_libraries_take() -> None:
    pins = [Requirement(line) for line in GPU_PACKAGES.splitlines() if "==" in line and not line.startswith("#")]
    checked = []
    for pin, library in itertools.product(pins, ("transformers", "trl", "peft", "accelerate")):
        for asked in map(Requirement, importlib.metadata.requires(library) or []):
            if asked.name == pin.name:
                (version,) = (each.version for each in pin.specifier)
                assert asked.specifier.contains(version), f"{library} takes {asked}, and {pin} is named"
                checked.append(pin.name)
    assert set(checked) == {pin.name for pin in pins} == {"deepspeed"}


SMI = "#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, {driver}'\n"
NO_GPU = [
    ("", None, {}, "this machine has none. Use `--recipe recipes/demo.yaml`"),
    ("580.65.06", None, {}, "is a build without CUDA, so it cannot use the NVIDIA GeForce RTX 4090. Install the build "
                            "for CUDA: https://pytorch.org/get-started/locally/"),
    ("535.183.01", "13.0", {}, "the driver of the NVIDIA GeForce RTX 4090 is 535.183.01, while PyTorch 2.13.0"),
    ("535.183.01", "13.0", {}, "with CUDA 13.0 needs 580 or newer. Update the driver, or install a build for an older"),
    ("580.65.06", "13.0", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides the NVIDIA GeForce RTX 4090."),
    ("580.65.06", "13.0", {}, "PyTorch cannot use the NVIDIA GeForce RTX 4090."),
]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs a shell script")
@pytest.mark.parametrize(("driver", "cuda", "env", "message"), NO_GPU)
def test_why_there_is_no_gpu_is_said(
    driver: str, cuda: str | None, env: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    (tmp_path / "nvidia-smi").write_text(SMI.format(driver=driver) if driver else "#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        models.plan_model("mistralai/Mistral-7B-v0.1", "qlora")
    assert str(raised.value).startswith("mistralai/Mistral-7B-v0.1 needs a GPU (24 GB for the defaults), and ")
    assert message in str(raised.value)
    with pytest.raises(UserError, match=r"--use_cpu is set\. Remove it\."):
        models.plan_model("mistralai/Mistral-7B-v0.1", "qlora", trl_args={"use_cpu": True})


@pytest.mark.skipif(os.name != "posix", reason="Triton is for Linux")
def test_without_a_compiler_trl_computes_with_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trl.kernels import chunked_logprob

    FakeGpu(monkeypatch, bf16=True)
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    models.plan_model("org/m", "none")  # only answers
    assert chunked_logprob._use_triton(torch.device("cuda"))
    models.plan_model("org/m")
    assert not chunked_logprob._use_triton(torch.device("cuda"))
    assert "Triton cannot compile here without a C compiler. TRL computes" in capsys.readouterr().out
    (tmp_path / "gcc").touch()
    (tmp_path / "gcc").chmod(0o755)
    assert models.missing_compiler() == ""
    (tmp_path / "Python.h").unlink()
    assert models.missing_compiler() == f"Python's headers ({tmp_path / 'Python.h'})"


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
    answers = models.plan_model("org/m", "none")
    assert (answers.device, answers.device_map) == ("cuda", {"": 0})  # one model answers on one of them
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
