"""SIGKILL at named calls of every notebook: the same command then gives what an undisturbed run gives (long)."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project
from tests.notebooks.test_signals import CALLS, prepare, stop
from tests.training.test_resume import FLAGS as DPO_FLAGS
from tests.training.test_resume import outcome

pytestmark = pytest.mark.long
DEMO = ["--recipe", "recipes/demo.yaml"]
SFT_FLAGS = [
    *DEMO, "--max_steps", "7", "--train_rows", "64", "--eval_rows", "8", "--save_steps", "3", "--eval_steps", "7",
    "--logging_steps", "2", "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "4",
]  # fmt: skip
FLAGS = {
    "01_sft.py": SFT_FLAGS,
    "02_dpo.py": DPO_FLAGS,
    "03_merge_push.py": DEMO,
    "04_vibes.py": [*DEMO, "--rows", "6", "--batch_size", "2", "--do_sample"],
    "05_judge.py": [*DEMO, "--answers_dir", "outputs/asked"],
    "06_pairs.py": [*DEMO, "--rows", "6", "--num_samples", "2", "--batch_size", "2", "--judge_module", "by_length"],
}
# Besides the calls of test_signals, where a signal would be kept until a step ends.
TRAINING = [
    "transformers.trainer:Trainer.training_step 1", "transformers.trainer:Trainer.training_step 5",
    "transformers.trainer:Trainer.training_step 7", "transformers.trainer:Trainer._save_optimizer_and_scheduler 1",
    "transformers.trainer:Trainer._save_rng_state 2", "helpers.runs.checkpoints:write_json 1",
    "transformers.trainer:Trainer._save_checkpoint 3", "helpers.training.resume:ResumeCallback.on_save 3",
    "helpers.training.callbacks:CheckpointCallback.on_save 3", "transformers.trainer:rotate_checkpoints 1",
    "transformers.trainer:Trainer._finalize_training 1", "transformers.trainer:Trainer.evaluate 1",
    "helpers.runs.curves:final_metrics 1", "helpers.models.adapters:save_model 1", "helpers.runs.run:Run.finish 1",
    "helpers.runs.checkpoints:hash_files 1", "helpers.runs.curves:Curves.read 1", "helpers.runs.report:show_report 1",
]  # fmt: skip
MORE = {
    "01_sft.py": TRAINING,
    "02_dpo.py": TRAINING,
    "03_merge_push.py": ["helpers.runs.run:Run.finish 1"],
    "04_vibes.py": ["helpers.evaluation.answers:JsonlStore.add 1", "helpers.evaluation.answers:JsonlStore.add 4",
                    "helpers.runs.run:Run.finish 1"],
    "05_judge.py": ["helpers.runs.run:Run.finish 1", "helpers.core:atomic_write 2"],
    "06_pairs.py": ["helpers.evaluation.answers:JsonlStore.add 1", "helpers.evaluation.answers:JsonlStore.add 5",
                    "helpers.runs.run:Run.finish 1"],
}  # fmt: skip
AFTER_TOO = {"transformers.trainer:Trainer._save_checkpoint", "helpers.runs.run:Run.finish",
             "helpers.merging.merge:write_merged", "helpers.evaluation.answers:JsonlStore.add"}  # fmt: skip
CASES = [
    (notebook, target, count + moment)
    for notebook in FLAGS
    for target, count in (call.split() for call in dict.fromkeys([*CALLS[notebook], *MORE[notebook]]))
    for moment in (("", "+") if target in AFTER_TOO else ("",))  # before the call, and right after it
]


def contents(project: Project, notebook: str, run: str) -> Any:
    """What a run leaves behind, without times and names of folders."""
    folder = project.root / "outputs" / run
    if notebook in ("01_sft.py", "02_dpo.py"):
        names = {file.name for file in folder.iterdir()}
        assert {"curves.png", "report.html"} <= names
        return outcome(project, run) | {"names": names}
    record = json.loads((folder / "run.json").read_text())
    timeless = [row(file) for file in sorted(folder.rglob("*.jsonl"))]
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.safetensors"))]
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return record["status"], record.get("metrics"), record.get("fingerprint"), timeless, weights, names


def row(file: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    return [{key: value for key, value in each.items() if key not in ("tstamp", "answer_id")} for each in rows]


@pytest.fixture(scope="module")
def undisturbed(project: Project, dpo_run: str) -> Any:
    @functools.cache
    def of(notebook: str) -> Any:
        name = f"alone-{notebook[:2]}"
        prepare(project, notebook)
        project.run(notebook, *FLAGS[notebook], "--run_name", name)
        return contents(project, notebook, name)

    return of


@pytest.mark.parametrize(
    ("notebook", "target", "count"),
    [pytest.param(*case, id=f"{case[0][:2]}-{case[1].rpartition(':')[2]}-{case[2]}") for case in CASES],
)
def test_killed_at_a_call_it_ends_as_if_left_alone(
    notebook: str, target: str, count: str, project: Project, undisturbed: Any
) -> None:
    expected = undisturbed(notebook)
    prepare(project, notebook)
    name = f"killed-{notebook[:2]}-{hashlib.sha256(f'{target}{count}'.encode()).hexdigest()[:6]}"
    flags = [*FLAGS[notebook], "--run_name", name]
    assert stop(project, notebook, target, count, signal.SIGKILL, *flags).returncode == -signal.SIGKILL
    project.run(notebook, *flags)
    found = contents(project, notebook, name)
    if isinstance(expected, dict):
        for part, value in expected.items():
            assert found[part] == value, part
    assert found == expected
