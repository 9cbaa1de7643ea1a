"""The smaller helpers: runs, models and merging."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from helpers.core import CleanExit, SettingsError, UserError
from helpers.merging.verify import compare_logits, last_logits
from helpers.models import plan as models
from helpers.models import resolve as sources
from helpers.runs import run as runs
from helpers.settings.load import RunSettings, load_settings


def settings_of(folder: Path, *words: str) -> Any:
    import dataclasses

    @dataclasses.dataclass
    class Settings(RunSettings):
        """A step's settings."""

        step: ClassVar[str] = "dpo"
        lora_r: int = 8  # rank
        lora_alpha: int = 16  # scale
        lora_target_modules: str = "all-linear"  # layers
        tuning: str = "qlora"  # what is trained

    return load_settings(Settings, {}, ["--output_dir", str(folder), *words])


# Runs


def test_the_same_settings_find_the_same_run_and_others_another(tmp_path: Path) -> None:
    first = runs.start_run(settings_of(tmp_path), "org/Some-7B")
    assert first.name == f"dpo-Some-7B-{settings_of(tmp_path).digest('')}"
    assert not first.folder.exists()  # nothing is written before there is something to write
    first.save(data={"read": 1})
    assert runs.start_run(settings_of(tmp_path), "org/Some-7B").folder == first.folder
    assert runs.start_run(settings_of(tmp_path, "--lora_r", "4"), "org/Some-7B").folder != first.folder
    record = json.loads((first.folder / "run.json").read_text())
    assert record["status"] == "running"
    assert (record["base_model"], record["parent"]) == ("org/Some-7B", None)
    assert record["settings"]["lora_r"] == 8
    assert record["sources"]["lora_r"] == "default"
    assert record["versions"]["trl"] == "1.16.0"


def test_a_finished_run_is_not_started_again_unless_told(tmp_path: Path) -> None:
    run = runs.start_run(settings_of(tmp_path), "org/m")
    run.save()
    (run.folder / "adapter_model.safetensors").write_bytes(b"weights")
    run.finish(metrics={"eval_loss": 1.0})
    with pytest.raises(CleanExit, match=r"is finished: nothing to do\. --resume never"):
        runs.start_run(settings_of(tmp_path), "org/m")
    anew = runs.start_run(settings_of(tmp_path, "--resume", "never"), "org/m")
    assert (run.folder / "adapter_model.safetensors").exists()  # until the new run has something to write
    anew.save()
    assert not (run.folder / "adapter_model.safetensors").exists()


def test_a_name_by_hand_with_other_settings_is_refused_with_the_differences(tmp_path: Path) -> None:
    runs.start_run(settings_of(tmp_path, "--run_name", "mine"), "org/m").save()
    runs.start_run(settings_of(tmp_path, "--run_name", "mine", "--report_to", "tensorboard"), "org/m")
    with pytest.raises(SettingsError, match="lora_r 8 → 4"):
        runs.start_run(settings_of(tmp_path, "--run_name", "mine", "--lora_r", "4"), "org/m")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    for more in ([], ["--resume", "never"]):
        with pytest.raises(SettingsError, match="is not empty and not a run"):
            runs.start_run(settings_of(tmp_path, "--run_name", "thesis", *more), "org/m")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CleanExit, match=r"Dry run: .*\(new\) would start from org/m"):
        runs.start_run(settings_of(tmp_path, "--dry_run"), "org/m")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_trains_says_what_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = runs.Run(tmp_path / "sft-x", {"fingerprint": "f"})
    settings = settings_of(tmp_path, "--run_name", "a")
    runs.start_run(settings, "org/m")
    assert capsys.readouterr().out.splitlines()[-1] == f"Run: {tmp_path / 'a'}"
    monkeypatch.setattr(settings, "rows_per_step", lambda: 8)
    runs.start_run(settings, "org/m")
    assert capsys.readouterr().out.splitlines() == [f"Run: {tmp_path / 'a'}", "Starts from org/m"]
    runs.start_run(settings, "org/m", parent)
    assert capsys.readouterr().out.splitlines()[-1] == f"Starts from {tmp_path / 'sft-x'}"
    monkeypatch.setattr(settings, "dry_run", True)
    monkeypatch.setattr(type(settings), "step", "judge")
    with pytest.raises(CleanExit, match=r"Dry run: .*a \(new\)\.$"):
        runs.start_run(settings, "gpt-4")


def test_latest_is_the_newest_finished_run_of_the_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished dpo run"):
        runs.find_run(tmp_path, "latest", "dpo")
    for name, status in (("a", "finished"), ("b", "finished"), ("c", "running")):
        run = runs.start_run(settings_of(tmp_path, "--run_name", name), "org/m")
        run.save()
        if status == "finished":
            run.finish()
    assert runs.find_run(tmp_path, "latest", "dpo").name == "b"
    assert runs.find_run(tmp_path, "a", "dpo").name == "a"
    assert runs.find_run(tmp_path, str(tmp_path / "a"), "dpo").name == "a"
    with pytest.raises(UserError, match="'c' is a dpo run with status running, not a finished dpo run"):
        runs.find_run(tmp_path, "c", "dpo")
    with pytest.raises(UserError, match="'x' is not the folder of a run"):
        runs.find_run(tmp_path, "x", "dpo")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "failed")])
def test_what_ends_a_training_is_written_down(tmp_path: Path, error: type[BaseException], status: str) -> None:
    run = runs.start_run(settings_of(tmp_path), "org/m")
    with pytest.raises(error), run.training() as checkpoint:  # noqa: PT012
        assert checkpoint is None
        raise error
    assert runs.read_run(run.folder)["status"] == status


# Models


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
    assert models.plan_model("org/m", attention="eager").attention == "eager"


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
    forced = models.plan_model("org/m", given={"use_cpu": True})
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
    with pytest.raises(UserError, match="4 GPUs are visible to one process: set CUDA_VISIBLE_DEVICES=0") as raised:
        models.plan_model("org/m")
    launch = "accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 4 notebooks/02_dpo.py"
    assert f"{launch} --run_name 'two words'" in str(raised.value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert models.plan_model("org/m").device == "cuda"


def test_a_model_that_lacks_a_shard_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        UserError, match=r"lacks model-00002-of-00002\.safetensors, which its model\.safetensors\.index"
    ):
        sources.resolve_model(str(tmp_path))


def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    for name in ("empty", "bare", "gone"):
        (tmp_path / name).mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for name, said in (
        (str(tmp_path / "empty"), "has no config.json"),
        ("not/a/model", "neither a folder here nor"),
        (str(tmp_path / "bare"), r"has a config.json and no weights \(\*.safetensors or pytorch_model\*.bin\)"),
    ):
        with pytest.raises(UserError, match=said):
            sources.resolve_model(name)
    adapter = '{"peft_type": "LORA", "base_model_name_or_path": "BASE"}'.replace("BASE", str(tmp_path / "nowhere"))
    (tmp_path / "gone" / "adapter_config.json").write_text(adapter)
    with pytest.raises(UserError, match=r"adapter_config.json and no weights"):
        sources.find_adapter(str(tmp_path / "gone"))
    (tmp_path / "gone" / "adapter_model.safetensors").write_bytes(b"x")
    gone = str(tmp_path / "gone")
    said = "nowhere' is neither a folder here nor a Hub id"
    with pytest.raises(UserError, match=f"{said}; bring it back, or make that run again"):
        sources.resolve_models((gone,), tmp_path)
    with pytest.raises(UserError, match=f"{said}; --base_model_id names another"):
        sources.find_adapter(gone, "")


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match="'org/m' cannot be loaded: it is not in the cache, and the Hub cannot be"):
        sources.resolve_model("org/m")
    assert time.monotonic() - began < 5


def test_rank_and_targets_of_an_adapter_that_goes_on_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    settings = settings_of(tmp_path)
    models.adopt_adapter_settings(tmp_path, settings)
    assert (settings.lora_r, settings.lora_target_modules, settings.sources["lora_r"]) == (4, ["q_proj"], "parent")
    with pytest.raises(SettingsError, match="--lora_target_modules all-linear, but the adapter"):
        models.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--lora_target_modules", "all-linear"))
    with pytest.raises(SettingsError, match="--tuning full, but"):
        models.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--tuning", "full"))
    assert models.adopt_adapter_settings(tmp_path, settings_of(tmp_path))["r"] == 4
    assert models.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--lora_r", "4"))["r"] == 4
    with pytest.raises(SettingsError, match=f"--lora_r 64, but the adapter in {tmp_path.name} has 4"):
        models.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--lora_r", "64"))
    with pytest.raises(SettingsError, match=r"--tuning dora, but the adapter in .* has lora: leave it out"):
        models.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--tuning", "dora"))
    theirs = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(theirs))
    models.adopt_adapter_settings(tmp_path, settings := settings_of(tmp_path, "--tuning", "lora"))
    assert (settings.tuning, settings.lora_modules_to_save) == ("dora", ("lm_head",))


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
    models.upcast_adapter(model)
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


def test_candidates_are_what_a_run_started_from_and_the_run(tmp_path: Path) -> None:
    base = tmp_path / "sft-full"
    made = {"sft-full": None, "dpo-a": "sft-full", "sft-lora": None, "dpo-b": "sft-lora", "dpo-full": "sft-full"}
    for name, parent in made.items():
        folder = tmp_path / name
        folder.mkdir()
        if name.endswith("full"):
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(b"x")
        else:
            (folder / "adapter_model.safetensors").write_bytes(b"x")
            config = {"base_model_name_or_path": str(base), "revision": "v2", "peft_type": "LORA"}
            (folder / "adapter_config.json").write_text(json.dumps(config))
        record = {"step": name[:3], "status": "finished", "finished": "2026", "base_model": "org/m"}
        record["parent_folder"] = str(tmp_path / parent) if parent else None
        (folder / "run.json").write_text(json.dumps(record))
    names = [c.name for c in sources.resolve_models((str(tmp_path / "dpo-a"), "org/other", "us/other"), tmp_path)]
    assert names == ["sft-full", "dpo-a", "other (1)", "other (2)"]
    before, after = sources.resolve_models(("dpo-b",), tmp_path)
    assert (before.name, before.adapter, before.base) == ("sft-lora", str(tmp_path / "sft-lora"), str(base))
    assert (after.name, after.adapter, after.revision) == ("dpo-b", str(tmp_path / "dpo-b"), "v2")
    assert after.tokenizer == str(base)  # the adapter came without one
    (tmp_path / "dpo-b" / "tokenizer_config.json").write_text("{}")
    assert after.tokenizer == str(tmp_path / "dpo-b")
    before, after = sources.resolve_models(("dpo-full",), tmp_path)
    assert (before.base, after.base, after.adapter) == (str(base), str(tmp_path / "dpo-full"), None)


# Merging


def tiny_mistral(vocabulary: int = 64) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_a_merge_is_compared_by_its_logits(tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig, get_peft_model

    talks = [[{"role": "user", "content": "What is 2 plus 3?"}], [{"role": "user", "content": "And 4?"}]]
    base = last_logits(tiny_mistral(len(tokenizer)), tokenizer, talks)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(tiny_mistral(len(tokenizer)), config)
    adapted = last_logits(policy, tokenizer, talks)
    assert [logits.shape[1] for logits in adapted] == [len(tokenizer)] * 2
    same = compare_logits(adapted, last_logits(policy.merge_and_unload(), tokenizer, talks))
    other = compare_logits(adapted, base)
    assert same["max_abs"] < 1e-4
    assert same["top1"] == 1
    assert same["kl"] < 1e-8
    assert other["kl"] > 1e-3
    p, q = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert compare_logits([p], [q])["kl"] == pytest.approx(expected.item(), abs=1e-6)


def test_the_demo_model_loads_like_any_other(demo_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_folder / "tiny-mistral")
    assert sum(p.numel() for p in model.parameters()) < 3_000_000


def test_a_run_that_replaces_another_does_not_go_on_from_its_checkpoints(tmp_path: Path) -> None:
    run = runs.start_run(settings_of(tmp_path), "org/m")
    run.save()
    (run.folder / "checkpoint-2").mkdir()
    (run.folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    with runs.start_run(settings_of(tmp_path, "--resume", "never"), "org/m").training() as checkpoint:
        assert checkpoint is None
    assert not (run.folder / "checkpoint-2").exists()
