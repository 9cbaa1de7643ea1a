"""Publishing: private by default, named files only, and never without being asked."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.core import SettingsError, UserError
from helpers.hub import check_push, push_before_merge, push_model
from helpers.hub.push import prepare_push, push_folder
from tests import fake_hub as local
from tests.conftest import DPO, Project


@dataclasses.dataclass
class PushSettings:
    """What 03_merge_push.py knows about publishing."""

    output_dir: Path
    push_to_hub: bool = True
    hub_repo_id: str = "me/name"
    hub_revision: str = ""
    hub_tag: str = ""
    push: str = "merged"
    private: bool = True
    license: str = ""
    dry_run: bool = False


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that retries would have waited, instead of waiting."""
    seconds: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", seconds.append)
    return seconds


def test_a_push_is_private_and_sends_only_the_files_of_the_model_and_a_card(
    online: local.Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_folder(model, "me/name", private=True)
    repo = online.repos["models/me/name"]
    assert repo["private"] is True
    card = repo["files"].pop("README.md").decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
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
    output = capsys.readouterr().out
    assert "Pushing 6 files to me/name (private)." in output
    assert "me/name is private." in output
    assert local.TOKEN not in output
    assert sum("/commit/" in request for request in online.requests) == 1


def test_an_adapter_of_a_local_base_is_not_pushed(online: local.Hub, model: Path) -> None:
    (model / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model}"}}')
    with pytest.raises(UserError, match="is a local folder, which others do not have"):
        push_folder(model, "me/name", private=True)
    assert online.writes() == []
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    push_folder(model, "", private=True)  # by its own name, under the token's account
    assert "adapter_config.json" in online.repos[f"models/me/{model.name}"]["files"]


def test_a_gated_model_is_explained(online: local.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.models.resolve import resolve_model

    online.fail["/org/gated/"] = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(UserError, match=r"org/gated is gated and your token may not read it\. Accept its terms"):
        resolve_model("org/gated")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"org/gated is gated .* needs a Hub token\. Set HF_TOKEN"):
        resolve_model("org/gated")


def test_a_repository_is_public_only_if_asked_for(online: local.Hub, model: Path) -> None:
    push_folder(model, "me/open", private=False)
    assert online.repos["models/me/open"]["private"] is False
    with pytest.raises(UserError, match=r"me/open exists and is public\. Use --no_private"):
        push_folder(model, "me/open", private=True)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_the_hub_is_one_line(online: local.Hub, model: Path, status: int) -> None:
    online.fail["/api/repos/create"] = (status, {})
    with pytest.raises(UserError) as raised:
        push_folder(model, "me/name", private=True)
    assert str(raised.value).startswith("pushing to me/name failed: ")
    assert "\n" not in str(raised.value)
    assert local.TOKEN not in str(raised.value)


def test_without_a_token_a_push_explains_how_to_give_one(
    hub: local.Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="Set HF_TOKEN in the environment or in"):
        push_folder(model, "me/name", private=True)


@pytest.mark.long
def test_a_run_is_merged_and_pushed_after_training_and_again_once_finished(
    hub: local.Hub, hub_env: dict[str, str], project: Project, sft_run: str
) -> None:
    flags = [word for name, value in DPO.items() for word in (f"--{name}", str(value))]
    flags += ["--max_steps", "2", "--save_steps", "2", "--run_name", "pushed", "--merge_adaptors", "--push_to_hub"]
    online = hub_env | {"HF_TOKEN": local.TOKEN}
    done = project.run("02_dpo.py", *flags, "--hub_repo_id", "me/pushed", **online)
    again = project.run("02_dpo.py", *flags, "--hub_repo_id", "me/again", **online)
    assert "was already finished and was not retrained" in again.stderr
    cards = [hub.repos[f"models/me/{name}"]["files"].pop("README.md").decode() for name in ("again", "pushed")]
    assert cards[0] == cards[1].replace("me/pushed", "me/again").replace("# pushed", "# again").replace(
        "name: pushed", "name: again"
    )
    assert hub.repos["models/me/again"]["files"] == hub.repos["models/me/pushed"]["files"]
    repo = hub.repos["models/me/pushed"]
    assert repo["private"] is True
    for name, content in [*repo["files"].items(), ("README.md", cards[1].encode())]:
        assert str(project.root).encode() not in content, name
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(repo["files"])
    assert not {"run.json", "adapter_model.safetensors"} & set(repo["files"])
    (merged,) = project.root.glob("outputs/merge-*/model.safetensors")
    assert repo["files"]["model.safetensors"] == merged.read_bytes()
    for file in project.root.glob("outputs/*/*.json*"):
        assert local.TOKEN not in file.read_text(errors="replace")
    assert local.TOKEN not in done.stdout + done.stderr
    assert os.environ.get("HF_TOKEN") is None


@pytest.mark.long
def test_a_model_and_a_dataset_are_read_from_the_hub_and_then_offline(
    hub: local.Hub, hub_env: dict[str, str], project: Project, demo_folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from huggingface_hub import ModelCard, constants

    model = {file.name: file.read_bytes() for file in (demo_folder / "tiny-mistral").iterdir()}
    hub.add("models", "org/tiny", model)
    hub.add("datasets", "org/pairs", {"train.jsonl": (demo_folder / "preferences" / "train.jsonl").read_bytes()})
    flags = [word for name, value in (DPO | {"sft_run": ""}).items() for word in (f"--{name}", str(value))]
    flags += ["--model_id", "org/tiny", "--dataset_id", "org/pairs", "--max_steps", "2", "--save_steps", "2"]
    online = hub_env | {"HF_TOKEN": local.TOKEN}
    done = project.run("02_dpo.py", *flags, "--run_name", "from_hub", "--push_to_hub", "False", **online)
    assert "3,000" in done.stdout
    assert hub.writes() == []
    record = project.record("from_hub")
    assert (record["status"], record["base_model"], record["parent"]) == ("finished", "org/tiny", None)
    assert record["data"]["read"] == record["data"]["kept"] + record["data"]["dropped"] == 3000
    requests = len(hub.requests)
    project.run("02_dpo.py", *flags, "--run_name", "offline", **online, HF_HUB_OFFLINE="1")
    assert project.record("offline")["metrics"]["eval_loss"] == record["metrics"]["eval_loss"]
    assert len(hub.requests) == requests

    flags = [
        "--run",
        "outputs/from_hub",
        "--run_name",
        "from_hub_merged",
        "--push_to_hub",
        "--hub_repo_id",
        "me/merged",
    ]
    done = project.run("03_merge_push.py", *flags, "--license", "apache-2.0", **online)
    files = hub.repos["models/me/merged"]["files"]
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/tiny", "merge", "apache-2.0")
    assert data.datasets == ["org/pairs"]
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "margin", "loss"}
    assert b"Compared with the trained policy on held-out prompts" in files["README.md"]
    assert files["curves.png"][1:4] == b"PNG"
    assert "me/merged (private)" in done.stdout
    for name, content in files.items():
        assert str(project.root).encode() not in content, name
        assert local.TOKEN.encode() not in content, name
    sent = len(hub.writes())
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    settings = PushSettings(project.root / "outputs", hub_repo_id="me/merged", push="both", dry_run=True)
    push_before_merge(settings, project.root / "outputs" / "from_hub")
    listed = capsys.readouterr().out
    assert "MB  model.safetensors" in listed
    assert "MB  config.json" in listed
    assert "Would push from_hub to me/merged-adapter:" in listed
    push_before_merge(dataclasses.replace(settings, hub_repo_id=""), project.root / "outputs" / "from_hub")
    unnamed = capsys.readouterr().out  # the names that push_model would give
    assert "Would push from_hub to from_hub_merged-adapter:" in unnamed
    assert "Would push from_hub_merged to from_hub_merged:" in unnamed
    assert "MB  adapter_model.safetensors" in listed
    assert "base_model: org/tiny" in listed
    assert len(hub.writes()) == sent


PROMPT = [{"role": "user", "content": "What is 2 plus 3?"}]


def answer(model: Any, tokenizer: Any) -> list[int]:
    inputs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens: list[int] = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    return tokens


@pytest.mark.long
def test_the_files_listed_arrive_and_load_with_the_same_answers(
    online: local.Hub, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("adapter", "merged"):
        files, card = prepare_push(trained[name], f"me/{name}", "apache-2.0" if name == "adapter" else "")
        push_folder(trained[name], f"me/{name}", private=True)
        repo = online.repos[f"models/me/{name}"]
        assert repo["private"] is True
        assert repo["files"] == {f.name: f.read_bytes() for f in files} | {"README.md": card.encode()}
    assert len(list(trained["merged"].glob("*.safetensors"))) > 1
    cache = {"cache_dir": tmp_path / "cache", "token": local.TOKEN}
    there = AutoModelForCausalLM.from_pretrained("me/merged", **cache)
    tokenizer = AutoTokenizer.from_pretrained("me/merged", **cache)
    here = AutoModelForCausalLM.from_pretrained(trained["merged"])
    assert answer(there, tokenizer) == answer(here, AutoTokenizer.from_pretrained(trained["merged"]))
    base = AutoModelForCausalLM.from_pretrained("org/base", **cache)
    assert answer(PeftModel.from_pretrained(base, "me/adapter", **cache), tokenizer) == answer(here, tokenizer)
    card = online.repos["models/me/adapter"]["files"]["README.md"].decode()
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")


@pytest.mark.parametrize(
    ("part", "failure", "message"),
    [
        ("/storage/", (0, {}), ""),
        ("/commit/", (429, {"Retry-After": "0"}), ""),
        ("/commit/", (0, {}), ""),
        ("/create", (401, {}), "the Hub does not accept your token (401)"),
        ("/commit/", (403, {}), "your token may not do that (403)"),
        ("objects/batch", (403, {}, "Private repository storage limit reached"), "storage limit reached"),
    ],
    ids=["broken connection", "429", "broken commit", "401", "403", "quota"],
)
def test_a_push_is_retried_or_explained_in_one_line_and_the_next_sends_what_is_missing(
    part: str, failure: Any, message: str, online: local.Hub, trained: dict[str, Path]
) -> None:
    online.fail[part] = failure
    if not message:
        online.times[part] = 1
        push_folder(trained["merged"], "me/name", private=True)
    else:
        with pytest.raises(UserError) as raised:
            push_folder(trained["merged"], "me/name", private=True)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
        online.fail.clear()
        sent = set(online.objects)
        online.requests.clear()
        push_folder(trained["merged"], "me/name", private=True)
        again = [r for r in online.requests if r.startswith("PUT")]
        assert len(again) == len(list(trained["merged"].glob("*.safetensors"))) - len(sent)
    files = online.repos["models/me/name"]["files"]
    assert all(files[f.name] == f.read_bytes() for f in trained["merged"].glob("*.safetensors"))


def test_retry_after_is_honoured(
    online: local.Hub, trained: dict[str, Path], waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    online.fail["/commit/"], online.times["/commit/"] = (429, {"Retry-After": "7"}), 1
    push_folder(trained["adapter"], "me/name", private=True)
    assert waits == [7.0]
    assert capsys.readouterr().out.count("The Hub is busy or unreachable. Retrying in 7 s.") == 1


@pytest.mark.parametrize(
    ("failure", "seconds"),
    [
        ((503, {}), [1, 2, 4, 8]),
        ((0, {}), [1, 2, 4, 8]),
        ((429, {"Retry-After": "300"}), [300] * 4),
        ((429, {"Retry-After": "301"}), []),
        ((403, {}), []),
    ],
    ids=["503", "broken connection", "5 minutes", "more than 5 minutes", "403"],
)
def test_a_call_is_tried_five_times_if_another_try_may_help(
    failure: Any, seconds: list[float], online: local.Hub, model: Path, waits: list[float]
) -> None:
    online.fail["/api/repos/create"] = failure
    with pytest.raises(UserError, match="pushing to me/name failed: "):
        push_folder(model, "me/name", private=True)
    assert waits == seconds
    assert online.requests.count("POST /api/repos/create") == len(seconds) + 1


def test_a_branch_and_a_tag(online: local.Hub, trained: dict[str, Path]) -> None:
    push_folder(trained["adapter"], "me/name", private=True, revision="beta", tag="v1")
    repo = online.repos["models/me/name"]
    assert "adapter_model.safetensors" in repo["branches"]["beta"]
    assert "adapter_model.safetensors" not in repo["files"]
    assert repo["tags"] == {"v1": repo["sha"]}


@pytest.mark.parametrize("where", ["run.json", "train.log", "tokenizer_config.json"])
@pytest.mark.parametrize("token", [local.TOKEN, "hf_" + "a1B2" * 9])
def test_a_token_in_a_file_or_in_a_record_of_the_run_stops_the_push(
    where: str, token: str, online: local.Hub, trained: dict[str, Path]
) -> None:
    file = trained["merged"] / where
    file.write_text((file.read_text() if file.exists() else "{}") + f"\n# {token}")
    with pytest.raises(UserError, match=f"Nothing was pushed: .* in {where}. Remove it, revoke it") as raised:
        push_folder(trained["merged"], "me/name", private=True)
    assert token not in str(raised.value)
    assert online.writes() == []


def test_a_local_path_in_a_file_stops_the_push(online: local.Hub, trained: dict[str, Path]) -> None:
    from helpers.core import REPO

    config = trained["merged"] / "config.json"
    before = config.read_text()
    config.write_text(before.replace("{", '{"_name": "/data/people/anna/base",', 1))
    with pytest.raises(UserError, match=r"Nothing was pushed: config.json contains a local path"):
        push_folder(trained["merged"], "me/name", private=True)
    config.write_text(before.replace("{", f'{{"_name": "{REPO}/outputs",', 1))
    with pytest.raises(UserError, match=r"Nothing was pushed: config.json contains a local path"):
        push_folder(trained["merged"], "me/name", private=True)
    assert online.writes() == []


def test_a_push_is_checked_before_hours_of_work(
    online: local.Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PushSettings(tmp_path)
    check_push(settings, model)
    with pytest.raises(SettingsError, match=r"--hub_repo_id 'me/my model' is not a repository's name: "):
        check_push(dataclasses.replace(settings, hub_repo_id="me/my model"))
    (model / "run.json").write_text("hf_" + "a1B2" * 9)
    push_before_merge(settings, model)  # this folder is not published
    push_before_merge(dataclasses.replace(settings, push_to_hub=False, push="both"), model)
    with pytest.raises(UserError, match=r"Nothing was pushed: a Hub token in run\.json"):
        push_before_merge(dataclasses.replace(settings, push="both"), model)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="--push_to_hub needs a Hub token"):
        push_before_merge(settings, model)
    assert online.writes() == []


def test_an_adapter_alone_is_pushed_without_a_merge_and_both_after_one(
    online: local.Hub, trained: dict[str, Path], tmp_path: Path
) -> None:
    settings = PushSettings(tmp_path, push="adapter")
    assert push_before_merge(settings, trained["adapter"]) is True
    assert "adapter_model.safetensors" in online.repos["models/me/name"]["files"]
    online.repos.pop("models/me/name")
    record = {"step": "merge", "base_model": "org/base", "versions": {}, "parent_folder": str(trained["adapter"])}
    (trained["merged"] / "run.json").write_text(json.dumps(record))
    push_model(trained["merged"], dataclasses.replace(settings, push="both"))
    assert "adapter_model.safetensors" not in online.repos["models/me/name"]["files"]
    assert "adapter_model.safetensors" in online.repos["models/me/name-adapter"]["files"]
    card = online.repos["models/me/name-adapter"]["files"]["README.md"].decode()
    assert "license: apache-2.0" in card  # the base model's
