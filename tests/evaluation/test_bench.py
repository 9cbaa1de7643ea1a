"""Tasks with right answers before and after: lm-eval on a task of the tests, against a table worked by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.core import REPO, UserError, read_jsonl, write_json
from helpers.evaluation.bench import Bench, BenchJudgments, BenchResults, compare_right
from helpers.runs.report import write_report
from helpers.runs.run import Run
from helpers.settings import load_settings
from tests.conftest import Project, code_cells
from tests.families import SHAPE
from tests.notebooks.test_data import run_all

TABLE = [(1, 1)] * 9 + [(1, 0)] + [(0, 1)] * 6 + [(0, 0)] * 4  # right before, right after
CHECK = "def is_right(doc, results):\n    return {'acc': float(results[0].strip() in doc['right'])}\n"


def test_the_paired_interval_is_that_of_a_table_worked_by_hand() -> None:
    before, after = zip(*TABLE, strict=True)
    found = compare_right(before, after)
    assert (found["questions"], found["better"], found["worse"]) == (20, 6, 1)
    assert (found["before"], found["after"], found["difference"]) == (0.5, 0.75, 0.25)
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7)  # at most one of seven, on both sides
    # Clopper and Pearson for 6 of 7: 7 p^6 (1 - p) + p^7 = 0.025 at 0.4212768, and p^7 = 0.975 at 0.996390
    assert found["interval"] == pytest.approx(
        ((2 * 0.4212768 - 1) * 7 / 20, (2 * 0.975 ** (1 / 7) - 1) * 7 / 20), abs=1e-6
    )
    turned = compare_right(after, before)
    assert turned["interval"] == pytest.approx((-found["interval"][1], -found["interval"][0]))
    same = compare_right([1, 0] * 5, [1, 0] * 5)
    assert (same["difference"], same["p"]) == (0, 1)
    assert same["interval"] == pytest.approx((-(1 - 0.025**0.1), 1 - 0.025**0.1))


def write_chat_model(folder: Path, tokenizer: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model("llama", **SHAPE | ids | {"vocab_size": len(tokenizer), "initializer_range": 0.4})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers_alone(folder: Path, questions: list[str]) -> list[str]:
    """Greedy answers of five tokens, one question at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for question in questions:
        talk = [{"role": "user", "content": question}]
        row = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.eval().generate(**row, max_new_tokens=5, do_sample=False)[0, row["input_ids"].shape[1] :]
        found.append(tokenizer.decode(made, skip_special_tokens=True).strip())
    return found


def write_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A task of lm-eval over a JSONL file, with a function that says what is right."""
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "check.py").write_text(CHECK)
    task = {
        "task": "tiny_sums", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_target": "{{right|join(' or ')}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }  # fmt: skip
    text = yaml.safe_dump(task) + "process_results: !function check.is_right\n"
    (folder / "tiny_sums.yaml").write_text(text)
    return folder / "tiny_sums.yaml"


def test_lm_eval_counts_what_a_plain_loop_counts_and_the_report_says_what_got_worse(
    project: Project, tokenizer: Any, tmp_path: Path
) -> None:
    start, trained = (write_chat_model(tmp_path / name, tokenizer, i) for i, name in enumerate(("start", "dpo-x")))
    questions = [f"What is {i} plus {i * i}?" for i in range(len(TABLE))]
    said = [answers_alone(folder, questions) for folder in (start, trained)]
    assert sum(one == two for one, two in zip(*said, strict=True)) == 0
    rows = [
        {"question": question, "right": [text for text, is_right in zip(texts, row, strict=True) if is_right]}
        for question, row, *texts in zip(questions, TABLE, *said, strict=True)
    ]
    task = write_task(tmp_path, rows)
    here = ["--bench", str(task), "--output_dir", str(tmp_path / "outputs")]
    flags = [*here, "--models", str(start), str(trained)]
    shown = project.run("05_judge.py", *flags).stdout
    assert "start before, dpo-x after" in shown
    line = next(line for line in shown.splitlines() if line.startswith("tiny_sums, acc"))
    assert line.split()[2:] == ["20", "50.0%", "75.0%", "+25.0%", "-5.5%", "to", "+34.7%", "6", "1", "0.12"]
    [folder] = (tmp_path / "outputs").glob("judge-lm-eval-tiny_sums-*")
    stored = {row["model"]: row["docs"] for row in read_jsonl(folder / "bench.jsonl")}
    for side, name in enumerate(("start", "dpo-x")):
        assert [doc["answer"].strip() for doc in stored[name]] == said[side]
        assert [doc["values"] for doc in stored[name]] == [{"acc": row[side]} for row in TABLE]
        assert [doc["question"] for doc in stored[name]] == questions
    metrics = json.loads((folder / "results.json").read_text())
    assert metrics["models"] == {"start": {"tiny_sums": 0.5}, "dpo-x": {"tiny_sums": 0.75}}
    assert [(row["question"], row["before"].strip()) for row in metrics["worse"]] == [(questions[9], said[0][9])]
    assert (folder / "results.png").stat().st_size > 5000
    assert not (folder / "model_judgment").exists()
    broken = tmp_path / "broken.yaml"
    broken.write_text(task.read_text().replace("questions.jsonl", "nowhere.jsonl"))
    refused = [
        here, [*flags, "--answers_dir", str(tmp_path)], [*flags, "--mode", "single"], [*flags, "--judge_model", "m"],
        [*flags, "--dry_run", "--limit", "3"], ["--bench", "nowhere.yaml", *flags[2:]],
        [*here, "--models", str(start)], [*here, "--models", str(start), "m@http://127.0.0.1:9"],
        ["--bench", str(broken), *flags[2:]],
    ]  # fmt: skip
    before = set((tmp_path / "outputs").rglob("*"))
    ended, _ = run_all(project, [("05_judge.py", [*flags]), *(("05_judge.py", words) for words in refused)])
    for text, expected in zip(ended, (
        "well", "UserError: ", "SettingsError: --bench asks the models. Remove --answers_dir and --bench_dir, and",
        "SettingsError: --mode single rates answers from 1 to 10; --bench compares them.", "SettingsError: ",
        "CleanExit: Dry run", "UserError: --bench 'nowhere.yaml' is not a file",
        "SettingsError: --bench compares models, and there is one: start. Add one to --models.",
        "SettingsError: --bench needs models that are loaded here, and m is behind an endpoint.",
        "UserError: --bench broken cannot be loaded: ",
    ), strict=True):  # fmt: skip
        assert text.startswith(expected), text
    assert "exclude each other" in ended[4]
    assert set((tmp_path / "outputs").rglob("*")) == before
    few = project.run("05_judge.py", *flags, "--limit", "10", "--run_name", "few").stdout
    line = next(line for line in few.splitlines() if line.startswith("tiny_sums, acc"))
    assert line.split()[2:6] == ["10", "100.0%", "90.0%", "-10.0%"]

    run = tmp_path / "outputs" / "dpo-x"
    shutil.rmtree(tmp_path / "outputs" / "few")
    run.mkdir()
    write_json(run / "run.json", {"step": "dpo", "status": "finished", "finished": "2026-01-01", "base_model": "start"})
    text = write_report(run).read_text()
    assert "could not be rendered" not in text.partition("What got worse")[0][-3000:]
    assert "What got worse" in text
    assert questions[9] in text
    assert "-5.5% to +34.7%" in text


@pytest.mark.long
def test_tasks_that_were_answered_are_not_asked_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [write_chat_model(tmp_path / name, tokenizer, i) for i, name in enumerate("ab")]
    task = write_task(tmp_path, [{"question": f"{i}?", "right": [""]} for i in range(3)])
    values = {"bench": (str(task),), "models": tuple(map(str, models)), "bench_dir": "", "limit": 2}
    settings = SimpleNamespace(**values, output_dir=tmp_path / "outputs", is_set=lambda name: False)
    asked: list[str] = []
    ask = Bench._ask
    monkeypatch.setattr(Bench, "_ask", lambda self, *words: asked.append(words[0]) or ask(self, *words))
    run = Run(tmp_path / "outputs" / "judge-x", {})
    first = Bench(settings).run(run)
    assert isinstance(first, BenchJudgments)
    assert asked == ["tiny_sums"] * 2
    file = run.folder / "bench.jsonl"
    one, two = file.read_text().splitlines(keepends=True)
    file.write_text(one + two[:50])  # killed while the second was written
    assert Bench(settings).run(run).answered == first.answered
    assert asked == ["tiny_sums"] * 3
    assert Bench(settings).fingerprint == Bench(settings).fingerprint
    assert Bench(SimpleNamespace(**vars(settings) | {"limit": 3})).fingerprint != Bench(settings).fingerprint
    assert [row["questions"] for row in BenchResults.from_judgments(first).tasks] == [2]


def test_without_lm_eval_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r'^`--bench` needs the package lm-eval. Install it with `pip install "lm-eval'):
        Bench(SimpleNamespace())


def test_bench_without_names_means_ifeval_and_gsm8k() -> None:
    (cell,) = (c for c in code_cells(REPO / "notebooks" / "05_judge.py") if "parameters" in c.metadata.get("tags", []))
    space: dict[str, Any] = {}
    exec(compile(cell.source, "Settings", "exec", dont_inherit=True), space)
    for words, expected in ((["--bench"], ("ifeval", "gsm8k")), (["--bench", "mmlu"], ("mmlu",)), ([], ())):
        assert load_settings(space["Settings"], {}, words).bench == expected


@pytest.mark.long
def test_a_task_that_nobody_knows_is_refused(project: Project) -> None:
    text = "SettingsError: --bench gsm9k is no task of lm-eval and no YAML file. See `lm-eval ls tasks`."
    ended, _ = run_all(project, [("05_judge.py", ["--bench", "ifeval", "gsm9k"])])
    assert ended == [text]
