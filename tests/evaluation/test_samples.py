"""Several answers to a prompt: drawn with seeds of their own, asked for with `n`, taken from files, kept apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from helpers.core import SettingsError, UserError, read_jsonl
from helpers.evaluation.endpoint import Endpoint
from helpers.evaluation.generators import HFGenerator
from helpers.evaluation.questions import Answer, answer_turns
from helpers.evaluation.samples import SampleStore, find_prompts, prompt_messages
from tests.evaluation.rounds import pairs_settings, write_answers, write_rows
from tests.judge_server import judge_server
from tests.tiny import tiny_mistral

SAMPLING = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
QUESTIONS = [
    {"question_id": i, "category": "general", "turns": [f"What is {i} plus 3? " * (1 + i % 3)]} for i in range(5)
]


@pytest.fixture(scope="module")
def generator(tokenizer: PreTrainedTokenizerBase) -> HFGenerator:
    return HFGenerator(tiny_mistral(len(tokenizer)), tokenizer)


def texts(store: SampleStore, model: str = "m") -> dict[Any, list[str]]:
    return {i: [c["turns"][0] for c in row["choices"]] for i, row in sorted(store.file(model).rows.items())}


def sampled(folder: Path, generator: Any, batch_size: int = 2, seed: int = 1, **kwargs: Any) -> SampleStore:
    store = SampleStore(folder, QUESTIONS, batch_size, seed, num_samples=3, models=["m"])
    store.generate_missing("m", generator, **SAMPLING | kwargs)
    return store


def test_each_answer_has_its_own_draw_whatever_else_is_in_the_batch(tmp_path: Path, generator: HFGenerator) -> None:
    one = texts(sampled(tmp_path / "1", generator, batch_size=1))
    assert texts(sampled(tmp_path / "5", generator, batch_size=5)) == one
    assert all(len(set(own)) == 3 for own in one.values())
    assert texts(sampled(tmp_path / "other", generator, seed=2)) != one
    cold = texts(sampled(tmp_path / "cold", generator, temperature=1e-4))  # as good as greedy
    assert all(len(set(own)) == 1 for own in cold.values())
    talks = [prompt_messages(q) for q in QUESTIONS]
    greedy = generator.generate(talks, max_new_tokens=8, do_sample=False)
    assert [own[0] for own in cold.values()] == list(greedy)


def test_a_question_with_tools_is_sampled_with_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    own: Any = copy.deepcopy(tokenizer)
    own.chat_template = "{% if tools %}{{ tools|tojson }}{% endif %}" + own.chat_template
    generator, tools = HFGenerator(tiny_mistral(len(own)), own), [{"type": "function", "function": {"name": "add"}}]
    questions = [QUESTIONS[0] | {"tools": tools}, QUESTIONS[1]]
    store = SampleStore(tmp_path, questions, 2, 1, num_samples=2, models=["m"])
    store.generate_missing("m", generator, **SAMPLING | {"temperature": 1e-4})
    talks = [prompt_messages(q) for q in questions]
    greedy = generator.generate(talks, options=[{"tools": tools}, {}], max_new_tokens=8, do_sample=False)
    assert texts(store) == {0: [greedy[0]] * 2, 1: [greedy[1]] * 2}
    assert greedy[0] != generator.generate(talks, max_new_tokens=8, do_sample=False)[0]


def test_draws_follow_the_probabilities_that_temperature_and_top_p_leave(generator: HFGenerator) -> None:
    import torch

    talk = prompt_messages(QUESTIONS[0])
    many = generator.sample([talk], [list(range(2000))], max_new_tokens=1, temperature=0.7, top_p=0.8)[0]
    text = generator.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = generator.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        chances = (generator.model(ids).logits[0, -1].double() / 0.7).softmax(-1).sort(descending=True)
    kept = (chances.values.cumsum(-1) - chances.values) < 0.8  # as long as those before have less
    kept_chances = chances.values[kept] / chances.values[kept].sum()
    expected: dict[str, float] = {}
    for token, chance in zip(chances.indices[kept].tolist(), kept_chances.tolist(), strict=True):
        word = generator.tokenizer.decode([token], skip_special_tokens=True).strip()
        expected[word] = expected.get(word, 0) + chance
    assert {*map(str, many)} <= {*expected}
    for word, chance in sorted(expected.items(), key=lambda item: -item[1])[:5]:
        assert many.count(word) / len(many) == pytest.approx(chance, abs=0.04), word


def test_a_run_that_was_stopped_gives_the_answers_of_one_that_was_not(
    tmp_path: Path, generator: HFGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = texts(sampled(tmp_path / "whole", generator))
    file = sampled(tmp_path / "cut", generator).file("m").file
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:1]) + lines[1][:20])  # within a line
    assert texts(sampled(tmp_path / "cut", generator)) == whole
    assert len(read_jsonl(file)) == 5


def test_rows_are_fastchats_with_several_choices(tmp_path: Path, generator: HFGenerator) -> None:
    store = sampled(tmp_path, generator)
    row = read_jsonl(tmp_path / "model_answer" / "m.jsonl")[0]
    assert [choice["index"] for choice in row["choices"]] == [0, 1, 2]
    assert [*store.names] == ["m #1", "m #2", "m #3"]
    answers = store.answer_set.answers
    assert {name: own[0][0] for name, own in answers.items()} == dict(zip(answers, texts(store)[0], strict=True))
    assert answer_turns(row)[0] == row["choices"][0]["turns"][0]  # what 05 judges


class Numbered:
    """A script whose reply to `n` has count(n) choices, numbered through all requests; some are empty."""

    def __init__(self, count: Callable[[int], int], empty: tuple[int, ...]) -> None:
        self.count, self.empty, self.made = count, empty, 0
        self.requests: list[dict[str, Any]] = []  # the server's

    def __call__(self, messages: list[dict[str, str]]) -> Any:
        choices = []
        for k in range(self.count(self.requests[-1].get("n", 1))):
            self.made += 1
            text = "" if self.made in self.empty else f"answer {self.made}"
            choices.append({"index": k, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"})
        return {"body": {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}}


@pytest.mark.parametrize(
    ("count", "empty", "asked", "expected"),
    [
        (lambda n: n, (), [4], ["answer 1", "answer 2", "answer 3", "answer 4"]),
        (lambda n: 1, (), [4, 3, 2, None], ["answer 1", "answer 2", "answer 3", "answer 4"]),  # ignores n
        (lambda n: min(n, 3), (), [4, None], ["answer 1", "answer 2", "answer 3", "answer 4"]),
        (lambda n: n + 2, (), [4], ["answer 1", "answer 2", "answer 3", "answer 4"]),
        (lambda n: n, (2,), [4, None], ["answer 1", "answer 3", "answer 4", "answer 5"]),
        (lambda n: n, tuple(range(2, 99)), [4, 3, 3], ["answer 1", "", "", ""]),
        (lambda n: n, tuple(range(99)), [4, 4], ["", "", "", ""]),
    ],
)
def test_answers_that_a_server_leaves_out_are_asked_for_again(
    count: Any, empty: tuple[int, ...], asked: list[int | None], expected: list[str]
) -> None:
    script = Numbered(count, empty)
    with judge_server(script) as server:
        script.requests = server.requests
        [answers] = Endpoint("m", server.url).sample([[{"role": "user", "content": "x"}]], [[1, 2, 3, 4]], **SAMPLING)
        assert answers == expected
        assert [request.get("n") for request in server.requests] == asked
        assert all(request["temperature"] == 0.8 and request["top_p"] == 0.95 for request in server.requests)
        assert len({request["seed"] for request in server.requests}) == len(asked)


def test_a_server_that_refuses_n_is_asked_one_by_one() -> None:
    with judge_server(lambda messages: "fine") as server:
        server.refuse = lambda request: (400, "n must be at most 1") if "n" in request else None
        [answers] = Endpoint("m", server.url).sample([[{"role": "user", "content": "x"}]], [[1, 2, 3]], **SAMPLING)
    assert answers == ["fine"] * 3
    assert [request.get("n") for request in server.requests] == [3, None, None, None]


def test_prompts_that_evaluate_are_left_out_and_counted(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held.jsonl", [{"prompt": "Held  OUT?"}])
    run = tmp_path / "outputs" / "vibes-x"
    write_rows(run / "question.jsonl", [{"question_id": 1, "turns": ["Asked before?", "And then?"]}])
    (run / "run.json").write_text(json.dumps({"step": "vibes", "status": "finished"}))
    rows = [{"prompt": text} for text in ("held out?", "Asked before?", "New?", "new? ", "Another?")]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = pairs_settings(tmp_path, "--models", "a@http://127.0.0.1:1/v1", "--prompts_file", prompts,
                              "--exclude", held_out)  # fmt: skip
    found = find_prompts(settings)
    assert [q["turns"] for q in found.questions] == [["New?"], ["Another?"]]
    assert found.read == 5
    assert found.left_out == {"is in an evaluation set": 2, "repeats another prompt": 1}
    settings = pairs_settings(tmp_path, "--models", "a@http://127.0.0.1:1/v1", "--prompts", "Held out?", "--exclude",
                              held_out)  # fmt: skip
    with pytest.raises(UserError, match=r"None of 1 prompts is left \(is in an evaluation set: 1\)"):
        find_prompts(settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no prompts are set"),
        (["--prompts", "x", "--chosen_from", "a"], "--chosen_from and --rejected_from belong together"),
        (["--prompts", "x", "--temperature", "0"], "--temperature 0 gives the same answer every time"),
        (["--prompts", "x", "--num_samples", "1"], "--num_samples 1 gives nothing to compare"),
        (["--from_judgments", "nowhere"], "--from_judgments 'nowhere' does not exist"),
        (["--answers_dir", "nowhere"], "--answers_dir 'nowhere' is not a folder"),
    ],
)
def test_what_cannot_give_pairs_is_refused_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    given = [] if "--answers_dir" in words or "--chosen_from" in words else ["--models", "a@http://127.0.0.1:1/v1"]
    with pytest.raises((SettingsError, UserError), match=said):
        find_prompts(pairs_settings(tmp_path, *given, *words))


def test_answers_of_files_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = write_answers(tmp_path / "given", {"a": [["one", "two"], ["three"]], "b": [["four"], ["five"]]})
    prompts = find_prompts(pairs_settings(tmp_path, "--answers_dir", str(folder)))
    store = prompts.open_store(tmp_path / "run", pairs_settings(tmp_path))
    store.import_answers(prompts.answers)
    store.import_answers(prompts.answers)  # once
    assert [*store.names] == ["a #1", "a #2", "b"]
    assert store.answers("a #2") == {0: ["two"]}
    assert store.answers("b") == {0: ["four"], 1: ["five"]}
    assert len(read_jsonl(tmp_path / "run" / "model_answer" / "a.jsonl")) == 2
    only = find_prompts(pairs_settings(tmp_path, "--answers_dir", str(folder), "--models", "b"))
    assert [*only.answers] == ["b"]
    with pytest.raises(SettingsError, match=r"There are no answers of c\. Use one of: a, b"):
        find_prompts(pairs_settings(tmp_path, "--answers_dir", str(folder), "--models", "c"))


def test_thoughts_are_kept_apart_from_the_answer(tmp_path: Path) -> None:
    answer = Answer("<think>\nHm.\n</think>\n\nFive.")
    store = SampleStore(tmp_path, QUESTIONS[:1], num_samples=1, models=["m"])
    store.file("m").add(store._row("m", 0, [answer, Answer("Six.")]))
    one, two = (own[0][0] for own in store.answer_set.answers.values())
    assert (one, one.thoughts, two, two.thoughts) == ("Five.", "Hm.", "Six.", "")
