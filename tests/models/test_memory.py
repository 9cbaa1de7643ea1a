"""Will it fit: shapes from a config.json, bytes as a real run has them, and a dry run that fetches nothing."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import yaml

from helpers.core import SettingsError, read_jsonl, show
from helpers.models import memory
from helpers.models.memory import GB, TrainingSpec, memory_by_part, read_decoder, suggest_changes
from tests import fake_hub as local
from tests.conftest import Project
from tests.families import FAMILIES, SHAPE, check_row
from tests.notebooks.test_data import DRIVER

MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
}  # fmt: skip
QLORA = {
    "tuning": "qlora", "quantization": "auto", "lora_r": 256, "lora_target_modules": "all-linear",
    "lora_modules_to_save": (), "adapter_dtype": "fp32", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2, "global_batch_size": 0, "max_length": 1512, "attn_implementation": "auto",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of these tests' own: what they train is not the "latest" of others."""
    return Project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "qwen3", "gemma", "gpt_neox", "phi3", "gpt2", "mixtral"])
def test_a_config_alone_gives_every_parameter_and_linear_layer(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = read_decoder(json.loads(config.to_json_string()))
    assert decoder.parameters == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    assert {n.name: ({n.inputs, n.outputs}, n.bias) for n in decoder.linears} == {
        name: (set(m.weight.shape), m.bias is not None) for name, m in linear.items()
    }
    assert len(decoder.targets(r".*\.0\..*")) == len([name for name in linear if ".0." in name])


PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
TODAY = QLORA | {"shared_prefix": "auto", "lora_r": 32, "max_length": 2048, "gradient_accumulation_steps": 16}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_its_size_and_what_fits_24_gb(name: str) -> None:
    decoder = read_decoder(PUBLISHED[name]["config"])
    assert decoder.parameters == pytest.approx(PUBLISHED[name]["parameters"], rel=0.01)
    peak = memory_by_part(decoder, TrainingSpec(TODAY, "dpo", decoder))["peak"]
    assert (peak <= 24 * GB) == (not decoder.experts), peak  # experts are not quantized
    check_row(name, f"{decoder.parameters / 1e9:.2f} B", f"{peak / GB:.1f} GB")
    full = TODAY | {"tuning": "full", "optim": "adamw_torch", "max_length": 4096}
    flags, lowered = suggest_changes(decoder, full, "dpo", 24 * GB)[0]
    assert (lowered <= 24 * GB) == (not decoder.experts), flags
    assert flags.startswith("--")


def test_a_dry_run_of_a_published_model_needs_its_config_alone(project: Project, tmp_path: Path) -> None:
    jobs = []
    for name, published in PUBLISHED.items():
        folder = tmp_path / name.rpartition("/")[2]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(published["config"]))
        jobs.append(["--recipe", "recipes/qwen3-4b.yaml", "--model_id", str(folder), "--dry_run"])
    done = project.python("-c", DRIVER, input=json.dumps([("02_dpo.py", flags) for flags in jobs]))
    shown = re.split("^ENDED .*\n", done.stdout, flags=re.MULTILINE)[:-1]
    assert len(shown) == len(PUBLISHED), done.stdout + done.stderr
    for (name, published), text in zip(PUBLISHED.items(), shown, strict=True):
        has_experts = "expert" in str(published["config"])
        assert ("fits into 24 GB" in text) == (not has_experts), (name, text)
        assert ("No flags make it fit. The smallest is:" in text) == has_experts, (name, text)
        assert "unknown" not in text, (name, text)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3 MoE"])
def test_adapters_of_experts_are_counted(kind: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, _, more = FAMILIES[kind]
    config = AutoConfig.for_model(model_type, **SHAPE, **more, vocab_size=100, pad_token_id=0)
    decoder = read_decoder(json.loads(config.to_json_string()))
    policy = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    counted = sum(memory.trained_sizes(decoder, TrainingSpec(QLORA | {"lora_r": 4}, "dpo", decoder)))
    real = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    assert counted == pytest.approx(real, rel=0.03)  # all but the adapters of routers
    assert decoder.parameters == sum(weight.numel() for weight in policy.base_model.parameters()) - real


# Runs 02_dpo.py with the flags of each job, and prints what is allocated in the end: bytes by part.
COUNTED = """
import json, runpy, sys, torch
def size(tensors): return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())
for flags in json.load(sys.stdin):
    sys.argv = ["02_dpo.py", *flags]
    done = runpy.run_path("notebooks/02_dpo.py", run_name="__main__")
    trainer, weights = done["trainer"], dict(done["trainer"].model.named_parameters())
    states = [w.quant_state for w in weights.values() if getattr(w, "quant_state", None)]
    tables = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    full = done["settings"].tuning == "full"
    adapter = [] if full else [w for n, w in weights.items() if w.requires_grad]
    base = [w for n, w in weights.items() if full or not w.requires_grad] + tables
    kept = [t for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    trained = [w for w in weights.values() if w.requires_grad]
    sizes = {"weights": size(base), "adapter": size(adapter), "gradients": size(trained), "optimizer": size(kept)}
    sizes["reference"] = size(trainer.ref_model.parameters()) if trainer.ref_model is not None else 0
    print("COUNTED", json.dumps([sizes, done["settings"].values()]))
"""


@pytest.mark.long
def test_weights_adapter_and_optimizer_are_what_a_real_run_allocates(project: Project, demo_folder: Path) -> None:
    model = demo_folder / "tiny-mistral"
    few = {"recipe": "recipes/demo.yaml", "setup_module": "", "sft_run": "", "model_id": model, "use_cpu": True}
    few |= {"dataset_id": demo_folder / "preferences", "max_steps": 1, "train_rows": 16, "eval_rows": 4}
    few |= {"per_device_train_batch_size": 2, "save_strategy": "no", "completion_steps": 0}
    jobs = [
        {"tuning": "qlora"},
        {"tuning": "qlora", "optim": "adamw_8bit", "lora_r": 64},
        {"tuning": "lora", "lora_target_modules": ".*(q_proj|down_proj)"},
        {"tuning": "dora", "use_rslora": True},
        {"tuning": "lora", "quantization": "8bit", "optim": "sgd"},
        {"tuning": "full"},
        {"tuning": "full", "precompute_ref_log_probs": True, "optim": "adamw_8bit"},
        {"tuning": "lora", "optim": "adamw_8bit", "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {"tuning": "full", "optim": "adafactor", "precompute_ref_log_probs": True},
    ]
    flags = []
    for job in jobs:
        values = {n: v if isinstance(v, list) else [v] for n, v in (few | job).items()}
        flags.append([str(w) for n, v in values.items() for w in (f"--{n}", *v)])
    done = project.python("-c", COUNTED, input=json.dumps(flags))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counted = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("COUNTED ")]
    assert len(counted) == len(jobs)
    decoder = read_decoder(json.loads((model / "config.json").read_text()))
    for job, (sizes, values) in zip(jobs, counted, strict=True):
        expected = memory_by_part(decoder, TrainingSpec(values, "dpo", decoder))
        for part, size in sizes.items():
            rows_and_columns = 0.02 * sizes["weights"] if job.get("optim") == "adafactor" else 0
            assert expected[part] == pytest.approx(size, rel=0.02, abs=rows_and_columns), (job, part)


def test_eight_bit_states_are_counted_in_blocks_and_small_weights_in_float32() -> None:
    def state_bytes(size: int, optimizer: str) -> float:
        return memory.state_bytes(size, TrainingSpec(QLORA | {"optim": optimizer}, "dpo", read_decoder(MISTRAL_7B)))

    assert state_bytes(1 << 20, "adamw_8bit") == (1 << 20) * 2 + 2 * 4 * (1 << 20) / 256
    assert state_bytes(4095, "adamw_8bit") == 8 * 4095
    assert state_bytes(1 << 20, "paged_lion_8bit") == (1 << 20) * (1 + 4 / 256)
    assert state_bytes(1 << 20, "adamw_torch_fused") == 8 << 20


def test_engines_share_out_what_their_stage_says(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, full = read_decoder(MISTRAL_7B), QLORA | {"tuning": "full", "optim": "adamw_torch"}
    count = decoder.parameters
    one = memory_by_part(decoder, TrainingSpec(full, "dpo", decoder))
    assert (one["weights"], one["gradients"], one["optimizer"]) == (4 * count, 4 * count, 8 * count)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    stages = []
    for stage in (1, 2, 3):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        stages.append(memory_by_part(decoder, TrainingSpec(full, "dpo", decoder)))
    zero1, zero2, zero3 = stages
    assert (zero1["weights"], zero1["gradients"], zero1["optimizer"]) == (2 * count, 2 * count, 12 * count / 8)
    assert zero2["gradients"] == zero3["gradients"] == 2 * count / 8
    assert zero3["weights"] == zero3["reference"] == 2 * count / 8
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert memory_by_part(decoder, TrainingSpec(full, "dpo", decoder)) == zero3


def test_advice_names_what_alone_makes_it_fit_and_else_several_together() -> None:
    decoder = read_decoder(MISTRAL_7B)
    large = QLORA | {"per_device_train_batch_size": 8}
    alone = suggest_changes(decoder, large, "dpo", 24 * GB)
    assert alone[0][0] == "--per_device_train_batch_size 4 --gradient_accumulation_steps 4"
    assert any(words.startswith("--max_length") for words, _ in alone)
    assert all(peak <= 24 * GB for _, peak in alone)
    ((together, peak),) = suggest_changes(decoder, large | {"gradient_checkpointing": False}, "dpo", 20 * GB)
    assert together.startswith("--gradient_checkpointing True --per_device_train_batch_size")
    assert peak <= 20 * GB < memory_by_part(decoder, TrainingSpec(large, "dpo", decoder))["peak"]
    ((least, peak),) = suggest_changes(decoder, QLORA, "dpo", 3 * GB)  # the weights alone are larger
    assert least == "--lora_r 8 --max_length 256"
    assert peak > 3 * GB
    kept = suggest_changes(decoder, large | {"global_batch_size": 16}, "dpo", 30 * GB, trained_further=True)
    assert kept[0][0] == "--per_device_train_batch_size 4"  # --global_batch_size has its own accumulation
    assert not any("--lora_r" in words for words, _ in kept)  # an adapter that is trained further keeps its rank
    full = QLORA | {"tuning": "full"}
    assert suggest_changes(decoder, full, "dpo", 40 * GB)[0][0] == "--tuning qlora"
    assert suggest_changes(decoder, full | {"quantization": "none"}, "dpo", 40 * GB)[0][0] == (
        "--tuning qlora --quantization 4bit"
    )
    assert suggest_changes(decoder, full, "dpo", 100 * GB)[0][0] == "--precompute_ref_log_probs True"


def test_micro_batches_are_as_large_as_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = read_decoder(MISTRAL_7B)
    auto = QLORA | {"tokens_per_microbatch": "auto", "gradient_accumulation_steps": 16}
    found = []
    for size in (16, 24, 80):
        spec = TrainingSpec(auto | {"memory_gb": size}, "dpo", decoder)
        found.append(spec.tokens)
        limit = memory.USED_SHARE * size * GB
        assert memory_by_part(decoder, spec)["peak"] <= limit
        if size < 80:
            assert memory_by_part(decoder, spec, spec.tokens + 1)["peak"] > limit
    assert 2 * 1512 < found[0] < found[1] < found[2] == 16 * 2 * 1512  # all pairs of a step
    assert TrainingSpec(auto | {"memory_gb": 4}, "dpo", decoder).tokens == 2 * 1512  # a pair is not cut
    fixed = auto | {"tokens_per_microbatch": 8000, "memory_gb": 24}
    assert TrainingSpec(fixed, "dpo", decoder).tokens == 8000
    assert suggest_changes(decoder, fixed | {"memory_gb": 16}, "dpo", 16 * GB)[0][0] == "--tokens_per_microbatch auto"
    assert TrainingSpec(fixed | {"tokens_per_microbatch": 0}, "dpo", decoder).tokens == 2 * 1512  # a batch
    assert TrainingSpec(fixed | {"loss_type": ("aot",)}, "dpo", decoder).tokens == 2 * 1512
    for given in (
        {"loss_type": ("sigmoid", "aot")}, {"loss_type": ("sigmoid", "sft"), "use_weighting": True},
        {"optim": "lomo"}, {"optim": "adalomo"}, {"optim": "galore_adamw_8bit_layerwise"}, {"fsdp": "full_shard"},
    ):  # fmt: skip
        assert TrainingSpec(fixed | given, "dpo", decoder).tokens == 2 * 1512, given
    for given in ({"optim": "galore_adamw_8bit"}, {"loss_type": ("ipo",)}):
        assert TrainingSpec(fixed | given, "dpo", decoder).tokens == 8000, given
    shared = fixed | {"shared_prefix": "auto"}
    assert TrainingSpec(shared, "dpo", decoder).varlen
    for rope in (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": {"rope_type": "longrope"}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ):  # fmt: skip
        own = read_decoder(MISTRAL_7B | rope)
        assert TrainingSpec(shared, "dpo", own).tokens == 2 * 1512, rope
        assert not TrainingSpec(shared, "dpo", own).varlen
    own = read_decoder(MISTRAL_7B | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    assert TrainingSpec(shared, "dpo", own).tokens == 8000
    alone = memory_by_part(decoder, TrainingSpec(fixed, "dpo", decoder))
    monkeypatch.setenv("WORLD_SIZE", "2")
    together = memory_by_part(decoder, TrainingSpec(fixed, "dpo", decoder))
    assert together["buckets"] == together["gradients"] == pytest.approx(together["peak"] - alone["peak"])


def dry_run(
    project: Project, notebook: str, *words: str, status: int = 0, real: bool = False, **env: str
) -> tuple[str, str, float]:
    """What it printed on stdout and on stderr, and, of a `real` process, its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = project.run(notebook, "--dry_run", *words, status=status, real=real, **env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_dry_run_fetches_a_config_alone_in_seconds_and_writes_nothing(project: Project, tmp_path: Path) -> None:
    with local.serve() as hub:
        files = {"config.json": json.dumps(MISTRAL_7B).encode(), "model.safetensors": b"x", "tokenizer.json": b"{}"}
        hub.add("models", "org/large-7b", files)
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        words = ["--model_id", "org/large-7b", "--dataset_id", "org/pairs", "--max_grad_norm", "1"]
        out, said, seconds = dry_run(project, "02_dpo.py", *words, real=True, **home)
        assert seconds < 3
        parts = {line.split()[0]: line.split()[1:3] for line in out.splitlines() if " GB " in line}
        needed = {"weights", "adapter", "gradients", "optimizer", "activations", "peak"}
        assert needed <= set(parts) <= {*needed, "logits"}
        assert parts["weights"] == ["4.13", "GB"]
        assert "fits into 24 GB" in out
        assert re.search(r"The largest --tokens_per_microbatch that fits is 1\d,\d+: at most", out)
        assert "Unknown steps and tokens: org/pairs has not been downloaded yet." in out
        assert "Dry run: outputs/dpo-large-7b-" in said
        fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
        assert fetched == {"config.json"}
        assert not any("/datasets/" in path for path in hub.requests)
        out, _, _ = dry_run(project, "02_dpo.py", *words, "--max_steps", "7", "--memory_gb", "12", real=True, **home)
        assert "--lora_r 128  (" in out
        assert "7 steps, unknown tokens: org/pairs has not been downloaded yet." in out
    assert not list((project.root / "outputs").glob("dpo-large-*"))


@pytest.mark.long
def test_steps_and_tokens_are_those_of_the_run(project: Project, demo_folder: Path) -> None:
    words = ["--recipe", "recipes/demo.yaml", "--setup_module", "", "--sft_run", ""]
    words += ["--model_id", str(demo_folder / "tiny-mistral"), "--dataset_id", str(demo_folder / "preferences")]
    words += ["--max_steps", "-1", "--train_rows", "64", "--eval_rows", "8", "--num_train_epochs", "2"]
    words += ["--per_device_train_batch_size", "4", "--eval_steps", "32"]
    out, _, _ = dry_run(project, "02_dpo.py", *words)
    (line,) = [line for line in out.splitlines() if line.startswith("About ")]
    assert line.startswith("About 64 rows to train on, 32 steps, ")
    project.run("02_dpo.py", *words, "--run_name", "counted")
    metrics = project.record("counted")["metrics"]
    assert metrics["step"] == 32
    tokens = int(line.split("32 steps, ")[1].split()[0].replace(",", ""))
    assert tokens == pytest.approx(metrics["tokens_seen"], rel=0.15)  # without the chat format's own
    again, _, _ = dry_run(project, "02_dpo.py", *words, "--learning_rate", "1e-4")
    speed = metrics["tokens_per_second"]
    assert f"at {speed:,.0f} tokens per second as in counted." in again
    logs = project.root / "outputs" / "counted" / "metrics.jsonl"
    rows = read_jsonl(logs)
    logs.write_text("".join(json.dumps(row | {"step": min(row["step"], 19)}) + "\n" for row in rows))
    ignored, _, _ = dry_run(project, "02_dpo.py", *words, "--learning_rate", "1e-4")
    assert "tokens per second" not in ignored
    sft = ["--recipe", "recipes/demo.yaml", "--setup_module", "", "--model_id", str(demo_folder / "tiny-mistral")]
    out, _, _ = dry_run(project, "01_sft.py", *sft, "--dataset_id", str(demo_folder / "instructions"))
    assert " rows to train on, " in out


def test_a_dry_run_of_what_cannot_work_is_one_line(project: Project, demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "unheard_of"}')
    tiny, pairs = str(demo_folder / "tiny-mistral"), str(demo_folder / "preferences")
    out, _, _ = dry_run(project, "02_dpo.py", "--model_id", str(tmp_path / "odd"), "--dataset_id", pairs)
    assert "Memory: unknown, because its config.json is not supported: " in out
    assert "The weights are not here yet: odd has a config.json and no weights" in out
    for words, status, said in (
        (["--lora_target_modules", "q_prj"], 2, "`--lora_target_modules q_prj` matches no linear layer of"),
        (["--max_grad_norm", "much"], 2, "--max_grad_norm takes a number, not 'much' (from flag)"),
        (["--global_batch_size", "7", "--per_device_train_batch_size", "2"], 2, "is not a multiple of"),
        (["--dataset_id", "nothing.jsonl"], 1, "does not exist. Check its path"),
    ):
        _, error, _ = dry_run(project, "02_dpo.py", "--model_id", tiny, "--dataset_id", pairs, *words, status=status)
        assert said in error
        assert "Traceback" not in error


def test_several_sets_and_long_prompts_are_counted_as_they_are_trained(
    project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i} " + "word " * 400, "chosen": "yes", "rejected": "no"} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    words = ["--model_id", str(demo_folder / "tiny-mistral"), "--dataset_id", *sets, "--eval_rows", "10"]
    words += ["--max_length", "256", "--max_prompt_length", "200", "--per_device_train_batch_size", "10"]
    words += ["--gradient_accumulation_steps", "1"]
    out, _, _ = dry_run(project, "02_dpo.py", *words, "--overlong", "truncate_prompt")
    assert "About 70 rows to train on, 7 steps, " in out
    # steps 0, 2, 4 and 6 and the reference, of 10 rows; 70 rows of 4 passes each
    assert "Evaluation: 4 times 10 rows, 15% of the computation." in out
    _, said, _ = dry_run(project, "02_dpo.py", *words, status=1)
    assert "none of the sampled rows can be used" in said


def test_the_stage_of_deepspeed_s_own_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, values = read_decoder(MISTRAL_7B), QLORA | {"tuning": "full", "deepspeed": str(tmp_path / "ds.json")}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert TrainingSpec(values, "dpo", decoder).stage == 3
    (tmp_path / "ds.json").unlink()
    with pytest.raises(SettingsError, match=r"`--deepspeed .*` cannot be read"):
        TrainingSpec(values, "dpo", decoder)


def test_suggested_flags_stay_on_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    flags = "  --gradient_checkpointing True --per_device_train_batch_size 4  (11.90 GB)"
    show(memory.MemoryEstimate({"weights": 4.13 * GB, "peak": 4.13 * GB}, {"weights": "4-bit NF4"}, [flags]))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == flags
    assert lines[1].split() == ["weights", "4.13", "GB", "4-bit", "NF4"]
