"""Secrets: which are found in a folder to push, in which writings, and that ordinary files have none."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from helpers.core import REPO, SettingsError, UserError
from helpers.hub.push import prepare_push, push_folder
from helpers.settings.secrets import env_secrets, find_kinds, find_secrets
from tests import fake_hub as local
from tests.settings.notebook import load

LETTERS = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xYzAbC3dEf"  # 40, as random as a key
HEX = "0123456789abcdef0a1b2c3d4e5f6789"
JWT = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (
    b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"1234567890"}', b"0123456789abcdef0123456789abcdef"))  # fmt: skip
SECRETS = {
    "Hub": ("a Hub token", f"hf_{LETTERS[:34]}"),
    "Hub, in a name": ("a Hub token", f"x_hf_{LETTERS[:34]}"),
    "Hub, organization": ("a Hub token", f"api_org_{LETTERS[:34]}"),
    "OpenAI": ("an API key", f"sk-{LETTERS[:20]}T3BlbkFJ{LETTERS[:20]}"),
    "OpenAI, project": ("an API key", f"sk-proj-{LETTERS}_{LETTERS}"),
    "Anthropic": ("an API key", f"sk-ant-api03-{LETTERS}-{LETTERS}AA"),
    "OpenRouter": ("an API key", f"sk-or-v1-{HEX}{HEX}"),
    "Groq": ("an API key", f"gsk_{LETTERS}{LETTERS[:12]}"),
    "Nvidia": ("an API key", f"nvapi-{LETTERS}"),
    "GitHub": ("a GitHub token", f"ghp_{LETTERS[:36]}"),
    "GitHub, OAuth": ("a GitHub token", f"gho_{LETTERS[:36]}"),
    "GitHub, fine-grained": ("a GitHub token", f"github_pat_11{LETTERS}_{LETTERS}"),
    "GitLab": ("a GitLab token", f"glpat-{LETTERS[:20]}"),
    "Slack": ("a Slack token", "xoxb-123456789012-1234567890123-" + LETTERS[:24]),
    "Slack, app": ("a Slack token", f"xapp-1-A0123456789-1234567890123-{HEX}"),
    "Slack, webhook": ("a Slack webhook", f"https://hooks.slack.com/services/T01234567/B01234567/{LETTERS[:24]}"),
    "Discord": ("a Discord webhook", f"https://discord.com/api/webhooks/123456789012345678/{LETTERS}"),
    "Google": ("a Google key", f"AIzaSy{LETTERS[:33]}"),
    "Google, OAuth": ("a Google token", f"ya29.{LETTERS}"),
    "Google, client": ("a Google token", f"GOCSPX-{LETTERS[:28]}"),
    "npm": ("an npm token", f"npm_{LETTERS[:36]}"),
    "npm, file": ("an npm token", "//registry.npmjs.org/:_authToken=01234567-89ab-cdef-0123-456789abcdef"),
    "Stripe": ("a Stripe key", f"sk_live_{LETTERS[:24]}"),
    "Stripe, restricted": ("a Stripe key", f"rk_live_{LETTERS[:24]}"),
    "JWT": ("a JSON Web Token", JWT),
    "AWS, id": ("an AWS key", "AKIAZ7EXAMPLE4QWERTY"),
    "AWS, secret": ("a password or key", f"aws_secret_access_key = {LETTERS}"),
    "AWS, secret in JSON": ("a password or key", '{"SecretAccessKey": "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"}'),
    "Azure, storage": ("an Azure key", f"AccountName=me;AccountKey={LETTERS}{LETTERS}abcdef==;"),
    "Azure, client": ("an Azure secret", f"abc8Q~{LETTERS[:34]}"),
    "SendGrid": ("a SendGrid key", f"SG.{LETTERS[:22]}.{LETTERS}abc"),
    "Twilio": ("a Twilio key", f"SK{HEX}"),
    "PyPI": ("a PyPI token", f"pypi-AgEIcHlwaS5vcmc{LETTERS}{LETTERS}"),
    "Telegram": ("a Telegram token", f"123456789:AA{LETTERS[:33]}"),
    "Mailchimp": ("a Mailchimp key", f"{HEX}-us12"),
    "Square": ("a Square token", f"sq0csp-{LETTERS}abc"),
    "DigitalOcean": ("an access token", f"dop_v1_{HEX}{HEX}"),
    "Databricks": ("an access token", f"dapi{HEX}"),
    "Docker": ("an access token", f"dckr_pat_{LETTERS[:27]}"),
    "RSA": ("a private key", "-----BEGIN RSA PRIVATE KEY-----"),
    "OpenSSH": ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    "PKCS8": ("a private key", "-----BEGIN PRIVATE KEY-----"),
    "PGP": ("a private key", "-----BEGIN PGP PRIVATE KEY BLOCK-----"),
    "database": ("a password in an address", "postgres://anna:Tr0ub4dor@db.example.com:5432/x"),
    "short password": ("a password in an address", "redis://:hunter2@10.0.0.1:6379"),
    "git": ("a password in an address", "https://oauth2:abcdef@gitlab.example.com/x.git"),
    "password": ("a password or key", 'password = "correct-horse-9"'),
    "key": ("a password or key", "API_KEY=Zx81Spectrum48k"),
    "header": ("a key in a header", f"Authorization: Bearer {LETTERS}"),
}  # fmt: skip
WRITINGS: dict[str, Callable[[str], bytes]] = {
    "as it is": str.encode,
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "UTF-16 after UTF-8": lambda text: b"a log in UTF-8\n" + text.encode("utf-16-le"),
    "JSON": lambda text: json.dumps({"x": f"a\n{text}\n"}).encode(),
    "JSON in JSON": lambda text: json.dumps({"x": json.dumps({"y": f"\t{text}"})}).encode(),
    "escaped": lambda text: "".join(f"\\u{ord(c):04x}" for c in text).encode(),
    "escaped twice": lambda text: json.dumps("".join(f"\\u{ord(c):04X}" for c in text)).encode(),
    "bytes": lambda text: "".join(f"\\x{ord(c):02x}" for c in text).encode(),
    "HTML": lambda text: "".join(f"&#{ord(c)};" for c in text).encode(),
    "a query": lambda text: f"https://example.com/?x={quote(text, safe='')}".encode(),
    "base64": lambda text: base64.b64encode(f"key {text}\n".encode()),
    "base64 of an address": lambda text: base64.urlsafe_b64encode(f"?>{text}".encode()),
}


@pytest.mark.parametrize("name", SECRETS)
def test_the_table_of_secrets(name: str, tmp_path: Path) -> None:
    """Each kind, in each writing, is found in a file that is pushed and in a record of the run."""
    kind, secret = SECRETS[name]
    lost = []
    for writing, write in WRITINGS.items():
        for file in (tmp_path / "tokenizer_config.json", tmp_path / "train.log"):
            file.write_bytes(write(f"some text, {secret} and more" if "=" not in secret else f"some text\n{secret}\n"))
            found = find_secrets([file])
            if f"{kind} in {file.name}" not in found:
                lost.append((writing, file.name, found))
            assert not any(secret in line for line in found)
    assert lost == []


@pytest.mark.parametrize("where", ["config.json", "chat_template.jinja", "own.py", "run.json", "metrics.jsonl"])
def test_nothing_is_pushed_with_a_secret_and_the_secret_is_not_printed(
    where: str, online: local.Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = SECRETS["GitLab"][1]
    (model / where).write_text(f"# {secret}")
    with pytest.raises(UserError, match=f"Nothing was pushed: a GitLab token in {where}") as raised:
        push_folder(model, "me/name", private=True)
    assert secret not in str(raised.value) + "".join(capsys.readouterr())
    assert online.writes() == []


ENVIRONMENT = {
    "DB_PASSWORD": "correct horse",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_TOKEN": "örtlich-geheim-1",
    "SERVICE_AUTH": "plainwordsonlyplain",
    "DATABASE_URL": "mysql://anna:hunter22@db/x",
}


@pytest.mark.parametrize("name", ENVIRONMENT)
@pytest.mark.parametrize("source", ["environment", ".env"])
def test_values_of_the_environment_and_of_dotenv_are_found(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == ".env":
        (tmp_path / ".env").write_text(f"# mine\n{name}='{ENVIRONMENT[name]}'\n")
    else:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    parts = [ENVIRONMENT[name], *(["hunter22"] if name == "DATABASE_URL" else [])]
    for part in parts:
        for writing in ("as it is", "UTF-16", "JSON", "escaped", "base64"):
            (tmp_path / "run.json").write_bytes(WRITINGS[writing](f"a {part} b"))
            assert f"{name} in run.json" in find_secrets([tmp_path / "run.json"]), (part, writing)


def test_ordinary_variables_are_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = env_secrets()
    ordinary = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "qwertz-layout-1", "MONKEY_MODE": "disabled-1",
                "SSH_AUTH_SOCK": str(tmp_path), "DPO_MAX_TOKENS_TOTAL": "512", "HF_TOKEN_IS_SET": "true",
                "SOME_KEY": "disabled", "HF_HOME": "/data/hf", "HTTP_PROXY": "http://example.com:3128"}  # fmt: skip
    for name, value in ordinary.items():
        monkeypatch.setenv(name, value)
    assert env_secrets() == before


ORDINARY = [
    '{"pad_token": "<|endoftext|>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"}',
    '{"fingerprint": "0123456789abcdef", "sha256": "' + HEX * 2 + '", "commit": "' + HEX + '01234567+"}',
    '{"settings": {"dataset_id": ["argilla/ultrafeedback-binarized-preferences-cleaned"], "max_new_tokens": 256}}',
    '{"base_url": "http://127.0.0.1:8000/v1", "source": "https://huggingface.co/org/model@main/x"}',
    '{"\\u0120password": 12345, "\\u0120secret": 777, "key": 5, "password=\\"": 50123, "secret=\'": 7, "\\":": 1}',
    "mailto:someone@example.com https://example.com:8080/a@b ssh://git@github.com/x",
    "postgres://user:password@localhost/db redis://user:<password>@host mysql://u:${PASSWORD}@host",
    'password = getpass.getpass()\napi_key = os.environ["OPENAI_API_KEY"]\nsecret_key = hashlib.sha256(x).hexdigest()',
    "self.k_proj, self.key_proj2 = key; private_key = config.private_key_v2; token = tokens[12]",
    "a task-specific mask-language-modeling-objective-for-models, sk-learn-compatible estimators",
    "xoxo-kisses-and-hugs, npm_config_loglevel, hf_transfer, hf_hub_download_with_retries, sk_live_, SG.a.b",
    "2026-11-28 11:20:30,123456789:AAAAA step 12/100 loss 0.6931 grad_norm 1.2345678901234567890123456789012345",
    "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 8).decode(),
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_has_no_secret(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert find_secrets([tmp_path / "config.json"], text) == []


def test_texts_of_models_may_have_examples_of_passwords(tmp_path: Path) -> None:
    (tmp_path / "completions.jsonl").write_text(json.dumps({"answer": 'password = "example-123"'}))
    assert find_secrets([tmp_path / "completions.jsonl"]) == []


@pytest.mark.long
def test_the_demo_and_tokenizers_of_this_environment_have_no_secret(demo_folder: Path) -> None:
    mistral = pytest.importorskip("mistral_common")
    files = [f for f in demo_folder.rglob("*") if f.suffix in (".json", ".jsonl", ".jinja", ".safetensors")]
    data = Path(mistral.__file__).parent / "data"
    files += [next(data.glob("tekken_*.json")), next(data.glob("tokenizer.model.*"))]
    files += [*(REPO / "recipes").rglob("*.yaml"), *(REPO / "docs").glob("*.md"), REPO / "README.md"]
    assert len(files) > 15
    assert find_secrets(files) == []


def test_a_large_tokenizer_is_read_within_seconds(tmp_path: Path) -> None:
    words = [f"Ġ{i:x}{chr(97 + i % 26)}" for i in range(120_000)]
    content = {"model": {"vocab": {word: i for i, word in enumerate(words)}, "merges": [[w[:2], w[2:]] for w in words]}}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))  # Ġ is an escape
    start = time.process_time()
    assert find_secrets([file]) == []
    assert time.process_time() - start < 10
    content["model"]["vocab"][SECRETS["Slack"][1]] = 1
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1))
    assert find_secrets([file]) == ["a Slack token in tokenizer.json"]


ADDRESSES = [
    "http://anna:hunter2@127.0.0.1:8000/v1",
    "https://sometoken@models.example.com/v1",
    "https://models.example.com/v1?api_key=0123456789",
    "https://data.example.com/x.jsonl?X-Amz-Signature=abcdef0123&X-Amz-Expires=1",
    "https://me.blob.core.windows.net/x.jsonl?sv=1&sig=abcdef%3D",
    f"https://models.example.com/hf_{LETTERS[:34]}/v1",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("layer", ["flag", "equals", "stray", "notebook", "variable", ".env", "recipe", "bad recipe"])
def test_an_address_with_a_password_is_refused_before_it_is_printed(
    address: str, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, bound = [], dict[str, Any]()
    if layer == "flag":
        words = ["--model_id", address]
    elif layer == "equals":
        words = [f"--model_id={address}"]
    elif layer == "stray":
        words = [address]
    elif layer == "notebook":
        bound = {"model_id": address}
    elif layer == "variable":
        monkeypatch.setenv("DPO_MODEL_ID", address)
    elif layer == ".env":
        (tmp_path / ".env").write_text(f"DPO_MODEL_ID='{address}'\n")
    else:
        (tmp_path / "own.yaml").write_text(f"model_id: {address}\n" + "a: [b\n" * (layer == "bad recipe"))
        words = ["--recipe", "own.yaml"]
    with pytest.raises(SettingsError) as raised:
        load(*words, **bound)
    shown = str(raised.value) + "".join(capsys.readouterr())
    assert " has a" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any(part in shown for part in ("hunter2", "sometoken", "0123456789", "abcdef", LETTERS[:34]))


@pytest.mark.parametrize("words", [
    ("--model_id", "org/model@main"), ("--notes", "mail me@example.com, https://example.com/a?b=c&page=2"),
    ("--model_id", "http://127.0.0.1:8000/v1"), ("--run_name", "sk-learn"), ("--model_id", "hf://datasets/org/x@v1/y"),
])  # fmt: skip
def test_ordinary_values_are_settings(words: tuple[str, str]) -> None:
    assert getattr(load(*words), words[0][2:]) == words[1]


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "OPENAI_BASE_URL"])
def test_an_address_of_the_environment_may_have_no_password(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "https://anna:hunter2@example.com")
    with pytest.raises(SettingsError, match=f"{name} has a password or key in an address") as raised:
        load()
    assert "hunter2" not in str(raised.value)


def test_the_readme_of_a_run_is_searched(online: local.Hub, trained: dict[str, Path]) -> None:
    record = {"step": "dpo", "base_model": "org/base", "versions": {"trl": SECRETS["npm"][1]}, "settings": {}}
    record["settings"] = {"dpo_beta": 0.1, "loss_type": ["sigmoid"]}
    (trained["adapter"] / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"an npm token in README\.md; an npm token in run\.json"):
        prepare_push(trained["adapter"], "me/name")
    assert find_kinds("nothing here") == []
