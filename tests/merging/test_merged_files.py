"""Merged files are complete or absent, and an interrupted merge continues with the missing ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.core import SettingsError, UserError
from helpers.merging.merge import (
    adapter_as_run,
    find_adapter,
)
from helpers.merging.weights import (
    StreamingMerger,
)
from tests.merging.models import LORA, build, our_merge, save, tensors


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("after", range(0, 20, 4))
def test_an_interrupted_merge_continues_with_the_missing_files(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    whole = tensors(our_merge(base, adapter))
    (tmp_path / "merged").rename(tmp_path / "before")
    tensor, calls = StreamingMerger.tensor, []

    def stop(self: StreamingMerger, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) > after:
            raise Stopped
        return tensor(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(StreamingMerger, "tensor", stop)
        with pytest.raises(Stopped):
            our_merge(base, adapter)
    there = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "merged").glob("*.safetensors")}
    assert (len(there) > 0) == (after > 0)
    folder = our_merge(base, adapter)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there
    assert not list(folder.glob("*.part"))
    again = tensors(folder)
    assert set(again) == set(whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert (folder / "model.safetensors.index.json").read_text() == (
        tmp_path / "before" / "model.safetensors.index.json"
    ).read_text()


def test_the_files_of_another_merge_are_not_used(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    before = tensors(our_merge(base, adapter))
    weights = {n: w + 1 for n, w in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    after = tensors(our_merge(base, adapter))
    assert [name for name in before if "proj" in name and torch.equal(before[name], after[name])] == []
    half = our_merge(base, adapter, dtype=torch.float16)
    assert {weight.dtype for weight in tensors(half).values()} == {torch.float16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 50_000}))
    with pytest.raises(UserError, match=r"The disk lacks 1\.\d\d MB for the merged weights\. Free some space"):
        our_merge(base, adapter)
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_a_size_of_files_that_cannot_be_read_is_refused() -> None:
    for text in ("big", "7", "2 potatoes"):
        settings = SimpleNamespace(max_shard_size=text)
        message = f"--max_shard_size '{text}' is not a size. Use a size such as 2GB or 500MB."
        with pytest.raises(SettingsError, match=re.escape(message)):
            find_adapter(settings)


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    folder = our_merge(base, adapter, largest=10_000)
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    large = [tensors for tensors in files.values() if sum(weight.nbytes for weight in tensors.values()) > 10_000]
    assert large
    assert all(len(tensors) == 1 for tensors in large)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(w.nbytes for tensors in files.values() for w in tensors.values())
    single = our_merge(base, adapter, largest=10**6)
    assert [file.name for file in single.glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(single / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_another_adapter_in_the_same_place_is_another_start(tmp_path: Path) -> None:
    _, adapter = save(tmp_path, build(), LORA)
    first = adapter_as_run(adapter).record["fingerprint"]
    assert adapter_as_run(adapter).record["fingerprint"] == first
    weights = {n: w + 1 for n, w in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    assert adapter_as_run(adapter).record["fingerprint"] != first
