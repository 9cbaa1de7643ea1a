"""An OpenAI-compatible endpoint: what it is sent, what is retried, what is an error in one line."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.core import SettingsError, UserError
from helpers.evaluation.answers import AnswerStore
from helpers.evaluation.endpoint import Endpoint, run_parallel
from tests.conftest import REPO
from tests.judge_server import judge_server

GREEDY = {"max_new_tokens": 12, "do_sample": False}
QUESTIONS = [
    {"question_id": i, "category": "general", "turns": [f"What is {i} plus 3?", *["And 4?"] * (i % 2)]}
    for i in range(6)
]


@pytest.mark.usefixtures("no_waiting")
def test_what_the_client_says_of_a_server_that_refuses_is_one_line() -> None:
    with judge_server(lambda messages: "x") as server:
        judge = Endpoint("nobody", server.url, tries=2)
        for status, line in {
            401: "does not accept the key in OPENAI_API_KEY (401)",
            404: "has no model 'nobody' (404): it has judge",
            400: "refuses the request: scripted 400",
            429: "still asks to slow down (429): scripted 429",
            503: "fails (503): scripted 503",
        }.items():
            server.faults = [status] * 4
            with pytest.raises(UserError, match=re.escape(line)):
                judge.ask([{"role": "user", "content": "x"}])
        server.faults = ["html"] * 9
        with pytest.raises(UserError, match="sent 2 malformed replies in a row"):
            judge.ask([{"role": "user", "content": "x"}])


def test_a_model_that_calls_an_argument_otherwise_gets_it_so() -> None:
    def refuse(request: dict[str, Any]) -> Any:
        names = [name for name in ("max_tokens", "temperature") if name in request]
        return (400, f"Unsupported parameter: '{names[0]}' is not supported with this model.") if names else None

    with judge_server(lambda messages: "fine") as server:
        server.refuse = refuse
        judge = Endpoint("o9", server.url)
        assert judge.ask([{"role": "user", "content": "x"}], max_tokens=5, temperature=0.0).text == "fine"
        assert judge.ask([{"role": "user", "content": "y"}], max_tokens=6, temperature=0.0).text == "fine"
    assert [r.get("max_completion_tokens") for r in server.requests] == [None, 5, 5, 6]


def test_a_retry_after_is_waited_for_by_the_client() -> None:
    with judge_server(lambda messages: "x") as server:
        server.faults, server.retry_after = [429], "0.4"
        begun = time.monotonic()
        assert Endpoint("judge", server.url).ask([{"role": "user", "content": "x"}]).text == "x"
        assert time.monotonic() - begun >= 0.4


def test_an_endpoint_is_asked_with_openais_arguments(tmp_path: Path) -> None:
    with judge_server(lambda messages: f"You said {messages[-1]['content']}") as server:
        generator = Endpoint("judge", server.url)
        answers = AnswerStore(tmp_path, QUESTIONS, batch_size=3, seed=11)
        sampling = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
        answers.generate_missing("m", generator, **sampling, num_beams=1, repetition_penalty=1.0)
        assert answers.answers("m")[1] == [f"You said {turn}" for turn in QUESTIONS[1]["turns"]]
        assert server.most_at_once <= 3
        request = server.requests[0]
        assert (request["max_tokens"], request["temperature"], request["top_p"], request["top_k"]) == (7, 0.5, 0.9, 4)
        assert {r["seed"] for r in server.requests} <= set(range(11, 16))
    with pytest.raises(SettingsError, match="--num_beams is not an argument of an OpenAI-compatible endpoint"):
        generator.generate([[]], 0, **GREEDY, num_beams=2)


def test_a_prompt_that_a_server_refuses_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(lambda messages: "yes") as server:
        server.refuse = lambda request: 400 if "4 plus 3" in request["messages"][-1]["content"] else None
        answers = AnswerStore(tmp_path, QUESTIONS)
        answers.generate_missing("m", Endpoint("m", server.url), **GREEDY)
    assert [q["question_id"] for q in answers.missing("m")] == [4]
    assert answers.answers("m")[5] == ["yes", "yes"]
    assert "refuses the request: scripted 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is not an address"),
        ("http://127.0.0.1/v1?api-key=secret", "is not an address"),
        ("http://me:secret@127.0.0.1/v1", "'http://127.0.0.1/v1' is not"),
    ],
)
def test_an_address_that_is_none_or_has_a_password_is_refused(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Endpoint("m", url)
    assert "secret" not in str(caught.value)


def test_results_of_running_jobs_are_kept_when_one_fails() -> None:
    def work(job: int) -> int:
        if job == 1:
            raise UserError("one fails")
        time.sleep(0.05)
        return job

    done: list[int] = []
    with pytest.raises(UserError, match="one fails"):
        done.extend(run_parallel(range(100), work, 2))
    assert done == [0]


def test_ctrl_c_does_not_wait_for_a_server_that_hangs() -> None:
    code = (
        "import os, signal, threading, time\n"
        "from helpers.evaluation.endpoint import run_parallel\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "list(run_parallel(range(4), lambda job: time.sleep(60), 2))\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=50)
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode != 0
    assert time.monotonic() - begun < 40
