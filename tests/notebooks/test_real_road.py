"""Another round on a real model: its prompts, its rules, and the way from 06 to 05."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.core import read_jsonl
from recipes import real, smollm2
from recipes.real import Score, facts
from tests.conftest import REPO, Project, marks

RECIPE = ["--recipe", "recipes/real.yaml"]

FOLDER = REPO / "recipes" / "real"
VOLCANO = {"prompt": "What is a volcano?"}
GOOD = "A volcano is an opening in the ground. Hot rock, ash and gas come out of it."


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (GOOD, Score(True, 1, True)),
        ("A volcano is a volcano that erupts.", Score(False, 1, True)),
        ("", Score(False, 0, True)),
        ("It is a deep hole with hot rock, ash and gas.", Score(True, 1, True)),
        ("I am sorry, I cannot say anything about a volcano near big towns.", Score(False, 1, True)),
        (f"{GOOD} It is loud. It is hot.", Score(True, 0.5, True)),
        ("A volcano has hot rock, ash, gas and a", Score(True, 0, True)),
        ("A volcano has " + "hot rock, ash, gas and steam, and " * 14 + "more.", Score(True, 0.49, True)),
        ("A volcano, e.g. Mount St. Helens, spits rock, ash and gas. It is hot.", Score(True, 1, True)),
        ("# Volcano\nA mountain with hot rock, ash and gas.", Score(True, 1, False)),
        ("A volcano has **hot rock**, ash, gas and steam.", Score(True, 1, False)),
        ("1. A volcano has hot rock, ash, gas and steam.", Score(True, 1, False)),
        ("He said: \u201cA volcano has hot rock, ash and gas.\u201d", Score(True, 1, True)),
    ],
)
def test_the_rule_asks_for_a_brief_and_plain_answer_that_says_something(answer: str, verdict: Score) -> None:
    scored = real.score(answer, VOLCANO)
    assert (scored.answers, round(scored.brief, 2), scored.plain) == dataclasses.astuple(verdict)


def test_an_answer_that_says_something_wins_and_then_the_briefer_and_the_plain_one() -> None:
    long, circular = f"{GOOD} It is loud. It is hot.", "A volcano is a volcano that erupts."
    assert real.compare(long, GOOD, VOLCANO) == "win"
    assert real.compare(GOOD, f"**{GOOD}**", VOLCANO) == "loss"
    assert real.compare(long, circular, VOLCANO) == "loss"
    assert real.compare(long, f"**{GOOD}**", VOLCANO) == "tie"
    assert real.compare(GOOD, "A volcano has hot rock, ash, gas and lava.", VOLCANO) == "tie"


@pytest.mark.parametrize(
    ("answer", "accepted", "correct"),
    [
        ("The capital of France is Paris.", ["Paris"], True),
        ("It is Parisian.", ["Paris"], False),
        ("Its formula is H\u2082O.", ["H2O"], True),
        ("At 100\u00b0C.", ["100"], True),
        ("At 1000 degrees.", ["100"], False),
        ("It has 8 legs.", ["8", "eight"], True),
        ("It was painted by Leonardo Da Vinci.", ["da Vinci"], True),
        ("", ["ice"], False),
    ],
)
def test_a_fact_is_correct_if_the_answer_names_it(answer: str, accepted: list[str], correct: bool) -> None:
    assert facts.score(answer, {"accepted": accepted}).correct is correct


def test_the_recipe_and_make_take_the_round_on_the_converted_model() -> None:
    recipe, model = yaml.safe_load((REPO / "recipes" / "real.yaml").read_text()), smollm2.FOLDER.as_posix()
    assert (recipe["pairs"]["models"], recipe["dpo"]["model_id"]) == ([model], model)
    assert f"MODEL := {model}\n" in (REPO / "Makefile").read_text()


def test_prompts_are_of_all_kinds_and_a_third_of_them_is_held_out() -> None:
    train, held_out, asked = (read_jsonl(FOLDER / f"{name}.jsonl") for name in ("train", "heldout", "facts"))
    assert (len(train), len(held_out), len(asked)) == (140, 70, 40)
    assert {*Counter(row["category"] for row in train).values()} == {10}
    assert {*Counter(row["category"] for row in held_out).values()} == {5}
    prompts = [row["prompt"].casefold() for row in train + held_out + asked]
    assert len({*prompts}) == 250
    assert all(real.content_words(prompt) for prompt in prompts)  # a word that an answer can take up
    assert not any(facts.score(row["prompt"], row).correct for row in asked)


FEW = ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--eval_rows", "1", "--completion_steps", "0"]


def train_on_own_pairs(project: Project, outputs: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The first steps of a short `make real` into `outputs`: pairs, and the hash of the adapter trained on them."""
    own, root = ["--output_dir", outputs], project.root / outputs
    prompts = [f"{row['prompt']} Answer in one or two sentences." for row in read_jsonl(FOLDER / "train.jsonl")]
    (project.root / "prompts.txt").write_text("\n".join(prompts[:12]))  # short answers end before --max_new_tokens
    sampling = ["--num_samples", "3", "--max_new_tokens", "64", "--run_name", "pairs"]
    project.run("06_pairs.py", *RECIPE, *own, "--prompts_file", str(project.root / "prompts.txt"), *sampling)
    data = ["--dataset_id", str(root / "pairs" / "preferences.jsonl")]
    project.run("02_dpo.py", *RECIPE, *own, *data, *FEW, "--run_name", "dpo")
    weights = (root / "dpo" / "adapter_model.safetensors").read_bytes()
    rows = {name: read_jsonl(root / "pairs" / f"{name}.jsonl") for name in ("preferences", "control")}
    return rows, hashlib.sha256(weights).hexdigest()


def compare_with_control(project: Project, outputs: str) -> tuple[list[str], float]:
    """The other steps: the results of 05, and the KL of the merge."""
    own, root, results = ["--output_dir", outputs], project.root / outputs, []
    data = ["--dataset_id", str(root / "pairs" / "control.jsonl")]
    project.run("02_dpo.py", *RECIPE, *own, *data, *FEW, "--run_name", "control")
    project.run("03_merge_push.py", *RECIPE, *own, "--run", str(root / "dpo"), "--run_name", "merged")
    merged = project.record(f"{Path(outputs).name}/merged")["metrics"]["kl"]
    assert merged < 1e-6
    models, short = ["--models", str(root / "control"), str(root / "dpo")], ["--rows", "4", "--max_new_tokens", "24"]
    for name, file, rules in (("answers", "heldout", "recipes.real"), ("facts", "facts", "recipes.real.facts")):
        words = ["--prompts_file", f"recipes/real/{file}.jsonl", *short, "--run_name", name]
        project.run("04_vibes.py", *RECIPE, *own, *models, *words)
        judge = ["--answers_dir", str(root / name), "--judge_module", rules, "--run_name", f"{name}-judged"]
        project.run("05_judge.py", *RECIPE, *own, *judge)
        results.append((root / f"{name}-judged" / "results.json").read_text())
        pairs = json.loads(results[-1])["pairs"]
        assert {("control", "dpo")} < {(pair["baseline"], pair["candidate"]) for pair in pairs}
        assert all(pair["win"] + pair["loss"] + pair["tie"] == 4 for pair in pairs)
    return results, merged


# The long tests take the second half of the road once.
@pytest.mark.parametrize("times", [pytest.param(times, marks=marks(False, times == 1)) for times in (1, 2)])
def test_a_short_road_from_pairs_to_verdicts_gives_the_same_numbers_twice(
    times: int, tmp_path_factory: pytest.TempPathFactory, real_model: Path
) -> None:
    project = Project(tmp_path_factory.mktemp("project"))
    shutil.copytree(real_model, project.root / smollm2.FOLDER)
    first, second = (train_on_own_pairs(project, f"outputs/{name}") for name in ("one", "two"))
    assert first == second
    rows, _ = first
    assert len(rows["preferences"]) >= 4
    asked, control = ([row["prompt"][0]["content"] for row in rows[name]] for name in ("preferences", "control"))
    assert asked == control
    for row in rows["preferences"]:
        question = {"prompt": row["prompt"][0]["content"]}
        better, worse = (real.score(row[side][0]["content"], question) for side in ("chosen", "rejected"))
        assert dataclasses.astuple(better) > dataclasses.astuple(worse)
    ends = [compare_with_control(project, f"outputs/{name}") for name in ("one", "two")[:times]]
    assert ends[0] == ends[-1]
