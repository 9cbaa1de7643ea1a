"""Callbacks of a run: completions do not affect training; diagnostics are printed, saved, and can stop it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, TrainerControl, TrainerState, TrainingArguments

from helpers.core import Interrupted, SettingsError, UserError, read_jsonl
from helpers.runs.checkpoints import checkpoint_error
from helpers.runs.run import Run, read_run
from helpers.settings.fields import TrainSettings
from helpers.training import callbacks
from helpers.training.diagnostics import diagnose
from tests.conftest import DPO, REPO, SFT, Project
from tests.tiny import settings_of


def flags(**given: Any) -> list[str]:
    return [word for name, value in (DPO | given).items() for word in (f"--{name}", str(value))]


def logs(project: Project, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.root / "outputs" / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_is_sampled_on_the_way_and_ends_with_the_weights_of_one_that_is_not(
    project: Project, dpo_run: str
) -> None:
    """dpo_run has samples at its default: a fifth of 6 steps is every second."""
    folder = project.root / "outputs" / dpo_run
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == [0, 2, 4, 6]
    prompts = {row["prompt"] for row in rows}
    assert 4 <= len(prompts) <= callbacks.COMPLETION_PROMPTS
    assert len(rows) == 4 * len(prompts)
    for log in (log for log in logs(project, dpo_run) if "samples/mean_length" in log):
        lengths = [row["tokens"] for row in rows if row["step"] == log["step"]]
        assert log["samples/mean_length"] == sum(lengths) / len(lengths)
        assert log["samples/cut"] == sum(length == 48 for length in lengths) / len(lengths)  # the recipe's
        assert max(lengths) <= 48

    project.run("02_dpo.py", *flags(run_name="unseen", completion_steps=0))
    assert not (project.root / "outputs" / "unseen" / "samples.jsonl").exists()
    assert project.record("unseen")["fingerprint"] == project.record(dpo_run)["fingerprint"]  # of the weights
    timed = ("runtime", "per_second")
    with_samples = [
        {name: value for name, value in log.items() if not name.endswith(timed)}
        for log in logs(project, dpo_run)
        if "samples/mean_length" not in log
    ]
    without = [{n: v for n, v in log.items() if not n.endswith(timed)} for log in logs(project, "unseen")]
    assert with_samples == without


@pytest.mark.long
def test_stop_on_diagnostic_saves_a_checkpoint_and_the_run_resumes_without_it(project: Project, sft_run: str) -> None:
    gone_wrong = {
        "run_name": "wrong",
        "max_steps": 24,
        "learning_rate": 0.5,
        "eval_steps": 2,
        "warmup_steps": 0,
        "max_grad_norm": 10,
    }
    done = project.run("02_dpo.py", *flags(**gone_wrong, stop_on_diagnostic="displacement,nan"), status=3)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "error: Stopped at step 3 of 24 by --stop_on_diagnostic displacement: the log-probability of chosen"
    )
    assert "Try --loss_type sigmoid sft" in line
    assert line.endswith("Without it, the same command resumes from checkpoint-3.")
    assert done.stdout.count("displacement: ") == 1  # printed when it first appears
    record, folder = project.record("wrong"), project.root / "outputs" / "wrong"
    assert record["status"] == "interrupted"
    assert "Report: outputs/wrong/report.html" in done.stdout
    assert (folder / "curves.png").read_bytes()[1:4] == b"PNG"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The same command without --stop_on_diagnostic" in page
    assert ">displacement</h3>" in page
    found = {diagnostic["name"]: diagnostic for diagnostic in record["diagnostics"]}
    assert "fell from" in found["displacement"]["observation"]
    assert {"observation", "reason", "suggestion"} < set(found["displacement"])

    done = project.run("02_dpo.py", *flags(**gone_wrong))
    assert "Resuming from outputs/wrong/checkpoint-3" in done.stdout
    assert "displacement: the log-probability of chosen answers fell" in done.stdout
    record = project.record("wrong")
    assert record["status"] == "finished"
    # which problems such a learning rate has in the end depends on the machine's rounding: all that the logs show
    shown = diagnose(logs(project, "wrong"), 24)
    assert record["diagnostics"] == [dataclasses.asdict(each) for each in shown] != []


@pytest.mark.long
def test_two_processes_stop_on_a_diagnostic_at_the_same_step(project: Project, sft_run: str) -> None:
    gone_wrong = {
        "run_name": "two",
        "max_steps": 24,
        "learning_rate": 0.5,
        "eval_steps": 2,
        "warmup_steps": 0,
        "max_grad_norm": 10,
    }
    words = flags(**gone_wrong, stop_on_diagnostic="displacement", per_device_train_batch_size=2, tuning="lora")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    ddp = REPO / "recipes" / "accelerate" / "ddp.yaml"
    port = str(29500 + os.getpid() % 500)
    notebook = project.command("02_dpo.py", *words)[1:]
    done = subprocess.run(
        [*launcher, str(ddp), "--num_processes", "2", "--main_process_port", port, *notebook], cwd=project.root,
        env=project.env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        done.stderr.count("Stopped at step 3 of 24 by --stop_on_diagnostic displacement: the log-probability of chosen")
        == 1
    )
    assert 'callbacks.py"' not in done.stderr  # a traceback is the launcher's own
    assert project.record("two")["status"] == "interrupted"
    assert checkpoint_error(project.root / "outputs" / "two" / "checkpoint-3") == ""


def test_an_unknown_diagnostic_is_refused_with_the_list() -> None:
    with pytest.raises(SettingsError, match=r"--stop_on_diagnostic.* sadness .*displacement, runaway_margin.* nan"):
        TrainSettings(stop_on_diagnostic=("displacement", "sadness")).check()


class FakeTrainer:
    """The parts of a trainer that a callback uses."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.events: list[Any] = []
        self.callback_handler = self

    def call_event(self, event: str, *args: Any, logs: Any) -> None:
        self.events.append((event, logs))


def tiny() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MistralForCausalLM(config)


class Tokenizer:
    """Pads on the left, as asked."""

    pad_token_id, eos_token_id = 0, 2

    def pad(self, batch: dict[str, list[list[int]]], padding_side: str, return_tensors: str) -> Any:
        from transformers import BatchEncoding

        width = max(map(len, batch["input_ids"]))
        rows = [[0] * (width - len(row)) + row for row in batch["input_ids"]]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in batch["input_ids"]]
        return BatchEncoding({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)})


def test_greedy_answers_are_those_of_one_prompt_alone_and_leave_model_and_chance_as_they_were() -> None:
    model = tiny().train()
    model.config.use_cache = False  # as training with gradient checkpointing leaves it
    chance = torch.random.get_rng_state()
    prompts = [[1, 5, 9], [1, 7], [1, 8, 9, 10, 11]]
    together = callbacks.generate_greedily(model, Tokenizer(), prompts, 12)
    assert torch.equal(torch.random.get_rng_state(), chance)
    assert model.training
    assert not model.config.use_cache
    assert together == [callbacks.generate_greedily(model, Tokenizer(), [prompt], 12)[0] for prompt in prompts]
    for answer in together:
        assert len(answer) == 12 or answer[-1] == 2
    assert callbacks.generate_greedily(model, Tokenizer(), [[1, 5, 9]], 3)[0] == together[0][:3]


def test_an_answer_ends_with_its_end() -> None:
    model = tiny()
    (answer,) = callbacks.generate_greedily(model, Tokenizer(), [[1, 5, 9]], 4)
    model.generation_config.eos_token_id = [answer[1]]
    (cut,) = callbacks.generate_greedily(model, Tokenizer(), [[1, 5, 9]], 4)
    assert cut == answer[: answer.index(answer[1]) + 1]


def test_the_prompt_of_a_conversation_is_what_is_not_learned() -> None:
    assert callbacks.prompt_ids_of({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}) == [1, 2]
    assert callbacks.prompt_ids_of({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}) == [1, 2]


def test_a_diagnostic_stops_at_the_next_step_and_not_during_an_evaluation(tmp_path: Any) -> None:
    watch = callbacks.CheckpointCallback(FakeTrainer(torch.nn.Linear(2, 2)), tmp_path, ("lr_never_warm", "nan"))
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to="none"), TrainerControl()
    history = [{"step": i, "loss": 1.0, "learning_rate": 0.0} for i in range(1, 7)]
    state = TrainerState(global_step=6, max_steps=24, log_history=history[:4])
    watch.on_log(args, state, control, logs=history[3])
    watch.on_step_end(args, state, control)
    assert not control.should_training_stop
    state.log_history = history
    watch.on_log(args, state, control, logs=history[5])
    watch.previous_handlers = {}
    watch.on_prediction_step(args, state, control)  # the evaluation of the step that was logged goes on
    watch.on_step_end(args, state, control)
    assert control.should_training_stop
    assert control.should_save
    with pytest.raises(
        Interrupted,
        match=r"Stopped at step 6 of 24 by --stop_on_diagnostic lr_never_warm: at step 6 of 24 the learning",
    ) as e:
        watch.on_train_end(args, state, control)
    assert e.value.status == 3


def test_a_diagnostic_is_printed_once_and_the_current_ones_are_saved(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, {})
    watch = callbacks.RecordCallback(run)
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to="none"), TrainerControl()
    state = TrainerState(global_step=6, max_steps=24)
    watch.on_train_begin(args, state, control)
    assert (run.record["diagnostics"], run.record["max_steps"]) == ([], 24)
    state.log_history = [{"step": i, "loss": 1.0 / i, "learning_rate": 0.0} for i in range(1, 7)]
    watch.on_log(args, state, control)
    watch.on_log(args, state, control)
    said = capsys.readouterr().out
    assert said.count("lr_never_warm: at step 6 of 24 the learning rate is 0.") == 1
    assert [diagnostic["name"] for diagnostic in run.record["diagnostics"]] == ["lr_never_warm"]
    assert read_run(tmp_path) == run.record  # kept at once, for a run that is killed later
    state.log_history.append({"step": 7, "loss": 0.1, "learning_rate": 1e-4})
    watch.on_log(args, state, control)
    assert read_run(tmp_path)["diagnostics"] == []


def test_sft_is_sampled_too(project: Project, sft_run: str) -> None:
    rows = [json.loads(x) for x in (project.root / "outputs" / sft_run / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    assert all(row["prompt"] and "[/INST]" not in row["answer"] for row in rows)
    assert SFT[:2] == ["--max_steps", "3"]


def test_the_text_of_a_prompt_is_the_user_s_last_message() -> None:
    ask = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Why? "}]
    assert callbacks.prompt_text_of({"prompt": ask}) == "Why?"
    talk = [*ask, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    assert callbacks.prompt_text_of({"messages": [*talk, {"role": "assistant", "content": "No."}]}) == "Why?"


def test_a_run_s_folder_has_no_card_of_a_library_and_its_held_out_prompts(
    project: Project, sft_run: str, dpo_run: str
) -> None:
    for name in (sft_run, dpo_run):
        folder = project.root / "outputs" / name
        assert not (folder / "README.md").exists()
        rows = read_jsonl(folder / "held_out.jsonl")
        assert rows
        assert all(row["prompt"][-1]["role"] == "user" and row["prompt"][-1]["content"] for row in rows)


def test_processes_that_would_not_train_together_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under a launcher of FSDP on a machine without a GPU: accelerate then starts no process group."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    with pytest.raises(UserError, match="2 processes were launched, but accelerate sees 1: each would train"):
        callbacks.prepare_trainer(trainer, Run(tmp_path, {}), settings=settings_of(tmp_path), eval_set=None)
