"""Find secrets in settings before they are printed, and secrets and local paths in files before they are pushed."""

from __future__ import annotations

import base64
import binascii
import contextlib
import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import yaml

from helpers.core import REPO, SettingsError

# How a secret of each kind begins, and what follows.
PATTERNS = [
    (kind, start, re.compile(re.escape(start) + rest, re.ASCII))
    for kind, forms in yaml.safe_load(Path(__file__).with_name("secrets.yaml").read_text("utf-8")).items()
    for starts, rest in forms.items() for start in starts.split()
]  # fmt: skip
# NAME = VALUE, where the name tells that the value is secret: in quotes with a digit, or with a digit and both cases.
NAMED = re.compile(
    r"(?:secret[_-]?(?:access[_-]?)?key|(?:api|auth|access|account|private|client|service|signing|db)[_-]?key|pwd"
    r"|(?:(?:client|app|shared|consumer)[_-]?)?secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:access|auth|api|bearer|refresh|session|hub|hf|bot|deploy)[_-]?token)"
    r"[\"'\]]{0,2}\s{0,4}(?:[:=]=?>?|>)\s{0,4}"
    r"(?:([\"'`])(?=[^\s\"'`]*\d)[^\s\"'`<>{}$()\\]{8,200}\1"
    r"|(?-i:(?=\S*\d)(?=\S*[a-z])(?=\S*[A-Z]))[\w+/=~!#%^&*-]{12,200}(?![\w(.\[/]))",
    re.IGNORECASE | re.ASCII,
)
# Where a secret may be: a long word, or near one of these. The rest of a tokenizer of 30 MB is not looked at.
LONG_WORD = re.compile(r"[\w.+/=~-]{14,}", re.ASCII)
SIGNS = (b"://", b"-----begin ", b"putty-user-key-file-", b"bearer ", b"basic ",
         b"secret", b"password", b"passwd", b"passphrase", b"pwd", b"key", b"token", b"credential")  # fmt: skip
HAS_VALUE = re.compile(rb"s?[\"'\]]{0,2}\s{0,4}[:=>]")  # after a sign that is the end of a name
# In the address of a server or a dataset: a user, or a parameter that is a key.
ADDRESS = re.compile(
    r"://[^\s/?#\"'@]+@|://[^\s\"']*[?&;](?:[\w.-]*(?:token|secret|passw(?:or)?d|signature|credential)|[\w.-]*key|sig"
    r"|auth|pwd)=[^&\s\"']{4,}",
    re.IGNORECASE,
)
ADDRESS_VARIABLES = ("HF_ENDPOINT", "OPENAI_BASE_URL", "WANDB_BASE_URL")
SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|(?:API|ACCESS|PRIVATE)?KEY|SECRET|PASS(?:WORD|WD|PHRASE)?|PWD|PAT|CREDENTIAL|AUTH)S?\d*(?:_|$)"
)
ABSOLUTE_PATH = re.compile(rb':\s*"(?:/[\w.~ -]+){2,}/?"|:\s*"[A-Za-z]:(?:\\\\|/)[^"]*"')
ESCAPE = re.compile(r"\\(?:u\{?([0-9a-fA-F]{4})\}?|x([0-9a-fA-F]{2})|([\"'/nrt\\]))")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}")
WEIGHTS_SCAN_BYTES = 2**24  # of a file of weights only its header is scanned


def find_secrets(files: Iterable[Path], text: str = "") -> list[str]:
    """What looks like a secret in `files` or in `text` (the card): "a Hub token in run.json", never the secret."""
    contents, findings = {"README.md": text.encode()}, []
    for file in files:
        with file.open("rb") as opened:
            contents[file.name] = opened.read(WEIGHTS_SCAN_BYTES if file.suffix == ".safetensors" else -1)
    secrets = env_secrets()
    for name, content in contents.items():
        for reading in _readings(content):
            findings += [f"{variable} in {name}" for value, variable in secrets.items() if value in reading]
            # models write code with passwords: in their texts, a name such as `password` alone does not count
            findings += [f"{kind} in {name}" for kind in find_kinds(reading, named=not name.endswith(".jsonl"))]
    return list(dict.fromkeys(findings))


def find_paths(files: Iterable[Path], text: str = "") -> list[str]:
    """Names of `files`, or README.md for `text`, that contain a local folder (a config: any absolute path)."""
    local = [str(path).encode() for path in (REPO, Path.home(), Path.cwd()) if len(path.parts) > 1]
    contents = {file.name: file.read_bytes() for file in files if file.suffix in (".json", ".jinja", ".py")}
    return [
        name for name, content in (contents | {"README.md": text.encode()}).items()
        if any(path in content for path in local) or (name.endswith("config.json") and ABSOLUTE_PATH.search(content))
    ]  # fmt: skip


def find_kinds(text: str, named: bool = True) -> list[str]:
    """The kinds of secrets in a text; with `named` also passwords and keys that only their name tells."""
    signed = "\n".join(_near_signs(text))
    places = "\n".join(text[max(0, w.start() - 40) : w.end() + 8] for w in LONG_WORD.finditer(text)) + f"\n{signed}"
    kinds = [kind for kind, start, pattern in PATTERNS if start in places and pattern.search(places)]
    return kinds + ["a password or key"] * bool(named and NAMED.search(signed))


def _near_signs(text: str) -> Iterator[str]:
    """The parts of a text that follow a sign of a secret."""
    lower = text.encode("latin-1", "replace").lower()  # as many bytes as characters
    for sign in SIGNS:
        start = lower.find(sign)
        while start >= 0:
            end = start + len(sign)
            if not sign.isalpha() or HAS_VALUE.match(lower, end):
                yield text[max(0, start - 16) : end + 250]
            start = lower.find(sign, end)


def _readings(content: bytes) -> Iterator[str]:
    """The text of a file, and as it reads as UTF-16, without its escapes, and with its base64 decoded. A character of
    the texts is a byte of UTF-8, which Python searches fastest."""
    text = content.replace(b"\0", b"").decode("latin-1")
    texts = [text, _as_bytes(content.decode(json.detect_encoding(content), "replace"))] if b"\0" in content else [text]
    for text in texts:
        yield text
        plain = text
        for _ in range(3 if "\\" in text else 0):  # JSON within JSON is escaped twice
            plain = ESCAPE.sub(_unescape, plain)
        plain = _as_bytes(html.unescape(plain)) if "&#" in plain else plain
        plain = unquote(plain, "latin-1") if "%" in plain else plain
        if plain != text:
            yield plain
        words = (word for long in LONG_WORD.findall(text) for word in BASE64.findall(long))
        yield "\n".join(filter(None, map(_decode_base64, words)))


def _as_bytes(text: str) -> str:
    return text.encode("utf-8", "replace").decode("latin-1")


def _unescape(found: re.Match[str]) -> str:
    number = found[1] or found[2]
    return _as_bytes(chr(int(number, 16))) if number else {"n": "\n", "r": "\n", "t": "\t"}.get(found[3], found[3])


def _decode_base64(word: str) -> str:
    """The text that is in a word as base64; "" if it is anything else."""
    with contextlib.suppress(binascii.Error, UnicodeDecodeError):
        text = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_" if set("-_") & set(word) else None)
        return _as_bytes(text.decode())
    return ""


def env_secrets() -> dict[str, str]:
    """What looks like a credential in the environment, in .env, and the Hub token: value → the name of its variable. It
    has the name of one, or the form of one; of an address with a password it is the password too."""
    from dotenv import dotenv_values
    from huggingface_hub import get_token

    variables = [*os.environ.items()]
    for file in (Path.cwd() / ".env", REPO / ".env"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            variables += [(name, value or "") for name, value in dotenv_values(file, encoding="utf-8-sig").items()]
    secrets: dict[str, str] = {}
    for name, value in variables:
        password = re.search(r"://[^\s/:@]*:([^\s/@]{6,})@", value)
        is_named = bool(SECRET_VARIABLE.search(name.upper())) and len(value) >= 8
        if len(value) < 16:  # a word such as "disabled" is none
            is_named = is_named and bool(re.search(r"\d|PASS|SECRET", value + name.upper()))
        if (is_named or find_kinds(value)) and not os.path.exists(value):
            secrets |= {value: name} | ({password[1]: name} if password else {})
    secrets[get_token() or ""] = "HF_TOKEN"
    return {_as_bytes(value): name for value, name in secrets.items() if value}


def refuse_secrets(place: str, words: Sequence[str]) -> None:
    """Raise SettingsError for words of a setting with a token or a password, before they are printed or saved."""
    for text in words:
        kinds = ["a password or key in an address"] if ADDRESS.search(text) else find_kinds(text, named=False)
        if kinds:
            fix = "Remove it. Keys such as HF_TOKEN and OPENAI_API_KEY are read from the environment and from .env."
            raise SettingsError(f"{place} has {kinds[0]}. {fix}")
