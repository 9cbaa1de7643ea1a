"""Small doubles that tests of several rooms share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

from helpers.settings import RunSettings, load_settings


@dataclasses.dataclass
class StepSettings(RunSettings):
    """A step's settings."""

    step: ClassVar[str] = "dpo"
    model_id: str = "org/m"  # model
    revision: str = ""  # branch
    sft_run: str = ""  # run
    trust_remote_code: bool = False  # its code
    chat_template: str = "auto"  # template
    lora_r: int = 8  # rank
    lora_alpha: int = 16  # scale
    lora_target_modules: str = "all-linear"  # layers
    tuning: str = "qlora"  # what is trained


def weights(text: str = "") -> str:
    """A safetensors file without a tensor, with a text that tells it from others; all of it is ASCII."""
    header = json.dumps({"__metadata__": {"text": text}}).ljust(64)
    return len(header).to_bytes(8, "little").decode() + header


def settings_of(folder: Path, *words: str) -> Any:
    return load_settings(StepSettings, {}, ["--output_dir", str(folder), *words])


def tiny_mistral(vocabulary: int = 64) -> Any:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()
