"""Questions, answers, and what gives them: a model, an adapter switched on and off, an endpoint."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from helpers.core import SettingsError, UserError, read_jsonl
from helpers.data.conversations import Message
from helpers.evaluation.answers import AnswerStore, JsonlStore, SideBySide
from helpers.evaluation.generators import (
    Endpoint,
    HFGenerator,
    OpenAIGenerator,
    chat_loop,
    generate_answers,
    generation_kwargs,
)
from helpers.evaluation.questions import OUR_QUESTIONS as OURS
from helpers.evaluation.questions import read_bench, read_questions
from helpers.models.chat import render
from helpers.models.resolve import ModelRef, resolve_models
from helpers.settings.load import load_settings
from tests.conftest import REPO, code_cells
from tests.judge_server import judge_server
from tests.models.test_helpers import tiny_mistral

GREEDY = {"max_new_tokens": 12, "do_sample": False}
QUESTIONS = [
    {
        "question_id": i,
        "category": "general",
        "turns": [f"What is {i} plus 3? " * n][: 1 + i % 2] + ["And 4?"] * (i % 2),
    }
    for i, n in enumerate((1, 5, 2, 4, 3, 2))
]


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> Any:
    return tiny_mistral(len(tokenizer))


def said(answers: AnswerStore, name: str = "m") -> dict[Any, list[str]]:
    return answers.turns(name)


def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    talks = [[{"role": "user", "content": "What is 2 plus 3? " * n}] for n in (1, 5, 2, 4, 3)]
    one = generate_answers(model, tokenizer, talks, 1, **GREEDY)
    many = generate_answers(model, tokenizer, talks, 3, **GREEDY)
    assert one == many
    assert len(set(one)) > 1


def test_answers_end_where_the_chat_format_ends_them(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [[{"role": "user", "content": "What is 2 plus 3?"}]]
    model = tiny_mistral(len(tokenizer))
    text = render(tokenizer, talk[0], prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, -12:].tolist()
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(ids[4])  # as a chat format may set it, beside the base's </s>
    (whole,), (ended,) = (generate_answers(model, t, talk, 1, **GREEDY) for t in (tokenizer, other))
    assert model.generation_config.eos_token_id == 2
    assert ended == tokenizer.decode(ids[: ids.index(ids[4]) + 1]).strip()
    assert len(ended) < len(whole)


def settings_of(*words: str) -> Any:
    (cell,) = [c for c in code_cells(REPO / "notebooks" / "04_vibes.py") if "parameters" in c.metadata.get("tags", [])]
    names: dict[str, Any] = {}
    exec(compile(cell.source, "Settings", "exec", dont_inherit=True), names)
    return load_settings(names["Settings"], {}, list(words))


def test_a_temperature_means_that_it_samples_and_one_of_0_that_it_does_not() -> None:
    assert generation_kwargs(settings_of())["do_sample"] is False
    assert generation_kwargs(settings_of("--temperature", "0.7")) == {
        "max_new_tokens": 256, "do_sample": True, "num_beams": 1, "repetition_penalty": 1.0, "temperature": 0.7,
        "top_p": 1.0, "top_k": 50,
    }  # fmt: skip
    assert generation_kwargs(settings_of("--temperature", "0"))["do_sample"] is False
    assert (
        generation_kwargs(settings_of("--generation_kwargs", "min_p=1e-2", "no_repeat_ngram_size=3"))["min_p"] == 0.01
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--do_sample", "--temperature", "0"], "--do_sample needs a --temperature above 0"),
        (["--top_p", "1.5"], "a --top_p above 0 and at most 1"),
        (["--generation_kwargs", "num_return_sequences=2"], "--generation_kwargs num_return_sequences=2"),
        (["--generation_kwargs", "min_q=1"], "did you mean min_p=...?"),
        (["--generation_kwargs", "repetition_penalty=abc"], "--generation_kwargs repetition_penalty=abc: a number"),
        (["--generation_kwargs", "max_new_tokens=-4"], "model.generate refuses these settings"),
        (["--batch_size", "0"], "--batch_size 0 cannot be: 1 is the least"),
        (["--rows", "-1"], "--rows -1 cannot be: 0 is the least"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 cannot be"),
    ],
)
def test_what_generate_would_choke_on_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(said)):
        generation_kwargs(settings_of(*words))


def test_brackets_in_a_setting_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    settings_of("--prompts", "Is [/b] markup?")
    assert "[/b]" in capsys.readouterr().out


def test_an_adapter_switched_on_and_off_answers_as_two_models_loaded_apart(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    for seed in (1, 2):
        trained = get_peft_model(tiny_mistral(len(tokenizer)), config)
        torch.manual_seed(seed)
        for name, weight in trained.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(weight, std=0.5)
        trained.save_pretrained(tmp_path / str(seed))
    talks = [[{"role": "user", "content": "What is 2 plus 3? " * n}] for n in (1, 4, 2)]

    def apart(adapter: str) -> list[str]:
        base = tiny_mistral(len(tokenizer))
        policy = PeftModel.from_pretrained(base, tmp_path / adapter).eval() if adapter else base
        return generate_answers(policy, tokenizer, talks, 3, **GREEDY)

    together, shared = {}, tiny_mistral(len(tokenizer))
    for adapter in ("", "1", "2"):  # as 04 does it
        policy = PeftModel.from_pretrained(shared, tmp_path / adapter).eval() if adapter else shared
        together[adapter] = generate_answers(policy, tokenizer, talks, 3, **GREEDY)
        shared = policy.unload() if adapter else policy
    again = generate_answers(shared, tokenizer, talks, 3, **GREEDY)
    assert together == {name: apart(name) for name in ("", "1", "2")}
    assert again == together[""]
    assert together[""] != together["1"] != together["2"] != together[""]


def test_conversations_are_played_turn_by_turn_with_what_was_answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    answers = AnswerStore(tmp_path, QUESTIONS)
    answers.play("m", HFGenerator(model, tokenizer), 2, 0, False, **GREEDY)
    rows = read_jsonl(tmp_path / "model_answer" / "m.jsonl")
    assert {key for row in rows for key in row} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [len(turns) for turns in said(answers).values()] == [len(q["turns"]) for q in QUESTIONS]
    asked = QUESTIONS[1]["turns"]
    first, second = said(answers)[1]
    talk = [{"role": "user", "content": asked[0]}, {"role": "assistant", "content": first}]
    talk.append({"role": "user", "content": asked[1]})
    assert generate_answers(model, tokenizer, [talk], 1, **GREEDY) == [second]
    assert read_bench(tmp_path) == QUESTIONS  # question.jsonl stands beside the answers


@pytest.mark.parametrize("sampling", [GREEDY, {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}])
def test_a_run_that_was_stopped_goes_on_to_the_answers_of_one_that_was_not(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    whole = AnswerStore(tmp_path / "whole", QUESTIONS)
    whole.play("m", HFGenerator(model, tokenizer), 2, 0, False, **sampling)
    calls = 0

    class Stopped(HFGenerator):
        def answer(self, conversations: list[list[Message]], seed: int, **sampling: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return super().answer(conversations, seed, **sampling)

    with pytest.raises(KeyboardInterrupt):
        AnswerStore(tmp_path / "halves", QUESTIONS).play("m", Stopped(model, tokenizer), 2, 0, False, **sampling)
    file = tmp_path / "halves" / "model_answer" / "m.jsonl"
    assert 0 < len(read_jsonl(file)) < len(QUESTIONS)
    with file.open("a") as cut:  # and by a kill in the middle of a line
        cut.write('{"question_id": 99, "choi')
    halves = AnswerStore(tmp_path / "halves", QUESTIONS)
    halves.play("m", HFGenerator(model, tokenizer), 2, 0, False, **sampling)
    assert said(halves) == said(whole)
    assert len(read_jsonl(file)) == len(QUESTIONS)
    assert not halves.missing("m")


def test_a_sampled_answer_follows_the_seed_and_categories_have_fastchats_temperatures(tmp_path: Path) -> None:
    asked: list[tuple[list[str], dict[str, Any]]] = []

    class Listens:
        def answer(self, conversations: list[list[Message]], seed: int, **sampling: Any) -> list[str]:
            asked.append(([talk[-1]["content"] for talk in conversations], sampling | {"seed": seed}))
            return ["yes"] * len(conversations)

        def say(self, conversation: list[Message], seed: int, **sampling: Any) -> str:
            raise AssertionError

    kinds = {"writing": 0.7, "math": 0.0, "stem": 0.1, "my own": 0.7}
    questions = [{"question_id": k, "category": k, "turns": [k]} for k in kinds]
    AnswerStore(tmp_path, questions).play("m", Listens(), 8, 5, True, max_new_tokens=3, do_sample=False)
    at = {text: words.get("temperature", 0.0) for texts, words in asked for text in texts}
    assert at == kinds
    assert len({words["seed"] for _, words in asked}) == len(asked)


def test_questions_come_from_flags_files_datasets_or_are_ours(tmp_path: Path) -> None:
    ours = read_questions()
    kinds = {q["category"] for q in ours}
    assert kinds == {"writing", "reasoning", "maths", "code", "extraction", "refusal", "multi-turn", "format"}
    assert len(ours) == len(read_jsonl(OURS)) >= 24
    assert max(len(q["turns"]) for q in ours) == 3
    assert [q["turns"] for q in read_questions(("a", "b"))] == [["a"], ["b"]]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert [q["turns"] for q in read_questions(("zero",), str(tmp_path / "p.txt"))] == [["zero"], ["one"], ["two"]]
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "answer": "1", "category": "sum"},
        {"question_id": 81, "category": "writing", "turns": ["two", "three"], "reference": ["2", "3"]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "four"},
                      {"role": "assistant", "content": "4"}, {"role": "user", "content": "five"}]},
        {"instruction": "six", "input": "6", "output": "vi"},
        {"prompt": ["seven", "eight"], "prompt_id": 97, "reference": []},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_questions(file=str(tmp_path / "p.jsonl"))
    assert read == [
        {"question_id": 1, "category": "sum", "turns": ["one"], "answer": "1"},
        {"question_id": 81, "category": "writing", "turns": ["two", "three"], "reference": ["2", "3"]},
        {"question_id": 3, "category": "general", "turns": ["four", "five"], "system": "Be brief."},
        {"question_id": 4, "category": "general", "turns": ["six\n\n6"], "output": "vi"},
        {"question_id": 97, "category": "general", "turns": ["seven", "eight"]},
    ]
    (tmp_path / "odd.jsonl").write_text('{"prompt": "half \\ud83d", "reference": 4, "id": [1]}\n')
    assert read_questions(file=str(tmp_path / "odd.jsonl")) == [
        {"question_id": 1, "category": "general", "turns": ["half ?"], "reference": ["4"]}
    ]
    (tmp_path / "set.json").write_text(
        json.dumps([{"prompt": ["a", "b"], "prompt_id": 1}, {"prompt": ["c"], "prompt_id": 2}])
    )
    from_set = read_questions(dataset_id=str(tmp_path / "set.json"), rows=1)
    assert from_set == [{"question_id": 1, "category": "general", "turns": ["a", "b"]}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"text": "one"}\n', "row 1: a text, or texts, under one of turns, messages, prompt"),
        ("p.jsonl", '{"turns": []}\n', "row 1"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "two questions have the id 1"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2, is not a JSON object"),
        ("p.txt", "\n\n", "there is nothing in it"),
        ("nowhere.txt", None, "is not a file"),
        ("p.jsonl", '{"prompt": 5}\n', "row 1"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_questions(file=str(tmp_path / name))


def test_answers_side_by_side_are_escaped_and_evenly_picked(tmp_path: Path) -> None:
    questions = [{"question_id": i, "category": "", "turns": [f"<b>{i}"]} for i in range(4)]
    answers = AnswerStore(tmp_path, questions)
    for name in ("one", "two"):
        answers.of(name).add(*({"question_id": i, "choices": [{"turns": [f"<script>{name}{i}"]}]} for i in range(4)))
    page = SideBySide.of(answers, ["one", "two"], 4)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;one0" in page
    assert SideBySide.of(answers, ["one"], 2).prompts == ["<b>1", "<b>3"]
    assert SideBySide.of(answers, ["one"], 9).prompts == [f"<b>{i}" for i in range(4)]
    assert answers.mean_length(["one"]) == {"one": 12.0}


def test_a_ledger_takes_off_a_line_that_was_cut_short_and_keeps_one_without_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"id": 2}')
    ledger = JsonlStore(file, lambda row: row["id"])
    assert list(ledger.rows) == [1, 2]
    ledger.add({"id": 3}, {"id": 2, "again": True})
    assert file.read_text() == '{"id": 1}\n{"id": 2}\n{"id": 3}\n{"id": 2, "again": true}\n'
    assert ledger.rows[2]["again"]
    with file.open("a") as out:
        out.write('{"id": 4, "te')
    ledger = JsonlStore(file, lambda row: row["id"])
    assert list(ledger.rows) == [1, 2, 3]
    ledger.add({"id": 5, "text": "\ud800 \u2028"})
    assert [row["id"] for row in read_jsonl(file)] == [1, 2, 3, 2, 5]
    file.write_text('{"name": 1}\n')
    with pytest.raises(UserError, match="not of this file's kind"):
        JsonlStore(file, lambda row: row["id"])


def test_an_endpoint_is_asked_in_openais_words_and_its_stream_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(lambda messages: f"You said {messages[-1]['content']}") as server:
        speaker = OpenAIGenerator(Endpoint("judge", server.url))
        answers = AnswerStore(tmp_path, QUESTIONS)
        sampling = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
        answers.play("m", speaker, 3, 11, False, **sampling, num_beams=1, repetition_penalty=1.0)
        assert said(answers)[1] == [f"You said {turn}".strip() for turn in QUESTIONS[1]["turns"]]
        assert server.most_at_once <= 3
        request = server.requests[0]
        assert (request["max_tokens"], request["temperature"], request["top_p"], request["top_k"]) == (7, 0.5, 0.9, 4)
        chat_loop(speaker, 0, ["Hello there", "", "/new", "Again", "/quit", "never"], **GREEDY)
    assert capsys.readouterr().out.endswith("You said Hello there\nYou said Again\n")
    assert [len(r["messages"]) for r in server.requests[-2:]] == [1, 1]
    assert server.requests[-1]["temperature"] == 0.0
    with pytest.raises(SettingsError, match="an endpoint takes no --num_beams"):
        speaker.answer([[]], 0, **GREEDY, num_beams=2)


def test_a_prompt_that_a_server_refuses_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(messages: list[dict[str, str]]) -> str:
        return "yes"

    with judge_server(picky) as server:
        original = server.RequestHandlerClass._answer  # type: ignore[attr-defined]

        def answer(handler: Any, request: dict[str, Any], fault: Any) -> None:
            refuses = "4 plus 3" in request["messages"][-1]["content"]
            original(handler, request, 400 if refuses else fault)

        server.RequestHandlerClass = type("Picky", (server.RequestHandlerClass,), {"_answer": answer})  # type: ignore[assignment]
        answers = AnswerStore(tmp_path, QUESTIONS)
        answers.play("m", OpenAIGenerator(Endpoint("m", server.url)), 8, 0, False, **GREEDY)
    assert [q["question_id"] for q in answers.missing("m")] == [4]
    assert said(answers)[5] == ["yes", "yes"]
    assert "refuses the request: scripted 400" in capsys.readouterr().out


def test_two_processes_that_add_to_one_ledger_lose_nothing_of_each_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    one, two = (JsonlStore(file, lambda row: row["id"]) for _ in range(2))
    for i in range(5):
        one.add({"id": f"one {i}", "text": "x" * i})
        two.add({"id": f"two {i}", "text": "x" * 7 * i})
    assert len(read_jsonl(file)) == 10


def test_a_conversation_with_a_model_here_is_printed_as_it_comes(
    model: Any, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_loop(HFGenerator(model, tokenizer), 0, ["What is 2 plus 3?"], **GREEDY)
    (expected,) = generate_answers(model, tokenizer, [[{"role": "user", "content": "What is 2 plus 3?"}]], 1, **GREEDY)
    assert capsys.readouterr().out.split("ends.\n")[1].strip() == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "is not an address"),
        ("http://127.0.0.1/v1?api-key=secret", "is not an address"),
        ("http://me:secret@127.0.0.1/v1", "'http://127.0.0.1/v1' is not"),
    ],
)
def test_an_address_that_is_none_or_has_a_password_is_refused(url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        Endpoint("m", url)
    assert "secret" not in str(caught.value)


def test_names_behind_an_endpoint_are_candidates_beside_local_ones(tmp_path: Path) -> None:
    found = resolve_models(("a/b@http://127.0.0.1:1/v1", "org/model"), tmp_path)
    assert found[0] == ModelRef("b", "a/b", base_url="http://127.0.0.1:1/v1")
    assert found[1].base_url == ""
    assert [c.base_url for c in resolve_models(("a", "b"), tmp_path, "http://x/v1")] == ["http://x/v1"] * 2


def test_a_model_with_other_weights_has_another_fingerprint(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    before = ModelRef("one", str(tmp_path / "one")).fingerprint
    assert before == ModelRef("one", str(tmp_path / "one")).fingerprint
    (tmp_path / "one" / "model.safetensors").write_bytes(b"xy")
    assert ModelRef("one", str(tmp_path / "one")).fingerprint != before
    for name in ("run", "moved"):  # a run says itself what its weights are
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"fingerprint": "abc"}')
    run, moved = (ModelRef("a", str(tmp_path / name)).fingerprint for name in ("run", "moved"))
    assert run == moved != before
