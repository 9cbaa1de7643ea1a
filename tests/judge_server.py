"""An OpenAI-compatible server on 127.0.0.1 that answers by a script, and fails when it is told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[list[dict[str, str]]], Any]


class JudgeServer(ThreadingHTTPServer):
    """`script` makes a reply of the messages: a text, a dict of what its choice has, or one with the whole "body".

    `faults` are taken one a request, None being none, before it answers. A fault is a status, alone or with the message
    or the body of its error, or "malformed", "html", "empty", "cut" (the connection breaks within the body), "hang"
    (longer than a client waits), "short" (finish_reason length, no verdict) or "gone" (no reply at all, from now on).
    """

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.faults = script, list[Any]()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []  # what stood under Authorization
        self.answered: Counter[str] = Counter()  # by user message
        self.most_at_once = self._now = 0
        self.delay, self.retry_after = 0.0, ""
        self.refuse: Callable[[dict[str, Any]], Any] = lambda request: None  # a status, or one with its message
        self.lock = threading.Lock()
        self.gone = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "judge", "object": "model"}]}).encode())

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.keys.append(self.headers.get("Authorization"))
            server._now += 1
            server.most_at_once = max(server.most_at_once, server._now)
            fault = "gone" if server.gone else server.faults.pop(0) if server.faults else None
            server.gone = server.gone or fault == "gone"
        try:
            time.sleep(server.delay)
            self._answer(request, fault)
        finally:
            with server.lock:
                server._now -= 1

    def _answer(self, request: dict[str, Any], fault: Any) -> None:
        server, said = self.server, request["messages"][-1]["content"]
        fault = server.refuse(request) or fault
        if isinstance(fault, tuple):
            error = fault[1] if isinstance(fault[1], dict) else {"error": {"message": fault[1]}}
            return self._send(fault[0], json.dumps(error).encode())
        if isinstance(fault, int):
            return self._send(fault, json.dumps({"error": {"message": f"scripted {fault}"}}).encode())
        if fault == "gone":
            self.close_connection = True
            return None
        if fault == "hang":
            time.sleep(1)
        text = "I have to think about" if fault == "short" else server.script(request["messages"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text},
                  "finish_reason": "length" if fault == "short" else "stop"}  # fmt: skip
        if isinstance(text, dict):
            choice |= text
        body = {
            "id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
        }  # fmt: skip
        content = json.dumps(choice.get("body", body)).encode()
        content = {"malformed": content[:40], "html": b"<html>gateway</html>", "empty": b'{"choices": []}'}.get(
            fault, content
        )
        if fault is None:
            with server.lock:
                server.answered[said] += 1
        return self._send(200, content, cut=fault == "cut", html=fault == "html")

    def _send(self, status: int, content: bytes, cut: bool = False, html: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if html else "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 429 and self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def judge_server(script: Script) -> Iterator[JudgeServer]:
    server = JudgeServer(script)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def shown(messages: list[dict[str, str]]) -> tuple[str, str]:
    """The two answers in one of our pairwise prompts for one turn."""
    found = re.search(r"# Answer A\n\n(.*)\n\n# Answer B\n\n(.*)\n\n# Which", messages[-1]["content"], re.DOTALL)
    assert found
    return found[1], found[2]
