"""A local Hub that the client of this process talks to, and models to push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fake_hub as local


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
    write_merged(tmp_path / "merged", merge, 150_000)
    merge.config.save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("base", "adapter", "merged")}
