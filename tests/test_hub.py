"""Publishing: private unless told otherwise, named files only, and never when it was not asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.errors import UserError
from tests import hub as local
from tests.conftest import DPO, Project


@pytest.fixture
def hub() -> Iterator[local.Hub]:
    with local.serve() as server:
        yield server


@pytest.fixture
def online(hub: local.Hub, monkeypatch: pytest.MonkeyPatch) -> local.Hub:
    """The client of this process speaks to the tests' Hub, with a token."""
    import huggingface_hub.constants as constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", local.TOKEN)
    return hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text(f"{{}} {name}")
    for name in ("run.json", "metrics.jsonl", ".env", "training_args.bin", "optimizer.pt"):
        (tmp_path / name).write_text("secret")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("secret")
    return tmp_path


def test_a_push_is_private_and_sends_the_model_s_files_alone(
    online: local.Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.hub import push_folder

    push_folder(model, "me/name", private=True)
    repo = online.repos["models/me/name"]
    assert repo["private"] is True
    assert {n: c.decode() for n, c in repo["files"].items()} == {
        name: f"{{}} {name}"
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        )
    }
    said = capsys.readouterr().out
    assert "Pushing 5 files to me/name (private)." in said
    assert "me/name is private." in said
    assert local.TOKEN not in said


def test_an_adapter_on_a_base_that_nobody_else_has_is_not_pushed(online: local.Hub, model: Path) -> None:
    from helpers.hub import push_folder

    (model / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model}"}}')
    with pytest.raises(UserError, match="is a folder here, which nobody else has"):
        push_folder(model, "me/name", private=True)
    assert online.writes() == []
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    push_folder(model, "", private=True)  # by its own name, under the token's account
    assert "adapter_config.json" in online.repos[f"models/me/{model.name}"]["files"]


def test_a_gated_model_says_what_to_do(online: local.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.sources import local_or_hub

    online.fail["/org/gated/"] = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(UserError, match="org/gated is gated, and your token may not read it: accept its terms"):
        local_or_hub("org/gated")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"org/gated is gated .* needs a Hub token: set HF_TOKEN"):
        local_or_hub("org/gated")


def test_public_is_public_only_when_told(online: local.Hub, model: Path) -> None:
    from helpers.hub import push_folder

    push_folder(model, "me/open", private=False)
    assert online.repos["models/me/open"]["private"] is False
    with pytest.raises(UserError, match="me/open exists and is public"):
        push_folder(model, "me/open", private=True)


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_one_line(online: local.Hub, model: Path, status: int) -> None:
    from helpers.hub import push_folder

    online.fail["/api/repos/create"] = (status, {})
    with pytest.raises(UserError) as raised:
        push_folder(model, "me/name", private=True)
    assert str(raised.value).startswith("pushing to me/name failed: ")
    assert "\n" not in str(raised.value)
    assert local.TOKEN not in str(raised.value)


def test_without_a_token_a_push_says_how_to_give_one(
    hub: local.Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.hub import push_folder

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="set HF_TOKEN in the environment or in"):
        push_folder(model, "me/name", private=True)


def test_push_to_hub_false_never_pushes_and_merge_adaptors_pushes_the_merged_model(
    hub: local.Hub, project: Project, sft_run: str
) -> None:
    flags = [word for name, value in DPO.items() for word in (f"--{name}", str(value))]
    flags += ["--max_steps", "2", "--save_steps", "2", "--run_name", "pushed", "--hub_repo_id", "me/pushed"]
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": local.TOKEN, "HF_HUB_DISABLE_XET": "1"}
    project.run("02_dpo.py", *flags, "--push_to_hub", "False", **online)
    assert hub.writes() == []
    assert hub.repos == {}

    done = project.run("02_dpo.py", *flags, "--resume", "never", "--merge_adaptors", "--push_to_hub", **online)
    again = project.run("02_dpo.py", *flags, "--merge_adaptors", "--push_to_hub", "--hub_repo_id", "me/again", **online)
    assert "was finished before; it was not trained again" in again.stderr
    assert hub.repos["models/me/again"]["files"] == hub.repos["models/me/pushed"]["files"]
    repo = hub.repos["models/me/pushed"]
    assert repo["private"] is True
    for name, content in repo["files"].items():
        assert str(project.root).encode() not in content, name
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(repo["files"])
    assert not {"run.json", "adapter_model.safetensors"} & set(repo["files"])
    (merged,) = project.root.glob("outputs/merge-*/model.safetensors")
    assert repo["files"]["model.safetensors"] == merged.read_bytes()
    for file in project.root.glob("outputs/*/*.json*"):
        assert local.TOKEN not in file.read_text(errors="replace")
    assert local.TOKEN not in done.stdout + done.stderr
    assert os.environ.get("HF_TOKEN") is None


def test_a_model_and_a_dataset_from_a_hub_and_then_offline(
    hub: local.Hub, project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    model = {file.name: file.read_bytes() for file in (demo_folder / "tiny-mistral").iterdir()}
    hub.add("models", "org/tiny", model)
    hub.add("datasets", "org/pairs", {"train.jsonl": (demo_folder / "preferences" / "train.jsonl").read_bytes()})
    flags = [word for name, value in DPO.items() for word in (f"--{name}", str(value))]
    flags += ["--model_id", "org/tiny", "--dataset_id", "org/pairs", "--max_steps", "2", "--save_steps", "2"]
    online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = project.run("02_dpo.py", *flags, "--run_name", "from_hub", **online)
    assert "3,000" in done.stdout
    record = project.record("from_hub")
    assert (record["status"], record["base_model"], record["parent"]) == ("finished", "org/tiny", None)
    assert record["data"]["read"] == record["data"]["kept"] + record["data"]["dropped"] == 3000
    asked = len(hub.requests)
    project.run("02_dpo.py", *flags, "--run_name", "offline", **online, HF_HUB_OFFLINE="1")
    assert project.record("offline")["metrics"]["eval_loss"] == record["metrics"]["eval_loss"]
    assert len(hub.requests) == asked
