"""Ctrl-C, SIGTERM and SIGHUP end a notebook in one line, wherever they arrive, and the same command completes it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import DPO, SFT, Project, marks

KILLER = str(Path(__file__).resolve().parents[1] / "killed.py")
DEMO = ["--recipe", "recipes/demo.yaml"]
FLAGS = {
    "01_sft.py": [*DEMO, *SFT],
    "02_dpo.py": [word for name, value in DPO.items() for word in (f"--{name}", str(value))],
    "03_merge_push.py": DEMO,
    "04_vibes.py": [*DEMO, "--rows", "6", "--batch_size", "2"],
    "05_judge.py": [*DEMO, "--answers_dir", "outputs/asked"],
    "06_pairs.py": [*DEMO, "--rows", "6", "--num_samples", "2", "--batch_size", "2", "--judge_module", "by_length"],
}
# Where each notebook is told to stop: the call that does not come to its end, and the number of that call.
CALLS = {
    "01_sft.py": [
        "helpers.settings.load:show 1", "helpers.models.resolve:resolve_start 1", "helpers.data.loading:load_rows 1",
        "transformers:AutoModelForCausalLM.from_pretrained 1", "transformers.trainer:Trainer.training_step 2",
        "transformers.trainer:Trainer._save_checkpoint 1", "helpers.models.adapters:save_model 1",
        "helpers.runs.run:Run.finish 1", "helpers.runs.report:show_report 1",
    ],
    "02_dpo.py": [
        "helpers.data.prepare:tokenize_dataset 1", "transformers.trainer:Trainer.evaluate 1",
        "helpers.training.callbacks:CheckpointCallback.on_save 2", "helpers.runs.curves:final_metrics 1",
    ],
    "03_merge_push.py": [
        "helpers.merging.merge:find_adapter 1", "helpers.merging.merge:write_merged 1",
        "helpers.merging.merge:save_config 1", "helpers.merging.verify:verify_merge 1",
        "helpers.merging.merge:MergedModel.finalize 1",
    ],
    "04_vibes.py": [
        "helpers.evaluation.questions:read_questions 1", "helpers.evaluation.generators:HFGenerator.generate 2",
        "helpers.evaluation.answers:AnswerStore.write_vote_page 1",
    ],
    "05_judge.py": [
        "helpers.evaluation.judgments:find_answers 1", "helpers.evaluation.judgments:Judge.run 1",
        "helpers.evaluation.judgments:Judgments.save 1",
    ],
    "06_pairs.py": [
        "helpers.evaluation.samples:find_prompts 1", "helpers.evaluation.judges:Scorer.score 1",
        "helpers.evaluation.generators:HFGenerator.sample 2", "helpers.evaluation.pairs:PairSet.save 1",
    ],
}  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALL_THREE = ("Trainer.training_step", "merge:write_merged", "HFGenerator.generate", "Judge.run", "HFGenerator.sample")
# Each call with one of the signals in turn; the work itself, and where a quick test needs it, with all three.
CASES = [(notebook, *call.split(), number) for notebook, calls in CALLS.items() for place, call in enumerate(calls)
         for number in (SIGNALS if call.split()[0].endswith(ALL_THREE) else SIGNALS[place % 3 :][:1])]  # fmt: skip
QUICK = {("01_sft.py", "helpers.settings.load:show", signal.SIGINT),
         ("04_vibes.py", "helpers.evaluation.generators:HFGenerator.generate", signal.SIGTERM)}  # fmt: skip


def is_long(notebook: str, target: str, count: str, number: signal.Signals) -> bool:
    """All three signals for training and generation, and for other calls the one whose turn it is."""
    place = CALLS[notebook].index(f"{target} {count}")
    return target.endswith(("Trainer.training_step", "HFGenerator.generate")) or number is SIGNALS[place % 3]


def prepare(project: Project, notebook: str) -> None:
    """05 judges the newest answers: let there be some. 06 uses the answers of other runs again: let there be none."""
    if notebook == "06_pairs.py":
        (project.root / "by_length.py").write_text("def score(answer, question):\n    return len(answer)\n")
        for folder in (project.root / "outputs").glob("[!.]*-06*"):
            shutil.rmtree(folder)
    if notebook == "05_judge.py" and not (project.root / "outputs" / "asked").exists():
        project.run("04_vibes.py", *FLAGS["04_vibes.py"], "--run_name", "asked")


def stop(project: Project, notebook: str, target: str, count: str, number: int, *flags: str) -> Any:
    words = [KILLER, target, count, str(int(number)), str(project.root / "notebooks" / notebook), *flags]
    return warm.run(words, project.root, project.env)


@pytest.mark.parametrize(
    ("notebook", "target", "count", "number"),
    [
        pytest.param(*case, id=f"{case[0][:2]}-{case[1].rpartition(':')[2]}-{case[3].name}",
                     marks=marks((case[0], case[1], case[3]) in QUICK, is_long(*case)))
        for case in CASES
    ],
)  # fmt: skip
def test_a_signal_anywhere_ends_in_one_line(
    notebook: str, target: str, count: str, number: signal.Signals, project: Project, dpo_run: str
) -> None:
    output = f"told-{notebook[:2]}-{hashlib.sha256(f'{target}{number}'.encode()).hexdigest()[:6]}"
    flags = [*FLAGS[notebook], "--run_name", output]
    prepare(project, notebook)
    done = stop(project, notebook, target, count, number, *flags)
    text = done.stdout[-1500:] + done.stderr[-3000:]
    assert done.returncode == 128 + number, text
    assert "Traceback" not in done.stderr, text
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert number.name in line
    assert "un the same command" in line or "No checkpoint was saved" in line
    if number is signal.SIGHUP:  # the last of the three: what is left completes
        project.run(notebook, *flags)


def test_a_signal_that_is_ignored_stays_ignored_and_workers_end_at_once(tmp_path: Path) -> None:
    program = """
import multiprocessing, os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from helpers.core import install_error_hook
install_error_hook()
os.kill(os.getpid(), signal.SIGHUP)
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
time.sleep(1)  # Python forgets signals that arrive while it forks
worker.terminate()
worker.join()
print(worker.exitcode, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (143, "-15\n"), done.stderr
    assert done.stderr == "error: Stopped by SIGTERM. Run the same command again to resume.\n"


def test_a_second_signal_ends_a_program_that_waits_at_its_exit() -> None:
    program = """
import os, signal, threading, time
from helpers.core import install_error_hook
signal.signal(signal.SIGINT, signal.default_int_handler)
install_error_hook()
main = os.getpid()
def slow():
    time.sleep(0.5)
    os.kill(main, signal.SIGINT)
    time.sleep(60)
threading.Thread(target=slow).start()
raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "error: Stopped by SIGINT. Run the same command again to resume.\n"
    assert os.name == "posix"
