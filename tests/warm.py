"""Python programs that start in no time: a process that has imported the libraries forks a child for each of them.

`run` takes what follows `python` on a command line and returns what `subprocess.run` would. Importing torch,
transformers, TRL, PEFT and datasets takes 5 to 9 s of CPU; a test run starts more than a hundred programs.

Libraries read parts of the environment when they are imported. A program whose environment differs in more than
`HARMLESS` therefore gets a warm process with that environment. Where fork is unsafe (not on Linux), and for programs
that need a process of their own from the start (`real=True`), a plain subprocess runs.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# What a training notebook imports, down to what trainers import when they are first used; none of ours.
LIBRARIES = (
    "torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer", "transformers.trainer", "transformers.models.mistral.modeling_mistral",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "matplotlib.pyplot", "tyro", "rich.console", "rich.table", "jinja2", "openai",
    "dotenv", "yaml", "scipy.stats",
    "transformers.integrations.mistral.tokenizer",  # 3 s of grammars, where mistral-common is installed
)  # fmt: skip
# Variables that are read while a program runs, not when a library is imported.
HARMLESS = {
    "PYTHONPATH",
    "PYTORCH_ALLOC_CONF",
    "GOMP_SPINCOUNT",  # read when torch is imported, but its processes have one thread here
    "COLUMNS",
    "HF_TOKEN",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "PYTEST_CURRENT_TEST",
    "PWD",
}
HARMLESS_PREFIXES = ("SFT_", "DPO_", "MERGE_", "VIBES_", "JUDGE_", "PAIRS_", "WANDB_", "COV_")
AT_MOST = 5  # warm processes at a time: each takes some 0.7 GB

_servers: dict[str, Server] = {}


def run(
    words: list[str], cwd: Path, env: Mapping[str, str], input: str | None = None, real: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`; its exit status (negative: the signal that ended it), and what it printed."""
    if real or not _can_fork(words, cwd):
        command = [sys.executable, *words]
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, **given)
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write((input or "").encode())
        stdin.seek(0)
        streams = [file.fileno() for file in (stdin, stdout, stderr)]
        status = _server(env).ask({"words": words, "cwd": str(cwd), "env": dict(env)}, streams)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([sys.executable, *words], status, *texts)


def _can_fork(words: list[str], cwd: Path) -> bool:
    """Whether a fork of a warm process does what a new one would: no option of Python's, no .env that is read first."""
    understood = not words[0].startswith("-") or words[0] in ("-c", "-m")
    return understood and sys.platform == "linux" and hasattr(os, "pidfd_open") and not (cwd / ".env").exists()


def _server(env: Mapping[str, str]) -> Server:
    """The warm process with this environment; it is started where there is none yet."""
    at_import = {
        name: value for name, value in env.items() if name not in HARMLESS and not name.startswith(HARMLESS_PREFIXES)
    }
    key = json.dumps(at_import, sort_keys=True)
    if key in _servers and _servers[key].process.poll() is not None:
        _servers.pop(key).stop()
    server = _servers.pop(key, None) or Server(at_import)
    _servers[key] = server  # as the newest
    while len(_servers) > AT_MOST:
        _servers.pop(next(iter(_servers))).stop()
    return server


def start(env: Mapping[str, str]) -> None:
    """Let a warm process with this environment import the libraries, and do not wait for it."""
    if sys.platform == "linux":
        _server(env)


def stop_all() -> None:
    while _servers:
        _servers.popitem()[1].stop()


class Server:
    """A warm process, and the socket on which it is asked."""

    def __init__(self, env: dict[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())], env=env, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            )  # fmt: skip

    def ask(self, request: dict[str, Any], streams: list[int]) -> int:
        """Send a request with its three open files; the exit status of the program."""
        content = json.dumps(request).encode()
        head = len(content).to_bytes(8, "big")
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
            self.socket.sendmsg([head], [rights])
            self.socket.sendall(content)
            answer = self.socket.recv(100)
        except BaseException:  # as a test's timeout: the server notices that nobody waits, and ends its child
            self.stop()
            raise
        if not answer:
            self.log.seek(0)
            status, text = self.process.wait(timeout=60), self.log.read().decode()[-2000:]
            raise RuntimeError(f"the warm process ended with {status}: {text}")
        return int(answer)

    def stop(self) -> None:
        self.socket.close()
        self.process.wait(timeout=60)
        self.log.close()


def serve(connection: socket.socket) -> None:
    """In the warm process: import the libraries, then fork a child for each request, until the socket is closed."""
    plain = list(sys.path)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # an optional one
            importlib.import_module(name)
    assert threading.active_count() == 1  # a thread would not be there in a child
    gc.collect()
    gc.freeze()  # a child's collections leave these pages alone, which stay shared
    while True:
        head, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not head:
            return
        with connection.makefile("rb") as reader:
            request = json.loads(reader.read(int.from_bytes(head, "big")))
        child = os.fork()
        if not child:
            connection.close()
            become(request, streams, plain)
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):
            connection.sendall(str(wait_for(child, connection)).encode())


def wait_for(child: int, connection: socket.socket) -> int:
    """The exit status of a child, which is killed when nobody is there any more to hear of it."""
    handle = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([handle, connection], [], [])
        if handle not in ready:
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(handle)


def become(request: dict[str, Any], streams: list[int], plain: list[str]) -> NoReturn:
    """In a child: be the program that was asked for, from its first line to its exit status."""
    for number, stream in enumerate(streams):  # sys.stdout and others, which loggers hold, write there from now on
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()
    sys.modules["numpy"].random.seed()
    status = 1
    try:
        status = execute(request["words"], plain)
    finally:
        _end(status)


def execute(words: list[str], plain: list[str]) -> int:
    """Run `python WORDS` in this process; its exit status."""
    first, rest = words[0], words[1:]
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.path_importer_cache.clear()
    start = {"-c": "", "-m": os.getcwd()}.get(first) if first.startswith("-") else str(Path(first).resolve().parent)
    sys.path[:] = [str(start), *paths, *plain]
    sys.argv[:] = ["-c" if first == "-c" else first, *rest[1:]] if first in ("-c", "-m") else words
    try:
        if first == "-m":
            sys.argv[0] = "-m"
            runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]  # what `python -m` itself calls
        else:
            file = "<string>" if first == "-c" else os.path.abspath(first)
            if first != "-c":
                main.__file__ = file
            exec(compile(rest[0] if first == "-c" else Path(file).read_bytes(), file, "exec"), main.__dict__)
    except SystemExit as error:
        return _status(error)
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__):
            trace = trace.tb_next
        try:
            sys.excepthook(type(error), error.with_traceback(trace), trace)
        except SystemExit as stop:
            return _status(stop)
        if isinstance(error, KeyboardInterrupt):
            return -signal.SIGINT
        return 1
    return 0


def _status(error: SystemExit) -> int:
    """The exit status that Python gives for it."""
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _end(status: int) -> NoReturn:
    """End as the interpreter ends, without its tidying of memory."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = 120
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as link:
        serve(link)
