"""Tools of a question, thoughts of an answer, and variables of a template: what is sent, and how it is shown."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from helpers.core import write_json
from helpers.data.formats import row_template_options
from helpers.evaluation.answers import AnswerStore
from helpers.evaluation.endpoint import Endpoint
from helpers.evaluation.generators import Generators, HFGenerator
from helpers.evaluation.pairs import Candidate, Pair, PairSet
from helpers.evaluation.questions import Answer, JudgePrompts, question_turns, read_bench, read_questions
from helpers.evaluation.samples import SampleStore, find_prompts
from helpers.hub.push import write_card
from helpers.models.resolve import ModelRef
from helpers.runs.report import write_report
from tests.evaluation.rounds import pairs_settings, write_rows
from tests.evaluation.test_generation import GREEDY, settings_of
from tests.judge_server import judge_server
from tests.tiny import tiny_mistral

if TYPE_CHECKING:
    from tests.evaluation.pages import Open

ADD = {"type": "function", "function": {"name": "add", "description": "Adds <b>numbers</b>.", "parameters": {}}}
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "general", "turns": ["What is 2 plus 3?", "And 4?"], "tools": [ADD]},
    {"question_id": 2, "category": "general", "turns": ["What is 4 plus 5?", "And 6?"]},
]
VARIABLES = {"enable_thinking": False}
VARIED: list[tuple[Any, Any]] = [  # and what the template gets
    (VARIABLES, VARIABLES), (json.dumps(VARIABLES), VARIABLES), ("{'enable_thinking': False}", VARIABLES), (None, None),
    ("", None), ({}, None), ({"enable_thinking": None, "mode": "so"}, {"mode": "so"}),
]  # fmt: skip


def test_a_column_of_tools_is_a_list_or_json_and_is_kept_with_the_answers(tmp_path: Path, capsys: Any) -> None:
    kinds: list[Any] = [[ADD], ADD, json.dumps([ADD]), json.dumps(ADD), None, "", "[{", 5]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?", "tools": tools}) + "\n" for i, tools in enumerate(kinds)))
    source = SimpleNamespace(prompts_file=str(file), rows=0, dataset_id="", prompts=())
    questions = read_questions(source)
    assert [q.get("tools") for q in questions] == [[ADD]] * 4 + [None, None]
    printed = capsys.readouterr().out
    assert "2 of 8 rows were dropped" in printed
    assert "tools that are not JSON objects: 2 (row 7)" in printed
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    again = read_questions(SimpleNamespace(**vars(source) | {"prompts_file": str(tmp_path / "question.jsonl")}))
    assert [q.get("tools") for q in again] == [q.get("tools") for q in questions]
    assert question_turns(questions[0]) == [f"(Tools: {json.dumps([ADD])})\n\n0?"]
    prompts = JudgePrompts()
    [match, *_] = prompts.make_matches(questions[:1], {"a": {1: ["x"]}, "b": {1: ["y"]}}, [("a", "b")], "pairwise")
    assert json.dumps([ADD]) in prompts.messages(match, questions[0], {"a": {1: ["x"]}, "b": {1: ["y"]}})[1]["content"]


@pytest.mark.parametrize("source", ["jsonl", "json", "csv", "parquet", "dataset"])
def test_a_column_of_variables_is_an_object_or_json_and_is_kept_with_the_answers(source: str, tmp_path: Path) -> None:
    given = VARIED if source in ("jsonl", "json") else VARIED[1:3] + VARIED[4:5]
    rows = [{"prompt": f"{i}?", "chat_template_kwargs": value} for i, (value, _) in enumerate(given)]
    file, table = tmp_path / f"asked.{source}", None if source in ("jsonl", "json") else Dataset.from_list(rows)
    if table is None:
        write_rows(file, rows) if source == "jsonl" else file.write_text(json.dumps(rows))
    else:
        {"csv": table.to_csv, "parquet": table.to_parquet, "dataset": table.save_to_disk}[source](str(file))
    settings: Any = SimpleNamespace(prompts_file=str(file), rows=0, dataset_id="", dataset_split="", prompts=())
    if source == "dataset":
        settings.prompts_file, settings.dataset_id = "", str(file)
    questions = read_questions(settings)
    assert [q.get("chat_template_kwargs") for q in questions] == [expected for _, expected in given]
    AnswerStore(tmp_path / "run", questions).write_questions()
    assert read_bench(tmp_path / "run") == questions


def test_a_question_with_odd_variables_is_left_out_by_its_reason(tmp_path: Path, capsys: Any) -> None:
    odd: list[Any] = ["no thinking", "false", [1], 5, {"chat_template": "x"}, {"tools": []}, VARIABLES]
    rows = [{"prompt": f"{i}?", "chat_template_kwargs": value} for i, value in enumerate(odd)]
    file = write_rows(tmp_path / "asked.jsonl", rows)
    source: Any = SimpleNamespace(prompts_file=file, rows=0, dataset_id="", prompts=())
    assert [q["turns"] for q in read_questions(source)] == [["6?"]]
    printed = capsys.readouterr().out
    assert "6 of 7 rows were dropped. chat_template_kwargs that are not JSON objects: 4 (row 1);" in printed
    assert "chat_template_kwargs with chat_template, which is not a variable of a template: 1 (row 5)" in printed


def test_a_model_here_gets_the_variables_of_its_question_over_its_own(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own: Any = copy.deepcopy(tokenizer)
    own.chat_template = "{{ mode }}{% if enable_thinking is false %}red red red{% endif %}" + own.chat_template
    model, common = tiny_mistral(len(own)), {"enable_thinking": True, "mode": "blue blue"}
    plain = [QUESTIONS[1] | {"question_id": i} for i in (1, 2)]
    store = AnswerStore(tmp_path, [plain[0] | {"chat_template_kwargs": VARIABLES}, plain[1]])
    store.generate_missing("m", HFGenerator(model, own, variables=common), **GREEDY)
    for question, variables in zip(plain, (common | VARIABLES, common), strict=True):
        alone = AnswerStore(tmp_path / str(question["question_id"]), [question])
        alone.generate_missing("m", HFGenerator(model, own, variables=variables), **GREEDY)
        assert alone.answers("m")[question["question_id"]] == store.answers("m")[question["question_id"]]
    assert store.answers("m")[1] != store.answers("m")[2]


def test_a_server_gets_the_variables_of_a_question_over_those_of_all(tmp_path: Path) -> None:
    asked = [QUESTIONS[0] | {"chat_template_kwargs": VARIABLES}, QUESTIONS[1]]
    common = {"enable_thinking": True, "mode": "so"}
    for variables, first, second in (({}, VARIABLES, None), (common, common | VARIABLES, common)):
        with judge_server(lambda messages: "nine") as server:
            model = Endpoint("m", server.url, variables=variables)
            AnswerStore(tmp_path / str(len(variables)), asked).generate_missing("m", model, **GREEDY)
            samples = SampleStore(tmp_path / f"{len(variables)} samples", asked, num_samples=2, models=["m"])
            samples.generate_missing("m", model, max_new_tokens=4, do_sample=True, temperature=1.0, top_p=1.0)
            sent = [r for r in server.requests if r["messages"][0]["content"] == "What is 2 plus 3?"]
            others = [r for r in server.requests if r["messages"][0]["content"] == "What is 4 plus 5?"]
        assert [r.get("chat_template_kwargs") for r in sent] == [first] * len(sent)
        assert [r.get("chat_template_kwargs") for r in others] == [second] * len(others)
        assert [r.get("tools") for r in sent] == [[ADD]] * len(sent)
        assert min(len(sent), len(others)) >= 4  # two turns and two samples


def test_variables_of_a_question_tell_prompts_and_runs_apart_and_are_columns_of_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?"}, {"prompt": "Why?", "chat_template_kwargs": VARIABLES}, {"prompt": "Why?"}]
    words = ["--prompts_file", write_rows(tmp_path / "asked.jsonl", rows), "--models", "m"]
    prompts = find_prompts(pairs_settings(tmp_path, *words, "--base_url", "http://127.0.0.1:1/v1"))
    assert [q.get("chat_template_kwargs") for q in prompts.questions] == [None, VARIABLES]
    assert prompts.left_out == {"repeats another prompt": 1}
    assert len({Generators([], settings_of()).fingerprint([q]) for q in prompts.questions}) == 2
    question = prompts.questions[1] | {"tools": [ADD]}
    chosen, rejected = (Candidate(text, "m", Answer(text), score) for text, score in (("b", 1.0), ("a", 0.0)))
    row = PairSet("s", 1, Counter())._row(Pair(question, chosen, rejected, "s"))
    assert (row["tools"], row["chat_template_kwargs"]) == ([ADD], VARIABLES)
    assert row_template_options(row) == {"tools": [ADD], **VARIABLES}


def test_a_model_here_gets_the_tools_of_its_question_in_its_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own: Any = copy.deepcopy(tokenizer)
    own.chat_template = "{% if tools %}{{ tools|tojson }}{% endif %}" + own.chat_template
    model = tiny_mistral(len(own))
    store = AnswerStore(tmp_path, QUESTIONS)
    store.generate_missing("m", HFGenerator(model, own), **GREEDY)
    expected: dict[int, list[str]] = {}
    for question in QUESTIONS:
        talk: list[dict[str, str]] = []
        for turn in question["turns"]:
            talk.append({"role": "user", "content": turn})
            given: dict[str, Any] = {"tools": question["tools"]} if "tools" in question else {}
            row = own.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=True, **given
            )
            with torch.inference_mode():
                ids = model.generate(**row, **GREEDY, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
            text = own.decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            talk.append({"role": "assistant", "content": text})
            expected.setdefault(question["question_id"], []).append(text)
    assert store.answers("m") == expected
    plain = AnswerStore(tmp_path / "plain", [{k: v for k, v in q.items() if k != "tools"} for q in QUESTIONS])
    plain.generate_missing("m", HFGenerator(model, own), **GREEDY)
    assert plain.answers("m")[1] != expected[1]
    assert plain.answers("m")[2] == expected[2]


def test_a_server_gets_the_tools_of_a_question_and_its_calls_are_the_answer(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}

    def script(messages: list[dict[str, str]]) -> Any:
        if "2 plus 3" not in messages[-1]["content"]:
            return "nine"
        message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
        return {"message": message, "finish_reason": "tool_calls"}

    with judge_server(script) as server:
        store = AnswerStore(tmp_path, QUESTIONS)
        store.generate_missing("m", Endpoint("m", server.url), **GREEDY)
        sent = {(r["messages"][0]["content"], len(r["messages"])): r.get("tools") for r in server.requests}
    assert sent == {("What is 2 plus 3?", 1): [ADD], ("What is 2 plus 3?", 3): [ADD],
                    ("What is 4 plus 5?", 1): None, ("What is 4 plus 5?", 3): None}  # fmt: skip
    answer = store.answers("m")[1][0]
    assert answer == '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>'
    assert answer.thoughts == "hm"
    assert store.answers("m")[2] == ["nine", "nine"]


def test_thoughts_are_a_mark_in_a_terminal_and_folded_in_a_notebook(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, [{"question_id": 1, "category": "general", "turns": ["Two?"]}])
    for name, text in (("one", "<think>so it <i>goes</i></think>4"), ("two", "5"), ("three", "<think>still at")):
        store.file(name).add({"question_id": 1, "choices": [{"turns": [text]}]})
    table = store.side_by_side(["one", "two", "three"], 1)
    console = Console(width=120)
    with console.capture() as printed:
        console.print(table)
    assert "(thought: 3 words) 4" in printed.get()
    assert "(thought: 2 words) (empty answer)" in printed.get()
    assert printed.get().count("(thought:") == 2
    html = table._repr_html_()
    assert "<details><summary>(thought: 3 words)</summary>so it &lt;i&gt;goes&lt;/i&gt;</details>4</td>" in html
    assert html.count("<details>") == 2


def test_the_page_folds_the_variables_of_a_question(open_page: Open) -> None:
    answers = {"one": {1: ["five", "nine"]}, "two": {1: ["six", "nine"]}}
    page = open_page([QUESTIONS[0] | {"chat_template_kwargs": {"mode": "<b>so</b>"}}], answers)
    folded = page.locator("details.tools")
    assert folded.locator("summary").all_inner_texts() == ["Tools", "Variables of the chat template"]
    folded.last.locator("summary").click()
    assert json.loads(folded.last.locator(".text").inner_text()) == {"mode": "<b>so</b>"}


def test_the_page_folds_tools_and_thoughts_and_compares_neither(open_page: Open) -> None:
    answers = {"one": {1: ["<think>hm, a thought</think>five", "nine"]}, "two": {1: ["five, I say", "nine"]}}
    page = open_page(QUESTIONS[:1], answers)
    tools, thoughts = page.locator("details.tools"), page.locator("details.thoughts")
    assert (tools.count(), thoughts.count()) == (1, 1)  # not once more in the second turn
    for folded, summary, inside in ((tools, "Tools", "Adds <b>numbers</b>."), (thoughts, "Thoughts", "hm, a thought")):
        assert folded.locator("summary").inner_text() == summary
        assert not folded.locator(".text").is_visible()
        folded.locator("summary").click()
        assert inside in folded.locator(".text").inner_text()
    bodies = page.locator(".answer > .text").all_inner_texts()
    assert sorted(bodies) == ["five", "five, I say", "nine", "nine"]
    headers = page.locator(".answer header .quiet").all_inner_texts()
    assert sorted(headers)[:2] == ["1 word · 4 characters", "1 word · 4 characters"]
    assert sorted(headers)[2:] == ["1 word · 4 characters", "3 words · 11 characters"]
    marks = page.locator(".answer del, .answer ins, .answer mark").all_inner_texts()
    assert "thought" not in "".join(marks)


def test_samples_of_a_report_fold_thoughts(tmp_path: Path) -> None:
    answers = ["<think>\nhm & so\n</think>\n\n4", "plain", "<think>still at", "</think>\n\nfive"]
    rows = [{"step": 0, "prompt": f"{i}?", "answer": text, "tokens": 3} for i, text in enumerate(answers)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(tmp_path / "run.json", {"step": "dpo", "status": "finished", "base_model": "m"})
    page = write_report(tmp_path).read_text()
    assert "<details><summary>Thought</summary>hm &amp; so</details>4</dd>" in page
    assert "<dd>plain</dd>" in page
    assert "<details><summary>Thought</summary>still at</details>(empty)</dd>" in page
    assert "five</dd>" in page


def test_variables_of_the_template_reach_04_a_server_the_card_and_the_serve_command(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    given = json.dumps(VARIABLES)
    with judge_server(lambda messages: "yes") as server:
        for words, expected in ((["--chat_template_kwargs", given], VARIABLES), ([], None)):
            models = Generators([ModelRef("m", "m", base_url=server.url)], settings_of(*words))
            [(_, generator)] = models.load()
            assert generator.generate([[{"role": "user", "content": "So?"}]], **GREEDY) == ["yes"]
            assert server.requests[-1].get("chat_template_kwargs") == expected
    own: Any = copy.deepcopy(tokenizer)
    own.chat_template = own.chat_template + "{% if enable_thinking is false %}no{% endif %}"
    tiny_mistral(len(own)).save_pretrained(tmp_path / "m")
    own.save_pretrained(tmp_path / "m")
    record = {"step": "dpo", "status": "finished", "base_model": "org/base", "settings": {}}
    write_json(tmp_path / "m" / "run.json", record | {"data": {"rendered_with": {given: 4}}})
    ref = ModelRef("m", str(tmp_path / "m"))
    for words, expected in (([], VARIABLES), (["--chat_template_kwargs", '{"enable_thinking": true}'],
                                              {"enable_thinking": True})):  # fmt: skip
        models = Generators([ref], settings_of(*words))
        assert models.loading["m"]["template variables"] == json.dumps(expected)
        [(_, generator)] = models.load()
        assert isinstance(generator, HFGenerator)
        assert generator.variables == expected
    card = write_card(tmp_path / "m", repo_id="me/m")
    assert ", **{'enable_thinking': False})" in card
    assert "vllm serve me/m --default-chat-template-kwargs '{\"enable_thinking\": false}'" in card
