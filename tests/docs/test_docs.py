"""The pages of docs/ are correct: their commands run in a form that suits a laptop; links, quotes and tables hold."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.runs.start import settings_of
from helpers.settings.load import load_settings
from helpers.training.diagnostics import ADVICE, DIAGNOSTICS
from tests.conftest import REPO, SFT, Project
from tests.notebooks.test_data import run_all

PAGES = sorted((REPO / "docs").glob("*.md"))
STARTS = ("python", "accelerate", "deepspeed", "make", "vllm", "transformers", "lm_eval")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A DeepSpeed command changes the environment: restore it for the tests that follow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# Placeholders in commands, and what the tests use instead.
STAND_IN = {
    "outputs/sft-...": "outputs/sft-lora",
    "outputs/dpo-...": "latest",
    "outputs/merge-...": "outputs/merged",
    "--judge_model gpt-4": "--judge_model gpt-4 --base_url http://127.0.0.1:9/v1",
}
PLAIN = "--recipe recipes/demo.yaml --max_steps 2 --save_steps 2 --eval_steps 2 --completion_tokens 4"
LORA = f"{PLAIN} --sft_run None --model_id outputs/demo/tiny-mistral --tuning lora --lora_r 4"
SHORT = f"{PLAIN} --tuning lora --lora_r 4"
# Commands that are run, in this order, with the flags that are added: the demo's model, few steps, another run name.
DEMO = {
    "notebooks/01_sft.py --recipe recipes/demo.yaml": " ".join(SFT),
    "notebooks/01_sft.py --dataset_id my_pairs.jsonl": (
        f"{PLAIN} --model_id outputs/demo/tiny-mistral --tuning lora --lora_r 4 --run_name sft-lora"
    ),
    "notebooks/02_dpo.py": f"{LORA} --dry_run",
    "notebooks/02_dpo.py --dry_run --memory_gb 16": LORA,
    "notebooks/02_dpo.py --dataset_id my_pairs.jsonl": LORA,
    "notebooks/02_dpo.py --dataset_id HuggingFaceH4/ultrafeedback_binarized --dataset_split train_prefs "
    "--eval_split test_prefs": LORA,
    "notebooks/02_dpo.py --dataset_id my_pairs.jsonl --gradient_accumulation_steps 4 --num_train_epochs 3 "
    "--logging_steps 1": f"{LORA} --max_steps -1 --per_device_train_batch_size 1 --save_steps 100 --eval_steps 100",
    "notebooks/03_merge_push.py --adapter outputs/sft-...": "--run_name merged",
    "notebooks/02_dpo.py --model_id outputs/merge-... --tuning lora": (
        f"{PLAIN} --sft_run None --lora_r 4 --dataset_id my_pairs.jsonl"
    ),
    "notebooks/02_dpo.py --recipe recipes/demo.yaml --dataset_id my_pairs.jsonl --max_steps 6 --logging_steps 1": (
        "--sft_run latest"
    ),
    "notebooks/03_merge_push.py --recipe recipes/demo.yaml": "",
    "notebooks/03_merge_push.py --push_to_hub --hub_repo_id me/model --dry_run": "",
    "notebooks/04_vibes.py --recipe recipes/demo.yaml --prompts_file my_pairs.jsonl": "--max_new_tokens 4",
    "notebooks/04_vibes.py --models outputs/dpo-... --prompts_file mt_bench/question.jsonl --temperature_by_category "
    "--max_new_tokens 1024 --run_name mt-answers": "--max_new_tokens 4",
    "notebooks/05_judge.py --bench_dir mt_bench --answers_dir outputs/mt-answers --judge_model gpt-4 --dry_run": "",
    "notebooks/05_judge.py --bench_dir mt_bench --answers_dir outputs/mt-answers --judge_model gpt-4": "--dry_run",
    "notebooks/05_judge.py --bench_dir mt_bench --answers_dir outputs/mt-answers --judge_model gpt-4 --mode single": (
        "--dry_run"
    ),
    "notebooks/04_vibes.py --recipe recipes/demo.yaml": "--max_new_tokens 4 --run_name last",
    "notebooks/05_judge.py --recipe recipes/demo.yaml": "",
    "-m helpers data --dataset_id my_pairs.jsonl --out report": "--model_id outputs/demo/tiny-mistral",
    "-m helpers data --recipe recipes/demo.yaml --dataset_id my_pairs.jsonl --out report": "",
    "docs/make_pictures.py house packed": "",
}
PAIRS = "tests/notebooks/test_pairs_notebook.py"
# Commands that only go through their parser, and the test that runs a similar one.
READ = {
    "notebooks/05_judge.py --votes ~/Downloads/votes-*.json": "tests/notebooks/test_judge_notebook.py",
    "notebooks/05_judge.py --bench --models outputs/dpo-... --limit 200": "tests/evaluation/test_bench.py",
    "notebooks/05_judge.py --bench gsm8k my_task.yaml --models outputs/dpo-...": "tests/evaluation/test_bench.py",
    "notebooks/03_merge_push.py --push_to_hub --hub_repo_id me/model": "tests/hub/test_push.py",
    "notebooks/02_dpo.py --dataset_id latest-pairs": PAIRS,
    "notebooks/06_pairs.py --prompts_file prompts.jsonl --judge_module my_rules --control": PAIRS,
    "notebooks/02_dpo.py --sft_run outputs/dpo-... --dataset_id latest-pairs --run_name round-2": PAIRS,
    "notebooks/02_dpo.py --sft_run outputs/dpo-... --dataset_id outputs/pairs-.../control.jsonl --run_name control": (
        PAIRS
    ),
    "notebooks/04_vibes.py --models outputs/control outputs/round-2 --prompts_file other_prompts.jsonl": PAIRS,
    "notebooks/05_judge.py --judge_model gpt-4.1": "tests/notebooks/test_judge_notebook.py",
    "notebooks/06_pairs.py --recipe recipes/demo.yaml": PAIRS,
    "notebooks/03_merge_push.py --push_to_hub --hub_repo_id me/model --push both": "tests/hub/test_push.py",
}
# Commands of other programs, which are not installed here: not checked.
OTHERS = {
    "vllm serve outputs/merge-...",
    "transformers serve outputs/merge-...",
    "python llama.cpp/convert_hf_to_gguf.py outputs/merge-... --outfile model.gguf --outtype bf16",
    "lm_eval --model hf --model_args pretrained=outputs/merge-...,dtype=auto --tasks ifeval --apply_chat_template",
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@cache
def commands() -> dict[str, str]:
    """Each command of the pages, on one line and without its comment, and its page."""
    pages = {}
    for page in PAGES:
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.partition(" #")[0].split()
                first = next((word for word in words if "=" not in word), "")
                if first in STARTS:
                    pages[" ".join(words)] = page.name
    return pages


def of_python() -> dict[str, str]:
    """What follows `python` in our own commands."""
    own = {command: page for command, page in commands().items() if command not in OTHERS}
    return {command.removeprefix("python "): page for command, page in own.items() if command.startswith("python ")}


def launched() -> list[str]:
    return [command for command in commands() if {"accelerate", "deepspeed"} & set(command.split()[:2])]


def parse_command(words: list[str]) -> Any:
    """The settings of the notebook `words[0]` with the other words as flags; nothing is run."""
    return load_settings(settings_of(REPO / words[0]), {}, [*words[1:], "--setup_module", "None"])


def test_every_command_has_a_demo_form() -> None:
    known = set(DEMO) | set(READ)
    new = {command: page for command, page in of_python().items() if command not in known}
    assert not new, f"no demo form: add one to the tables at the top of tests/docs/test_docs.py for {new}"
    gone = (known - set(of_python())) | (OTHERS - set(commands()))
    assert not gone, f"no page has these any more: remove them from the tables of tests/docs/test_docs.py: {gone}"
    rest = {c for c in commands() if c.split()[0] not in ("python", "make")} - OTHERS - set(launched())
    assert not rest, f"no test checks these: {rest}"


def test_flags_of_every_command_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for command in of_python():
        if command.startswith("notebooks/"):
            settings = parse_command(shlex.split(command))
            given = [name for name in settings.sources if settings.sources[name] == "flag"]
            assert len(given) == len(re.findall(r" --\w", command)) + 1, command
    capsys.readouterr()


def test_launched_commands_name_configurations_and_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert len(launched()) >= 5
    for command in launched():
        words = shlex.split(command)
        while "=" in words[0]:
            assert words.pop(0) == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"
        if words[0] == "deepspeed":  # its launcher's own flags: tests/notebooks/test_recipes.py starts it
            words = words[words.index("notebooks/02_dpo.py") :]
            assert parse_command(words).trl["deepspeed"] == "ds_config_stage1.json"
            continue
        given = launch_command_parser().parse_args(words[2:])
        content = yaml.safe_load((REPO / given.config_file).read_text())
        assert content["distributed_type"] in ("MULTI_GPU", "DEEPSPEED", "FSDP")
        parse_command([given.training_script, *given.training_script_args])
    capsys.readouterr()


def test_a_flag_that_is_misspelt_would_be_found() -> None:
    from helpers.core import SettingsError

    with pytest.raises(SettingsError, match="did you mean --dataset_id"):
        parse_command(shlex.split("notebooks/02_dpo.py --datset_id my_pairs.jsonl"))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets, page.name


def test_links_pictures_and_files_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.is_file(), f"{page.name}: {link}"
            if heading:
                there = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                         for h in re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)]  # fmt: skip
                assert heading in there, f"{page.name}: {link}"
        for path in re.findall(r"`((?:tests|helpers|recipes|benchmarks|notebooks|docs)/[\w./-]+)`", text):
            assert (REPO / path).exists(), f"{page.name}: {path}"
    assert (REPO / "docs" / "pictures" / "house.png").stat().st_size < 150_000
    assert all(f"docs/{page.name}" in (REPO / "README.md").read_text() for page in PAGES)


def texts_in(*files: Path) -> list[str]:
    """Every string of a program; the replacement fields of f-strings are "…"."""
    texts = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(" ".join(node.value.split()))
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append(" ".join("".join(map(str, parts)).split()))
    return texts


def quotes(section: str) -> list[list[str]]:
    """Rows of the tables of a part of troubleshooting.md: the quoted message, and the other cells."""
    rows = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)
    cells = [row.split(" | ") for row in rows if row.startswith("`")]
    return [[re.findall(r"(`+)(.+?)\1", first)[0][1].strip(), *rest] for first, *rest in cells]


def troubleshooting() -> tuple[str, str, str]:
    """Its parts: our own messages, those of libraries, and symptoms."""
    text = (REPO / "docs" / "troubleshooting.md").read_text()
    ours, _, rest = text.partition("## Messages from libraries")
    others, _, symptoms = rest.partition("## The loss is fine")
    assert others
    assert symptoms
    return ours, others, symptoms


def test_every_quoted_message_is_in_our_code() -> None:
    texts = texts_in(*(REPO / "helpers").rglob("*.py"), *(REPO / "notebooks").glob("*.py"))
    lines = [row[0] for row in quotes(troubleshooting()[0])]
    assert len(lines) > 30
    assert min(len(line.replace("…", "").strip()) for line in lines) > 8
    unknown = [line for line in lines if not any(line in text for text in texts)]
    assert not unknown, "our code does not print:\n" + "\n".join(unknown)


def test_every_message_of_a_library_is_in_the_file_of_the_table() -> None:
    packages = Path(inspect.getfile(yaml)).parents[1]
    rows = quotes(troubleshooting()[1])
    assert rows
    for line, file, _ in rows:
        assert any(line in text for text in texts_in(packages / file)), f"{file} does not have {line!r}"


def test_the_suggestions_are_those_of_the_diagnostics() -> None:
    rows = re.findall(r"^\| .+ \| `(\w+)` \| (.+) \|$", troubleshooting()[2], re.MULTILINE)
    assert [name for name, _ in rows] == list(DIAGNOSTICS)
    for name, advice in rows:
        assert set(re.findall(r"--\w+", advice)) == set(re.findall(r"--\w+", " ".join(ADVICE[name]["try"]))), name


def test_the_design_page_names_every_overridden_method_of_trl() -> None:
    from trl import DPOTrainer

    from helpers.training.microbatches import MicroBatchDPOTrainer
    from helpers.training.trainer import SharedPrefixDPOTrainer, TokenizedDPOTrainer

    text = (REPO / "docs" / "design.md").read_text()
    for ours in (TokenizedDPOTrainer, SharedPrefixDPOTrainer, MicroBatchDPOTrainer):
        methods = [name for name in vars(ours) if callable(vars(ours)[name]) and hasattr(DPOTrainer, name)]
        assert methods
        for name in methods:
            assert f"`DPOTrainer.{name}`" in text, name


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the files that the commands assume: pairs, a dataset with splits, MT-Bench."""
    from datasets import Dataset, DatasetDict

    project = Project(tmp_path_factory.mktemp("project"))
    pairs = [
        {"prompt": f"What is {i} plus 3?", "chosen": f"{i} plus 3 is {i + 3}.", "rejected": f"Who knows, {i}."}
        for i in range(50)
    ]
    (project.root / "my_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    splits = {"train_prefs": Dataset.from_list(pairs[:40]), "test_prefs": Dataset.from_list(pairs[40:])}
    DatasetDict(splits).save_to_disk(str(project.root / "HuggingFaceH4" / "ultrafeedback_binarized"))
    questions = [
        {"question_id": 81 + i, "category": "writing", "turns": [f"What is {i} plus 3?", "And plus 4?"]}
        for i in range(2)
    ]
    (project.root / "mt_bench").mkdir()
    (project.root / "mt_bench" / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (project.root / "docs" / "pictures").mkdir(parents=True)
    (project.root / "docs" / "make_pictures.py").write_text((REPO / "docs" / "make_pictures.py").read_text())
    return project


def demo_form(command: str, more: str) -> list[str]:
    for theirs, ours in STAND_IN.items():
        command = command.replace(theirs, ours)
    return shlex.split(f"{command} {more}")


@pytest.mark.long
def test_the_commands_run_in_their_demo_form(project: Project) -> None:
    forms = {command: demo_form(command, more) for command, more in DEMO.items()}
    notebooks = {c: words for c, words in forms.items() if words[0].startswith("notebooks/")}
    jobs = [(words[0].removeprefix("notebooks/"), words[1:]) for words in notebooks.values()]
    ended, said = run_all(project, jobs, OPENAI_API_KEY="none")
    for command, words, end, lines in zip(notebooks, notebooks.values(), ended, said, strict=True):
        expected = "CleanExit: " if "--dry_run" in words else "well"
        assert end.startswith(expected), f"{command}: {end}\n" + "\n".join(lines[-20:])
    assert project.record("merged")["status"] == "finished"
    for words in forms.values():
        if not words[0].startswith("notebooks/"):
            done = project.python(*words)
            assert done.returncode == 0, done.stderr
    assert (project.root / "report" / "data_report.png").is_file()
    made = [f.name for f in (project.root / "docs" / "pictures").iterdir()]
    assert sorted(made) == ["house.png", "packed.png"]


@pytest.mark.long
def test_a_dry_run_of_several_processes_counts_a_share_of_the_weights(
    project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    config = yaml.safe_load((REPO / "recipes" / "accelerate" / "zero3.yaml").read_text())
    config |= {"num_processes": 2, "main_process_port": 29500 + os.getpid() % 500}
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    given = ["--model_id", str(demo_folder / "tiny-mistral"), "--dataset_id", str(demo_folder / "preferences")]
    given += ["--tuning", "full", "--dry_run"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "zero3.yaml")]
    env = project.env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    notebook = str(project.root / "notebooks" / "02_dpo.py")
    shared, alone = (
        subprocess.run([*words, notebook, *given], cwd=project.root, env=env, capture_output=True, text=True)
        for words in (launcher, [sys.executable])
    )
    sizes = [float(re.findall(r"^weights +([\d.]+) MB", done.stdout, re.MULTILINE)[0]) for done in (shared, alone)]
    assert sizes[0] < sizes[1] / 2 + 0.01, shared.stdout + shared.stderr[-2000:]
