"""Publishing: private unless told otherwise, named files only, and never when it was not asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.core import UserError
from tests import fake_hub as local
from tests.conftest import DPO, Project


@pytest.fixture
def hub() -> Iterator[local.Hub]:
    with local.serve() as server:
        yield server


@pytest.fixture
def online(hub: local.Hub, monkeypatch: pytest.MonkeyPatch) -> local.Hub:
    """The client of this process speaks to the tests' Hub, with a token."""
    from huggingface_hub import constants, hf_api

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
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


def test_a_push_is_private_and_sends_the_model_s_files_and_a_card_alone(
    online: local.Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.hub.push import push_folder

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
    said = capsys.readouterr().out
    assert "Pushing 6 files to me/name (private)." in said
    assert "me/name is private." in said
    assert local.TOKEN not in said
    assert sum("/commit/" in request for request in online.requests) == 1


def test_an_adapter_on_a_base_that_nobody_else_has_is_not_pushed(online: local.Hub, model: Path) -> None:
    from helpers.hub.push import push_folder

    (model / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model}"}}')
    with pytest.raises(UserError, match="is a folder here, which nobody else has"):
        push_folder(model, "me/name", private=True)
    assert online.writes() == []
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    push_folder(model, "", private=True)  # by its own name, under the token's account
    assert "adapter_config.json" in online.repos[f"models/me/{model.name}"]["files"]


def test_a_gated_model_says_what_to_do(online: local.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.models.resolve import resolve_model

    online.fail["/org/gated/"] = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(UserError, match=r"org/gated is gated and your token may not read it\. Accept its terms"):
        resolve_model("org/gated")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"org/gated is gated .* needs a Hub token: set HF_TOKEN"):
        resolve_model("org/gated")


def test_public_is_public_only_when_told(online: local.Hub, model: Path) -> None:
    from helpers.hub.push import push_folder

    push_folder(model, "me/open", private=False)
    assert online.repos["models/me/open"]["private"] is False
    with pytest.raises(UserError, match="me/open exists and is public"):
        push_folder(model, "me/open", private=True)


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_one_line(online: local.Hub, model: Path, status: int) -> None:
    from helpers.hub.push import push_folder

    online.fail["/api/repos/create"] = (status, {})
    with pytest.raises(UserError) as raised:
        push_folder(model, "me/name", private=True)
    assert str(raised.value).startswith("pushing to me/name failed: ")
    assert "\n" not in str(raised.value)
    assert local.TOKEN not in str(raised.value)


def test_without_a_token_a_push_says_how_to_give_one(
    hub: local.Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.hub.push import push_folder

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
    cards = [hub.repos[f"models/me/{name}"]["files"]["README.md"].decode() for name in ("again", "pushed")]
    assert cards[0] == cards[1].replace("me/pushed", "me/again").replace("# pushed", "# again").replace(
        "name: pushed", "name: again"
    )
    hub.repos["models/me/again"]["files"]["README.md"] = cards[1].encode()
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
    hub: local.Hub, project: Project, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from huggingface_hub import ModelCard, constants

    from helpers.hub.push import preview_push

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

    flags = ["--run", "outputs/from_hub", "--run_name", "from_hub_merged", "--push_to_hub", "--hub_repo_id", "me/whole"]
    done = project.run("03_merge_push.py", *flags, "--license", "apache-2.0", **online, HF_TOKEN=local.TOKEN)
    files = hub.repos["models/me/whole"]["files"]
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/tiny", "merge", "apache-2.0")
    assert data.datasets == ["org/pairs"]
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "margin", "loss"}
    assert b"Against the policy as it was trained" in files["README.md"]
    assert files["curves.png"][1:4] == b"PNG"
    assert "me/whole (private)" in done.stdout
    for name, content in files.items():
        assert str(project.root).encode() not in content, name
        assert local.TOKEN.encode() not in content, name
    sent = len(hub.writes())
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    preview_push(project.root / "outputs" / "from_hub", project.root / "outputs", "both", "me/whole")
    listed = capsys.readouterr().out
    assert "MB  model.safetensors" in listed
    assert "kB  config.json" in listed
    assert "Would go to me/whole-adapter, from from_hub" in listed
    assert "MB  adapter_model.safetensors" in listed
    assert "base_model: org/tiny" in listed
    assert len(hub.writes()) == sent


PROMPT = [{"role": "user", "content": "What is 2 plus 3?"}]


def answer(model: Any, tokenizer: Any) -> list[int]:
    inputs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found: list[int] = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    return found


@pytest.fixture
def trained(tmp_path: Path, online: local.Hub, tokenizer: Any) -> dict[str, Path]:
    """A base that is on the Hub, an adapter of it, and the two merged, in two files of weights."""
    from peft import LoraConfig, get_peft_model

    from helpers.merging.merge import StreamingMerger
    from helpers.merging.weights import write_merged
    from tests.tiny import tiny_mistral

    torch.manual_seed(0)
    base = tiny_mistral(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    online.add("models", "org/base", {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir()})
    online.repos["models/org/base"]["card"] = {"license": "apache-2.0"}
    policy = get_peft_model(
        base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    policy.peft_config["default"].base_model_name_or_path = "org/base"
    policy.save_pretrained(str(tmp_path / "adapter"))
    merge = StreamingMerger(tmp_path / "base", tmp_path / "adapter")
    write_merged(tmp_path / "merged", merge, {}, 150_000, None)
    merge.config.save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("base", "adapter", "merged")}


def test_what_arrives_is_what_was_listed_and_answers_alike_from_an_empty_cache(
    online: local.Hub, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.hub.push import prepare_push, push_folder

    for name in ("adapter", "merged"):
        # the adapter names its base, whose licence is taken over
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
    ("part", "fails", "said"),
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
def test_a_push_survives_or_says_why_in_one_line_and_the_next_sends_what_is_missing(
    part: str, fails: Any, said: str, online: local.Hub, trained: dict[str, Path]
) -> None:
    from helpers.hub.push import push_folder

    online.fail[part] = fails
    if not said:
        online.times[part] = 1  # once, and then well
        push_folder(trained["merged"], "me/name", private=True)
    else:
        with pytest.raises(UserError) as raised:
            push_folder(trained["merged"], "me/name", private=True)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
        online.fail.clear()
        sent = set(online.objects)
        online.requests.clear()
        push_folder(trained["merged"], "me/name", private=True)
        again = [r for r in online.requests if r.startswith("PUT")]
        assert len(again) == len(list(trained["merged"].glob("*.safetensors"))) - len(sent)
    files = online.repos["models/me/name"]["files"]
    assert all(files[f.name] == f.read_bytes() for f in trained["merged"].glob("*.safetensors"))


def test_a_hub_that_says_how_long_is_waited_for_that_long(
    online: local.Hub, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.hub.push import push_folder

    waits: list[float] = []
    monkeypatch.setattr("helpers.hub_errors.time.sleep", waits.append)
    online.fail["/commit/"], online.times["/commit/"] = (429, {"Retry-After": "7"}), 1
    push_folder(trained["adapter"], "me/name", private=True)
    assert waits == [7.0]


def test_a_branch_and_a_tag(online: local.Hub, trained: dict[str, Path]) -> None:
    from helpers.hub.push import push_folder

    push_folder(trained["adapter"], "me/name", private=True, revision="beta", tag="v1")
    repo = online.repos["models/me/name"]
    assert "adapter_model.safetensors" in repo["branches"]["beta"]
    assert "adapter_model.safetensors" not in repo["files"]
    assert repo["tags"] == {"v1": repo["sha"]}


@pytest.mark.parametrize("where", ["run.json", "train.log", "tokenizer_config.json"])
@pytest.mark.parametrize("token", [local.TOKEN, "hf_" + "a1B2" * 9])
def test_a_token_in_what_is_sent_or_beside_it_stops_the_push(
    where: str, token: str, online: local.Hub, trained: dict[str, Path]
) -> None:
    from helpers.hub.push import push_folder

    file = trained["merged"] / where
    file.write_text((file.read_text() if file.exists() else "{}") + f"\n# {token}")
    with pytest.raises(UserError, match=f"nothing was sent: .* in {where}") as raised:
        push_folder(trained["merged"], "me/name", private=True)
    assert token not in str(raised.value)
    assert online.writes() == []


def test_a_folder_of_this_machine_in_what_is_sent_stops_the_push(online: local.Hub, trained: dict[str, Path]) -> None:
    from helpers.core import REPO
    from helpers.hub.push import push_folder

    config = trained["merged"] / "config.json"
    before = config.read_text()
    config.write_text(before.replace("{", '{"_name": "/data/people/anna/base",', 1))
    with pytest.raises(UserError, match=r"nothing was sent: config.json names a folder of this machine"):
        push_folder(trained["merged"], "me/name", private=True)
    config.write_text(before.replace("{", f'{{"_name": "{REPO}/outputs",', 1))
    with pytest.raises(UserError, match=r"nothing was sent: config.json names a folder of this machine"):
        push_folder(trained["merged"], "me/name", private=True)
    assert online.writes() == []


def test_a_card_names_the_base_on_the_hub_after_steps_through_local_folders(tmp_path: Path) -> None:
    import json

    from huggingface_hub import ModelCard

    from helpers.evaluation.answers import AnswerSet
    from helpers.evaluation.judgments import Judgments, pair_row
    from helpers.evaluation.results import PairwiseResults
    from helpers.hub.model_card import write_card

    common = {"base_model": "org/base", "versions": {"trl": "1.16.0"}, "status": "finished"}
    data = {"read": 10, "kept": 8, "dropped": 2, "train": 6, "eval": 2}
    settings = {"dataset_id": ["org/talks"], "dataset_revision": "abc", "revision": "v2", "learning_rate": 1e-5}
    dpo = {"dpo_beta": 0.2, "loss_type": ["ipo"], "dataset_id": ["org/pairs", "mine.jsonl"], "max_steps": 7}
    runs: dict[str, dict[str, Any]] = {
        "sft": {"settings": settings, "data": data, "sources": {}},
        "dpo": {"settings": dpo, "sources": {"max_steps": "flag"}, "data": data, "metrics": {"eval_loss": 0.5}},
        "merge": {"settings": {}, "metrics": {"kl": 1e-6, "top1": 1.0, "max_abs": 0.1, "mean_abs": 0.01}},
    }
    parent = None
    for step, record in runs.items():
        (tmp_path / step).mkdir()
        record |= common | {"step": step, "parent_folder": parent}
        (tmp_path / step / "run.json").write_text(json.dumps(record))
        parent = str(tmp_path / step)
    (tmp_path / "dpo" / "adapter_config.json").write_text("{}")
    (tmp_path / "judge").mkdir()
    rows = [
        pair_row({"question_id": i}, 1, ("sft", "dpo"), ["gpt", "pair"], [{"winner": w}] * 2)
        for i, w in enumerate(["dpo"] * 5 + ["tie"] * 2 + ["sft"])
    ]
    verdict = PairwiseResults.from_judgments(Judgments("gpt", rows), AnswerSet([], {})).as_dict()
    (tmp_path / "judge" / "run.json").write_text(
        json.dumps({"step": "judge", "status": "finished", "metrics": verdict})
    )
    text = write_card(tmp_path / "merge", "me/x", "mit")
    card = ModelCard(text)
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == ("org/base", "merge", "mit")
    assert card.data.datasets == ["org/pairs", "org/talks"]
    assert "[org/base](https://huggingface.co/org/base) at revision `v2`: instruction-tuned, then aligned" in text
    assert "with β = 0.2 and the ipo loss." in text
    assert "Data: org/pairs, mine.jsonl; 10 rows were read, 8 kept and 2 dropped; 6 were trained on" in text
    assert "Data: org/talks at revision `abc`" in text
    assert "| max_steps | 7 |" in text
    assert "KL 1.00e-06 nats" in text
    assert "Against sft, on the same prompts, judged by gpt:" in text
    assert re.search(r"\| 5 \| 1 \| 2 \| 75.0% \| \d+\.\d% to \d+\.\d% \|", text)
    assert str(tmp_path) not in text
    assert ModelCard(write_card(tmp_path / "dpo", "me/x")).data.base_model_relation == "adapter"
    assert ModelCard(write_card(tmp_path / "sft", "me/x")).data.base_model_relation == "finetune"


def test_a_card_names_no_base_that_nobody_named_and_no_folder(tmp_path: Path) -> None:
    import json

    from huggingface_hub import ModelCard

    from helpers.hub.model_card import write_card

    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert "None" not in write_card(tmp_path, "me/x")
    record = {"step": "dpo", "base_model": "org/base", "versions": {}, "metrics": {"eval_loss": float("nan")}}
    record["settings"] = {"dpo_beta": 0.1, "loss_type": ["sigmoid"], "deepspeed": "/data/me/zero3.json"}
    (tmp_path / "run.json").write_text(json.dumps(record | {"sources": {"deepspeed": "flag"}}))
    text = write_card(tmp_path, "me/x")
    assert "| deepspeed | zero3.json |" in text
    assert ModelCard(text).data.eval_results is None
