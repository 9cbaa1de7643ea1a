"""06 as a command: from prompts to pairs that 02 takes, with servers that are counted, and kills."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.core import read_jsonl
from tests.conftest import DPO, Project
from tests.judge_server import JudgeServer, judge_server
from tests.notebooks.test_signals import stop

GIVEN = {name: value for name, value in DPO.items() if name != "sft_run"} | {"max_steps": 2}
SHORT = [word for name, value in GIVEN.items() for word in (f"--{name}", str(value))]
PROMPTS = [f"What is {i} plus 7?" for i in range(10)]


def answer_or_rate(messages: list[dict[str, str]]) -> Any:
    """Four answers to a prompt, of which one repeats another and one is empty; a rating of an answer."""
    text = messages[-1]["content"]
    number = int(hashlib.sha256(text.encode()).hexdigest(), 16)
    if "rate" in messages[0]["content"]:
        return f"[[{1 + number % 10}]]"
    words = [f"It is {number % 50}.", f"Surely {number % 7}.", f"It is {number % 50}.", ""]
    choices = [
        {"index": k, "message": {"role": "assistant", "content": w}, "finish_reason": "stop"}
        for k, w in enumerate(words)
    ]
    return {"body": {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}}


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server(answer_or_rate) as server:
        yield server


@pytest.fixture
def flags(project: Project, server: JudgeServer) -> list[str]:
    prompts = project.root / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    return ["--models", f"policy@{server.url}", "--prompts_file", str(prompts), "--judge_model", "judge",
            "--judge_base_url", server.url, "--batch_size", "3", "--max_concurrency", "1"]  # fmt: skip


def judged(server: JudgeServer) -> Counter[str]:
    """How often each answer was sent to the judge."""
    return Counter(r["messages"][-1]["content"] for r in server.requests if "rate" in r["messages"][0]["content"])


def test_pairs_of_an_endpoint_are_the_next_round_s_data(
    project: Project, sft_run: str, server: JudgeServer, flags: list[str]
) -> None:
    dry = project.run("06_pairs.py", *flags, "--run_name", "round", "--dry_run")
    assert "10 of 11 prompts, answered by policy\n  repeats another prompt: 1\n" in dry.stdout
    assert not (project.root / "outputs" / "round").exists()
    assert server.requests == []
    shown = project.run("06_pairs.py", *flags, "--run_name", "round", "--control").stdout
    folder = project.root / "outputs" / "round"
    asked = [r for r in server.requests if "rate" not in r["messages"][0]["content"]]
    assert Counter(r.get("n") for r in asked) == {4: 10, None: 10}  # the empty one is asked for again
    assert judged(server) == dict.fromkeys(judged(server), 1)
    rows, control = (read_jsonl(folder / f"{name}.jsonl") for name in ("preferences", "control"))
    data = project.record("round")["data"]
    assert data["read"] == 11
    assert data["kept"] == len(rows) == len(control) == 11 - sum(data["reasons"].values())
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert not any("" in (row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in [*rows, *control])
    assert rows[0]["sampling"]["temperature"] == 0.8
    assert "Next: python notebooks/02_dpo.py --model_id MODEL --dataset_id outputs/round/preferences.jsonl" in shown
    assert "note: The location of the weights of policy is unknown. Replace MODEL by its folder or Hub id" in shown
    count = len(server.requests)
    before = (folder / "preferences.jsonl").read_bytes()
    project.run("06_pairs.py", *flags, "--run_name", "round", "--control")
    project.run("06_pairs.py", *flags, "--run_name", "all", "--pairing", "all_pairs")  # other pairs of the same answers
    assert len(server.requests) == count
    assert (folder / "preferences.jsonl").read_bytes() == before
    project.run("06_pairs.py", *flags, "--run_name", "round", "--control", "--resume", "never")
    assert (folder / "preferences.jsonl").read_bytes() == before


def test_02_takes_the_newest_pairs_whatever_they_are_called(project: Project, dpo_run: str, flags: list[str]) -> None:
    project.run("06_pairs.py", *flags, "--run_name", "newest")
    names = {}
    for spelling in ("latest-pairs", "outputs/newest", "outputs/newest/preferences.jsonl",
                     str(project.root / "outputs" / "newest" / "preferences.jsonl")):  # fmt: skip
        words = [*SHORT, "--sft_run", f"outputs/{dpo_run}", "--dataset_id", spelling, "--dry_run", "--train_rows", "0"]
        text = project.run("02_dpo.py", *words).stderr
        names[spelling] = next(line for line in text.splitlines() if "Dry run" in line)
    assert len(set(names.values())) == 1, names
    assert f"would start from outputs/{dpo_run}." in next(iter(names.values()))
    (line,) = project.run("02_dpo.py", "--dataset_id", "latest-pairs", "--output_dir", "empty", "--model_id",
                          "outputs/demo/tiny-mistral", status=1).stderr.strip().splitlines()  # fmt: skip
    assert line == (
        "error: There is no finished pairs run in empty. Run `python notebooks/06_pairs.py`, or name a run's folder."
    )


@pytest.mark.long
def test_a_second_round_has_the_first_in_its_lineage(project: Project, dpo_run: str, flags: list[str]) -> None:
    from helpers.runs.run import lineage

    project.run("06_pairs.py", *flags, "--run_name", "second-pairs")
    words = [*SHORT, "--sft_run", f"outputs/{dpo_run}", "--dataset_id", "latest-pairs", "--train_rows", "0"]
    project.run("02_dpo.py", *words, "--run_name", "second")
    names = [Path(record["folder"]).name for record in lineage(project.root / "outputs" / "second")]
    assert names == ["second", dpo_run, "sft"]
    assert "second-pairs/preferences.jsonl" in (project.root / "outputs" / "second" / "report.html").read_text()
    shown = project.run("04_vibes.py", "--models", "outputs/second", "--prompts", "x", "--max_new_tokens", "4").stdout
    assert f"1 prompts for {dpo_run}, second" in shown  # before and after this round
    project.run("03_merge_push.py", "--run", f"outputs/{dpo_run}", "--run_name", "merged-first", "--max_kl", "9")
    more = ["--model_id", "outputs/merged-first", "--dataset_id", "latest-pairs", "--train_rows", "0"]
    project.run("02_dpo.py", *SHORT, *more, "--run_name", "third")
    names = [Path(record["folder"]).name for record in lineage(project.root / "outputs" / "third")]
    assert names == ["third", "merged-first", dpo_run, "sft"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "count", "again"),
    [
        ("helpers.evaluation.answers:JsonlStore.add", "2", 0),  # a batch of answers that is not stored
        ("helpers.evaluation.answers:JsonlStore.add", "3+", 0),
        ("helpers.evaluation.endpoint:Endpoint.ask", "4", 1),  # while the reply to the call before is being stored
        ("helpers.evaluation.answers:JsonlStore.add", "12+", 1),  # a score that is stored, with the next call under way
        ("helpers.core:atomic_write", "1", 0),
        ("helpers.evaluation.pairs:atomic_write", "1", 0),
    ],
)
def test_killed_anywhere_it_ends_as_if_left_alone(
    project: Project, server: JudgeServer, flags: list[str], target: str, count: str, again: int
) -> None:
    alone, killed = (f"{name}-{hashlib.sha256((target + count).encode()).hexdigest()[:6]}" for name in ("one", "two"))
    own = [*flags, "--output_dir", str(project.root / killed), "--run_name", "p", "--control"]
    own += ["--max_concurrency", "1"]  # of several calls at a time, those under way are lost
    done = stop(project, "06_pairs.py", target, count, signal.SIGKILL, *own)
    assert done.returncode == -signal.SIGKILL, done.stderr
    rows = [row for file in (project.root / killed).rglob("*.jsonl") for row in read_jsonl(file)]
    stored = {row["user_prompt"] for row in rows if "user_prompt" in row}
    project.run("06_pairs.py", *own)
    repeated = Counter({text: n - 1 for text, n in judged(server).items() if n > 1})
    assert not stored & repeated.keys()  # nothing that is stored is paid for twice
    assert repeated.total() <= again
    own[own.index("--output_dir") + 1] = str(project.root / alone)
    project.run("06_pairs.py", *own)
    for name in ("preferences.jsonl", "control.jsonl", "question.jsonl"):
        one, two = (project.root / place / "p" / name for place in (alone, killed))
        assert one.read_bytes() == two.read_bytes()
    records = [json.loads((project.root / place / "p" / "run.json").read_text()) for place in (alone, killed)]
    for key in ("status", "data", "metrics"):
        assert records[0][key] == records[1][key]


@pytest.mark.long
def test_a_round_of_the_demo_beats_its_control(full_demo: tuple[Project, str]) -> None:
    """Sampled from the model of 01, scored by rules; both policies answer the 480 held-out questions."""
    project, _ = full_demo
    demo = ["--recipe", "recipes/demo.yaml"]
    made = project.run("06_pairs.py", *demo).stdout
    next_lines = [line.partition("python notebooks/")[2] for line in made.splitlines() if "notebooks/02_dpo" in line]
    commands = [shlex.split(line) for line in next_lines]
    assert [command[command.index("--dataset_id") + 1].rpartition("/")[2] for command in commands] == [
        "control.jsonl", "preferences.jsonl",
    ]  # fmt: skip
    for command, name in zip(commands, ("control", "round"), strict=True):
        project.run(*command, "--max_steps", "40", "--run_name", name)  # as recipes/demo.yaml says
    project.run("04_vibes.py", *demo, "--models", "outputs/control", "outputs/round", "--run_name", "answers")
    project.run("05_judge.py", *demo, "--answers_dir", "outputs/answers", "--run_name", "judged")
    pairs = {(p["baseline"], p["candidate"]): p for p in project.record("judged")["metrics"]["pairs"]}
    against_control = pairs["control", "round"]
    assert against_control["interval"][0] > 0.5, against_control
    start = next(name for name in project.record("answers")["models"] if name.startswith("sft"))
    assert pairs[start, "round"]["interval"][0] > 0.5
    before = (project.root / project.record("round")["settings"]["dataset_id"][0]).read_bytes()
    project.run("06_pairs.py", *demo, "--resume", "never")
    assert (project.root / project.record("round")["settings"]["dataset_id"][0]).read_bytes() == before
