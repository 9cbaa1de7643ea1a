"""Each family that people align, as a tiny random model, through 01, 02, 03 and 04; docs/models.md has what came out.

DOCS_TABLE=1 writes the rows of the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.core import read_jsonl
from tests.conftest import REPO, Project, marks
from tests.families import FAMILIES, check_row, write_family
from tests.notebooks.test_data import DRIVER
from tests.training.pairs import check_same_logs

PAGE = REPO / "docs" / "models.md"
FEW = {
    "max_steps": 2, "train_rows": 16, "eval_rows": 4, "max_length": 200, "lora_r": 4, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "eval_strategy": "no", "save_strategy": "no", "completion_steps": 0,
    "learning_rate": 0.01, "warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip
# The long tests have one family of each kind of layers, and the matrix the others.
OFTEN = {"Llama 3.1", "SmolLM3", "Mistral 0.1 (sliding)", "Qwen3 MoE", "Qwen3.5 with vision",
         "Gemma 3 4B with vision", "Phi-3 and 4", "GPT-NeoX (Pythia)"}  # fmt: skip
Job = tuple[str, dict[str, Any]]


def run_jobs(project: Project, jobs: list[Job]) -> list[str]:
    """Run notebooks one after another in one process; what each printed. All of them end well."""
    commands = []
    for notebook, given in jobs:
        values = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        commands.append((notebook, [str(word) for name, each in values.items() for word in (f"--{name}", *each)]))
    done = project.python("-c", DRIVER, input=json.dumps(commands))
    parts = re.split(r"^ENDED (.*)\n", done.stdout, flags=re.MULTILINE)
    for (notebook, given), end in zip(jobs, parts[1::2], strict=True):
        assert json.loads(end) == "well", (notebook, given["run_name"])
    return parts[:-1:2]


def jobs_of(tuning: str, base: Path, demo: Path) -> list[Job]:
    """LoRA as published, 02 after 01, with shared prefixes and without; QLoRA with two tokens that ChatML adds."""
    data = {"dataset_id": demo / "preferences", "max_prompt_length": 150, "tuning": tuning}
    template = {} if tuning == "lora" else {"chat_template": "chatml"}
    start = {"sft_run": "outputs/lora-sft"} if tuning == "lora" else {"model_id": base}
    sft = {"model_id": base, "dataset_id": demo / "instructions", "dataset_split": "train", "tuning": tuning}
    dpo = [FEW | template | start | data | {"run_name": tuning}]
    if tuning == "lora":
        dpo.append(dpo[0] | {"run_name": "lora-stock", "shared_prefix": "off"})
    return [
        ("01_sft.py", FEW | template | sft | {"run_name": f"{tuning}-sft"}),
        *(("02_dpo.py", given) for given in dpo),
        ("03_merge_push.py", {"run": f"outputs/{tuning}", "run_name": f"{tuning}-merged"}),
        ("04_vibes.py", {"models": [f"outputs/{tuning}", f"outputs/{tuning}-merged"], "run_name": f"{tuning}-answers",
                         "prompts": ["What is 2 plus 3?", "Why?"], "max_new_tokens": 6}),
    ]  # fmt: skip


def check_same_curves(project: Project) -> None:
    """Every logged number with shared prefixes is that without."""
    shared, stock = (read_jsonl(project.root / "outputs" / run / "metrics.jsonl") for run in ("lora", "lora-stock"))
    assert len(shared) >= 2
    check_same_logs(shared, stock, 2e-4)


def check_merged(folder: Path, base: Path, tied: bool, again: Path) -> None:
    """The merge loads as one tied or untied model, and so does what it saves."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == AutoModelForCausalLM.from_pretrained(base).config.model_type
    model.save_pretrained(again)
    for each in (model, AutoModelForCausalLM.from_pretrained(again)):
        one, two = each.get_input_embeddings().weight, each.get_output_embeddings().weight
        assert (one.data_ptr() == two.data_ptr()) == tied
        assert len(AutoTokenizer.from_pretrained(folder)) <= len(one)
        assert torch.equal(one, model.get_input_embeddings().weight)
        assert torch.equal(two, model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", [pytest.param(each, marks=marks(False, each in OFTEN)) for each in FAMILIES])
def test_a_family_is_tuned_aligned_merged_and_answers(family: str, tmp_path: Path, demo_folder: Path) -> None:
    _, tied, _ = FAMILIES[family]
    project = Project(tmp_path / "project")
    base = write_family(tmp_path / "base", family, AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral"))
    shared, merges = set(), set()
    for tuning in ("lora", "qlora"):
        jobs = jobs_of(tuning, base, demo_folder)
        printed = run_jobs(project, jobs)
        shared |= set(re.findall(r"^Shared prefix: (on|off, because .*?\w)[,.]", printed[1], re.MULTILINE))
        merges.add("PEFT" if "PEFT merges" in printed[-2] else "streamed")
        record = project.record(f"{tuning}-merged")
        assert record["metrics"]["kl"] < min(1e-5, record["verification"]["base alone"]["kl"])
        check_merged(project.root / "outputs" / f"{tuning}-merged", base, tied, tmp_path / f"again-{tuning}")
        folder = project.root / "outputs" / f"{tuning}-answers" / "model_answer"
        policy, merged = (read_jsonl(folder / f"{name}.jsonl") for name in (tuning, f"{tuning}-merged"))
        assert [row["choices"][0]["turns"] for row in policy] == [row["choices"][0]["turns"] for row in merged]
    check_same_curves(project)
    (sharing,), (merge,) = shared, merges
    sharing = "exact" if sharing == "on" else sharing.replace("off, because", "off:")
    merging = "by PEFT" if merge == "PEFT" else "one tensor at a time"
    check_row(family, sharing, merging, "stay tied" if tied else "untied")


def test_the_table_has_every_family() -> None:
    table = [line.split(" | ")[0].strip("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [each for each in table if each in FAMILIES] == list(FAMILIES)
