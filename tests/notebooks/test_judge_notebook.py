"""04 and 05 as commands: MT-Bench's files, a real server, and a judge's run that is killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.core import read_jsonl
from tests.conftest import Project
from tests.evaluation.judging import better
from tests.evaluation.test_reward_model import load as load_reward_model
from tests.evaluation.test_reward_model import scores_alone
from tests.evaluation.test_reward_model import write_model as write_reward_model
from tests.judge_server import judge_server
from tests.notebooks.test_data import run_all
from tests.notebooks.test_three_ways import execute_exported

CATEGORIES = ("writing", "math", "coding", "stem")
# FastChat's names and fields, in words of our own.
PROMPTS = {
    "pair-v2": "Q {question} A {answer_a} B {answer_b}",
    "pair-v2-multi-turn": "Q {question_1} A {answer_a_1} B {answer_b_1} Q {question_2} A {answer_a_2} B {answer_b_2}",
    "pair-math-v1": "Q {question} R {ref_answer_1} A {answer_a} B {answer_b}",
    "pair-math-v1-multi-turn": "Q {question_1} {question_2} R {ref_answer_1} {ref_answer_2} "
    "A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2}",
    "single-v1": "Q {question} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-math-v1-multi-turn": "Q {question_1} R {ref_answer_1} {ref_answer_2} A {answer_1} {answer_2} {question_2}",
}


def coin(messages: list[dict[str, str]]) -> str:
    """A verdict that depends on the whole prompt, and on nothing else."""
    number = int(hashlib.sha256(messages[-1]["content"].encode()).hexdigest(), 16) % 7
    return f"Hm. [[{'ABCABAB'[number]}]]" if "rate" not in messages[0]["content"] else f"[[{1 + number}]]"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in MT-Bench's layout: 8 questions of two turns, references for some."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "reference_answer").mkdir()
    questions = [
        {"question_id": 81 + i, "category": CATEGORIES[i % 4], "turns": [f"What is {i} plus 2?", "And plus 3?"]}
        for i in range(8)
    ]
    references = [
        {"question_id": q["question_id"], "answer_id": "x", "model_id": "gpt-4", "tstamp": 1.0,
         "choices": [{"index": 0, "turns": [f"ref {q['question_id']}a", f"ref {q['question_id']}b"]}]}
        for q in questions if q["category"] in ("math", "coding")
    ]  # fmt: skip
    prompts = [
        {"name": name, "type": "single" if name.startswith("single") else "pairwise", "prompt_template": template,
         "system_prompt": "Please rate." if name.startswith("single") else "Please compare.", "description": "",
         "category": "general", "output_format": "[[A]]"}
        for name, template in PROMPTS.items()
    ]  # fmt: skip
    for name, rows in (
        ("question.jsonl", questions), ("reference_answer/gpt-4.jsonl", references), ("judge_prompts.jsonl", prompts),
    ):  # fmt: skip
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def append_to_answers(file: Path) -> None:
    rows = read_jsonl(file)
    for row in rows:
        row["choices"][0]["turns"] = [f"{turn} ..." for turn in row["choices"][0]["turns"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def answered(project: Project, dpo_run: str, bench: Path) -> str:
    """The name of a run of 04 over the bench, before and after DPO. The tiny models' answers are made to differ."""
    project.run("04_vibes.py", "--models", f"outputs/{dpo_run}", "--prompts_file", str(bench / "question.jsonl"),
                "--max_new_tokens", "6", "--run_name", "bench-answers")  # fmt: skip
    append_to_answers(project.root / "outputs" / "bench-answers" / "model_answer" / "sft.jsonl")
    return "bench-answers"


@pytest.mark.long
def test_mt_bench_runs_from_its_own_files_and_a_second_run_asks_nothing(
    project: Project, dpo_run: str, bench: Path, answered: str
) -> None:
    outputs = project.root / "outputs"
    for name in ("sft", dpo_run):
        rows = read_jsonl(outputs / answered / "model_answer" / f"{name}.jsonl")
        assert sorted(row["question_id"] for row in rows) == list(range(81, 89))
        assert {(row["model_id"], len(row["choices"][0]["turns"]), row["choices"][0]["index"]) for row in rows} == {
            (name, 2, 0)
        }
    took = project.run("04_vibes.py", "--models", f"outputs/{dpo_run}", "--dry_run").stdout
    assert f"Models: sft (outputs/sft), {dpo_run} (outputs/{dpo_run})\n" in took
    took = project.run("03_merge_push.py", "--run", f"outputs/{dpo_run}", "--dry_run").stdout
    assert f"Adapter: outputs/{dpo_run}\nBase model: outputs/demo/tiny-mistral\n" in took
    page = (outputs / answered / "answers.html").read_text()
    assert "What is 7 plus 2?" in page
    with judge_server(coin) as server:
        flags = ["--bench_dir", str(bench), "--answers_dir", f"outputs/{answered}", "--judge_model", "gpt-4"]
        flags += ["--base_url", server.url]
        commands = [
            ("05_judge.py", [*flags, "--run_name", "mt"]),
            ("05_judge.py", [*flags, "--run_name", "mt"]),
            ("05_judge.py", [*flags, "--run_name", "mt-single", "--mode", "single"]),
            ("05_judge.py", ["--judgments", "outputs/mt/model_judgment/gpt-4_pair.jsonl", "--run_name", "counted",
                             "--answers_dir", f"outputs/{answered}"]),
        ]  # fmt: skip
        key = "sk-" + "x1Y" * 14
        ended, told = run_all(project, commands, OPENAI_API_KEY=key)
        assert ended == ["well"] * 4, told
        tried = project.run("05_judge.py", *flags, "--run_name", "other", "--dry_run", OPENAI_API_KEY=key)
        assert "\n0 calls like this one, about 0 tokens to read.\n32 more have been judged before.\n" in tried.stdout
        pairwise = [r for r in server.requests if r["messages"][0]["content"] == "Please compare."]
        assert len(pairwise) == 8 * 2 * 2  # questions, turns, orders: once each, whatever the second run asked
        assert len(server.requests) == 32 + 8 * 2 * 2  # and questions, turns, models
        assert set(server.keys) == {f"Bearer {key}"}
    assert not [f for f in outputs.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]
    rows = read_jsonl(outputs / "mt" / "model_judgment" / "gpt-4_pair.jsonl")
    assert Counter(row["judge"][1] for row in rows) == {
        "pair-v2": 4, "pair-v2-multi-turn": 4, "pair-math-v1": 4, "pair-math-v1-multi-turn": 4,
    }  # fmt: skip
    assert set(rows[0]) == {
        "question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "g1_user_prompt", "g1_judgment",
        "g2_user_prompt", "g2_judgment", "turn", "tstamp",
    }  # fmt: skip
    maths = next(row for row in rows if row["question_id"] == 82 and row["turn"] == 1)
    answers = {n: read_jsonl(outputs / answered / "model_answer" / f"{n}.jsonl") for n in ("sft", dpo_run)}
    said = {n: next(r for r in own if r["question_id"] == 82)["choices"][0]["turns"][0] for n, own in answers.items()}
    assert maths["g1_user_prompt"] == f"Q What is 1 plus 2? R ref 82a A {said['sft']} B {said[dpo_run]}"
    assert maths["g2_user_prompt"] == f"Q What is 1 plus 2? R ref 82a A {said[dpo_run]} B {said['sft']}"
    metrics = project.record("mt")["metrics"]
    wins = sum(row["g1_winner"] == row["g2_winner"] == "model_2" for row in rows)
    losses = sum(row["g1_winner"] == row["g2_winner"] == "model_1" for row in rows)
    assert (metrics["win"], metrics["loss"], metrics["tie"]) == (wins, losses, 16 - wins - losses)
    assert metrics["win_rate_adjusted"] == (wins + 0.5 * (16 - wins - losses)) / 16
    assert project.record("counted")["metrics"] == metrics
    single = read_jsonl(outputs / "mt-single" / "model_judgment" / "gpt-4_single.jsonl")
    ratings = project.record("mt-single")["metrics"]["models"]
    for name in ("sft", dpo_run):
        scores = [row["score"] for row in single if row["model"] == name]
        assert len(scores) == 16
        assert ratings[name]["average"] == pytest.approx(sum(scores) / 16)
    for run in ("mt", "mt-single"):
        assert (outputs / run / "results.png").stat().st_size > 5000


def test_mistakes_are_one_line_and_nothing_is_written(project: Project, bench: Path, answered: str) -> None:
    here = ["--answers_dir", f"outputs/{answered}"]
    before = set((project.root / "outputs").rglob("*"))
    cases = {
        ("05_judge.py", *here): "no judge is set. Give --judge_model NAME (with --base_url for your own server)",
        ("05_judge.py", *here, "--judge_model", "gpt-4"): "'gpt-4' at OpenAI needs a key: set OPENAI_API_KEY",
        ("05_judge.py", *here, "--judge_model", "m", "--base_url", "127.0.0.1:1"): "--base_url '127.0.0.1:1' is not",
        ("05_judge.py", *here, "--judge_module", "recipes.demo.questions", "--mode", "single"): "--mode single rates",
        ("05_judge.py", *here, "--judge_module", "x", "--judge_model", "m"):
            "--judge_model m and --judge_module x exclude each other",
        ("05_judge.py", *here, "--votes", "nowhere.json"): "--votes 'nowhere.json' is not a file of votes",
        ("05_judge.py", "--answers_dir", "nowhere", "--judge_module", "x"): "--answers_dir 'nowhere' is not a folder",
        ("04_vibes.py", "--models", "sft", "--generation_kwargs", "min_q=1"):
            "--generation_kwargs min_q=1: did you mean min_p=...?",
        ("04_vibes.py", "--models", "m", "--base_url", "x"): "--base_url 'x' is not an address",
        ("04_vibes.py", "--models", "sft", "--prompts_file", "nowhere"): "--prompts_file 'nowhere' is not a file",
    }  # fmt: skip
    ended, _ = run_all(project, [(name, list(flags)) for name, *flags in cases])
    for (words, expected), error in zip(cases.items(), ended, strict=True):
        assert re.match(rf"(Settings|User)Error: {re.escape(expected)}", error), (words, error)
    assert set((project.root / "outputs").rglob("*")) == before


def test_votes_are_counted_in_place_of_a_recipe_s_rules_and_more_of_them_are_another_run(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "model_answer").mkdir()
    questions = [{"question_id": i, "turns": [f"What is {i}?"]} for i in range(3)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name in "ab":
        rows = [{"question_id": i, "model_id": name, "choices": [{"turns": [f"{name}{i}"]}]} for i in range(3)]
        (tmp_path / "model_answer" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def export(count: int) -> None:
        votes = [{"question_id": i, "order": ["b", "a"], "winner": "b"} for i in range(count)]
        content = {"format": "votes-1", "page": "p", "voter_id": "1", "votes": votes}
        (tmp_path / "votes-p.json").write_text(json.dumps(content))

    here = ["--recipe", "recipes/demo.yaml", "--setup_module", "None", "--answers_dir", str(tmp_path)]
    here += ["--output_dir", str(tmp_path / "outputs")]
    votes = ["--votes", str(tmp_path / "votes-*.json")]
    export(1)
    ended, _ = run_all(project, [("05_judge.py", here), ("05_judge.py", here + votes)])
    assert ended[0] == (
        "SettingsError: --judge_module recipes.demo.questions needs a field 'answer' in every question. Add it to "
        "the prompts, or use --judge_model NAME."
    )
    assert ended[1] == "well"
    export(3)
    counted = project.run("05_judge.py", *here, *votes).stdout
    assert "already finished" not in counted
    assert "3 comparisons by human" in counted
    runs = [json.loads(f.read_text())["metrics"]["win"] for f in (tmp_path / "outputs").glob("judge-human-*/run.json")]
    assert sorted(runs) == [1, 3]
    assert "already finished" in project.run("05_judge.py", *here, *votes).stdout


def test_a_reward_model_judges_and_the_results_name_it(project: Project, tokenizer: Any, tmp_path: Path) -> None:
    reward = write_reward_model(tmp_path / "tiny-reward", tokenizer)
    texts = {"a": ["five", "it is five", "5", "so"], "b": ["it is 5", "five", "5", "is it so"]}
    (tmp_path / "model_answer").mkdir()
    questions = [{"question_id": i, "turns": [f"What is {i} plus 2?"]} for i in range(4)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, own in texts.items():
        rows = [{"question_id": i, "model_id": name, "choices": [{"turns": [text]}]} for i, text in enumerate(own)]
        (tmp_path / "model_answer" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": q["turns"][0]}, {"role": "assistant", "content": own[i]}]
        for own in texts.values() for i, q in enumerate(questions)
    ]  # fmt: skip
    alone = scores_alone(*load_reward_model(reward), talks)
    here = ["--answers_dir", str(tmp_path), "--output_dir", str(tmp_path / "outputs")]
    flags = [*here, "--reward_model", str(reward)]
    refused = [
        [*here, "--reward_model", "outputs/demo/tiny-mistral"], [*flags, "--judge_model", "m"],
        [*flags, "--mode", "single"],
    ]  # fmt: skip
    ended, _ = run_all(project, [("05_judge.py", words) for words in (*refused, [*flags, "--dry_run"])])
    assert ended[0].startswith("UserError: outputs/demo/tiny-mistral is no classifier (MistralForCausalLM), not a rew")
    assert ended[1].endswith(f"--judge_model m and --reward_model {reward} exclude each other. Give one of them.")
    assert ended[2].startswith("SettingsError: --mode single rates answers from 1 to 10; --reward_model compares them.")
    assert ended[3].startswith("CleanExit: Dry run:")
    assert not (tmp_path / "outputs").exists()
    shown = project.run("05_judge.py", *flags).stdout
    assert f"4 comparisons by reward model {reward}" in shown
    [file] = (tmp_path / "outputs").glob("judge-tiny-reward-*/scores.jsonl")
    scores = sorted(read_jsonl(file), key=lambda row: (row["model"], row["question_id"]))
    assert [row["score"] for row in scores] == pytest.approx(alone, abs=1e-5)
    metrics = json.loads((file.parent / "results.json").read_text())
    wins = sum(b > a for a, b in zip(alone[:4], alone[4:], strict=True) if a != b)
    assert (metrics["judge"], metrics["win"], metrics["loss"], metrics["tie"]) == (
        f"reward model {reward}", wins, 3 - wins, 1
    )  # fmt: skip
    assert f"Mean score: a {sum(alone[:4]) / 4:.3f}, b {sum(alone[4:]) / 4:.3f}." in metrics["notes"]
    [rows] = [read_jsonl(file) for file in file.parent.glob("model_judgment/*.jsonl")]
    assert {tuple(row["judge"]) for row in rows} == {("reward model", str(reward))}
    again = shutil.copytree(reward, tmp_path / "elsewhere" / "tiny-reward")
    assert "is already finished" in project.run("05_judge.py", *here, "--reward_model", f"{again}/").stdout


def test_one_comparison_has_one_folder_however_its_answers_are_named(project: Project, tmp_path: Path) -> None:
    vibes, elsewhere = tmp_path / "outputs" / "vibes-x", tmp_path / "elsewhere"
    (vibes / "model_answer").mkdir(parents=True)
    record = {"step": "vibes", "status": "finished", "finished": "2026-01-01", "models": ["b", "a"]}
    (vibes / "run.json").write_text(json.dumps(record))
    ids = [1, "2", "x"]
    rows = [{"question_id": i, "turns": [f"What is {i}?"]} for i in ids]
    (vibes / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        rows = [{"question_id": str(i), "model_id": name, "choices": [{"turns": [f"worth {ord(name) + k}"]}]}
                for k, i in enumerate(ids)]  # fmt: skip
        (vibes / "model_answer" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(vibes, elsewhere)

    def judge(url: str, *flags: str) -> list[str]:
        flags = (*flags, "--output_dir", str(tmp_path / "outputs"), "--judge_model", "judge", "--base_url", url)
        return project.run("05_judge.py", *flags).stdout.splitlines()

    with judge_server(better) as server:
        shown = judge(server.url)
        head = next(i for i, line in enumerate(shown) if line.startswith("model "))
        assert shown[head - 1] == f"Answers: {vibes} (b, a)"  # before it are the settings
        for flags in (
            ["--answers_dir", str(vibes)], ["--answers_dir", f"{vibes}/"], ["--answers_dir", "vibes-x"],
            ["--answers_dir", f"{vibes}/model_answer"], ["--models", "b", "outputs/a/"], ["--baseline", "b"],
            ["--bench_dir", str(elsewhere), "--models", "b", "a"],
        ):  # fmt: skip
            assert "is already finished" in "\n".join(judge(server.url, *flags)), flags
        runs = list((tmp_path / "outputs").glob("judge-judge-*"))
        assert len(runs) == 1
        assert len(server.requests) == 6
        judge(server.url, "--models", "a", "b")  # the other is the baseline
        assert len(server.requests) == 6
        records = [json.loads((run / "run.json").read_text()) for run in (tmp_path / "outputs").glob("judge-judge-*")]
        assert sorted((r["metrics"]["baseline"], r["metrics"]["win"]) for r in records) == [("a", 3), ("b", 0)]
        file = next(runs[0].glob("model_judgment/*"))
        flags = ["--judgments", str(file), "--output_dir", str(tmp_path / "outputs")]
        counted = project.run("05_judge.py", *flags).stdout.splitlines()
        assert f"Judgments: {file}" in counted
        assert "Judged by judge: b, a" in counted


@pytest.mark.long
def test_04_and_05_give_in_a_notebook_what_they_give_as_commands(project: Project, dpo_run: str) -> None:
    asked = {"models": [f"outputs/{dpo_run}"], "prompts_file": "outputs/demo/heldout.jsonl", "rows": 6,
             "max_new_tokens": 6}  # fmt: skip
    words = [str(w) for n, v in asked.items() for w in (f"--{n}", *(v if isinstance(v, list) else [v]))]
    flags = ["--answers_dir", "outputs/few", "--judge_module", "recipes.demo.questions", "--run_name", "few-judged"]
    ended, _ = run_all(project, [("04_vibes.py", [*words, "--run_name", "few"]), ("05_judge.py", flags)])
    assert ended == ["well", "well"]
    vibes = execute_exported(project, "04_vibes.py", asked | {"run_name": "few-cells"})
    typed = {"answers_dir": "few-cells", "judge_module": "recipes.demo.questions", "run_name": "few-cells-judged"}
    judged = execute_exported(project, "05_judge.py", typed)
    for name in ("sft", dpo_run):
        answers = [
            {row["question_id"]: row["choices"][0]["turns"] for row in read_jsonl(file)}
            for file in sorted(project.root.glob(f"outputs/few*/model_answer/{name}.jsonl"))
        ]
        assert len(answers) == 2
        assert answers[0] == answers[1]
        assert len(answers[0]) == 6
    assert project.record("few-judged")["metrics"] == project.record("few-cells-judged")["metrics"]
    assert "plus" in str([o for c in vibes.cells if "side_by_side" in c.source for o in c.outputs])
    (table,) = [c for c in judged.cells if "results.figure()" in c.source]
    assert "6 comparisons by rules" in str(table.outputs)
    assert [o for o in table.outputs if "image/png" in o.get("data", {})]


@contextmanager
def serve(model: Path, home: Path) -> Iterator[str]:
    """`transformers serve` on a free port of 127.0.0.1; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "hub").mkdir(parents=True)
    words = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--host", "127.0.0.1"]
    log = home / "log"
    with log.open("w") as out:
        server = subprocess.Popen([*words, "--port", str(port), "--device", "cpu"], stdout=out, stderr=out,
                                  env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.long
def test_a_real_server_answers_for_04_and_judges_for_05(project: Project, sft_run: str, tmp_path: Path) -> None:
    folder = project.root / "outputs" / sft_run
    prompts = ["What is 2 plus 3?", "Name the capital of Spain."]
    with serve(folder, tmp_path / "home") as url:
        commands = [
            ("04_vibes.py", ["--models", f"outputs/{sft_run}", f"{folder}@{url}", "--max_new_tokens", "8",
                             "--run_name", "served", "--prompts", *prompts]),
            ("05_judge.py", ["--answers_dir", "outputs/served", "--judge_model", str(folder), "--base_url", url,
                             "--max_new_tokens", "8", "--run_name", "judged-by-tiny"]),
        ]  # fmt: skip
        [vibes], _ = run_all(project, commands[:1])
        here, there = sorted((project.root / "outputs" / "served" / "model_answer").glob("*.jsonl"))
        answers = [{r["question_id"]: r["choices"][0]["turns"] for r in read_jsonl(file)} for file in (here, there)]
        append_to_answers(there)  # answers that are the same are not judged
        [judged], _ = run_all(project, commands[1:])
    assert vibes == "well"
    assert answers[0] == answers[1]  # the same greedy tokens, from this process and from the server
    assert len(answers[0]) == 2
    assert judged.startswith("UserError: no reply had a verdict; is this model able to judge?")
    rows = read_jsonl(project.root / "outputs" / "judged-by-tiny" / "calls.jsonl")
    assert [row["winner"] for row in rows] == ["error"] * 4
    assert all(row["judgment"] and row["prompt_tokens"] > 50 and row["completion_tokens"] > 0 for row in rows)


def test_a_conversation_in_a_terminal(project: Project, sft_run: str) -> None:
    words = ["notebooks/04_vibes.py", "--chat", "--models", f"outputs/{sft_run}", "--max_new_tokens", "8"]
    done = project.python(*words, input="What is 2 plus 3?\n/quit\n")
    assert done.returncode == 0, done.stderr[-2000:]
    shown = done.stdout.partition("/quit ends.\n")[2]
    assert re.fullmatch(r"> \S.*\n> ", shown), shown
    assert "Run:" not in done.stdout


# Runs 05 in a process that kills itself: after so many calls, or half way through a line of the ledger.
KILLED = """
import os, runpy, signal, sys
from helpers.evaluation import endpoint
from helpers.evaluation import answers as ledger
from helpers.runs import run as runs
calls = 0
def die(*words, **more):
    global calls
    calls += 1
    if calls > {after}:
        {how}
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*words, **more)
before = {owner}.{where}
{owner}.{where} = die
sys.argv = ["05_judge.py", *{flags!r}]
runpy.run_path("notebooks/05_judge.py", run_name="__main__")
"""
HALF = "words[0].file.open('a').write('{\"question_id\": 81, \"mod')"
MOMENTS = [
    *(("endpoint.Endpoint", "ask", after, "pass") for after in (0, 1, 5, 6)),
    *(("ledger.JsonlStore", "add", after, how) for after, how in ((0, "pass"), (2, HALF), (7, "pass"), (3, HALF))),
    ("runs.Run", "save", 2, "pass"),
    ("runs.Run", "finish", 0, "pass"),
]


@pytest.mark.long
def test_killed_at_ten_moments_it_asks_each_pair_once_in_each_order(
    project: Project, bench: Path, answered: str, tmp_path: Path
) -> None:
    # apart, or one would take over what another has asked
    whole, killed = tmp_path / "undisturbed", tmp_path / "killed"
    flags = ["--bench_dir", str(bench), "--answers_dir", f"outputs/{answered}", "--judge_model", "gpt-4"]
    with judge_server(coin) as server:
        flags += ["--base_url", server.url, "--max_concurrency", "2", "--run_name", "judged"]
        project.run("05_judge.py", *flags, "--output_dir", str(whole))
        flags += ["--output_dir", str(killed)]
        for owner, where, after, how in MOMENTS:
            code = KILLED.format(owner=owner, where=where, after=after, how=how, flags=flags)
            done = project.python("-c", code)
            assert done.returncode == -signal.SIGKILL, (where, after, done.stdout[-500:], done.stderr[-1000:])
        project.run("05_judge.py", *flags)
    rows = read_jsonl(killed / "judged" / "calls.jsonl")
    assert set(Counter((r["question_id"], r["turn"], *r["models"]) for r in rows).values()) == {1}
    assert len(rows) == 32
    records = [json.loads((folder / "judged" / "run.json").read_text()) for folder in (whole, killed)]
    assert records[0]["metrics"] == records[1]["metrics"]
