"""What is read on the vote page, texts that mean harm, and how the page is written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from pathlib import Path

import pytest

from tests.browser import give_up
from tests.evaluation.pages import (
    ANSWERS,
    LONG,
    ORDERS,
    QUESTIONS,
    SEED,
    Open,
    exported,
    press,
    status,
    texts,
    units,
    write_page,
)

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
    page = write_page(folder, seed=seed).read_text(encoding="utf-8")
    [content] = re.findall(r'id="content".*?>(.*?)</script>', page)
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
        answer = text.encode("utf-8", "replace").decode()  # half a pair is no text of an answer
        assert [units(element) for element in shown[:4]] == [
            each.encode("utf-16-le", "surrogatepass") for each in (text, text, answer, answer)
        ]
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


# Writing it


def test_the_policy_has_the_hashes_of_the_page_s_own_style_and_script(tmp_path: Path) -> None:
    page = write_page(tmp_path).read_text(encoding="utf-8")
    for tag in ("style", "script"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in page, f"write this hash into vote_page.html: {digest}"


def test_the_same_answers_are_the_same_page_and_a_write_leaves_no_draft(tmp_path: Path) -> None:
    pages = [write_page(tmp_path).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert {file.name for file in tmp_path.iterdir()} == {"answers.html", "model_answer"}


def test_without_a_browser_tests_are_skipped_and_fail_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        give_up("no browser")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        give_up("no browser")
