"""The demo's questions, and the judge that tells right from wrong and courteous from rude by rule.

A kind of question is a list of facts (what is asked about, and the answer) and a list of phrasings. Of the kinds
marked `unseen`, some facts are held out completely: a model answers them only if it has learned to add, to compare or
to look up. Other kinds can only be remembered: of them a phrasing is held out, never the fact.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TypedDict


class Question(TypedDict):
    """One prompt with its right answer; `alternatives` are the answers of its kind that would be wrong."""

    prompt: str
    answer: str
    category: str
    alternatives: list[str]
    habit: str  # the manner in which this phrasing is mostly answered in the instruction set


Fact = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class Kind:
    """Facts ((fields, answer) pairs) and the phrasings that ask for them; `{0}` is a fact's first field."""

    name: str
    facts: list[Fact]
    phrasings: list[str]
    unseen: bool


NAMES = "Ann Ben Carla David Emma Fred Grace Henry Iris Jack Kate Leo Maria Nick Olga Paul"
COLOURS = "red blue green yellow white black brown pink grey purple"
PETS = "dog cat parrot rabbit hamster pony turtle goldfish"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
OPPOSITES = """hot cold, big small, old young, fast slow, high low, light dark, full empty, rich poor, early late, hard
soft, wet dry, open closed, long short, loud quiet, happy sad, strong weak, clean dirty"""
PLURALS = """mouse mice, foot feet, tooth teeth, goose geese, child children, man men, woman women, ox oxen, leaf
leaves, wolf wolves, knife knives, life lives, box boxes, bus buses, city cities, baby babies, story
stories, dog dogs"""
CAPITALS = """France Paris, Italy Rome, Spain Madrid, Germany Berlin, Portugal Lisbon, Greece Athens, Austria Vienna,
Poland Warsaw, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin,
Hungary Budapest, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing"""
YOUNG = """dog puppy, cat kitten, cow calf, horse foal, sheep lamb, pig piglet, hen chick, duck duckling, goose
gosling, bear cub, deer fawn, goat kid, swan cygnet, frog tadpole, kangaroo joey, hare leveret"""

# Phrasings are parted by bars.
SUM = (
    """What is {0} plus {1}? | How much is {0} plus {1}? | Work out {0} plus {1}. | Tell me what {0} plus {1} makes."""
)
LOOKUP = """{0} has a {1}, lives in {2} and likes {3}. Which {4} is it? | {0} lives in {2}, likes {3} and has a {1}.
Name the {4}. | {0} likes {3}, has a {1} and lives in {2}. What {4} is it? | {0} has a {1}, likes {3} and
lives in {2}. Tell me the {4}."""
LARGER = """Which is larger, {0} or {1}? | Which is bigger, {0} or {1}? | What is the larger one, {0} or {1}? | Which
is more, {0} or {1}?"""
CALENDAR = """What comes just {0} {1}? | Which one is right {0} {1}? | Tell me what comes {0} {1}. | What is next {0}
{1}? | Name the one {0} {1}. | What do we call the one just {0} {1}?"""
OPPOSITE = """What is the opposite of {0}? | Give me the opposite of {0}. | Which word means the opposite of {0}? |
Name the opposite of {0}. | What is the reverse of {0}? | Which word is opposite to {0}?"""
PLURAL = """What is the plural of {0}? | Give me the plural of {0}. | What do we call more than one {0}? | Name the
plural of {0}. | How do you write the plural of {0}? | Which word is the plural of {0}?"""
CAPITAL = """What is the capital of {0}? | Name the capital of {0}. | Which city is the capital of {0}? | Give me the
capital of {0}. | What is the capital city of {0}? | Tell me the capital of {0}."""
OFFSPRING = """What is a young {0} called? | What do you call a young {0}? | Name the young of a {0}. | What is the
word for a baby {0}? | What do we call a baby {0}? | Tell me the name of a young {0}."""

HABITS = ["brief", "rude", "padded"]  # of a kind's first, second, ... phrasing, then round again

POLITE_MARKERS = ["happy to help", "of course", "certainly", "glad", "sure", "my pleasure", "thank you", "thanks"]
RUDE_MARKERS = ["obviously", "do you not know", "even a child", "silly", "stupid", "dumb", "idiot", "fool", "duh",
                "wasting my time", "waste of time", "lazy", "shut up", "who cares", "everyone knows"]  # fmt: skip
BRIEF_WORDS = 12
DENIALS = ["not", "never", "isn't", "nor"]
LINKS = ["of", "than", "after", "before", "plus", "minus", "to", "from", "+", "-"]


@dataclass(frozen=True)
class Score:
    """Two verdicts on one answer, reached apart: see `score`."""

    correct: bool
    courteous: bool


def kinds(seed: int) -> list[Kind]:
    """Every kind of question; only the look-ups, of which there are too many to list, depend on the seed."""
    draw = random.Random(f"look-ups {seed}")
    cities = CAPITALS.replace(",", "").split()[1::2]
    lookups: list[Fact] = []
    for _ in range(4000):
        told = (
            draw.choice(NAMES.split()),
            draw.choice(PETS.split()),
            draw.choice(cities),
            draw.choice(COLOURS.split()),
        )
        asked = draw.randrange(3)
        lookups.append(((*told, ("pet", "city", "colour")[asked]), told[asked + 1]))
    numbers = range(10, 100)
    sums: list[Fact] = [((f"{a}", f"{b}"), f"{a + b}") for a in numbers for b in range(1, 10) if a % 10 + b < 10]
    pairs: list[Fact] = [((f"{a}", f"{b}"), f"{max(a, b)}") for a in range(1, 10) for b in range(1, 10) if a != b]
    steps: list[Fact] = [
        ((side, cycle[i]), cycle[(i + step) % len(cycle)])
        for cycle in (DAYS.split(), MONTHS.split())
        for side, step in (("after", 1), ("before", -1))
        for i in range(len(cycle))
    ]
    return [
        Kind("sum", sums, _phrasings(SUM), unseen=True),
        Kind("look-up", list(dict.fromkeys(lookups)), _phrasings(LOOKUP), unseen=True),
        Kind("larger", pairs, _phrasings(LARGER), unseen=False),
        Kind("calendar", steps, _phrasings(CALENDAR), unseen=False),
        Kind("opposite", _both_ways(_pairs(OPPOSITES)), _phrasings(OPPOSITE), unseen=False),
        Kind("plural", _pairs(PLURALS), _phrasings(PLURAL), unseen=False),
        Kind("capital", _pairs(CAPITALS), _phrasings(CAPITAL), unseen=False),
        Kind("young", _pairs(YOUNG), _phrasings(OFFSPRING), unseen=False),
    ]


def split(seed: int, held_out: int = 60) -> tuple[dict[str, list[Question]], list[Question]]:
    """Questions to train on, by kind, and `held_out` questions of each kind whose prompts are not among them."""
    train: dict[str, list[Question]] = {}
    rest: list[Question] = []
    for kind in kinds(seed):
        draw = random.Random(f"split {seed} {kind.name}")
        answers = list(dict.fromkeys(answer for _, answer in kind.facts))
        questions = [
            [
                Question(
                    prompt=phrasing.format(*fields),
                    answer=answer,
                    category=kind.name,
                    alternatives=_alternatives(answer, answers),
                    habit=HABITS[index % len(HABITS)],
                )
                for index, phrasing in enumerate(kind.phrasings)
            ]
            for fields, answer in kind.facts
        ]
        if kind.unseen:
            draw.shuffle(questions)
            chosen = [draw.choice(group) for group in questions[:held_out]]
            seen = [question for group in questions[held_out:] for question in group]
        else:
            # Every fact gives as many phrasings, so that none is left without one to learn it by.
            for group in questions:
                draw.shuffle(group)
            flat = [question for rank in zip(*questions, strict=True) for question in rank]
            chosen, seen = flat[:held_out], flat[held_out:]
        prompts = {question["prompt"] for question in chosen}
        train[kind.name] = [question for question in seen if question["prompt"] not in prompts]
        rest += chosen
    return train, rest


def score(answer: str, question: Question) -> Score:
    """Whether an answer is correct, and whether it is courteous.

    Correct: the expected answer is claimed as a separate word or number, and no other answer of the question's kind
    (for a number, no other number) is claimed with it. A word is not claimed when it is denied ("not 7 but 8" claims
    8 alone), when it only restates the question ("the opposite of hot is cold" claims cold alone), or when it is part
    of a polite or rude phrase (the happy of "happy to help").

    Courteous: a polite phrase that is not denied, no rude one, and at most BRIEF_WORDS words in all.
    """
    words = _words(answer)
    asked = _words(question["prompt"])
    expected = question["answer"].lower()
    wrong = {alternative.lower() for alternative in question["alternatives"]}
    markers = POLITE_MARKERS + RUDE_MARKERS
    phrased = {i + k for marker in markers for i in _find(words, marker) for k in range(len(marker.split()))}
    claims = {
        word
        for i, word in enumerate(words)
        if (word == expected or word in wrong or (expected.isdigit() and word.isdigit()))
        and i not in phrased
        and not _denied(words, i)
        and not (word in asked and word != expected and _restated(words, i))
    }
    polite = any(not _denied(words, i) for marker in POLITE_MARKERS for i in _find(words, marker))
    rude = any(_find(words, marker) for marker in RUDE_MARKERS)
    return Score(correct=claims == {expected}, courteous=polite and not rude and len(words) <= BRIEF_WORDS)


def compare(before: str, after: str, question: Question) -> str:
    """ "win", "tie" or "loss" for `after`: the correct answer wins; of two as correct, the courteous one wins."""
    old, new = score(before, question), score(after, question)
    old_rank, new_rank = (old.correct, old.courteous), (new.correct, new.courteous)
    return "tie" if old_rank == new_rank else "win" if new_rank > old_rank else "loss"


def _phrasings(text: str) -> list[str]:
    return [" ".join(phrasing.split()) for phrasing in text.split("|")]


def _pairs(text: str) -> list[Fact]:
    return [((left,), right) for left, right in (pair.split() for pair in text.split(","))]


def _both_ways(facts: list[Fact]) -> list[Fact]:
    return facts + [((right,), left) for (left,), right in facts]


def _alternatives(answer: str, answers: list[str]) -> list[str]:
    """The wrong answers of a kind: for a number those a slip away, else all the others."""
    if answer.isdigit():
        return [f"{int(answer) + slip}" for slip in (-10, -2, -1, 1, 2, 10) if int(answer) + slip > 0]
    return [other for other in answers if other != answer]


def _words(text: str) -> list[str]:
    """Lower-cased words and numbers, `'s` cut off; + and - are words."""
    return re.findall(r"[a-z]+(?:'t)?|\d+|[+-]", text.lower().replace("\u2019", "'").replace("'s", ""))


def _find(words: list[str], phrase: str) -> list[int]:
    """Where a phrase begins among words."""
    parts = phrase.split()
    return [i for i in range(len(words)) if words[i : i + len(parts)] == parts]


def _denied(words: list[str], i: int) -> bool:
    """Whether "not", or "not a" or the like, is right before word i."""
    start = i - 1 if i and words[i - 1] not in ("a", "the") else i - 2
    return start >= 0 and words[start] in DENIALS


def _restated(words: list[str], i: int) -> bool:
    """Whether word i is next to "of", "than", "plus" or the like, as what is asked about does."""
    return any(word in LINKS for word in words[max(i - 1, 0) : i] + words[i + 1 : i + 2])
