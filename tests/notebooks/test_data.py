"""Every published format through the notebooks themselves, from files and from a Hub; bad data through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests import fake_hub as local
from tests.conftest import Project
from tests.data.test_formats import ROWS, bot, user

COUNT = 12
FEW = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "train_rows": 0, "eval_rows": 2, "completion_tokens": 4}
TALK = [user("Why?"), bot("Because."), user("And?"), bot("So.")]
SFT_ROWS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/ultrachat_200k": {"prompt": "Why?", "prompt_id": "0", "messages": TALK},
    "HuggingFaceH4/no_robots": {
        "prompt": "Why?", "prompt_id": "0", "category": "Chat",
        "messages": [{"role": "system", "content": "Be kind."}, *TALK],
    },
    "tatsu-lab/alpaca": {"instruction": "Why?", "input": "", "output": "Because.", "text": "### Instruction: Why?"},
    "allenai/tulu-v2-sft-mixture": {"dataset": "flan", "id": "flan_0", "messages": TALK},
    "prompt and completion": {"prompt": "Why?", "completion": "Because."},
    "HuggingFaceH4/orca_dpo_pairs": ROWS["HuggingFaceH4/orca_dpo_pairs"][1],
    "Anthropic/hh-rlhf": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: And?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: And?\n\nAssistant: No.",
    },
}  # fmt: skip
# Runs each job (a notebook and its flags) in one process, and says how it ended.
DRIVER = """
import json, runpy, sys
for notebook, flags in json.load(sys.stdin):
    sys.argv = [notebook, *flags]
    try:
        runpy.run_path("notebooks/" + notebook, run_name="__main__")
        end = "well"
    except BaseException as error:
        end = f"{type(error).__name__}: {error}"
    for stream in (sys.stdout, sys.stderr):
        print("ENDED", json.dumps(end), file=stream, flush=True)
"""


def several(row: dict[str, Any]) -> Dataset:
    """COUNT rows like this one, each about something else."""
    words = json.dumps(row)
    name = "Sum up." if "Sum up." in words else "Why?"
    rows = [json.loads(words.replace(name, f"{name} {i}")) for i in range(COUNT)]
    if row.get("score_chosen") == row.get("score_rejected") is not None:
        rows = [r | {"score_rejected": 7.0} for r in rows]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of these tests' own: what they train is not the "latest" of others."""
    return Project(tmp_path_factory.mktemp("project"))


def drive(project: Project, jobs: list[tuple[str, dict[str, Any]]], **env: str) -> list[str]:
    """Run notebooks one after another in one process; how each ended."""
    commands = []
    for notebook, given in jobs:
        values = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        commands.append((notebook, [str(w) for n, v in values.items() for w in (f"--{n}", *v)]))
    return run_all(project, commands, **env)[0]


def run_all(project: Project, commands: list[tuple[str, list[str]]], **env: str) -> tuple[list[str], list[list[str]]]:
    """`drive` with flags as they are typed; how each ended, and the lines on stderr of each."""
    done = project.python("-c", DRIVER, input=json.dumps(commands), **env)
    ended = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    assert len(ended) == len(commands), done.stdout[-3000:] + done.stderr[-3000:]
    said: list[list[str]] = [[]]
    for line in done.stderr.splitlines():
        if line.startswith("ENDED "):
            said.append([])
        else:
            said[-1].append(line)
    return ended, said[: len(commands)]


@pytest.mark.long
def test_every_format_trains_from_a_file_and_from_a_hub(
    hub: local.Hub, hub_env: dict[str, str], project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    model = str(demo_folder / "tiny-mistral")
    lora = {"model_id": model, "tuning": "lora", "lora_r": 4, "per_device_train_batch_size": 2, **FEW}
    jobs: list[tuple[str, dict[str, Any]]] = []
    sets = [("02_dpo.py", name, row) for name, (_, row, _) in ROWS.items()]
    sets += [("01_sft.py", name, row) for name, row in SFT_ROWS.items()]
    for i, (notebook, _, row) in enumerate(sets):
        rows = several(row)
        file = tmp_path / f"{i}.parquet"
        rows.to_parquet(file)
        repository = f"org/set-{i}"
        hub.add("datasets", repository, {"data/train-00000-of-00001.parquet": file.read_bytes()})
        if i % 2:  # JSON lines are as common in files of one's own
            file = file.with_suffix(".jsonl")
            rows.to_json(file)
        for place, dataset_id in (("file", str(file)), ("hub", repository)):
            job = {"dataset_id": dataset_id, "dataset_split": "train", "run_name": f"{place}-{i}", **lora}
            jobs.append((notebook, job))
    assert drive(project, jobs, **hub_env) == ["well"] * len(jobs)
    for i, (_, name, _) in enumerate(sets):
        from_file, from_hub = (project.record(f"{place}-{i}") for place in ("file", "hub"))
        data = from_file["data"]
        assert data["read"] == COUNT == data["kept"] + data["dropped"], name
        assert data["kept"] == data["train"] + data["eval"] == COUNT, name
        assert from_hub["data"] == data, name
        assert from_hub["metrics"]["eval_loss"] == from_file["metrics"]["eval_loss"], name
        assert (project.root / "outputs" / f"file-{i}" / "data_report.png").stat().st_size > 10_000
    formats = [project.record(f"file-{i}")["data"]["format"] for i in range(len(sets))]
    assert formats[: len(ROWS)] == [expected for expected, _, _ in ROWS.values()]
    assert formats[len(ROWS) :] == [
        "messages", "messages", "alpaca", "messages", "completion", "messages, the chosen side",
        "hh, the chosen side",
    ]  # fmt: skip


@pytest.mark.long
def test_a_set_behind_a_loader_script_is_read_from_the_file_beside_it(
    hub: local.Hub, hub_env: dict[str, str], project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    rows = several(ROWS["tatsu-lab/alpaca_farm"][1]).to_list()
    files = {"alpaca_farm.py": b"raise SystemExit", "alpaca_human_preference.json": json.dumps(rows).encode()}
    hub.add("datasets", "tatsu-lab/alpaca_farm", files)
    job = {
        "model_id": str(demo_folder / "tiny-mistral"), "tuning": "lora", "dataset_id": "tatsu-lab/alpaca_farm",
        "dataset_config": "alpaca_human_preference", "dataset_split": "preference", "run_name": "farm", **FEW,
    }  # fmt: skip
    without = job | {"dataset_config": "alpaca_gpt5_preference", "run_name": "none"}
    well, none = drive(project, [("02_dpo.py", job), ("02_dpo.py", without)], **hub_env)
    assert well == "well"
    assert none.startswith("UserError: dataset 'tatsu-lab/alpaca_farm', split 'preference', cannot be loaded:")
    assert project.record("farm")["data"]["kept"] == COUNT
    (offline,) = drive(project, [("02_dpo.py", job | {"run_name": "farm-2"})], **hub_env, HF_HUB_OFFLINE="1")
    assert offline == "well"


@pytest.mark.long
def test_a_recipe_mixes_sets_and_chat_tokens_go_the_whole_way(
    project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    several(SFT_ROWS["tatsu-lab/alpaca"]).to_json(tmp_path / "talks.jsonl")
    several(ROWS["Intel/orca_dpo_pairs"][1]).to_json(tmp_path / "orca.jsonl")
    several(ROWS["HuggingFaceH4/ultrafeedback_binarized"][1]).to_parquet(tmp_path / "ultra.parquet")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model_id: {demo_folder / "tiny-mistral"}
chat_template: chatml
tuning: qlora
lora_r: 4
max_steps: 2
save_steps: 2
eval_steps: 2
logging_steps: 1
eval_on_start: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-2
train_rows: 0
eval_rows: 2
sft:
  dataset_id: {tmp_path / "talks.jsonl"}
  dataset_split: train
dpo:
  dataset_id:
    - {tmp_path / "ultra.parquet"}
    - id: {tmp_path / "orca.jsonl"}
      fraction: 0.5
merge:
  max_kl: 1.0e-3
"""
    )
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("01_sft.py", {"recipe": recipe, "run_name": "chatml-sft"}),
        ("02_dpo.py", {"recipe": recipe, "run_name": "chatml-dpo", "sft_run": "chatml-sft"}),
        ("03_merge_push.py", {"run": "outputs/chatml-dpo", "run_name": "chatml-merged", "max_kl": 1e-3}),
        ("04_vibes.py", {"models": "chatml-dpo", "prompts": "Why?", "max_new_tokens": 4, "run_name": "chatml-vibes"}),
    ]
    assert drive(project, jobs) == ["well"] * len(jobs)
    data = project.record("chatml-dpo")["data"]
    # the Why? of both sets are the same prompts; the halved set gives as many rows as it has kept and dropped
    assert (data["read"], data["format"]) == (COUNT + COUNT // 2, "messages, orca")
    assert data["kept"] + data["dropped"] == data["read"]
    outputs = project.root / "outputs"
    config = json.loads((outputs / "chatml-sft" / "adapter_config.json").read_text())
    (new,) = {tuple(rows) for rows in config["trainable_token_indices"].values()}
    assert len(new) == len(config["trainable_token_indices"]) == 2
    # before the first step policy and reference are one: the reference has the trained rows of the SFT adapter
    history = [json.loads(line) for line in (outputs / "chatml-dpo" / "metrics.jsonl").read_text().splitlines()]
    first = next(log for log in history if "eval_loss" in log)
    assert (first["step"], first["eval_rewards/margins"]) == (0, 0.0)
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    merged = json.loads((outputs / "chatml-merged" / "config.json").read_text())
    assert merged["vocab_size"] == max(new) + 1
    assert project.record("chatml-merged")["metrics"]["kl"] < 1e-5
    (answered,) = [*(outputs / "chatml-vibes" / "model_answer").glob("chatml-dpo.jsonl")]
    assert len(answered.read_text().splitlines()) == 1


def test_forty_bad_rows_are_each_named_and_strict_refuses_them(
    project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    good = [
        {"prompt": f"What is {i} plus 1?", "chosen": [bot(f"{i + 1}.")], "rejected": [bot("0.")]} for i in range(28)
    ]
    fine = {"chosen": [bot("x")], "rejected": [bot("y")]}
    bad: dict[str, dict[str, Any]] = {
        "chosen equals rejected": {"prompt": "a?", "chosen": [bot("x")], "rejected": [bot("x ")]},
        "empty answer": {"prompt": "b?", **fine, "chosen": [bot("")]},
        "prompts differ": {"prompt": None, "chosen": [user("c?"), bot("x")], "rejected": [user("d?"), bot("y")]},
        "no final assistant turn": {"prompt": None, "chosen": [user("e?")], "rejected": [user("e?"), bot("y")]},
        "roles do not alternate": {
            "prompt": None, "chosen": [user("f?"), user("f?"), bot("x")], "rejected": [user("f?"), bot("y")],
        },
        "duplicate pair": good[3],
        "tie": {"prompt": "g?", **fine, "score_chosen": 5.0, "score_rejected": 5.0},
        "margin below --min_margin": {"prompt": "h?", **fine, "score_chosen": 5.0, "score_rejected": 4.8},
        "longer than max_length": {"prompt": "i? " * 200, **fine},
        "a number or a date, not text": {"prompt": "j?", "chosen": 7, "rejected": [bot("y")]},
    }  # fmt: skip
    rows = [*good, *bad.values()]
    rows += [
        {"prompt": "k?", "chosen": [bot("x")], "rejected": [bot("z")]},
        {"prompt": "k?", "chosen": [bot("z")], "rejected": [bot("x")]},
    ]
    assert len(rows) == 40
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(json.dumps({"score_chosen": None, "score_rejected": None} | row) for row in rows))
    flags = {
        "model_id": demo_folder / "tiny-mistral", "dataset_id": file, "tuning": "lora", "min_margin": 0.5,
        "max_prompt_length": 64, "max_length": 128, "run_name": "bad", **FEW,
    }  # fmt: skip
    words = [str(w) for n, v in flags.items() for w in (f"--{n}", v)]
    done = project.run("02_dpo.py", *words, "--strict", status=2)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: 12 of 40 rows cannot be used. ")
    for i, reason in enumerate(bad):
        assert f"{reason}: 1 (row {29 + i})" in line
    assert "the same pair with both labels: 2 (row 39)" in line
    assert not (project.root / "outputs" / "bad").exists()
    project.run("02_dpo.py", *words)
    data = project.record("bad")["data"]
    assert {reason: data["examples"][reason] for reason in bad} == {r: [29 + i] for i, r in enumerate(bad)}
    assert data["examples"]["the same pair with both labels"] == [39, 40]
    assert (data["read"], data["kept"], data["dropped"]) == (40, 28, 12)
    report = json.loads((project.root / "outputs" / "bad" / "data_report.json").read_text())
    assert report["share_of_rows"]["the same pair with both labels"] == 2 / 40
