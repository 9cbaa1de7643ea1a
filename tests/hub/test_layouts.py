"""A second push into a repository: loaders get the model that was pushed last, and what others put there stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.core import UserError
from helpers.hub.push import push_folder
from tests import fake_hub as local

BY_HAND = {
    "LICENSE": b"my license",
    "notes.md": b"mine",
    "images/curve.png": b"png",
    "onnx/model.safetensors": b"another folder",
    "model-Q4.gguf": b"gguf",
    ".gitattributes": b"*.safetensors filter=lfs",
    "eval.json": b"{}",
}


def write_model(folder: Path, base: Path, tokenizer: Any, shard_size: str) -> Path:
    """A model with weights of its own, in files of `shard_size`, and a tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.25)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def load(repo_id: str, cache: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(repo_id, cache_dir=cache, token=local.TOKEN)


def is_same(model: Any, folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    there, here = model.state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)


LAYOUTS = [("150KB", "1GB"), ("1GB", "150KB"), ("150KB", "300KB"), ("300KB", "150KB")]


@pytest.mark.parametrize(("before", "after"), LAYOUTS, ids=lambda size: size)
def test_another_layout_replaces_the_weights_in_the_same_commit(
    before: str, after: str, online: local.Hub, trained: dict[str, Path], tokenizer: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    old, new = tmp_path / "old", tmp_path / "new"
    AutoModelForCausalLM.from_pretrained(trained["base"]).save_pretrained(old, max_shard_size=before)
    tokenizer.save_pretrained(old)
    push_folder(old, "me/name", private=True)
    repo = online.repos["models/me/name"]
    repo["files"] |= BY_HAND
    online.requests.clear()
    push_folder(write_model(new, trained["base"], tokenizer, after), "me/name", private=True)
    assert sum("/commit/" in request for request in online.requests) == 1
    weights = {name for name in repo["files"] if "safetensors" in name and "/" not in name}
    assert weights == {file.name for file in new.glob("*safetensors*")}
    assert {name: repo["files"][name] for name in BY_HAND} == BY_HAND
    assert is_same(load("me/name", tmp_path / "cache"), new)
    output = capsys.readouterr().out
    assert [name for name in {file.name for file in old.glob("*safetensors*")} - weights if name not in output] == []


def test_files_of_other_formats_and_of_another_tokenizer_are_replaced(
    online: local.Hub, trained: dict[str, Path], tmp_path: Path
) -> None:
    stale = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
             "model.fp16.safetensors", "flax_model.msgpack", "consolidated.00.pth", "tokenizer.model", "vocab.json",
             "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_templates/tool_use.jinja",
             "preprocessor_config.json", "model.safetensors")  # fmt: skip
    online.add("models", "me/name", dict.fromkeys(stale, b"{}") | BY_HAND, private=True)
    (trained["merged"] / "chat_template.jinja").unlink()
    online.repos["models/me/name"]["files"]["chat_template.jinja"] = b"old"
    push_folder(trained["merged"], "me/name", private=True)
    files = online.repos["models/me/name"]["files"]
    assert not {*stale, "chat_template.jinja"} & files.keys()
    assert {name: files[name] for name in BY_HAND} == BY_HAND
    assert is_same(load("me/name", tmp_path / "cache"), trained["merged"])


def test_an_adapter_and_a_full_model_are_kept_apart(
    online: local.Hub, trained: dict[str, Path], tmp_path: Path
) -> None:
    for first, second, message in (
        ("merged", "adapter", "me/merged has a full model. Use another --hub_repo_id for an adapter."),
        ("adapter", "merged", "me/adapter has an adapter. Use another --hub_repo_id for a full model."),
    ):
        push_folder(trained[first], f"me/{first}", private=True)
        before = dict(online.repos[f"models/me/{first}"]["files"])
        with pytest.raises(UserError) as raised:
            push_folder(trained[second], f"me/{first}", private=True, revision="beta")
        assert str(raised.value) == message
        assert online.repos[f"models/me/{first}"]["files"] == before
        assert "branches" not in online.repos[f"models/me/{first}"]
    assert is_same(load("me/merged", tmp_path / "cache"), trained["merged"])


def test_an_adapter_replaces_an_adapter(online: local.Hub, trained: dict[str, Path], tmp_path: Path) -> None:
    online.add("models", "me/name", {"adapter_config.json": b"{}", "adapter_model.bin": b"old"}, private=True)
    push_folder(trained["adapter"], "me/name", private=True)
    files = online.repos["models/me/name"]["files"]
    assert "adapter_model.bin" not in files
    assert files["adapter_model.safetensors"] == (trained["adapter"] / "adapter_model.safetensors").read_bytes()


def test_a_branch_is_compared_with_its_own_files(
    online: local.Hub, trained: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    push_folder(trained["merged"], "me/name", private=True)
    before = dict(online.repos["models/me/name"]["files"])
    new = write_model(tmp_path / "new", trained["base"], tokenizer, "1GB")
    for _ in range(2):  # the branch is new, and then it is there
        push_folder(new, "me/name", private=True, revision="beta")
        branch = online.repos["models/me/name"]["branches"]["beta"]
        assert [name for name in branch if "safetensors" in name] == ["model.safetensors"]
    assert online.repos["models/me/name"]["files"] == before


def test_an_interrupted_push_deletes_nothing(online: local.Hub, trained: dict[str, Path], tmp_path: Path) -> None:
    online.add("models", "me/name", {"model.safetensors": b"old"}, private=True)
    online.fail["/commit/"] = (403, {})
    with pytest.raises(UserError, match="pushing to me/name failed"):
        push_folder(trained["merged"], "me/name", private=True)
    assert online.repos["models/me/name"]["files"] == {"model.safetensors": b"old"}


@pytest.mark.parametrize("name", ["my run", "a--b", "a..b", "größe", "x" * 120, ".hidden-"])
def test_a_folder_with_any_name_can_be_pushed_without_a_name(
    name: str, online: local.Hub, trained: dict[str, Path], tmp_path: Path
) -> None:
    from huggingface_hub.utils import validate_repo_id

    shutil.copytree(trained["adapter"], tmp_path / "runs" / name)
    push_folder(tmp_path / "runs" / name, "", private=True)
    (repo_id,) = (key.removeprefix("models/") for key in online.repos if key.startswith("models/me/"))
    validate_repo_id(repo_id)
    assert len(repo_id) <= 96
