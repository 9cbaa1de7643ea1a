"""Every recipe, and the training commands of the systems that this one grew from, on tiny models."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.core import SettingsError
from helpers.models.chat import render, set_chat_template
from helpers.settings.load import load_settings
from helpers.settings.sources import SECTIONS
from tests import fake_hub as local
from tests.conftest import REPO, Project, code_cells, marks
from tests.data.test_formats import ROWS
from tests.families import write_family
from tests.notebooks.test_data import SFT_ROWS, drive, run_all, several
from tests.notebooks.test_three_ways import _settings_class

RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
NOTEBOOKS = {"sft": "01_sft.py", "dpo": "02_dpo.py", "merge": "03_merge_push.py", "vibes": "04_vibes.py",
             "judge": "05_judge.py"}  # fmt: skip
# Recipe → architecture of its model, and sets in the schema of its own: for SFT, and for DPO.
MADE_OF: dict[str, tuple[str, list[str], list[str]]] = {
    "mistral-7b-ultrafeedback": ("mistral", [], ["argilla/ultrafeedback-binarized-preferences-cleaned"]),
    "llama2-7b-alpacafarm": ("llama", ["tatsu-lab/alpaca"], ["tatsu-lab/alpaca_farm"]),
    "tulu2-13b-ultrafeedback": ("llama", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "zephyr-chatml": (
        "mistral",
        ["HuggingFaceH4/ultrachat_200k"],
        ["berkeley-nest/Nectar", "Intel/orca_dpo_pairs", "HuggingFaceH4/ultrafeedback_binarized"],
    ),
    "pythia-2.8b-hh": ("gpt_neox", ["Anthropic/hh-rlhf"], ["Anthropic/hh-rlhf"]),
    "tulu2-13b-ultrafeedback with Qwen": ("qwen2", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "qwen3-4b": ("qwen3", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "llama-3.1-8b": ("llama", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "smollm3-3b": ("smollm3", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "gemma-3-4b-it": ("gemma3", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "ministral-8b": ("mistral", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "smollm2-1.7b-t4": ("llama", [], ["HuggingFaceH4/ultrafeedback_binarized"]),
    "smollm2-135m": ("llama", [], ["pairs"]),
    "real": ("llama", [], ["pairs"]),
}
# Families that have a vision part, or other layers, are built in tests/families.py.
FAMILY = {"qwen3": "Qwen3 4B (tied)", "smollm3": "SmolLM3", "gemma3": "Gemma 3 4B with vision"}
# The roads to the merge and to the Hub are walked by recipe for these; the matrix of families walks them by family.
WALKED = list(MADE_OF)[:6]
SPLITS = ("train", "train_sft", "train_prefs", "test_prefs", "test", "preference", "sft")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of these tests' own: what they train is not the "latest" of others."""
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def models(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random tiny model of each architecture, with the demo's tokenizer and no template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    tokenizer.chat_template = None
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    made = {}
    for kind in ("mistral", "llama", "gpt_neox", "qwen2"):
        groups = {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **groups, **ids))
        made[kind] = tmp_path_factory.mktemp("models") / f"tiny-{kind}"
        model.save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
    for kind, family in FAMILY.items():
        made[kind] = write_family(tmp_path_factory.mktemp("models") / f"tiny-{kind}", family, tokenizer)
    return made


def write_set(folder: Path, name: str) -> str:
    """A set in the schema of the real one, with whatever splits a recipe may ask for; no prompt is in two of them."""
    rows = several(SFT_ROWS.get(name) or ROWS[name][1]).to_list()
    path = folder / name.replace("/", "--")
    if not path.exists():
        half = len(rows) // 2
        sides = {s: rows[half:] if s.startswith("test") else rows[:half] for s in SPLITS}
        DatasetDict({s: Dataset.from_list(r) for s, r in sides.items()}).save_to_disk(path)
    return str(path)


def train_two_steps(models: dict[str, Path], project: Project, folder: Path, names: list[str]) -> None:
    """Train by each recipe, with SFT first where it has SFT; every run finishes and accounts for every row."""
    few = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "max_length": 200, "per_device_train_batch_size": 2}
    few |= {"completion_tokens": 4}
    jobs: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        kind, sft, dpo = MADE_OF[name]
        recipe = {"recipe": f"recipes/{name.partition(' ')[0]}.yaml", "model_id": models[kind]}
        run = name.replace(" ", "-")
        if sft:
            (data,) = (write_set(folder, s) for s in sft)
            jobs.append(("01_sft.py", recipe | few | {"dataset_id": data, "run_name": f"{run}-sft"}))
        given = recipe | few | {"run_name": f"{run}-dpo", "max_prompt_length": 150}
        if sft:
            del given["model_id"]
            given["sft_run"] = f"{run}-sft"
        entries = [write_set(folder, s) for s in dpo]
        if len(dpo) > 1:  # with the splits that the recipe gives to each
            splits = [
                entry["split"] for entry in yaml.safe_load((REPO / given["recipe"]).read_text())["dpo"]["dataset_id"]
            ]
            entries = [json.dumps({"id": e, "split": s}) for e, s in zip(entries, splits, strict=True)]
        jobs.append(("02_dpo.py", given | {"dataset_id": entries}))
    assert drive(project, jobs) == ["well"] * len(jobs)
    for _, given in jobs:
        record = project.record(str(given["run_name"]))
        assert record["status"] == "finished"
        assert record["metrics"]["step"] == 2
        assert record["data"]["kept"] + record["data"]["dropped"] == record["data"]["read"]


def walk_to_the_merge(
    models: dict[str, Path], project: Project, folder: Path, name: str, tuning: str = "qlora", **env: str
) -> dict[str, dict[str, Any]]:
    """Train an adapter by a recipe, merge it into both bases, and return what was verified, by base. With `env`, the
    base is org/KIND on its Hub."""
    kind, sft, dpo = MADE_OF[name]
    run, recipe = f"{name.replace(' ', '-')}-{tuning}{'-online' * bool(env)}", f"recipes/{name.partition(' ')[0]}.yaml"
    given = {"recipe": recipe, "tuning": tuning, "max_steps": 6, "max_length": 200, "completion_tokens": 4,
             "per_device_train_batch_size": 2, "learning_rate": 0.02, "warmup_steps": 0, "eval_strategy": "no",
             "save_strategy": "no"}  # fmt: skip
    size = "global_batch_size" if "global_batch_size" in (REPO / recipe).read_text() else "gradient_accumulation_steps"
    few = [word for key, value in (given | {size: 2}).items() for word in (f"--{key}", str(value))]
    start = ["--model_id", f"org/{kind}" if env else str(models[kind])]
    if sft:
        data = ["--dataset_id", write_set(folder, sft[0])]
        project.run("01_sft.py", *few, *start, *data, "--run_name", f"{run}-sft", **env)
        start = ["--sft_run", f"{run}-sft"]
    pairs = write_set(folder, dpo[0])
    data = ["--dataset_id", pairs, "--max_prompt_length", "150"]
    project.run("02_dpo.py", *few, *start, *data, "--run_name", run, **env)
    records = {}
    for base in ("dequantized", "original") if tuning == "qlora" else ("original",):
        flags = ["--recipe", recipe, "--run", f"outputs/{run}", "--merge_base", base, "--max_kl", "50"]
        done = project.run("03_merge_push.py", *flags, "--run_name", f"{run}-{base}", **env)
        assert "PEFT merges" not in done.stdout
        records[base] = project.record(f"{run}-{base}")
        assert records[base]["status"] == "finished"
        merged = AutoModelForCausalLM.from_pretrained(project.root / "outputs" / f"{run}-{base}")
        assert merged.config.model_type == kind
    return records


@pytest.mark.long
def test_qlora_by_the_recipe_of_pythia_is_merged_into_both_bases(
    models: dict[str, Path], project: Project, tmp_path: Path
) -> None:
    records = walk_to_the_merge(models, project, tmp_path, "pythia-2.8b-hh")
    assert records["dequantized"]["metrics"]["kl"] < 1e-12 < records["original"]["metrics"]["kl"]
    for record in records.values():
        assert record["metrics"]["kl"] < record["verification"]["base alone"]["kl"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks(False, "7b" in name)) for name in WALKED if name != "pythia-2.8b-hh"],
)
def test_lora_by_every_other_recipe_is_merged(
    name: str, models: dict[str, Path], project: Project, tmp_path: Path
) -> None:
    (record,) = walk_to_the_merge(models, project, tmp_path, name, "lora").values()
    assert record["metrics"]["kl"] < min(1e-6, record["verification"]["base alone"]["kl"])


LOAD_BACK = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from helpers.models.plan import quantization_config
prompts, repo = json.loads(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(repo)
merged = AutoModelForCausalLM.from_pretrained(repo)
options = {"quantization_config": quantization_config("4", torch.float32), "dtype": torch.float32}
policy = AutoPeftModelForCausalLM.from_pretrained(repo + "-adapter", **options)
for model in (merged, policy):
    answers = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.eval().generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
        answers.append(tokenizer.decode(out, skip_special_tokens=True).strip())
    print(json.dumps(answers))
"""
RULES = """
import dataclasses

@dataclasses.dataclass
class Score:
    is_short: bool

def score(answer, question):
    return Score(len(answer) < 20)

def compare(first, second, question):
    return "tie" if len(first) == len(second) else "win" if len(second) < len(first) else "loss"
"""
PROMPTS = ["What is 2 plus 3?", "Name a fruit.", "Why?"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(False, place % 2 == 0)) for place, name in enumerate(WALKED)]
)
def test_the_road_of_every_recipe_ends_on_the_hub_with_the_trained_policy(
    name: str, models: dict[str, Path], project: Project, hub: local.Hub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    kind = MADE_OF[name][0]
    hub.add("models", f"org/{kind}", {file.name: file.read_bytes() for file in models[kind].iterdir()})
    online = hub_env | {"HF_TOKEN": local.TOKEN}
    walk_to_the_merge(models, project, tmp_path, name, "qlora", **online)
    run, recipe = f"{name.replace(' ', '-')}-qlora-online", f"recipes/{name.partition(' ')[0]}.yaml"
    (project.root / "my_rules.py").write_text(RULES)
    given = ["--recipe", recipe, "--run_name"]
    folders = [f"outputs/{run}{part}" for part in ("", "-dequantized", "-original")]
    asked = ["--prompts", *PROMPTS, "--max_new_tokens", "8", "--models", *folders]
    project.run("04_vibes.py", *given, f"{run}-answers", *asked, **online)
    project.run("05_judge.py", *given, f"{run}-judged", "--answers_dir", f"outputs/{run}-answers", "--judge_module",
                "my_rules", **online)  # fmt: skip
    assert project.record(f"{run}-judged")["status"] == "finished"
    repo = f"me/{kind}-{len(name)}"
    merge = ["--run", f"outputs/{run}", "--merge_base", "dequantized", "--max_kl", "50"]
    push = ["--push_to_hub", "--push", "both", "--hub_repo_id", repo, "--license", "mit"]
    project.run("03_merge_push.py", *given, f"{run}-dequantized", *merge, *push, **online)
    files = project.root / "outputs" / f"{run}-answers" / "model_answer"
    answers = {file.stem: [json.loads(line)["choices"][0]["turns"][0] for line in file.read_text().splitlines()]
               for file in files.glob("*.jsonl")}  # fmt: skip
    done = project.python("-c", LOAD_BACK, json.dumps(PROMPTS), repo, **online)
    assert done.returncode == 0, done.stderr[-2000:]
    by_transformers, by_peft = map(json.loads, done.stdout.strip().splitlines()[-2:])
    assert by_transformers == by_peft == answers[run] == answers[f"{run}-dequantized"]


@pytest.mark.long
def test_a_recipe_of_two_steps_and_three_sets_trains(models: dict[str, Path], project: Project, tmp_path: Path) -> None:
    train_two_steps(models, project, tmp_path, ["zephyr-chatml"])
    zephyr = project.record("zephyr-chatml-dpo")
    assert zephyr["data"]["format"] == "ranked, orca, messages"
    assert zephyr["data"]["read"] == 18
    state = project.root / "outputs" / "zephyr-chatml-dpo" / "checkpoint-2" / "trainer_state.json"
    assert json.loads(state.read_text())["train_batch_size"] == 2


@pytest.mark.long
def test_every_other_recipe_trains_two_steps_of_each_kind(
    models: dict[str, Path], project: Project, tmp_path: Path
) -> None:
    train_two_steps(models, project, tmp_path, [name for name in MADE_OF if name != "zephyr-chatml"])
    assert project.record("tulu2-13b-ultrafeedback-dpo")["settings"]["global_batch_size"] == 128


def test_all_recipes_are_there_and_nothing_in_them_is_unread(project: Project) -> None:
    assert {f.stem for f in RECIPES} == {name.partition(" ")[0] for name in MADE_OF} | {"demo"}
    for file in RECIPES:
        content = yaml.safe_load(file.read_text())
        steps = [step for step in SECTIONS if step in content and step in NOTEBOOKS]
        assert steps
        for step in steps:
            settings = _settings_class(code_cells(REPO / "notebooks" / NOTEBOOKS[step]))
            loaded = load_settings(settings, {}, ["--recipe", str(file), "--setup_module", ""])
            read = {name for name, source in loaded.sources.items() if source == "recipe"}
            assert set(content[step]) <= read | {"setup_module"}
        for line in file.read_text().splitlines():  # the commands that it opens with name it
            if "--recipe" in line and "..." not in line:
                assert f"recipes/{file.name}" in line, line


def test_a_key_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dpo:\n  dpo_betta: 0.1\n")
    settings = _settings_class(code_cells(REPO / "notebooks" / "02_dpo.py"))
    with pytest.raises(SettingsError, match=r"unknown setting dpo_betta .recipe.: did you mean --dpo_beta"):
        load_settings(settings, {}, ["--recipe", str(recipe)])


# As they are printed in those systems' own instructions, with the file's name changed and paths in capitals.
SFT_000 = """01_sft.py --model_name MODEL --dataset_path SFT_DATA --training_args.output_dir OUT --streaming False
    --training_args.gradient_checkpointing --training_args.save_steps 155 --training_args.logging_steps 1
    --training_args.remove_unused_columns False --training_args.report_to None --training_args.bf16
    --training_args.num_train_epochs 3 --training_args.max_steps -1 --training_args.per_device_train_batch_size 2
    --training_args.per_device_eval_batch_size 2 --training_args.gradient_accumulation_steps 1 --max_seq_length 1024
    --training_args.weight_decay 0. --training_args.warmup_ratio 0.03 --training_args.learning_rate 2e-5"""
DPO_000 = """02_dpo.py --model_name_or_path MODEL --dataset_path FARM --beta 0.2 --training_args.output_dir OUT
    --max_prompt_length 512 --max_length 1024 --training_args.gradient_checkpointing --training_args.save_steps 150
    --training_args.logging_steps 1 --training_args.remove_unused_columns False --training_args.report_to None
    --training_args.bf16 --training_args.num_train_epochs 3 --training_args.per_device_train_batch_size 1
    --training_args.per_device_eval_batch_size 1 --training_args.gradient_accumulation_steps 1
    --training_args.weight_decay 0. --training_args.warmup_ratio 0.03 --training_args.learning_rate 2e-5"""
DPO_002 = """02_dpo.py --max_length 6000 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 4 --model_name_or_path MODEL --output_dir OUT --deepspeed STAGE"""
DPO_004 = """02_dpo.py --model_id MODEL --dataset_id PAIRS --num_train_epochs 1 --learning_rate 5e-05 --dpo_beta 0.1
    --output_dir OUT --run_name by_004 --merge_adaptors"""


@pytest.mark.long
def test_commands_of_the_systems_that_it_grew_from_run(
    models: dict[str, Path], project: Project, tmp_path: Path
) -> None:
    farm = tmp_path / "alpaca_farm"
    farm.mkdir()
    several(ROWS["tatsu-lab/alpaca_farm"][1]).to_json(farm / "alpaca_noisy_multi_preference.json")
    several(ROWS["pairs"][1]).to_json(tmp_path / "pairs.jsonl")
    several(SFT_ROWS["tatsu-lab/alpaca"]).to_json(tmp_path / "talks.jsonl")
    paths = {
        "MODEL": models["mistral"], "FARM": farm, "PAIRS": tmp_path / "pairs.jsonl", "OUT": tmp_path / "out",
        "SFT_DATA": tmp_path / "talks.jsonl",
    }  # fmt: skip
    texts = (SFT_000, DPO_000, DPO_004)
    commands = []
    for text in texts:
        notebook, *words = [str(paths.get(word, word)) for word in shlex.split(text)]
        # one step of warm-up would be all that nine pairs give, and an adapter that has learned nothing is not merged
        more = ["--gradient_accumulation_steps", "1"] if text == DPO_004 else []
        commands.append((notebook, words + more))
    ended, said = run_all(project, commands)
    assert ended == ["well"] * len(commands)
    for text, lines in zip(texts, said, strict=True):
        one_note_for_each_older_name(text, lines)
    finished = [json.loads(f.read_text()) for f in (tmp_path / "out").glob("*/run.json")]
    assert [r["status"] for r in finished] == ["finished"] * len(finished)
    by_beta = {r["settings"].get("dpo_beta"): r["settings"] for r in finished if r["step"] == "dpo"}
    assert by_beta[0.2]["max_prompt_length"] == 512
    assert by_beta[0.2]["warmup_steps"] == 0.03
    assert (tmp_path / "out" / "by_004" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "out").glob("merge-*/model.safetensors"))


OLD = {"model_name", "dataset_path", "max_seq_length", "streaming"}


def one_note_for_each_older_name(text: str, said: list[str]) -> None:
    (notes,) = [line.removeprefix("note: ").split("; ") for line in said if line.startswith("note: ")] or [[]]
    flags = {w[2:] for w in shlex.split(text) if w.startswith("--")}
    older = {name for name in flags if name.startswith("training_args.") or name in OLD}
    for name in sorted(older):
        assert sum(f"--{name} " in note for note in notes) == 1, (name, notes)
    assert len(notes) == len(older), notes


@pytest.mark.long
def test_the_command_of_002_runs_under_its_own_launcher(
    models: dict[str, Path], project: Project, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    stage = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}} | dict.fromkeys(auto, "auto")
    (tmp_path / "ds_config_stage1.json").write_text(json.dumps(stage))
    several(ROWS["pairs"][1]).to_json(tmp_path / "pairs.jsonl")
    paths = {"MODEL": models["mistral"], "OUT": tmp_path / "out", "STAGE": tmp_path / "ds_config_stage1.json"}
    notebook, *words = [str(paths.get(word, word)) for word in shlex.split(DPO_002)]
    # its script names its datasets itself; more than one process needs GPUs: accelerate counts one where there is none
    words += ["--dataset_id", str(tmp_path / "pairs.jsonl"), "--max_steps", "2"]
    port = str(29500 + os.getpid() % 500)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    env = project.env | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*launcher, str(project.root / "notebooks" / notebook), *words], cwd=project.root, env=env,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one_note_for_each_older_name(DPO_002, done.stderr.splitlines())
    (file,) = (tmp_path / "out").glob("*/run.json")
    assert json.loads(file.read_text())["status"] == "finished"
    assert list(file.parent.glob("checkpoint-2/global_step2/*optim_states.pt"))  # DeepSpeed's own


def test_recipes_follow_their_sources() -> None:
    recipes = {file.stem: yaml.safe_load(file.read_text()) for file in RECIPES}
    farm, tulu, zephyr = (recipes[n] for n in ("llama2-7b-alpacafarm", "tulu2-13b-ultrafeedback", "zephyr-chatml"))
    assert (farm["lr_scheduler_type"], farm["max_grad_norm"]) == ("linear", 1.0)
    assert farm["sft"]["per_device_eval_batch_size"] == 2
    assert (tulu["dpo"]["lr_scheduler_type"], tulu["dpo"]["max_grad_norm"]) == ("linear", 1.0)
    assert (zephyr["tuning"], zephyr["dpo"]["learning_rate"]) == ("full", 1e-6)


def test_baichuan_s_template_opens_each_turn_with_its_token(demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    set_chat_template(tokenizer, "recipes/baichuan2.jinja")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert render(tokenizer, talk) == "<reserved_106>Hi<reserved_107>Yo</s>"
    assert render(tokenizer, talk[:1], prompt=True) == "<reserved_106>Hi<reserved_107>"
