"""Tokens and paths of this machine in files that are about to be published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from helpers.paths import REPO

SHAPES = {
    "a Hub token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b"),
    "an OpenAI key": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
NAMED = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
HEAD = 2**24  # bytes of a file of weights that are read: its header
RECORDS = ("run.json", "*.jsonl", "*.log")  # of a run: what stands in one of them is near to what is published


def secrets_here() -> dict[bytes, str]:
    """Values of this process's secrets, and what each is called."""
    from huggingface_hub import get_token

    known = {v: n for n, v in os.environ.items() if NAMED.search(n.upper()) and len(v) >= 16 and not os.path.exists(v)}
    if token := get_token():
        known[token] = "HF_TOKEN"
    return {value.encode(): name for value, name in known.items()}


def find_secrets(files: Iterable[Path], text: str = "") -> list[str]:
    """What looks like a secret in `files`, or in `text` (the card): a line for each, without the secret itself."""
    contents = [("README.md", text.encode())]
    for file in files:
        with file.open("rb") as opened:
            contents.append((file.name, opened.read(HEAD if file.suffix == ".safetensors" else -1)))
    known, found = secrets_here(), []
    for name, content in contents:
        found += [f"{called} in {name}" for value, called in known.items() if value in content]
        found += [f"{kind} in {name}" for kind, shape in SHAPES.items() if shape.search(content)]
    return list(dict.fromkeys(found))


def find_paths(files: Iterable[Path], text: str = "") -> list[str]:
    """Names of `files` (or README.md, for `text`) in which a folder of this machine is named: one that is known here,
    or, in a configuration, any value that is an absolute path."""
    homes = {str(path).encode() for path in (REPO, Path.home(), Path.cwd()) if len(path.parts) > 1}
    contents = [(file.name, file.read_bytes()) for file in files if file.suffix in (".json", ".jinja", ".py")]
    contents.append(("README.md", text.encode()))
    found = [name for name, content in contents if any(home in content for home in homes)]
    return found + [n for n, content in contents if n.endswith("config.json") and n not in found and _a_path(content)]


def _a_path(content: bytes) -> bool:
    return bool(re.search(rb':\s*"(?:/[\w.~ -]+){2,}/?"|:\s*"[A-Za-z]:(?:\\\\|/)[^"]*"', content))
