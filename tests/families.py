"""A tiny random model of each family that people align, with the layers that set the family apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
VISION = {
    "gemma3": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
               "image_size": 32, "patch_size": 8},
    "qwen3_5": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64},
}  # fmt: skip
TEXT = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}
# Family → model_type, whether the embeddings are tied, and what differs from SHAPE.
FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "Llama 3.1": ("llama", False, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}}),
    "Llama 3.2 (tied)": ("llama", True, {}),
    "SmolLM2": ("llama", True, {"num_key_value_heads": 4}),
    "SmolLM3": ("smollm3", True, {"no_rope_layers": [1, 0]}),
    "Mistral": ("mistral", False, {"sliding_window": None}),
    "Mistral 0.1 (sliding)": ("mistral", False, {"sliding_window": 8}),
    "Ministral": ("ministral", False, SLIDING),
    "Ministral 3 (text)": ("ministral3", False, {}),
    "Mixtral": ("mixtral", False, MOE),
    "Qwen2.5": ("qwen2", False, {}),
    "Qwen3 4B (tied)": ("qwen3", True, {}),
    "Qwen3 8B (untied)": ("qwen3", False, {}),
    "Qwen3 MoE": ("qwen3_moe", False, MOE),
    "Qwen3.5 (linear attention)": ("qwen3_5_text", True, LINEAR),
    "Qwen3.5 with vision": ("qwen3_5", True, LINEAR),
    "Gemma 2": ("gemma2", True, SLIDING | {"query_pre_attn_scalar": 16}),
    "Gemma 3 1B": ("gemma3_text", True, SLIDING | {"query_pre_attn_scalar": 16}),
    "Gemma 3 4B with vision": ("gemma3", True, SLIDING | {"query_pre_attn_scalar": 16}),
    "Phi-3 and 4": ("phi3", False, {}),
    "OLMo 2": ("olmo2", False, {}),
    "OLMo 3": ("olmo3", False, SLIDING),
    "GPT-NeoX (Pythia)": ("gpt_neox", False, {}),
}  # fmt: skip


def write_family(folder: Path, family: str, tokenizer: Any) -> Path:
    """Write a model of the family with the tokenizer's vocabulary into a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, tied, more = FAMILIES[family]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = SHAPE | more | ids | {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    torch.manual_seed(0)
    if kind in TEXT:
        text = AutoConfig.for_model(TEXT[kind], **shape).to_dict()
        image = {"mm_tokens_per_image": 4} if kind == "gemma3" else {}
        given = {"text_config": text, "vision_config": VISION[kind], "tie_word_embeddings": tied, **image}
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **given))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_row(first: str, *cells: str) -> None:
    """Compare a row of a table in docs/models.md; with DOCS_TABLE=1, write it first."""
    page = Path(__file__).resolve().parents[1] / "docs" / "models.md"
    lines, row = page.read_text().splitlines(), f"| {' | '.join([first, *cells])} |"
    (place,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    if os.environ.get("DOCS_TABLE"):
        lines[place] = row
        page.write_text("\n".join(lines) + "\n")
    assert lines[place] == row
