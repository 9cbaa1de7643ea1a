"""What a decoder is made of, from its config.json alone: no weights and, for the usual families, no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# Families whose layers are q, k, v, o and a gated MLP → whether q, k, v and o have a bias where nothing is said.
GATED = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, False),
    "gemma": (False, False),
}


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer by its full name, as PEFT sees it."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Every linear layer but the LM head, and the number of parameters that are in none: embeddings, head, norms."""

    layers: int
    hidden: int
    query: int  # width of all attention heads together
    key_value: int  # width of the key heads, and of the value heads
    inner: int  # width of the MLP
    gated: bool
    vocabulary: int
    tied: bool  # embeddings and head are one
    positions: int  # the longest text that it was made for
    linears: tuple[Linear, ...]
    norms: int  # parameters of norms, and whatever else is in no linear layer and no embedding

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.embeddings + self.norms + biases + sum(linear.weights for linear in self.linears)

    def targets(self, lora_target_modules: str) -> list[Linear]:
        """The layers that PEFT gives an adapter: all of them, or those whose whole name a regular expression is."""
        if lora_target_modules == "all-linear":
            return list(self.linears)
        return [linear for linear in self.linears if re.fullmatch(lora_target_modules, linear.name)]


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json. An unusual one is built without memory for its weights, which takes seconds.

    Raises KeyError or ValueError where transformers does not know its type, or not how to build it.
    """
    try:
        if config["model_type"] in GATED:
            return _gated(config)
        if config["model_type"] == "gpt_neox":
            return _gpt_neox(config)
    except KeyError:  # transformers knows what such a one has where nothing is said
        pass
    return _built(config)


def _gated(c: Mapping[str, Any]) -> Decoder:
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    size = c.get("head_dim") or hidden // heads
    query, key_value = heads * size, (c.get("num_key_value_heads") or heads) * size
    bias, output_bias = GATED[c["model_type"]]
    if "attention_bias" in c and c["model_type"] != "qwen2":
        bias = output_bias = bool(c["attention_bias"])
    mlp_bias = bool(c.get("mlp_bias", False))
    linears = []
    for i in range(c["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        linears += [
            Linear(f"{attention}.q_proj", hidden, query, bias),
            Linear(f"{attention}.k_proj", hidden, key_value, bias),
            Linear(f"{attention}.v_proj", hidden, key_value, bias),
            Linear(f"{attention}.o_proj", query, hidden, output_bias),
            Linear(f"{mlp}.gate_proj", hidden, inner, mlp_bias),
            Linear(f"{mlp}.up_proj", hidden, inner, mlp_bias),
            Linear(f"{mlp}.down_proj", inner, hidden, mlp_bias),
        ]
    norms = c["num_hidden_layers"] * (2 * hidden + (2 * size if c["model_type"] == "qwen3" else 0)) + hidden
    tied = bool(c.get("tie_word_embeddings", c["model_type"] == "gemma"))
    return Decoder(
        c["num_hidden_layers"], hidden, query, key_value, inner, True, c["vocab_size"], tied,
        c.get("max_position_embeddings", 0), tuple(linears), norms,
    )  # fmt: skip


def _gpt_neox(c: Mapping[str, Any]) -> Decoder:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    bias = bool(c.get("attention_bias", True))
    linears = []
    for i in range(c["num_hidden_layers"]):
        attention, mlp = f"gpt_neox.layers.{i}.attention", f"gpt_neox.layers.{i}.mlp"
        linears += [
            Linear(f"{attention}.query_key_value", hidden, 3 * hidden, bias),
            Linear(f"{attention}.dense", hidden, hidden, bias),
            Linear(f"{mlp}.dense_h_to_4h", hidden, inner, True),
            Linear(f"{mlp}.dense_4h_to_h", inner, hidden, True),
        ]
    norms = c["num_hidden_layers"] * 4 * hidden + 2 * hidden
    return Decoder(
        c["num_hidden_layers"], hidden, hidden, hidden, inner, False, c["vocab_size"],
        bool(c.get("tie_word_embeddings", False)), c.get("max_position_embeddings", 0), tuple(linears), norms,
    )  # fmt: skip


def _built(c: Mapping[str, Any]) -> Decoder:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.for_model(**c)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text, head = config.get_text_config(), model.get_output_embeddings()
    tables = [model.get_input_embeddings(), head]
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            inputs, outputs = (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)
            linears.append(Linear(name, inputs, outputs, module.bias is not None))
    tied = bool(text.tie_word_embeddings)
    in_linears = sum(n.weights + n.outputs * n.bias for n in linears)
    embeddings = sum(t.weight.numel() for t in tables[: 1 if tied else 2])
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    inner = max((linear.outputs for linear in linears), default=text.hidden_size)
    return Decoder(
        text.num_hidden_layers, text.hidden_size, heads * size, groups * size,
        inner, any("gate" in linear.name for linear in linears), tables[0].weight.shape[0], tied,
        getattr(text, "max_position_embeddings", 0), tuple(linears),
        sum(p.numel() for p in model.parameters()) - in_linears - embeddings,
    )  # fmt: skip
