"""Votes on the page: by keyboard and by buttons, exported and counted; its widths, keys and focus."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.evaluation.judgments import AnswerSet, Judgments, read_votes
from helpers.evaluation.results import Counts, PairwiseResults
from tests.evaluation.pages import (
    ANSWERS,
    LONG,
    ORDERS,
    QUESTIONS,
    Open,
    boxes,
    exported,
    headings,
    press,
    results,
    status,
    texts,
)

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
    assert status(page) == "You have voted here: u undoes the vote. v goes to the next question."
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


# Widths, keys and focus


def test_columns_stand_side_by_side_where_there_is_room_and_else_below_each_other(open_page: Open) -> None:
    word = "x" * 300
    answers = {name: {81: [f"{word} `{word}`", f"Short: {len(name)}{name[0]}."]} for name in ANSWERS}
    page = open_page(QUESTIONS[:1], answers, title=word, settings={word: word})
    left, right = boxes(page.locator(".answer"))[:2]
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert left["width"] == pytest.approx(right["width"], abs=1)
    buttons = boxes(page.locator("#best-of button"))  # under their columns
    assert [b[key] for b in buttons for key in ("x", "width")] == pytest.approx(
        [b[key] for b in (left, right) for key in ("x", "width")], abs=1
    )
    assert all(b["y"] + b["height"] <= 900 for b in buttons)  # in sight, however long the answers are
    page.set_viewport_size({"width": 400, "height": 800})
    above, below = boxes(page.locator(".answer"))[:2]
    assert above["x"] == below["x"]
    assert above["y"] + above["height"] < below["y"]
    press(page, "1")
    page.get_by_text("How these answers were made").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 400 for box in boxes(page.locator("button:visible")))


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
    assert reached == [*top, "choice-0", "choice-1", "tie", "undo", "previous", "next", "unvoted"]
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
