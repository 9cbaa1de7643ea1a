"""What the tests of the vote page share: questions, answers, and ways to work a page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.evaluation.answers import AnswerStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Locator, Page

    Open = Callable[..., Page]
else:
    Open = Any

LONG = 2**60 + 1  # more than a JavaScript number holds
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now a shorter one."]},
    {"question_id": 82, "category": "maths", "turns": ["How much is 2 + 2?"], "reference": ["4"]},
    {"question_id": "poem", "category": "writing", "turns": ["Write a poem."]},
    {"question_id": LONG, "turns": ["Say yes."]},
]
ANSWERS: dict[str, dict[Any, list[str]]] = {
    "dpo-run": {81: ["A fine long line.", "A line."], 82: ["It is 4."], "poem": ["Roses."], LONG: ["Yes."]},
    "sft-run": {81: ["A fine line.", "Line."], 82: ["It is 5."], "poem": ["Violets."], LONG: ["No."]},
}
ORDERS = [["dpo-run", "sft-run"], ["sft-run", "dpo-run"], ["dpo-run", "sft-run"], ["sft-run", "dpo-run"]]
SEED = 2  # whose orders these are


def write_page(
    folder: Path, questions: Any = QUESTIONS, answers: Any = ANSWERS, title: str = "Two runs", settings: Any = None,
    seed: int = SEED, cut: Any = None,
) -> Path:  # fmt: skip
    """The vote page of these answers."""
    shutil.rmtree(folder / "model_answer", ignore_errors=True)
    store = AnswerStore(folder, questions, seed=seed)
    for name, own in answers.items():
        marks = (cut or {}).get(name, {})
        rows = [(i, {"turns": turns} | ({"cut": marks[i]} if i in marks else {})) for i, turns in own.items()]
        store.file(name).add(*({"question_id": i, "choices": [choice]} for i, choice in rows))
    store.write_vote_page([*answers], title, settings or {})
    return folder / "answers.html"


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def headings(page: Page) -> list[str]:
    return page.locator(".answer h3").all_inner_texts()


def texts(page: Page) -> list[str]:
    """Prompts and answers, as they stand on the page from top left to bottom right."""
    return page.locator(".user .text, .answer .text").all_inner_texts()


def status(page: Page) -> str:
    return page.get_by_role("status").inner_text()


def exported(page: Page) -> tuple[str, dict[str, Any]]:
    """The name of the download and what it holds, without the times."""
    with page.expect_download() as download:
        press(page, "e")
    votes = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    times = [vote.pop("voted") for vote in votes["votes"]] + [votes.pop("exported")]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    assert re.fullmatch("[0-9a-f]{16}", votes.pop("voter_id"))
    return download.value.suggested_filename, votes


def results(page: Page) -> list[list[str]]:
    return [row.locator("th, td").all_inner_texts() for row in page.locator("#table tr").all()]


def units(element: Locator) -> bytes:
    """The text that is seen, in UTF-16, so that half of a surrogate pair is seen as well."""
    codes = element.evaluate("e => Array.from({length: e.innerText.length}, (_, i) => e.innerText.charCodeAt(i))")
    return b"".join(code.to_bytes(2, "little") for code in codes)


def boxes(elements: Locator) -> list[Any]:
    return [element.bounding_box() for element in elements.all()]
