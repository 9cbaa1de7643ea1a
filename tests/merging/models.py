"""Tiny models with adapters, merged by PEFT and by us."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.merging.weights import (
    StreamingMerger,
    WeightFiles,
    write_merged,
)

VOCABULARY = 128


LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}


def build(kind: str = "mistral", tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else shape
    if kind in ("mistral", "llama", "qwen2"):
        shape["num_key_value_heads"] = 2
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=0.2, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def save(folder: Path, model: Any, given: dict[str, Any], shards: str = "20KB") -> tuple[Path, Path]:
    """A base in several files, and an adapter whose every weight has moved."""
    model.save_pretrained(folder / "base", max_shard_size=shards)
    policy = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **given))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += (0.1 * torch.randn(weight.shape, generator=draw)).to(weight.dtype)
    policy.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "base", folder / "adapter"


def peft_merge(base: Path, adapter: Path) -> tuple[dict[str, torch.Tensor], Any]:
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    merged = merged.merge_and_unload()
    merged.save_pretrained(base.parent / "by-peft")
    return load_file(base.parent / "by-peft" / "model.safetensors"), merged


def our_merge(base: Path, adapter: Path, largest: int = 20_000, dtype: torch.dtype | None = None) -> Path:
    folder = base.parent / "merged"
    merge = StreamingMerger(base, adapter)
    write_merged(folder, merge, largest, dtype)
    merge.config.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(folder)
    return {name: files[name] for name in files}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return found
