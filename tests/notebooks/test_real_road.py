"""Another round on a real model: its prompts, its rules, and the way from 06 to 05."""

from __future__ import annotations

from collections import Counter

import pytest

from helpers.core import read_jsonl
from recipes import real
from recipes.real import Score, facts
from tests.conftest import REPO

FOLDER = REPO / "recipes" / "real"
VOLCANO = {"prompt": "What is a volcano?"}
GOOD = "A volcano is an opening in the ground. Hot rock, ash and gas come out of it."


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (GOOD, Score(True, True, True)),
        ("A volcano is a volcano that erupts.", Score(False, True, True)),
        ("", Score(False, False, True)),
        ("It is a deep hole with hot rock, ash and gas.", Score(False, True, True)),  # of what?
        ("I'm sorry, I cannot say anything about a volcano near big towns.", Score(False, True, True)),
        (f"{GOOD} It is loud.", Score(True, False, True)),
        ("A volcano has hot rock, ash, gas and a", Score(True, False, True)),
        ("A volcano has " + "hot rock, ash, gas and steam, and " * 8 + "more.", Score(True, False, True)),
        ("A volcano, e.g. Mount St. Helens, spits rock, ash and gas. It is hot.", Score(True, True, True)),
        ("# Volcano\nA mountain with hot rock, ash and gas.", Score(True, True, False)),
        ("A volcano has **hot rock**, ash, gas and steam.", Score(True, True, False)),
        ("1. A volcano has hot rock, ash, gas and steam.", Score(True, True, False)),
        ("He said: \u201cA volcano has hot rock, ash and gas.\u201d", Score(True, True, True)),
    ],
)
def test_the_rule_asks_for_a_brief_and_plain_answer_that_says_something(answer: str, verdict: Score) -> None:
    assert real.score(answer, VOLCANO) == verdict


def test_an_answer_that_says_something_wins_and_then_the_brief_and_plain_one() -> None:
    long, circular = f"{GOOD} It is loud. It is hot.", "A volcano is a volcano that erupts."
    assert real.compare(long, GOOD, VOLCANO) == "win"
    assert real.compare(GOOD, f"**{GOOD}**", VOLCANO) == "loss"
    assert real.compare(long, circular, VOLCANO) == "loss"
    assert real.compare(long, f"**{long}**", VOLCANO) == "tie"


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


def test_prompts_are_of_all_kinds_and_a_third_of_them_is_held_out() -> None:
    train, held_out, asked = (read_jsonl(FOLDER / f"{name}.jsonl") for name in ("train", "heldout", "facts"))
    assert (len(train), len(held_out), len(asked)) == (140, 70, 40)
    assert {*Counter(row["category"] for row in train).values()} == {10}
    assert {*Counter(row["category"] for row in held_out).values()} == {5}
    prompts = [row["prompt"].casefold() for row in train + held_out + asked]
    assert len({*prompts}) == 250
    assert all(real.content_words(prompt) for prompt in prompts)  # a word that an answer can take up
    assert not any(facts.score(row["prompt"], row).correct for row in asked)
