"""Questions and what generates answers: a model, an adapter switched on and off, a chat."""

from __future__ import annotations

import copy
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython
import pytest
import torch
from ipykernel.kernelbase import Kernel
from IPython.core.error import StdinNotImplementedError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from helpers.core import CleanExit, SettingsError, UserError, read_jsonl
from helpers.data.messages import Message
from helpers.evaluation.answers import AnswerStore, Generator
from helpers.evaluation.generators import Generators, HFGenerator, generation_kwargs
from helpers.evaluation.questions import OUR_QUESTIONS, read_bench, read_questions
from helpers.models.chat import render
from helpers.models.resolve import ModelRef, resolve_models
from helpers.settings.load import load_settings
from tests.conftest import REPO, code_cells
from tests.judge_server import judge_server
from tests.tiny import tiny_mistral

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


def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    talks = [[{"role": "user", "content": "What is 2 plus 3? " * n}] for n in (1, 5, 2, 4, 3)]
    generator = HFGenerator(model, tokenizer)
    one = [generator.generate([talk], **GREEDY)[0] for talk in talks]
    assert generator.generate(talks, **GREEDY) == one
    assert len(set(one)) > 1


def test_answers_end_where_the_chat_format_ends_them(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [[{"role": "user", "content": "What is 2 plus 3?"}]]
    model = tiny_mistral(len(tokenizer))
    text = render(tokenizer, talk[0], prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, -12:].tolist()
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(ids[4])  # as a chat format may set it, beside the base's </s>
    (whole,), (ended,) = (HFGenerator(model, t).generate(talk, **GREEDY) for t in (tokenizer, other))
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
        (["--top_p", "1.5"], "--top_p 1.5 is out of range. Use at most 1."),
        (["--generation_kwargs", "num_return_sequences=2"], "--generation_kwargs num_return_sequences=2"),
        (["--generation_kwargs", "min_q=1"], "did you mean min_p=...?"),
        (["--generation_kwargs", "repetition_penalty=abc"], "--generation_kwargs repetition_penalty=abc: a number"),
        (["--generation_kwargs", "max_new_tokens=-4"], "model.generate refuses these settings"),
        (["--batch_size", "0"], "--batch_size 0 is out of range. Use at least 1."),
        (["--rows", "-1"], "--rows -1 is out of range. Use at least 0."),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of range"),
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
    tiny_mistral(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    talks = [[{"role": "user", "content": "What is 2 plus 3? " * n}] for n in (1, 4, 2)]

    def load_apart(adapter: str) -> list[str]:
        base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        policy = PeftModel.from_pretrained(base, tmp_path / adapter).eval() if adapter else base
        return HFGenerator(policy, tokenizer).generate(talks, **GREEDY)

    base = str(tmp_path / "base")
    refs = [ModelRef(n, base, adapter=str(tmp_path / n) if n else None) for n in ("", "1", "2")]
    refs.append(ModelRef("again", base))
    together = {
        name: generator.generate(talks, 0, **GREEDY) for name, generator in Generators(refs, settings_of()).load()
    }
    assert together == {name: load_apart(name.removeprefix("again")) for name in ("", "1", "2", "again")}
    assert together[""] != together["1"] != together["2"] != together[""]


def test_one_base_is_in_memory_at_a_time_and_models_with_all_answers_are_skipped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(self: Generators, ref: ModelRef) -> Any:
        assert not [model for model in loaded if model() is not None]
        model = tiny_mistral(len(tokenizer))
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Generators, "_load_base", load)
    tokenizer.save_pretrained(tmp_path / "t")
    refs = [ModelRef(name, str(tmp_path / name)) for name in "tu"]
    monkeypatch.setattr(ModelRef, "tokenizer", str(tmp_path / "t"))
    answers = AnswerStore(tmp_path, QUESTIONS[:1])
    for name, generator in Generators([*refs, refs[1]], settings_of()).load(answers):
        answers.generate_missing(name, generator, **GREEDY)
    assert len(loaded) == 2
    assert not list(Generators(refs, settings_of()).load(answers))


def test_conversations_are_played_turn_by_turn_with_what_was_answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    answers = AnswerStore(tmp_path, QUESTIONS, batch_size=2)
    answers.generate_missing("m", HFGenerator(model, tokenizer), **GREEDY)
    rows = read_jsonl(tmp_path / "model_answer" / "m.jsonl")
    assert {key for row in rows for key in row} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [len(turns) for turns in answers.answers("m").values()] == [len(q["turns"]) for q in QUESTIONS]
    asked = QUESTIONS[1]["turns"]
    first, second = answers.answers("m")[1]
    talk = [{"role": "user", "content": asked[0]}, {"role": "assistant", "content": first}]
    talk.append({"role": "user", "content": asked[1]})
    assert HFGenerator(model, tokenizer).generate([talk], **GREEDY) == [second]
    assert read_bench(tmp_path) == QUESTIONS  # question.jsonl stands beside the answers


@pytest.mark.parametrize("sampling", [GREEDY, {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}])
def test_a_run_that_was_stopped_goes_on_to_the_answers_of_one_that_was_not(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    whole = AnswerStore(tmp_path / "whole", QUESTIONS, batch_size=2)
    whole.generate_missing("m", HFGenerator(model, tokenizer), **sampling)
    calls = 0

    class Stopped(HFGenerator):
        def generate(self, conversations: list[list[Message]], seed: int = 0, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return super().generate(conversations, seed, **kwargs)

    halves = AnswerStore(tmp_path / "halves", QUESTIONS, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        halves.generate_missing("m", Stopped(model, tokenizer), **sampling)
    file = tmp_path / "halves" / "model_answer" / "m.jsonl"
    assert 0 < len(read_jsonl(file)) < len(QUESTIONS)
    with file.open("a") as cut:  # and by a kill in the middle of a line
        cut.write('{"question_id": 99, "choi')
    halves = AnswerStore(tmp_path / "halves", QUESTIONS, batch_size=2)
    halves.generate_missing("m", HFGenerator(model, tokenizer), **sampling)
    assert halves.answers("m") == whole.answers("m")
    assert len(read_jsonl(file)) == len(QUESTIONS)
    assert not halves.missing("m")


def test_a_sampled_answer_follows_the_seed_and_categories_have_fastchats_temperatures(tmp_path: Path) -> None:
    asked: list[tuple[list[str], dict[str, Any]]] = []

    class Listens(Generator):
        def generate(self, conversations: list[list[Message]], seed: int, **kwargs: Any) -> list[str]:
            asked.append(([talk[-1]["content"] for talk in conversations], kwargs | {"seed": seed}))
            return ["yes"] * len(conversations)

        def stream(self, conversation: list[Message], seed: int, **kwargs: Any) -> str:
            raise AssertionError

    kinds = {"writing": 0.7, "math": 0.0, "stem": 0.1, "my own": 0.7}
    questions = [{"question_id": k, "category": k, "turns": [k]} for k in kinds]
    store = AnswerStore(tmp_path, questions, seed=5, by_category=True)
    store.generate_missing("m", Listens(), max_new_tokens=3, do_sample=False)
    at = {text: words.get("temperature", 0.0) for texts, words in asked for text in texts}
    assert at == kinds
    assert len({words["seed"] for _, words in asked}) == len(asked)


def test_questions_come_from_flags_files_datasets_or_are_ours(tmp_path: Path) -> None:
    ours = read_questions(settings_of())
    kinds = {q["category"] for q in ours}
    assert kinds == {"writing", "reasoning", "maths", "code", "extraction", "refusal", "multi-turn", "format"}
    assert len(ours) == len(read_jsonl(OUR_QUESTIONS)) >= 24
    assert max(len(q["turns"]) for q in ours) == 3
    assert [q["turns"] for q in read_questions(settings_of("--prompts", "a", "b"))] == [["a"], ["b"]]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    lines = read_questions(settings_of("--prompts_file", str(tmp_path / "p.txt")))
    assert [q["turns"] for q in lines] == [["one"], ["two"]]
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "answer": "1", "category": "sum"},
        {"question_id": 81, "category": "writing", "turns": ["two", "three"], "reference": ["2", "3"]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "four"},
                      {"role": "assistant", "content": "4"}, {"role": "user", "content": "five"}]},
        {"instruction": "six", "input": "6", "output": "vi"},
        {"prompt": ["seven", "eight"], "prompt_id": 97, "reference": []},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_questions(settings_of("--prompts_file", str(tmp_path / "p.jsonl")))
    assert read == [
        {"question_id": 1, "category": "sum", "turns": ["one"], "answer": "1"},
        {"question_id": 81, "category": "writing", "turns": ["two", "three"], "reference": ["2", "3"]},
        {"question_id": 3, "category": "general", "turns": ["four", "five"], "system": "Be brief."},
        {"question_id": 4, "category": "general", "turns": ["six\n\n6"], "output": "vi"},
        {"question_id": 97, "category": "general", "turns": ["seven", "eight"]},
    ]
    (tmp_path / "odd.jsonl").write_text('{"prompt": "half \\ud83d", "reference": 4, "id": [1]}\n')
    assert read_questions(settings_of("--prompts_file", str(tmp_path / "odd.jsonl"))) == [
        {"question_id": 1, "category": "general", "turns": ["half ?"], "reference": ["4"]}
    ]
    (tmp_path / "set.json").write_text(
        json.dumps([{"prompt": ["a", "b"], "prompt_id": 1}, {"prompt": ["c"], "prompt_id": 2}])
    )
    from_set = read_questions(settings_of("--dataset_id", str(tmp_path / "set.json"), "--rows", "1"))
    assert from_set == [{"question_id": 1, "category": "general", "turns": ["a", "b"]}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"text": "one"}\n', "has no questions. no prompt: 1"),
        ("p.jsonl", '{"turns": []}\n', "row 1"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "has the question id 1 twice"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2, is not a JSON object"),
        ("p.txt", "\n\n", "has no questions"),
        ("nowhere.txt", None, "is not a file"),
        ("p.jsonl", '{"prompt": 5}\n', "row 1"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_questions(settings_of("--prompts_file", str(tmp_path / name)))


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What a person types, until the input ends."""
    typed = iter(lines)

    def read_line(prompt: str) -> str:
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read_line)


def test_a_chat_prints_answers_as_they_come_and_keeps_the_conversation(
    model: Any, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = HFGenerator(model, tokenizer)
    monkeypatch.setattr(Generators, "load", lambda self: iter([("m", generator)]))
    type_lines(monkeypatch, "What is 2 plus 3?")
    with pytest.raises(CleanExit, match="The conversation is not saved"):
        Generators([ModelRef("m", "m")], settings_of("--max_new_tokens", "12")).chat()
    [expected] = generator.generate([[{"role": "user", "content": "What is 2 plus 3?"}]], **GREEDY)
    assert capsys.readouterr().out.split("ends.\n")[1].strip() == expected


@pytest.mark.parametrize(
    "raised",
    [StdinNotImplementedError("raw_input was called"), RuntimeError("input(): lost sys.stdin")],
    ids=["a kernel", "no stdin"],
)
def test_a_chat_where_nobody_can_type_is_one_line(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_line(prompt: str) -> str:
        raise raised

    monkeypatch.setattr("builtins.input", read_line)
    with pytest.raises(SettingsError, match="--chat needs an interactive terminal") as caught:
        Generators([ModelRef("judge", "judge", base_url="http://127.0.0.1:1/v1")], settings_of()).chat()
    assert "\n" not in str(caught.value)


def test_a_chat_in_a_kernel_without_input_ends_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generators, "load", lambda self: pytest.fail("a model is loaded"))
    generators = Generators([ModelRef("judge", "judge", base_url="http://127.0.0.1:1/v1")], settings_of())
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=Kernel()))  # papermill's
    with pytest.raises(SettingsError, match="--chat needs an interactive terminal"):
        generators.chat()


def test_a_chat_with_an_endpoint_prints_its_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(monkeypatch, "Hello there", "", "/new", "Again", "More", "/quit", "never")
    with judge_server(lambda messages: f"You said {messages[-1]['content']}") as server, pytest.raises(CleanExit):
        Generators([ModelRef("judge", "judge", base_url=server.url)], settings_of()).chat()
    assert capsys.readouterr().out.endswith("You said Hello there\nYou said Again\nYou said More\n")
    assert [len(r["messages"]) for r in server.requests] == [1, 1, 3]
    assert server.requests[-1]["temperature"] == 0.0


def test_names_behind_an_endpoint_are_candidates_beside_local_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model is called 'tie'"):
        resolve_models(("org/tie@http://127.0.0.1:1/v1",), tmp_path)
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


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_only_newlines_end_a_prompt(mark: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"one{mark}two\r\nthree\n", encoding="utf-8", newline="")
    questions = read_questions(settings_of("--prompts_file", str(tmp_path / "p.txt")))
    assert [q["turns"] for q in questions] == [[f"one{mark}two"], ["three"]]


def test_rows_without_a_question_are_dropped_by_the_reasons_of_the_data(tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"prompt": "Why?"}, {"prompt": ""}, {"prompt": 3}, {"instruction": "Name it.", "context": "A lemon."},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(settings_of("--prompts_file", str(tmp_path / "p.jsonl")))
    assert [q["turns"] for q in questions] == [["Why?"], ["Name it.\n\nA lemon."], ["Who?"]]
    said = capsys.readouterr().out
    assert "2 of 5 rows were dropped. no prompt: 1 (row 2); a number or a date, not text: 1 (row 3)" in said


def test_an_answer_in_a_chat_cannot_command_the_terminal(capsys: Any) -> None:
    class Hostile(Generator):
        def generate(self, conversations: Any, seed: int = 0, **kwargs: Any) -> list[str]:
            return ["a\x1b]52;c;aGk=\x07"] * len(conversations)

    assert Hostile().stream([], 0) == "a\x1b]52;c;aGk=\x07"  # the answer is what it was
    assert capsys.readouterr().out == "a\\x1b]52;c;aGk=\\x07\n"
