"""The table of what servers say that refuse, and of what 04 and 05 do: they ask in another way, or end in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from helpers.core import UserError, read_jsonl
from helpers.evaluation.answers import AnswerStore
from helpers.evaluation.endpoint import Endpoint
from helpers.evaluation.judges import ModelJudge, make_judge
from helpers.evaluation.judgments import AnswerSet
from helpers.runs.run import Run
from tests.evaluation.judging import questions_of, settings_for
from tests.judge_server import JudgeServer, judge_server

pytestmark = pytest.mark.usefixtures("no_waiting")
SAMPLED = {"max_new_tokens": 4096, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
QUESTIONS = questions_of(24)


class Stumble(NamedTuple):
    """What a server says to a request, None if it answers; how it is asked then."""

    refuse: Any
    has: Mapping[str, Any] = MappingProxyType({})  # arguments of the last request, None for one that it lacks
    line: str = ""  # of the error, where nothing helps
    requests: int = 99  # at most


def unless(*names: str, status: int = 400, said: Any = "Unsupported parameter: '{}' is not supported.") -> Any:
    """A server that refuses a request with any of these arguments, naming the first."""

    def refuse(request: dict[str, Any]) -> Any:
        found = [name for name in names if name in request]
        return (status, said.format(found[0]) if isinstance(said, str) else said) if found else None

    return refuse


def both(request: dict[str, Any]) -> Any:
    said = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
    return (400, said) if {"temperature", "top_p"} <= {*request} else None


def at_most(limit: int, said: Any, status: int = 400, **more: Any) -> Any:
    def refuse(request: dict[str, Any]) -> Any:
        asked = request.get("max_tokens", request.get("max_completion_tokens"))
        text = said.format(asked=asked, both=asked + 100)
        return (status, {"error": {"message": text, **more}}) if asked > limit else None

    return refuse


def always(status: int, said: Any) -> Any:
    return lambda request: (status, said)


def detail(name: str) -> dict[str, Any]:
    return {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}]}


VLLM = (
    "This model's maximum context length is 2048 tokens. However, you requested {both} tokens (100 in the messages, "
    "{asked} in the completion). Please reduce the length of the messages or completion."
)
NEW_VLLM = (
    "'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is 2048 tokens "
    "and your request has 100 input tokens ({asked} > 2048 - 100)."
)
SGLANG = (
    "Requested token count exceeds the model's maximum context length of 2048 tokens. You requested a total of {both} "
    "tokens: 100 tokens from the input messages and {asked} tokens for the completion."
)
OPENAI = (
    "max_tokens is too large: {asked}. This model supports at most 16,384 completion tokens, whereas you provided "
    "{asked}."
)
TABLE = {
    "top_p is refused": Stumble(unless("top_p"), {"top_p": None, "temperature": 0.5, "top_k": 4, "max_tokens": 4096}),
    "temperature and top_p together": Stumble(both, {"top_p": None, "temperature": 0.5}),
    "temperature and top_p, each": Stumble(
        unless("temperature", "top_p", said="'temperature' and 'top_p' are not supported with this model."),
        {"top_p": None, "temperature": None, "top_k": 4},
    ),
    "temperature, only its default": Stumble(
        unless("temperature", said="Unsupported value: '{}' does not support 0.0 with this model. Only the default (1)"
               " value is supported."), {"temperature": None, "top_p": 0.9},
    ),
    "seed and top_k by a validator": Stumble(
        lambda r: unless("seed", status=422, said=detail("seed"))(r) or unless("top_k", status=422,
                                                                              said=detail("top_k"))(r),
        {"seed": None, "top_k": None, "top_p": 0.9},
    ),
    "max_completion_tokens": Stumble(
        unless("max_tokens", said="Unsupported parameter: '{}' is not supported with this model. Use "
               "'max_completion_tokens' instead."), {"max_tokens": None, "max_completion_tokens": 4096},
    ),
    "max_completion_tokens, and fewer": Stumble(
        lambda r: unless("max_tokens")(r) or at_most(99, "max_completion_tokens must be less than or equal to `99`")(r),
        {"max_tokens": None, "max_completion_tokens": 99},
    ),
    "max_tokens beyond the context, vLLM": Stumble(at_most(1948, VLLM), {"max_tokens": 1948}),
    "max_tokens beyond the context, newer vLLM": Stumble(
        at_most(1948, NEW_VLLM, param="max_tokens", code=400), {"max_tokens": 1948}
    ),
    "max_tokens beyond the context, SGLang": Stumble(at_most(1948, SGLANG), {"max_tokens": 1948}),
    "max_tokens beyond the context, TGI": Stumble(
        at_most(1948, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 100 `inputs` "
                "tokens and {asked} `max_new_tokens`", 422), {"max_tokens": 1948},
    ),
    "max_tokens beyond the context, Anthropic": Stumble(
        at_most(1948, "input length and `max_tokens` exceed context limit: 100 + {asked} > 2048, decrease input length "
                "or `max_tokens` and try again"), {"max_tokens": 1948},
    ),
    "max_tokens beyond what is written": Stumble(
        at_most(2048, "max_tokens: {asked} > 2048, which is the maximum allowed number of output tokens"),
        {"max_tokens": 2048},
    ),
    "max_tokens in a range": Stumble(
        at_most(1024, "Invalid max_tokens value, the valid range of max_tokens is [1, 1024]"), {"max_tokens": 1024}
    ),
    "max_tokens too large, who knows why": Stumble(
        always(400, {"error": {"message": "max_tokens is too large", "param": "max_tokens", "code": "invalid_value"}}),
        line="max_tokens is too large", requests=26,
    ),
    "an error in a reply": Stumble(
        always(200, {"error": {"message": "Provider returned error: bad request", "code": 400}}),
        line="Provider returned error: bad request", requests=26,
    ),
    "a passing error in a reply": Stumble(
        always(200, {"error": {"message": "The engine is overloaded", "type": "server_error"}}),
        line="The engine is overloaded",
    ),
    "an error in a reply, flat": Stumble(
        always(200, {"object": "error", "message": "The model `judge` does not exist.", "code": 404}),
        line="has no model 'judge' (404): it has judge", requests=26,
    ),
    "an error in a reply, a text": Stumble(
        always(200, {"error": "model 'judge' not found, try pulling it first"}), line="has no model 'judge' (404)",
        requests=26,
    ),
    "400 for everything": Stumble(
        always(400, "The server has no chat template"), line="The server has no chat template", requests=26
    ),
    "404": Stumble(
        always(404, {"error": {"message": "model \"judge\" not found", "type": "api_error"}}),
        line="has no model 'judge' (404)", requests=26,
    ),
    "a model that is not found, with 400": Stumble(
        always(400, {"error": {"message": "Invalid model: judge was not found", "code": "model_not_found"}}),
        line="has no model 'judge' (400)", requests=26,
    ),
}  # fmt: skip


def answer(server: JudgeServer, folder: Path) -> AnswerStore:
    """What 04 does."""
    store = AnswerStore(folder, QUESTIONS)
    store.generate_missing("judge", Endpoint("judge", server.url, tries=2), **SAMPLED)
    return store


def judge(server: JudgeServer, folder: Path) -> Any:
    """What 05 does."""
    answers = AnswerSet(QUESTIONS, {name: {i: [f"{name} {i}"] for i in range(24)} for name in "ab"})
    settings = settings_for(folder, server.url, max_new_tokens=4096, temperature=0.5)
    made = make_judge(settings, answers)
    assert isinstance(made, ModelJudge)
    return made.run(Run(folder, {}))


@pytest.mark.parametrize("name", TABLE)
def test_a_server_that_refuses_is_asked_otherwise_or_quoted(name: str, tmp_path: Path, capsys: Any) -> None:
    stumble = TABLE[name]
    with judge_server(lambda messages: "[[A]]") as server:
        server.refuse = stumble.refuse
        for step in (answer, judge):
            folder = tmp_path / step.__name__
            server.requests.clear()
            if stumble.line:
                with pytest.raises(UserError, match=re.escape(stumble.line)) as caught:
                    step(server, folder)
                assert "max_new_tokens" not in str(caught.value)
                assert "\n" not in str(caught.value)
                assert len(server.requests) <= stumble.requests
                continue
            done = step(server, folder)
            judges = ("temperature", "max_tokens", "max_completion_tokens")
            has = {name: value for name, value in stumble.has.items() if step is answer or name in judges}
            assert {key: server.requests[-1].get(key) for key in has} == has
            if step is answer:
                assert done.count("judge") == {"answered": 24, "refused": 0, "empty": 0, "cut": 0, "with thoughts": 0}
            else:
                assert [(row["g1_winner"], row["g2_winner"]) for row in done.rows] == [("model_1", "model_2")] * 24
    shown = capsys.readouterr().out
    assert "unknown" not in shown
    assert shown.count("note: judge") <= 6  # once each, not for every request


def test_a_limit_of_openais_is_not_taken_for_an_unknown_argument(capsys: Any) -> None:
    with judge_server(lambda messages: "fine") as server:
        server.refuse = at_most(16384, OPENAI, param="max_tokens", code="invalid_value")
        model = Endpoint("m", server.url)
        for _ in range(2):
            assert model.ask([{"role": "user", "content": "x"}], max_tokens=100_000).text == "fine"
    assert [r["max_tokens"] for r in server.requests] == [100_000, 16384, 16384]  # the limit is remembered
    assert "m allows fewer than 100000 new tokens; using " in capsys.readouterr().out


def test_a_prompt_that_leaves_no_room_is_refused_and_the_others_are_answered(tmp_path: Path) -> None:
    with judge_server(lambda messages: "yes") as server:
        server.refuse = lambda request: (
            (400, VLLM.format(both=9999, asked=4096).replace("100 in", "5903 in"))
            if re.search(r"question \d\.", request["messages"][-1]["content"]) else None
        )  # fmt: skip
        done = answer(server, tmp_path)
    assert done.count("judge")["refused"] == 10  # the first ten questions, whatever is asked first
    assert "maximum context length is 2048" in done.refusals["judge"][3]


def test_an_error_that_passes_is_asked_again() -> None:
    with judge_server(lambda messages: "fine") as server:
        server.faults = [(200, {"error": {"message": "Rate limit exceeded", "code": 429}}), None]
        assert Endpoint("m", server.url).ask([{"role": "user", "content": "x"}]).text == "fine"
    assert len(server.requests) == 2


def test_a_choice_with_an_error_and_a_filtered_one_are_refusals() -> None:
    replies: list[dict[str, Any]] = [
        {"finish_reason": "content_filter", "message": {"role": "assistant", "content": "So"}},
        {"message": {"role": "assistant", "content": None, "refusal": "I cannot do that."}},
        {"error": {"message": "Invalid image", "code": 400}, "finish_reason": "error"},
    ]
    with judge_server(lambda messages: replies[len(server.requests) - 1]) as server:
        answers = Endpoint("m", server.url).generate([[{"role": "user", "content": "x"}]], max_new_tokens=3)
        answers += Endpoint("m", server.url).generate([[{"role": "user", "content": "x"}]], max_new_tokens=3)
        answers += Endpoint("m", server.url).generate([[{"role": "user", "content": "x"}]], max_new_tokens=3)
    assert [answer.refused.split(" refuses ")[1] for answer in answers] == [
        "to answer: content filter", "to answer: I cannot do that.", "the request: Invalid image",
    ]  # fmt: skip


def test_a_judge_that_refuses_a_few_calls_says_so_again_when_it_is_run_again(tmp_path: Path) -> None:
    answers = AnswerSet(questions_of(1), {"a": {0: ["x"]}, "b": {0: ["y"]}})
    with judge_server(lambda messages: "[[A]]") as server:
        server.refuse = always(400, "Your account has no access")
        for asked in (4, 0):  # each of two calls with and without a system message
            server.requests.clear()
            with pytest.raises(UserError, match=r"every call was refused: .*Your account has no access") as caught:
                make_judge(settings_for(tmp_path / "run", server.url), answers).run(Run(tmp_path / "run", {}))
            assert "max_new_tokens" not in str(caught.value)
            assert len(server.requests) == asked
    assert {row["winner"] for row in read_jsonl(tmp_path / "run" / "calls.jsonl")} == {"error"}
