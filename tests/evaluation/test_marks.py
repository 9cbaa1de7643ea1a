"""Answers that are empty, cut off or refused, and thoughts: what is stored, shown, counted, compared and judged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from helpers.core import UserError, read_jsonl
from helpers.evaluation.answers import AnswerStore
from helpers.evaluation.endpoint import Endpoint
from helpers.evaluation.generators import HFGenerator
from helpers.evaluation.judgments import AnswerSet, find_answers
from helpers.evaluation.questions import strip_thoughts
from helpers.models.chat import render
from helpers.runs.run import Run
from tests.conftest import Project
from tests.evaluation.judging import questions_of
from tests.judge_server import judge_server
from tests.tiny import tiny_mistral

GREEDY = {"max_new_tokens": 8, "do_sample": False}
THOUGHTS = {
    "<think>hm\nhm</think>\n\n4": "4",
    "<THINK>hm</THINK>4": "4",
    "<think>a</think><think>b</think>4": "4",
    "<think>I was cut off in the mid": "",
    "<think>": "",
    "<think>\n\n</think>\n\n4": "4",
    "no beginning, as in R1's template</think>4": "4",
    "<thinking>hm</thinking>4": "4",
    "<thought>hm</thought>4": "4",
    "<reasoning>hm</reasoning>4": "4",
    "<seed:think>hm</seed:think>4": "4",
    "[THINK]hm[/THINK]4": "4",
    "[THINK]hm": "",
    "<|START_THINKING|>hm<|END_THINKING|>4": "4",
    "◁think▷hm◁/think▷4": "4",
    "<|begin_of_thought|>hm<|end_of_thought|>4": "4",
    "<|inner_prefix|>hm<|inner_suffix|>4": "4",
    "<|channel>thought\nhm<channel|>4": "4",
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4": "4",
    "<|channel|>analysis<|message|>hm": "",
    "<|channel|>final<|message|>4": "4",
    "Here is my thought process: hm. Here is my response: 4": "4",
    "4 <think>was it?</think>": "4",
    "It is 4.\n<think>was it": "It is 4.",
    "Write `<think>` first, and `</think>` then.": "Write `<think>` first, and `</think>` then.",
    "Somebody forgot the <think> tag.": "Somebody forgot the <think> tag.",
    "I think [that] is 4": "I think [that] is 4",
    "": "",
}


@pytest.mark.parametrize(("raw", "answer"), THOUGHTS.items())
def test_thoughts_are_left_out_of_an_answer(raw: str, answer: str) -> None:
    assert strip_thoughts(raw) == answer


MESSAGES: list[tuple[dict[str, Any], str, str]] = [  # a choice, the answer, its thoughts
    ({"message": {"role": "assistant", "content": "4", "reasoning_content": "hm"}}, "4", "hm"),
    ({"message": {"role": "assistant", "content": "4", "reasoning": "hm"}}, "4", "hm"),
    ({"message": {"role": "assistant", "content": None, "reasoning_content": "hm"}}, "", "hm"),
    ({"message": {"role": "assistant", "content": "<think>hm</think>4"}}, "4", "hm"),
    ({"message": {"role": "assistant", "content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "It is "},
        {"type": "text", "text": "4"}]}}, "It is 4", "hm"),
    ({"message": {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "4"}]}}, "4", "hm"),
    ({"message": {"role": "assistant", "content": [
        {"type": "reasoning", "summary": [{"text": "hm"}]}, "4"]}}, "4", "hm"),
    ({"message": {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]}}, "4", ""),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "answer", "thoughts"), MESSAGES)
def test_thoughts_of_a_server_are_kept_raw_and_left_out(
    choice: dict[str, Any], answer: str, thoughts: str, tmp_path: Path
) -> None:
    questions = questions_of(1, turns=2)
    with judge_server(lambda messages: choice) as server:
        store = AnswerStore(tmp_path, questions)
        store.generate_missing("m", Endpoint("m", server.url), **GREEDY)
        assert server.requests[1]["messages"][1] == {"role": "assistant", "content": answer}  # as templates do it
    [row] = read_jsonl(tmp_path / "model_answer" / "m.jsonl")
    assert row["choices"][0]["turns"] == [answer] * 2
    assert all(thoughts in raw for raw in row["choices"][0].get("raw", [""]))
    assert AnswerStore(tmp_path, questions).answers("m") == {0: [answer] * 2}
    counts = store.count("m")
    assert (counts["with thoughts"], counts["empty"]) == (2 * bool(thoughts), 2 * (not answer))
    assert thoughts not in store.side_by_side(["m"], 1).rows[0][1] or not thoughts


def found_in(folder: Path) -> AnswerSet:
    values = {"answers_dir": str(folder), "judgments": "", "models": (), "bench_dir": "", "baseline": "", "bench": ()}
    return find_answers(SimpleNamespace(**values, output_dir=folder, is_set=lambda name: True))


def shown(thing: Any) -> str:
    console = Console(width=200)
    with console.capture() as text:
        console.print(thing)
    return text.get()


def test_thoughts_in_files_that_others_wrote_are_not_compared_measured_or_judged(tmp_path: Path) -> None:
    for name, text in (("one", "<think>a long thought</think>same"), ("two", "same")):
        row = {"question_id": 0, "model_id": name, "choices": [{"index": 0, "turns": [text]}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "question.jsonl").write_text(json.dumps(questions_of(1)[0]) + "\n")
    found = found_in(tmp_path)
    assert found.answers == {"one": {0: ["same"]}, "two": {0: ["same"]}}
    lines = shown(found).splitlines()
    assert lines[0].split()[-5:] == ["characters", "per", "answer", "with", "thoughts"]
    assert lines[1].split() == ["one", "1", "of", "1", "4", "1"]
    assert lines[-1] == "note: 1 questions have identical answers, which are ties in a comparison: nobody is asked"


def script(messages: list[dict[str, str]]) -> Any:
    """Answers to ten questions: two are empty, three are cut off (one of them in its thoughts), the rest are whole."""
    number = int(messages[-1]["content"].split()[1].split(".")[0])
    text = {0: "", 1: "  \n", 4: "<think>still at"}.get(number, f"answer {number}")
    return {
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if number in (2, 3, 4) else "stop",
    }


def test_empty_cut_and_refused_answers_are_counted_and_marked(tmp_path: Path, capsys: Any) -> None:
    store = AnswerStore(tmp_path / "v", questions_of(10))
    with judge_server(script) as server:
        server.refuse = lambda r: (400, "Not this one") if "question 9" in r["messages"][-1]["content"] else None
        store.generate_missing("m", Endpoint("m", server.url), **GREEDY)
    assert "note: question 9 has no answer: m at" in capsys.readouterr().out
    counts = {"answered": 9, "refused": 1, "empty": 3, "cut": 3, "with thoughts": 1}
    assert AnswerStore(tmp_path / "v", questions_of(10)).count("m") == counts  # from the file
    run = Run(tmp_path / "v", {"status": "running"})
    store.finish(run, ["m"], page="p")
    record = json.loads((tmp_path / "v" / "run.json").read_text())
    assert (record["status"], record["metrics"], record["page"]) == ("finished", {"m": counts}, "p")
    table = store.side_by_side(["m"], 10)
    assert [row[1] for row in table.rows] == [
        "(empty answer)", "(empty answer)", "answer 2 (cut off)", "answer 3 (cut off)", "(empty answer) (cut off)",
        "answer 5", "answer 6", "answer 7", "answer 8", "(no answer)",
    ]  # fmt: skip
    note = ("note: m: 1 questions have no answer: they were refused; 3 answers are empty; 3 answers are cut off at "
            "--max_new_tokens; 1 answers had thoughts, which are left out")  # fmt: skip
    assert note in " ".join(shown(table).split())
    assert note in table._repr_html_()
    lines = shown(found_in(tmp_path / "v")).splitlines()
    assert lines[0].split()[-4:] == ["empty", "cut", "with", "thoughts"]
    assert lines[1].split() == ["m", "9", "of", "10", "5", "3", "3", "1"]


def test_the_page_marks_what_is_empty_cut_or_missing(open_page: Any) -> None:
    page = open_page(
        questions_of(2), {"one": {0: ["whole"], 1: [""]}, "two": {0: ["half"]}}, cut={"two": {0: [True]}}
    )  # fmt: skip
    marked = "1 questions not answered by every model · 1 empty answers · 1 answers cut off at the limit of tokens"
    assert page.locator("#marked").inner_text() == marked
    headers = page.locator(".answer header .quiet").all_inner_texts()
    assert sorted(headers) == ["1 word · 4 characters · cut off", "1 word · 5 characters"]
    assert page.locator("#unanswered").is_hidden()
    page.keyboard.press("ArrowRight")
    assert page.locator("#unanswered").inner_text() == "1 of 2 models has no answer here."


@pytest.mark.parametrize(
    ("answer", "refuse", "line"),
    [
        ("", None, "4 questions have no answer with any text; 0 were cut off. Check the models"),
        ({"message": {"role": "assistant", "content": "<think>hm"}, "finish_reason": "length"}, None,
         "4 questions have no answer with any text; 4 were cut off. Raise --max_new_tokens"),
        ("fine", (400, "Your plan has ended"), "Your plan has ended"),
        ("fine", (404, "no such model"), "has no model 'nobody' (404)"),
    ],
)  # fmt: skip
def test_a_run_in_which_nothing_was_answered_is_not_finished(
    answer: Any, refuse: Any, line: str, project: Project
) -> None:
    name = f"nothing-{len(line)}"
    with judge_server(lambda messages: answer) as server:
        server.refuse = lambda request: refuse
        flags = ["--models", "nobody", "--base_url", server.url, "--run_name", name, "--prompts", *"abcd"]
        done = project.run("04_vibes.py", *flags, status=1)
    assert line in done.stderr
    assert done.stderr.count("\n") <= 3
    assert "Traceback" not in done.stderr
    assert project.record(name)["status"] == "failed"
    judged = project.run("05_judge.py", "--judge_model", "j", "--base_url", server.url, status=1)
    assert "There is no finished vibes run" in judged.stderr


def test_a_local_answer_that_reaches_the_limit_is_cut(tokenizer: Any) -> None:
    model = tiny_mistral(len(tokenizer))
    talk = [[{"role": "user", "content": "What is 2 plus 3?"}]]
    inputs = tokenizer(render(tokenizer, talk[0], prompt=True), add_special_tokens=False, return_tensors="pt")
    last = int(model.generate(**inputs, **GREEDY)[0, -1])
    for more, cut in (({}, True), ({"eos_token_id": [last]}, False), ({"eos_token_id": last}, False)):
        assert HFGenerator(model, tokenizer).generate(talk, **GREEDY | more)[0].cut is cut


@pytest.mark.parametrize("special", [False, True])
def test_local_thoughts_are_left_out_also_those_that_the_template_or_special_tokens_begin(
    special: bool, tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    begin, end = ("[THINK]", "[/THINK]") if special else ("<think>", "</think>")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [begin, end]})
    else:
        tokenizer.add_tokens([begin, end])
    hm, four = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hm", "four"))
    marks = tokenizer.convert_tokens_to_ids([begin, end])
    eos = [tokenizer.eos_token_id]

    def speaks(ids: list[int]) -> Callable[..., Any]:
        import torch

        return lambda input_ids, **kwargs: torch.cat([input_ids, torch.tensor([ids])], dim=1)

    model = SimpleNamespace(device="cpu", generation_config=None)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for opened, ids, answer, raw in (
        ("", [marks[0], *hm, marks[1], *four, *eos], "four", f"{begin}hm{end}four"),
        (begin, [*hm, marks[1], *four, *eos], "four", f"{begin}hm{end}four"),
        (begin, [*hm], "", f"{begin}hm"),
        ("", [*four, *eos], "four", "four"),
    ):
        tokenizer.chat_template = template + opened
        model.generate = speaks(ids)
        [given] = HFGenerator(model, tokenizer).generate([[{"role": "user", "content": "x"}]], **GREEDY)
        assert (given, given.raw.replace(" ", ""), given.cut) == (answer, raw, ids[-1] != eos[0])


def test_a_refused_answer_in_a_chat_is_no_answer() -> None:
    with judge_server(lambda messages: "fine") as server:
        server.refuse = lambda request: (400, "Not this")
        with pytest.raises(UserError, match="Not this"):
            Endpoint("m", server.url).stream([{"role": "user", "content": "x"}], 0, **GREEDY)
