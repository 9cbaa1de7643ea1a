"""How 04 loads models: as they were trained, one at a time, without a trace of the one before, in their template."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from helpers.core import SettingsError, show, write_json
from helpers.evaluation.generators import Generators, HFGenerator
from helpers.models.chat import read_template, set_chat_template
from helpers.models.plan import plan_model, prepare_model, quantization_config
from helpers.models.resolve import ModelRef, resolve_adapter, resolve_models
from tests.evaluation.test_generation import GREEDY, settings_of

TALKS = [[{"role": "user", "content": "What is 2 plus 3? " * n}] for n in (1, 4, 2, 7)]
LORA: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
# What an adapter may leave behind on its base.
ADAPTERS: dict[str, Any] = {
    "plain": LoraConfig(**LORA),
    "modules": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "bias": LoraConfig(**LORA, bias="lora_only"),
    "dora": LoraConfig(**LORA, use_dora=True),
    "tokens": LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [5, 6, 7]}),
    "olora": LoraConfig(**LORA, init_lora_weights="olora"),
    "deeper": LoraConfig(**LORA, layer_replication=[[0, 2], [1, 2]]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def models(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, and adapters of each kind with weights that have moved; one has two more tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {"num_key_value_heads": 2, "attention_bias": True, "initializer_range": 0.4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    more = AutoTokenizer.from_pretrained(folder / "base")
    set_chat_template(more, "chatml")
    for name, config in (ADAPTERS | {"chatml": LoraConfig(**LORA)}).items():
        base: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
        own = more if name == "chatml" else tokenizer
        prepare_model(base, own)
        policy = get_peft_model(base, config)
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for weight in policy.parameters():
                if weight.requires_grad:
                    weight += 0.5 * torch.randn(weight.shape, generator=draw)
        policy.save_pretrained(str(folder / name))
        own.save_pretrained(folder / name)
    return folder


def ask_alone(ref: ModelRef) -> list[str]:
    """The answers of a model that is loaded by itself."""
    base: Any = AutoModelForCausalLM.from_pretrained(ref.base, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(ref.tokenizer)
    prepare_model(base, own)
    model = PeftModel.from_pretrained(base, ref.adapter) if ref.adapter else base
    return HFGenerator(model.eval(), own).generate(TALKS, **GREEDY)


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.long)])
def test_whatever_was_loaded_before_a_model_answers_as_it_does_alone(models: Path, order: int) -> None:
    names, base = [*ADAPTERS, "chatml"][::order], ModelRef("base", str(models / "base"))
    adapters = {name: resolve_adapter(str(models / name)) for name in names}
    refs = [base, *(each for name in names for each in (adapters[name], replace(base, name=f"base after {name}")))]
    alone = {name: ask_alone(adapter) for name, adapter in adapters.items()}
    before = ask_alone(base)
    expected = {ref.name: alone.get(ref.name, before) for ref in refs}
    together = {name: generator.generate(TALKS, **GREEDY) for name, generator in Generators(refs, settings_of()).load()}
    assert [name for name in expected if together[name] != expected[name]] == []
    assert len({tuple(answers) for answers in alone.values()}) == len(alone)


def test_one_base_is_alive_at_a_time_also_after_an_error(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    load_one = AutoModelForCausalLM.from_pretrained

    def load(*words: Any, **options: Any) -> Any:
        assert [model for model in alive if model() is not None] == []
        model = load_one(*words, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    base = str(models / "base")
    names = ("plain", "dora", "modules", "plain", "prefix", "chatml")
    refs = [ModelRef(str(i), base, str(models / name)) for i, name in enumerate(names)]
    speakers = []
    for _, speaker in Generators(refs, settings_of()).load():  # a notebook keeps its variables
        speakers.append(speaker)
    assert len(alive) == 3  # plain, dora and modules share one, as do plain and prefix: a trace comes after
    for _, speaker in Generators(refs, settings_of()).load():
        speakers.append(speaker)
        break
    assert [model for model in alive if model() is not None] == []
    broken = Generators(refs, settings_of())
    monkeypatch.setattr(broken, "_switch_to", lambda ref: (Generators._switch_to(broken, ref), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        list(broken.load())
    assert len(list(Generators(refs[:1], settings_of()).load())) == 1
    assert [model for model in alive if model() is not None] == []


def trained(folder: Path, base: Path, tokenizer: Any, plan: dict[str, str] | None, name: str = "dpo") -> Path:
    """A run of 02 as it leaves its folder: an adapter with its tokenizer, and run.json."""
    (folder / name).mkdir(parents=True)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=draw)
    policy.save_pretrained(str(folder / name))
    tokenizer.save_pretrained(folder / name)
    record = {"step": "dpo", "status": "finished", "base_model": str(base), "finished": "2026"}
    write_json(folder / name / "run.json", record | ({"plan": plan} if plan else {}))
    return folder / name


@pytest.mark.parametrize(("bits", "weights", "attention"), [
    ("4", "float32", "sdpa"), ("4", "bfloat16", "eager"), ("n", "bfloat16", "sdpa"), ("n", "float32", "eager"),
])  # fmt: skip
def test_a_run_answers_as_its_policy_did_and_its_base_as_the_reference(
    models: Path, tokenizer: Any, tmp_path: Path, bits: str, weights: str, attention: str
) -> None:
    dtype = getattr(torch, weights)
    config = quantization_config(bits, dtype)
    plan = plan_model("org/m", "none", attn_implementation=attention).as_dict()
    plan |= {"weights": weights, "computed in": weights, "quantization": "4-bit NF4, double" if config else "none"}
    run = trained(tmp_path, models / "base", tokenizer, plan)
    loading: dict[str, Any] = {"dtype": dtype, "quantization_config": config, "attn_implementation": attention}
    policy: Any = AutoModelForCausalLM.from_pretrained(models / "base", **loading)
    prepare_model(policy, tokenizer)
    policy = PeftModel.from_pretrained(policy, run).eval()
    autocast = None if weights == "float32" else dtype  # of accelerate, in training
    expected = {"dpo": HFGenerator(policy, tokenizer, autocast).generate(TALKS, **GREEDY)}
    with policy.disable_adapter():
        expected["base"] = HFGenerator(policy, tokenizer, autocast).generate(TALKS, **GREEDY)
    generators = Generators(resolve_models((str(run),), tmp_path), settings_of())
    assert {name: g.generate(TALKS, **GREEDY) for name, g in generators.load()} == expected
    for row in generators.loading.values():
        assert row == plan | {"chat template": row["chat template"]}
    assert f"weights {weights}" in generators.described["model dpo"]
    plain = Generators(resolve_models((str(run),), tmp_path), settings_of("--quantization", "none"))
    assert {row["quantization"] for row in plain.loading.values()} == {"none"}
    other = "eager" if attention == "sdpa" else "sdpa"
    asked = Generators(resolve_models((str(run),), tmp_path), settings_of("--attn_implementation", other))
    assert {row["attention"] for row in asked.loading.values()} == {other}
    assert {g.model.config._attn_implementation for _, g in asked.load()} == {other}


def test_a_merge_is_loaded_as_it_is_stored_and_its_base_like_it(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(models / "base")
    for name, dtype in (("merged", torch.bfloat16), ("merged32", torch.float32)):
        base.to(dtype).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        write_json(tmp_path / name / "run.json", {"step": "merge", "status": "finished", "base_model": "org/b"})
    generators = Generators(resolve_models(("merged", "merged32"), tmp_path), settings_of())
    assert [plan.dtype for plan in generators.plans.values()] == [torch.bfloat16, torch.float32]
    assert {row["quantization"] for row in generators.loading.values()} == {"none"}
    assert [dict(g.model.named_parameters())["lm_head.weight"].dtype for _, g in generators.load()] == [
        torch.bfloat16, torch.float32
    ]  # fmt: skip


def test_a_model_that_is_stored_in_4_bits_says_so(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    config = quantization_config("4", torch.float32)
    AutoModelForCausalLM.from_pretrained(models / "base", quantization_config=config).save_pretrained(tmp_path / "q")
    tokenizer.save_pretrained(tmp_path / "q")
    generators = Generators(resolve_models((str(tmp_path / "q"),), tmp_path), settings_of())
    assert generators.loading["q"]["quantization"] == "as stored, bitsandbytes"


def test_what_this_machine_lacks_is_planned_for_it() -> None:
    from helpers.models.plan import plan_as_trained

    there = {"device": "cuda", "weights": "bfloat16", "computed in": "bfloat16", "quantization": "none"}
    for attention in ("flash_attention_2", "kernels-community/flash-attn3", "flex_attention"):
        assert plan_as_trained("org/m", there | {"attention": attention}).attn_implementation == "sdpa"
    plan = plan_as_trained("org/m", there | {"attention": "eager"})
    assert (plan.attn_implementation, plan.dtype, plan.bf16) == ("eager", torch.bfloat16, True)
    plan = plan_as_trained("org/m", there | {"attention": "eager"}, attn_implementation="sdpa")
    assert plan.attn_implementation == "sdpa"


def test_the_base_is_asked_in_its_policy_s_template_and_each_template_is_printed(
    models: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, own = (AutoTokenizer.from_pretrained(models / "base") for _ in range(2))
    bare.chat_template, own.chat_template = None, read_template("vicuna")
    AutoModelForCausalLM.from_pretrained(models / "base").save_pretrained(tmp_path / "raw")
    bare.save_pretrained(tmp_path / "raw")
    run = trained(tmp_path, tmp_path / "raw", own, None)
    for names in (("dpo",), ("raw", "dpo"), ("dpo", "raw")):
        generators = Generators(resolve_models(names, tmp_path), settings_of())
        assert sorted(generators.loading) == ["dpo", "raw"]
        for _, generator in generators.load():
            assert generator.tokenizer.chat_template == own.chat_template
        show(generators)
        assert "vicuna of dpo" in capsys.readouterr().out
    alone = Generators(resolve_models(("raw",), tmp_path), settings_of())
    with pytest.raises(SettingsError, match=r"raw has no chat template\. Choose one with `--chat_template`"):
        show(alone)
    with pytest.raises(SettingsError, match="raw has no chat template"):
        list(alone.load())
    named = Generators(resolve_models(("raw",), tmp_path), settings_of("--chat_template", "alpaca"))
    [(_, generator)] = [(name, g.tokenizer) for name, g in named.load()]
    assert generator.chat_template == read_template("alpaca")
    assert named.loading["raw"]["chat template"] == "alpaca"
    mine = AutoTokenizer.from_pretrained(models / "base")
    mine.chat_template = read_template("vicuna") + "{# mine #}"
    mine.save_pretrained(run)
    loading = Generators(resolve_models(("dpo",), tmp_path), settings_of()).loading
    assert [row["chat template"] for row in loading.values()] == ["that of dpo", "its own"]


def test_a_base_named_beside_its_merge_is_asked_in_the_merge_s_template(
    models: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(models / "base")
    own = AutoTokenizer.from_pretrained(models / "base")
    own.chat_template = read_template("hh")
    for name, theirs in (("b", tokenizer), ("merged", own)):
        base.save_pretrained(tmp_path / name)
        theirs.save_pretrained(tmp_path / name)
    record = {"step": "merge", "status": "finished", "base_model": str(tmp_path / "b")}
    write_json(tmp_path / "merged" / "run.json", record)
    loading = Generators(resolve_models((str(tmp_path / "b"), "merged"), tmp_path), settings_of()).loading
    assert [row["chat template"] for row in loading.values()] == ["hh of merged", "hh"]


def test_policies_with_other_plans_have_a_base_each(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan = plan_model("org/m", "none").as_dict()
    trained(tmp_path, models / "base", tokenizer, plan, "lora")
    trained(tmp_path, models / "base", tokenizer, plan, "lora2")
    trained(tmp_path, models / "base", tokenizer, plan | {"quantization": "4-bit NF4, double"}, "qlora")
    names = [ref.name for ref in resolve_models(("lora", "lora2"), tmp_path)]
    assert names == ["base", "lora", "lora2"]
    refs = resolve_models(("lora", "qlora"), tmp_path)
    assert [ref.name for ref in refs] == ["base (1)", "lora", "base (2)", "qlora"]
    loading = Generators(refs, settings_of()).loading
    assert [row["quantization"][:5] for row in loading.values()] == ["none", "none", "4-bit", "4-bit"]
    assert json.dumps(loading)
