"""What is checked before hours of work: the token, the repository and the license. And the end of an adapter's push."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.core import SettingsError, UserError
from helpers.hub import check_push, push, push_before_merge
from helpers.hub.push import license_metadata, prepare_push, push_folder
from helpers.runs.checkpoints import hash_model_files
from helpers.runs.run import Run
from tests import fake_hub as local
from tests.conftest import REPO, code_cells
from tests.hub.test_push import PushSettings


@dataclasses.dataclass
class TrainingSettings:
    """What 02_dpo.py knows about publishing."""

    hub_repo_id: str = "me/name"
    run_name: str = ""
    tuning: str = "qlora"
    merge_adaptors: bool = False


def token(role: str, *scopes: tuple[str, str]) -> dict[str, Any]:
    scoped = [{"entity": {"type": "user", "name": name}, "permissions": [right]} for name, right in scopes]
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    access = {"role": role} | ({"fineGrained": {"scoped": scoped}} if scopes or role == "fineGrained" else {})
    return {"name": "me", "auth": {"accessToken": access}, "orgs": orgs}


USERS = [
    (token("write"), "me/x", ""),
    (token("write"), "x", ""),
    (token("write"), "team/x", ""),
    (token("read"), "me/x", "Your token may not write to me/x. Set HF_TOKEN to a token with write access to it."),
    (token("write"), "readers/x", "Your token cannot write to readers/x: it belongs to me or team. Use another"),
    (
        token("write"),
        "org/x",
        "Your token cannot write to org/x: it belongs to me or team. Use another --hub_repo_id.",
    ),
    (token("fineGrained", ("me", "repo.write")), "me/x", ""),
    (token("fineGrained", ("me/x", "repo.write")), "me/x", ""),
    (token("fineGrained", ("lab", "repo.write")), "lab/x", ""),
    (token("fineGrained", ("me", "repo.content.read")), "me/x", "Your token may not write to me/x."),
    (token("fineGrained", ("team", "repo.write")), "me/x", "Your token may not write to me/x."),
    (token("fineGrained"), "me/x", "Your token may not write to me/x."),
    ({"name": "me"}, "me/x", ""),  # a server that says no more
]


@pytest.mark.parametrize(("user", "repo_id", "message"), USERS)
@pytest.mark.parametrize("settings", [PushSettings(Path()), TrainingSettings()], ids=["03", "02"])
def test_a_token_that_may_not_write_is_refused_first(
    user: dict[str, Any], repo_id: str, message: str, settings: Any, online: local.Hub
) -> None:
    online.user = user
    settings = dataclasses.replace(settings, hub_repo_id=repo_id)
    if message:
        with pytest.raises(UserError) as raised:
            check_push(settings)
        assert str(raised.value).startswith(message)
    else:
        check_push(settings)
    assert online.writes() == []


def test_a_token_that_the_hub_does_not_know_is_refused_first(
    online: local.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UserError, match=r"--push_to_hub cannot work: the Hub does not accept your token \(401\)"):
        check_push(TrainingSettings())


@pytest.mark.parametrize(("tuning", "merge", "is_full"), [("qlora", False, False), ("lora", True, True),
                                                          ("full", False, True), ("full", True, True)])  # fmt: skip
def test_a_repository_with_the_other_kind_of_model_is_refused_before_training(
    tuning: str, merge: bool, is_full: bool, online: local.Hub
) -> None:
    settings = TrainingSettings(tuning=tuning, merge_adaptors=merge)
    online.add("models", "me/name", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, private=True)
    if is_full:
        with pytest.raises(UserError, match=r"me/name has an adapter\. Use another --hub_repo_id for a full model\."):
            check_push(settings)
    else:
        check_push(settings)
    online.add("models", "me/name", {"config.json": b"{}", "model.safetensors": b""}, private=True)
    if is_full:
        check_push(settings)
    else:
        with pytest.raises(UserError, match="me/name has a full model"):
            check_push(settings)
    assert online.writes() == []


def test_both_repositories_are_checked_before_a_merge(online: local.Hub, model: Path, tmp_path: Path) -> None:
    online.add("models", "me/name-adapter", {"model.safetensors": b""}, private=True)
    with pytest.raises(UserError, match="me/name-adapter has a full model"):
        push_before_merge(PushSettings(tmp_path, push="both"), model)
    online.add("models", "me/name-adapter", {}, private=False)
    with pytest.raises(UserError, match="me/name-adapter exists and is public"):
        push_before_merge(PushSettings(tmp_path, push="both"), model)
    with pytest.raises(SettingsError, match="is not a repository's name"):
        push_before_merge(PushSettings(tmp_path, push="both", hub_repo_id="me/" + "x" * 95), model)


def test_a_run_whose_files_have_changed_is_not_pushed(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(trained["adapter"], tmp_path / "dpo")
    (folder / "run.json").write_text(json.dumps({
        "step": "dpo", "status": "finished", "files": hash_model_files(folder), "base_model": "org/base",
        "settings": {}, "metrics": {},
    }))  # fmt: skip
    prepare_push(folder, "me/name")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 999}))
    with pytest.raises(UserError, match=r"has changed since its run finished: adapter_config\.json has changed"):
        prepare_push(folder, "me/name")


LICENSES = {
    "Apache 2.0": "apache-2.0", "apache2": "apache-2.0", "Apache License, Version 2.0": "apache-2.0",
    "Apache-2.0": "apache-2.0", "MIT License": "mit", "The MIT License": "mit", "GPLv3": "gpl-3.0",
    "GPL-3.0-or-later": "gpl-3.0", "LGPL v2.1": "lgpl-2.1", "CC BY-NC 4.0": "cc-by-nc-4.0", "CC0": "cc0-1.0",
    "BSD 3-Clause": "bsd-3-clause", "Llama 3.1 Community License Agreement": "llama3.1", "llama-2": "llama2",
    "The Unlicense": "unlicense", "Gemma Terms of Use": "gemma", "openrail++": "openrail++",
}  # fmt: skip


def test_a_license_is_called_what_the_hub_calls_it() -> None:
    assert {name: license_metadata(name)["license"] for name in LICENSES} == LICENSES
    for name, near in {"apache-3.0": "apache-2.0", "cc by": "cc-by-4.0", "proprietary": "", "mti": "mit"}.items():
        with pytest.raises(SettingsError, match=rf"is not a license that the Hub knows\. Use the nearest, {near}"):
            license_metadata(name)


def test_another_license_needs_its_name_and_link(online: local.Hub, trained: dict[str, Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    settings = PushSettings(tmp_path, license="apache-3.0")
    with pytest.raises(SettingsError, match=r"--license 'apache-3\.0' is not a license"):
        push_before_merge(settings, trained["adapter"])
    for name, link in (("", ""), ("my license", ""), ("", "https://x.org"), ("my license", "/home/me/LICENSE")):
        with pytest.raises(SettingsError, match="--license other needs --license_name and --license_link"):
            license_metadata("other", name, link)
    push_folder(trained["merged"], "me/a", True, "Other", "My License 1.0", "https://example.com/license")
    card = ModelCard(online.repos["models/me/a"]["files"]["README.md"].decode())
    assert card.data.license == "other"
    assert (card.data.license_name, card.data.license_link) == ("my-license-1.0", "https://example.com/license")


@pytest.mark.parametrize(("base", "expected"), [
    ({"license": "other", "license_name": "deepseek", "license_link": "LICENSE"},
     ("other", "deepseek", "https://huggingface.co/org/base")),
    ({"license": "other"}, ("other", "license-of-org-base", "https://huggingface.co/org/base")),
    ({"license": ["mit"]}, ("mit", None, None)),
    ({"license": "house rules"}, ("other", "house-rules", "https://huggingface.co/org/base")),
    ({}, (None, None, None)),
])  # fmt: skip
def test_the_license_of_the_base_is_passed_on(
    base: dict[str, Any], expected: tuple[str | None, ...], online: local.Hub, trained: dict[str, Path]
) -> None:
    from huggingface_hub import ModelCard

    online.repos["models/org/base"]["card"] = base
    data = ModelCard(prepare_push(trained["adapter"], "me/a")[1]).data
    assert (data.license, data.license_name, data.license_link) == expected


def test_the_cells_of_03_end_normally_after_the_push_of_an_adapter(
    online: local.Hub, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each cell by itself, as a kernel runs it: an error in one is an error for papermill."""
    flags = ["--adapter", str(trained["adapter"]), "--push_to_hub", "--push", "adapter", "--hub_repo_id", "me/only"]
    monkeypatch.setattr("sys.argv", ["03_merge_push.py", *flags, "--output_dir", str(tmp_path)])
    monkeypatch.setattr("helpers.settings.load.install_error_hook", lambda: None)
    names: dict[str, Any] = {"__name__": "03"}
    for cell in code_cells(REPO / "notebooks" / "03_merge_push.py"):
        exec(compile(cell.source, "cell", "exec", dont_inherit=True), names)
    assert "adapter_model.safetensors" in online.repos["models/me/only"]["files"]
    assert not list(tmp_path.glob("merge-*"))
    output = capsys.readouterr().out
    assert "Pushed: " in output
    assert "vllm serve" not in output


def test_02_merges_with_the_recipe_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(push.subprocess, "run", lambda words, **_: asked.append(words) or SimpleNamespace(returncode=0))
    (tmp_path / "dpo-x").mkdir()
    (tmp_path / "dpo-x" / "adapter_config.json").write_text("{}")
    values = {"merge_adaptors": True, "push_to_hub": False, "hub_repo_id": "", "trust_remote_code": False}
    for recipe in ("recipes/mine.yaml", ""):
        settings = SimpleNamespace(**values, output_dir=tmp_path, recipe=recipe)
        push.merge_and_push(Run(tmp_path / "dpo-x", {"step": "dpo"}), settings)
        assert ("--recipe=recipes/mine.yaml" in asked[-1]) == bool(recipe)
        assert not any(word.startswith(("--hub_repo_id", "--trust_remote_code")) for word in asked[-1])
