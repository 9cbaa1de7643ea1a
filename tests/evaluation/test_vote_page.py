"""The page for blind votes, read and worked in headless Chromium."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.core import UserError
from helpers.evaluation.answers import AnswerSet
from helpers.evaluation.judgments import Judgments, read_votes
from helpers.evaluation.results import Counts, PairwiseResults
from helpers.evaluation.vote_page import write_vote_page
from tests.browser import give_up

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

    Open = Callable[..., Page]

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


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    yield context
    context.close()


@pytest.fixture
def noise() -> list[str]:
    """Errors, dialogs and whatever else the pages of a test must not cause."""
    return []


@pytest.fixture
def open_page(context: BrowserContext, noise: list[str], tmp_path: Path) -> Iterator[Open]:
    """Writes a page and opens it; in the end it has asked for nothing but its file, and nothing went wrong in it."""
    file = tmp_path / "page.html"
    pages: list[Page] = []

    def open_page(questions: Any = QUESTIONS, answers: Any = ANSWERS, **options: Any) -> Page:
        write_vote_page(file, questions, answers, **{"title": "Two runs", "seed": SEED} | options)
        page = context.new_page()
        pages.append(page)
        page.on("request", lambda request: request.url == file.as_uri() or noise.append(f"request: {request.url}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on("console", lambda line: noise.append(f"console: {line.text}"))
        page.on("dialog", lambda dialog: (noise.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for page in pages:
        page.evaluate("localStorage.clear()")
        page.close()
    assert noise == []


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


# Votes


def test_votes_by_keyboard_become_the_export_and_that_the_table_of_05(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    assert page.locator("#progress").inner_text() == "0 of 4 voted"
    press(page, "1", "v")  # 81: left
    press(page, "b", "j")  # 82: right
    press(page, "t", "u", "ArrowLeft", "v", "0", "v")  # poem: a tie, undone, left, found again, a tie
    press(page, "2")
    assert page.locator("#progress").inner_text() == "4 of 4 voted"
    assert status(page) == "Voted: B is best, dpo-run. All questions have a vote: e exports them."
    page.get_by_label("Your name").fill(' Ada "A." <b>Lovelace ')
    press(page, "Escape")
    page_id = page.locator("#content").get_attribute("data-page")
    assert page_id is not None
    assert re.fullmatch("[0-9a-f]{12}", page_id)
    name, votes = exported(page)
    assert (name, votes) == (
        f"votes-{page_id}.json",
        {
            "format": "votes-1",
            "page": page_id,
            "voter": 'Ada "A." <b>Lovelace',
            "votes": [
                {"question_id": 81, "order": ORDERS[0], "winner": "dpo-run", "blind": True},
                {"question_id": 82, "order": ORDERS[1], "winner": "dpo-run", "blind": True},
                {"question_id": "poem", "order": ORDERS[2], "winner": "tie", "blind": False},  # undone with names seen
                {"question_id": LONG, "order": ORDERS[3], "winner": "dpo-run", "blind": True},
            ],
        },
    )
    (tmp_path / name).write_text(json.dumps(votes))
    answers = AnswerSet(QUESTIONS, {m: ANSWERS[m] for m in ("sft-run", "dpo-run")}, page=page_id)
    judgments = Judgments("human", read_votes((str(tmp_path / name),), answers))
    (pair,) = PairwiseResults.from_judgments(judgments, answers).pairs
    assert (pair.baseline, pair.candidate, pair.counts) == ("sft-run", "dpo-run", Counts(win=3, loss=0, tie=1))
    assert "1 of 4 votes were cast with the names visible." in pair.notes()


def test_buttons_do_what_keys_do(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("button", name="Vote: answer B is best").click()
    assert status(page) == "Voted: B is best, sft-run. v goes to the next question."
    page.get_by_role("button", name="Undo the vote").click()
    page.get_by_role("button", name="Vote: a tie").click()
    page.get_by_role("button", name="Next unvoted").click()
    page.get_by_role("button", name="Next question").click()
    page.get_by_role("button", name="Vote: answer A is best").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export votes").click()
    votes = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["votes"]
    assert [(vote["question_id"], vote["winner"]) for vote in votes] == [(81, "tie"), ("poem", "dpo-run")]


def test_no_votes_are_an_empty_list(open_page: Open) -> None:
    assert exported(open_page())[1]["votes"] == []


def test_names_are_hidden_until_the_vote(open_page: Open) -> None:
    page = open_page()
    assert headings(page) == ["A", "B"] * 2
    assert "-run" not in page.locator("body").inner_text()
    assert page.get_by_text("-run").count() == 0  # nor hidden anywhere but in the data
    press(page, "2")
    assert headings(page) == ["Adpo-run", "Bsft-run"] * 2
    assert page.locator(".best h3").all_inner_texts() == ["Bsft-run"] * 2
    press(page, "j")
    assert headings(page) == ["A", "B"]


def test_a_vote_stands_until_it_is_undone(open_page: Open) -> None:
    page = open_page()
    press(page, "1", "2")
    assert status(page) == "You have voted here: u takes the vote back. v goes to the next question."
    assert exported(page)[1]["votes"] == [{"question_id": 81, "order": ORDERS[0], "winner": "dpo-run", "blind": True}]
    press(page, "u")
    assert headings(page) == ["A", "B"] * 2
    assert page.locator("#sight").inner_text() == "You have seen the names here: a vote counts as not blind."
    press(page, "2")
    assert exported(page)[1]["votes"] == [{"question_id": 81, "order": ORDERS[0], "winner": "sft-run", "blind": False}]


def test_a_vote_after_reading_with_names_is_not_blind(open_page: Open) -> None:
    page = open_page()
    press(page, "j", "n")  # 82 only is seen with names
    assert headings(page) == ["Asft-run", "Bdpo-run"]
    press(page, "n")
    assert headings(page) == ["A", "B"]
    press(page, "1", "j", "1")
    page.reload()
    assert [vote["blind"] for vote in exported(page)[1]["votes"]] == [False, True]
    press(page, "n", "k", "k", "k", "1")
    assert [vote["blind"] for vote in exported(page)[1]["votes"]] == [False, False, True]


def test_names_seen_are_remembered_over_a_reload(open_page: Open) -> None:
    page = open_page()
    press(page, "n")
    page.reload()
    assert headings(page) == ["A", "B"] * 2
    press(page, "1")
    assert [vote["blind"] for vote in exported(page)[1]["votes"]] == [False]


def test_a_reload_keeps_votes_and_goes_on_where_one_is_missing(open_page: Open) -> None:
    page = open_page()
    press(page, "1", "j", "0")
    page.get_by_label("Your name").fill("Ada")
    press(page, "Escape")
    before = exported(page)
    page.reload()
    assert page.locator("#progress").inner_text() == "2 of 4 voted"
    assert page.locator("#place").inner_text() == "Question 3 of 4 id poem · writing"
    assert exported(page) == before
    other = open_page(answers=ANSWERS | {"sft-run": ANSWERS["sft-run"] | {82: ["It is 3."]}})
    assert other.locator("#progress").inner_text() == "0 of 4 voted"  # another page, with votes of its own


def test_a_vote_in_another_tab_is_seen_at_once(open_page: Open) -> None:
    first, second = open_page(), open_page()
    press(first, "1")
    second.wait_for_function("document.getElementById('progress').textContent === '1 of 4 voted'")
    press(second, "j", "2")
    first.wait_for_function("document.getElementById('progress').textContent === '2 of 4 voted'")
    assert [vote["winner"] for vote in exported(first)[1]["votes"]] == ["dpo-run", "dpo-run"]


def test_a_browser_that_keeps_nothing_still_votes_and_says_so(open_page: Open) -> None:
    page = open_page()
    page.add_init_script("Storage.prototype.getItem = Storage.prototype.setItem = () => { throw new Error('denied') }")
    page.reload()
    press(page, "1")
    voted = "Voted: A is best, dpo-run. v goes to the next question."
    assert status(page) == f"{voted} This browser keeps no votes: export before you leave."
    assert len(exported(page)[1]["votes"]) == 1


def test_results_stay_hidden_until_asked_for_or_all_is_voted(open_page: Open) -> None:
    page = open_page()
    press(page, "1", "j", "0")
    assert page.locator("#results").is_hidden()
    page.get_by_role("button", name="Results").click()
    expected = [["model", "wins", "ties", "losses"], ["dpo-run", "1", "1", "0"], ["sft-run", "0", "1", "1"]]
    assert results(page) == expected
    page.get_by_role("button", name="Results").click()
    assert page.locator("#results").is_hidden()
    press(page, "j", "n", "2", "j", "1")
    assert page.locator("#results-note").inner_text() == "4 of 4 voted, 2 of them not blind."
    assert results(page) == [
        ["model", "wins", "ties", "losses"],
        ["dpo-run", "1", "1", "2"],
        ["sft-run", "2", "1", "1"],
    ]


def test_the_best_of_three_is_named_and_a_model_without_an_answer_is_left_out(open_page: Open) -> None:
    answers = {"base": {81: ["Line.", "L."], 82: ["4"], "poem": []}} | ANSWERS
    page = open_page(QUESTIONS[:3], answers)
    orders = [["base", "sft-run", "dpo-run"], ["dpo-run", "base", "sft-run"], ["dpo-run", "sft-run"]]
    assert headings(page) == ["A", "B", "C"] * 2
    press(page, "c", "j", "3", "j", "3")
    assert status(page) == "There is no answer C here."
    press(page, "1")
    assert [(vote["order"], vote["winner"]) for vote in exported(page)[1]["votes"]] == [
        (orders[0], "dpo-run"),
        (orders[1], "sft-run"),
        (orders[2], "dpo-run"),
    ]
    rows = [["base", "0", "0", "2"], ["dpo-run", "2", "0", "1"], ["sft-run", "1", "0", "2"]]
    assert results(page)[1:] == rows


def test_a_question_with_one_answer_is_read_and_not_voted_on(open_page: Open) -> None:
    page = open_page(answers=ANSWERS | {"sft-run": {81: ["A fine line.", "Line."]}})
    assert page.locator("#progress").inner_text() == "0 of 1 voted"
    press(page, "j", "1")
    assert texts(page) == ["How much is 2 + 2?", "It is 4."]
    assert headings(page) == ["A"]
    assert status(page) == "There is nothing to vote on here."
    assert page.get_by_role("button", name="Vote:").count() == 0
    press(page, "v", "1")
    assert [vote["question_id"] for vote in exported(page)[1]["votes"]] == [81]


def test_answers_that_are_the_same_are_read_and_no_vote_is_asked_for(open_page: Open, tmp_path: Path) -> None:
    same = {"poem": ["Violets."], 82: ["It is 5."]}
    page = open_page(answers=ANSWERS | {"dpo-run": ANSWERS["dpo-run"] | same})
    assert page.locator("#progress").inner_text() == "0 of 2 voted"
    press(page, "1", "j", "1")  # 82: nothing
    assert status(page) == "There is nothing to vote on here."
    assert page.locator("#sight").inner_text() == "The answers here are the same: there is no vote to cast."
    assert page.get_by_role("button", name="Vote:").count() == 0
    assert headings(page) == ["A", "B"]
    press(page, "v")
    assert page.locator("#place").inner_text() == f"Question 4 of 4 id {LONG}"
    press(page, "2")
    assert status(page) == "Voted: B is best, dpo-run. All questions have a vote: e exports them."
    assert page.locator("#results-note").inner_text() == "2 of 2 voted; in 2 more the answers are the same."
    assert [vote["question_id"] for vote in exported(page)[1]["votes"]] == [81, LONG]


def test_one_model_is_read_with_its_name(open_page: Open) -> None:
    page = open_page(answers={"dpo-run": ANSWERS["dpo-run"]})
    assert headings(page) == ["dpo-run"] * 2
    assert page.get_by_role("button").all_inner_texts() == ["Keys?", "←Previous", "Next→"]
    press(page, "n", "j")
    assert headings(page) == ["dpo-run"]


# What is read


def test_the_order_is_shuffled_by_question_and_the_same_each_time(open_page: Open, tmp_path: Path) -> None:
    for _ in range(2):
        page = open_page()
        press(page, "n")
        for order in ORDERS:
            assert page.locator(".answers >> nth=0 >> .answer bdi").all_inner_texts() == order
            press(page, "j")
    assert orders(tmp_path, seed=SEED) == ORDERS
    assert orders(tmp_path, seed=SEED + 1) != ORDERS


def orders(folder: Path, seed: int) -> list[list[str]]:
    """What a page says of its columns, read without a browser."""
    write_vote_page(folder / "page.html", QUESTIONS, ANSWERS, "Two runs", seed=seed)
    [content] = re.findall(r'id="content".*?>(.*?)</script>', (folder / "page.html").read_text(encoding="utf-8"))
    return [[column["model"] for column in question["columns"]] for question in json.loads(content)["questions"]]


def test_turns_are_read_one_after_the_other_with_each_prompt_once(open_page: Open) -> None:
    page = open_page()
    first, second = ["Write a line.", "A fine long line.", "A fine line."], ["Now a shorter one.", "A line.", "Line."]
    assert texts(page) == first + second
    assert page.locator(".user h3").all_inner_texts() == ["Turn 1 of 2", "Turn 2 of 2"]
    press(page, "j")
    assert page.locator(".user h3").all_inner_texts() == ["Prompt"]


def test_a_turn_without_an_answer_says_so(open_page: Open) -> None:
    page = open_page(QUESTIONS[:1], {"dpo-run": {81: ["One."]}, "sft-run": {81: ["Two.", ""]}})
    said = page.locator(".answer .text:empty").evaluate_all(
        "all => all.map(e => getComputedStyle(e, '::before').content)"
    )
    assert said == ['"(no answer to this turn)"', '"(empty answer)"']


def test_a_reference_is_there_when_it_is_opened(open_page: Open) -> None:
    page = open_page()
    assert page.locator(".reference").count() == 0
    press(page, "j")
    assert page.locator(".reference .text").is_hidden()
    page.get_by_text("Reference answer").click()
    assert page.locator(".reference .text").inner_text() == "4"


def test_lengths_are_in_words_and_characters(open_page: Open) -> None:
    texts = ["Two  words\n", "a", "天気がいい 😀"]
    page = open_page(QUESTIONS[1:2], {str(k): {82: [text]} for k, text in enumerate(texts)})
    lengths = set(page.locator(".answer header .quiet").all_inner_texts())
    assert lengths == {"2 words · 11 characters", "1 word · 1 character", "6 words · 7 characters"}


def test_differences_are_the_words_out_of_the_longest_common_subsequence(open_page: Open) -> None:
    left, right = "We take the old road home,\n  where\n  we sleep.", "We take a new road,\n  and there we sleep."
    page = open_page(QUESTIONS[1:2], {"dpo-run": {82: [left]}, "sft-run": {82: [right]}})
    assert page.locator("mark").count() == 0
    press(page, "d")
    marks = [answer.locator("mark").all_inner_texts() for answer in page.locator(".answer").all()]
    assert marks == [["a new road,", "and there"], ["the old road home,", "where"]]  # line by line
    assert texts(page)[1:] == [right, left]  # marking changes no text
    press(page, "d")
    assert page.locator("mark").count() == 0


def test_what_cannot_be_compared_is_left_unmarked_with_a_word(open_page: Open) -> None:
    long = {82: [" ".join(map(str, range(2001)))], "poem": [" ".join(map(str, range(2000)))]}
    page = open_page(QUESTIONS[1:3], {"dpo-run": long, "sft-run": {82: ["0 1"], "poem": ["0 1 x"]}})
    press(page, "d")
    assert page.locator("#compared").inner_text() == "Differences are not marked in answers of more than 2,000 words."
    assert page.locator("mark").count() == 0
    press(page, "j")
    assert sorted(map(len, page.locator("mark").all_inner_texts())) == [1, len(long["poem"][0]) - len("0 1 ")]
    three = open_page(QUESTIONS[1:2], ANSWERS | {"base": {82: ["5"]}})
    press(three, "d")
    assert three.locator("#compared").inner_text() == "Differences are shown between two answers only."


def test_code_is_set_as_code_and_changes_no_text(open_page: Open) -> None:
    text = "Use `f(1)`:\n\n```python\ndef f(x):\n    return x\n```\nDone, and ``` open"
    page = open_page(QUESTIONS[1:2], {"dpo-run": {82: [text]}, "sft-run": {82: ["No code, `not\nhere`."]}})
    codes = ["`f(1)`", "```python\ndef f(x):\n    return x\n```", "``` open"]
    assert page.locator(".answer code").all_inner_texts() == codes
    assert text in texts(page)


def test_a_category_is_chosen_by_keyboard_and_left_again(open_page: Open) -> None:
    page = open_page()
    options = ["All (4)", "writing (2)", "maths (1)", "None (1)"]
    assert page.get_by_label("Category").locator("option").all_inner_texts() == options
    press(page, "f", "ArrowDown", "1", "Escape")  # a digit in the list is not a vote
    assert page.locator("#progress").inner_text() == "0 of 4 voted"
    assert page.locator("#place").inner_text() == "Question 1 of 2 id 81 · writing"
    press(page, "1", "v")
    assert page.locator("#place").inner_text() == "Question 2 of 2 id poem · writing"
    press(page, "j")
    assert status(page) == "This is the last question."
    press(page, "1", "v")
    assert status(page) == "Every question here has a vote."
    page.get_by_label("Category").select_option("None (1)")
    assert page.locator("#place").inner_text() == f"Question 1 of 1 id {LONG}"
    page.get_by_label("Category").select_option("All (4)")
    assert page.locator("#place").inner_text() == f"Question 4 of 4 id {LONG}"
    assert page.locator("#progress").inner_text() == "2 of 4 voted"


def test_a_category_chosen_with_the_mouse_leaves_the_keys_to_votes(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Category").click()
    press(page, "ArrowDown", "ArrowDown", "Enter")
    assert page.locator("#place").inner_text() == "Question 1 of 1 id 82 · maths"
    press(page, "1")
    assert status(page) == "Voted: A is best, sft-run. v goes to the next question."


def test_settings_and_title_are_shown_as_they_are(open_page: Open) -> None:
    said = {
        "temperature": 0.7,
        "<b>bad</b>": "{{content}}",
        "models": ["a", "b"],
        "at": Path("x"),
        "top_p": float("nan"),
    }
    page = open_page(title="</title>{{content}} & more", settings=said)
    assert page.title() == page.locator("h1").inner_text() == "</title>{{content}} & more"
    page.get_by_text("How these answers were made").click()
    assert page.locator("#said dt").all_inner_texts() == ["temperature", "<b>bad</b>", "models", "at", "top_p"]
    assert page.locator("#said dd").all_inner_texts() == ["0.7", "{{content}}", '["a", "b"]', '"x"', "NaN"]


# Texts that mean harm


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script><!-- <script>",
    "<img src=x onerror=\"alert('3')\"> & &lt;b&gt; 'single' \"double\" `back`",
    "مرحبا <b>بالعالم</b>, שלום \u202e reversed\u202c end",
    "one\u2028two\u2029three {{content}} ${alert(4)} \\u003c",
    "half a pair: \ud800 and \udc00, whole: 😀",
]


def test_hostile_text_is_shown_as_text(open_page: Open) -> None:
    questions = [{"question_id": text, "category": text, "turns": [text], "reference": [text]} for text in HOSTILE]
    answers = {HOSTILE[0]: {text: [text] for text in HOSTILE}, HOSTILE[1]: {text: [text, "x"] for text in HOSTILE}}
    page = open_page(questions, answers, settings=dict.fromkeys(HOSTILE, "{{content}}"))
    page.get_by_text("How these answers were made").click()
    press(page, "d")
    for text in HOSTILE:
        page.get_by_text("Reference answer").click()
        shown = page.locator(".user .text, .reference .text, .answer .text").all()
        assert [units(element) for element in shown[:4]] == [text.encode("utf-16-le", "surrogatepass")] * 4
        press(page, "1")
        assert set(page.locator(".answer bdi").all_inner_texts()) == set(HOSTILE[:2])
        press(page, "j")
    assert [units(name) for name in page.locator("#said dt").all()] == [
        text.encode("utf-16-le", "surrogatepass") for text in HOSTILE
    ]
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("img, b").count() == 0
    assert [vote["question_id"] for vote in exported(page)[1]["votes"]] == HOSTILE


def test_right_to_left_text_runs_from_the_right(open_page: Open) -> None:
    page = open_page(QUESTIONS[1:2], {"dpo-run": {82: ["مرحبا"]}, "sft-run": {82: ["Hello"]}})
    found = page.locator(".answer .text").evaluate_all(
        "all => all.map(e => [e.innerText, getComputedStyle(e).direction])"
    )
    assert sorted(found) == [["Hello", "ltr"], ["مرحبا", "rtl"]]


def test_the_policy_lets_nothing_out_and_nothing_else_run(open_page: Open, noise: list[str]) -> None:
    page = open_page()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refused = page.evaluate(
            """async (address) => {
              const refused = [];
              document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
              fetch(address).catch(() => 0);
              const make = (tag, properties) => document.body.appendChild(
                Object.assign(document.createElement(tag), properties));
              make("img", { src: address });
              make("script", { textContent: "window.ran = true" });
              make("div", { innerHTML: "<b onclick='window.ran = true' style='color: red'>" }).firstChild.click();
              const wait = () => new Promise((resolve) => setTimeout(resolve, 5));
              for (let k = 0; k < 200 && refused.length < 5; k++) await wait();
              return [...refused.sort(), window.ran];
            }""",
            f"http://127.0.0.1:{listener.getsockname()[1]}/",
        )
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert refused == ["connect-src", "img-src", "script-src-attr", "script-src-elem", "style-src-attr", None]
    noise.clear()  # each refusal is told on the console


# Widths, keys and focus


def test_columns_stand_side_by_side_where_there_is_room_and_else_below_each_other(open_page: Open) -> None:
    word = "x" * 300
    answers = {name: {81: [f"{word} `{word}`", "Short."]} for name in ANSWERS}
    page = open_page(QUESTIONS[:1], answers, title=word, settings={word: word})
    left, right = boxes(page.locator(".answer"))[:2]
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert left["width"] == pytest.approx(right["width"], abs=1)
    page.set_viewport_size({"width": 400, "height": 800})
    above, below = boxes(page.locator(".answer"))[:2]
    assert above["x"] == below["x"]
    assert above["y"] + above["height"] < below["y"]
    press(page, "1")
    page.get_by_text("How these answers were made").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 400 for box in boxes(page.locator("button:visible")))


def boxes(elements: Locator) -> list[Any]:
    return [element.bounding_box() for element in elements.all()]


def test_light_and_dark_follow_the_reader(open_page: Open) -> None:
    page = open_page()
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(244, 245, 247)", "rgb(20, 23, 27)"]


def test_tab_reaches_every_control_in_reading_order_with_focus_in_sight(open_page: Open) -> None:
    page = open_page()
    reached, outlined = [], set()
    for _ in range(14):
        press(page, "Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        outlined.add(page.evaluate("getComputedStyle(document.activeElement).outlineWidth"))
    top = ["category", "differences", "names", "tally", "help", "voter", "export"]
    assert reached == [*top, "previous", "next", "choice-0", "choice-1", "tie", "undo", "unvoted"]
    assert outlined == {"3px"}
    page.locator("#choice-1").focus()
    press(page, "Enter")
    assert page.evaluate("document.activeElement.id") == "choice-1"  # voting takes the focus nowhere
    assert page.locator("#choice-1").get_attribute("aria-pressed") == "true"
    assert status(page) == "Voted: B is best, sft-run. v goes to the next question."


def test_keys_are_letters_while_a_name_is_typed_and_shortcuts_of_the_browser_stay_its_own(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Your name").focus()
    page.keyboard.type("1tune?")
    assert page.get_by_label("Your name").input_value() == "1tune?"
    press(page, "Escape", "Control+a", "Alt+1")
    assert page.locator("#progress").inner_text() == "0 of 4 voted"
    press(page, "A")  # with caps lock on
    assert page.locator("#progress").inner_text() == "1 of 4 voted"


def test_the_keys_are_explained_and_wait_meanwhile(open_page: Open) -> None:
    page = open_page()
    press(page, "?")
    assert page.get_by_role("dialog", name="Keys").is_visible()
    press(page, "1", "Escape")
    assert page.get_by_role("dialog").count() == 0
    assert page.locator("#progress").inner_text() == "0 of 4 voted"


# Writing it


def test_the_same_answers_are_the_same_page_and_a_write_leaves_no_draft(tmp_path: Path) -> None:
    pages = []
    for _ in range(2):
        write_vote_page(tmp_path / "page.html", QUESTIONS, ANSWERS, "Two runs")
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ([], ANSWERS, "the page has no question to show"),
        ([QUESTIONS[0]] * 2, ANSWERS, "question_id 81 occurs 2 times"),
        (QUESTIONS, {"tie": {81: ["x"]}}, "a model is called 'tie'"),
    ],
)
def test_what_no_vote_could_be_read_from_is_refused(tmp_path: Path, questions: Any, answers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_vote_page(tmp_path / "page.html", questions, answers, "Two runs")
    assert list(tmp_path.iterdir()) == []


def test_without_a_browser_tests_are_skipped_and_fail_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        give_up("no browser")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        give_up("no browser")
