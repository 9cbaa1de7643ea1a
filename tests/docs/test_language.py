"""Words that this project once used too often are in no text that a reader meets, beyond a few that fit."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPO

# Write "is", "continues", "again", "next to", "fix", "all of", "entire", or simply nothing in their place.
AVOIDED = {
    "stands": r"\b(stands?|stood)\b",
    "goes on": r"\b(goes|go|going|gone|went) on\b",
    "anew": r"\banew\b",
    "is said": r"\b(is|are|was|were|be) said\b",
    "beside": r"\bbeside\b",
    "mend": r"\bmend(s|ed|ing)?\b",
    "of one's own": r"\bof (one's|its|their|your|our|\w+'s) own\b",
    "where there is none": r"\bwhere there (is|are|was|were) (none|no)\b",
    "whole": r"\bwhole\b",
    "what it is that": r"\bwhat it is that\b",
}
# (file, word) → how often it is right there, and why.
ALLOWED: dict[tuple[str, str], tuple[int, str]] = {("CHANGELOG.md", "whole"): (1, "the older name of a file")}
AT_MOST = 6  # entries of that table

TEXTS = sorted({
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", ".env.example")),
    *REPO.glob("docs/*.md"), *REPO.glob("notebooks/*.py"), *REPO.glob("recipes/**/*.yaml"),
    *(file for kind in ("py", "html", "jinja", "md") for folder in ("helpers", "recipes/demo", "benchmarks")
      for file in (REPO / folder).rglob(f"*.{kind}")),
})  # fmt: skip


def avoided_in(text: str) -> Counter[str]:
    """How often each word is in a text; a line break, or the "#" of a comment's next line, is a space."""
    flat = re.sub(r"\s+(# )?", " ", text)
    found = {word: len(re.findall(pattern, flat, re.IGNORECASE)) for word, pattern in AVOIDED.items()}
    return Counter({word: count for word, count in found.items() if count})


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(REPO)))
def test_a_text_has_no_word_that_is_avoided(file: Path) -> None:
    name = str(file.relative_to(REPO))
    allowed = {word: count for (where, word), (count, _) in ALLOWED.items() if where == name}
    assert dict(avoided_in(file.read_text())) == allowed


def test_the_words_are_found_across_lines_and_in_all_their_forms() -> None:
    assert avoided_in("It stands\n    # beside the whole of its own; it is\nsaid that he\n# goes\n# on.") == {
        "stands": 1, "beside": 1, "whole": 1, "of one's own": 1, "is said": 1, "goes on": 1,
    }  # fmt: skip
    assert avoided_in("A standard, besides; recommended, wholesale, and it goes only there.") == {}


def test_few_are_allowed_each_with_its_reason() -> None:
    assert len(ALLOWED) <= AT_MOST
    assert all(reason for _, reason in ALLOWED.values())
    assert {REPO / name for name, _ in ALLOWED} <= set(TEXTS)
