"""Adapter + base → merged weights, and how far the merged model is from the one that was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.chat import render
from helpers.rows import Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def last_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]
) -> list[torch.Tensor]:
    """For each conversation the float32 logits at every position, (tokens, vocabulary), one at a time: no padding."""
    import torch

    found = []
    for messages in conversations:
        text = render(tokenizer, messages, prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits[0].float().cpu())
    return found


def compare_logits(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """How far apart two models' next-token distributions are, over all positions of the same conversations.

    `max_abs` and `mean_abs` are differences of logits, `top1` is the share of positions with the same most likely
    token, `kl` the mean of KL(before ‖ after) in nats.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax

    a, b = torch.cat(before), torch.cat(after)
    kl = kl_div(log_softmax(b, -1), log_softmax(a, -1), reduction="batchmean", log_target=True)
    return {
        "max_abs": float((a - b).abs().max()),
        "mean_abs": float((a - b).abs().mean()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "kl": max(0.0, float(kl)),  # rounding can put a zero below zero
    }


def comparison_table(rows: dict[str, dict[str, float]]) -> Any:
    """A rich table of `compare_logits` results by name."""
    from rich.table import Table

    table = Table("logits of", "largest difference", "mean", "same top token", "KL", box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row(name, f"{row['max_abs']:.2e}", f"{row['mean_abs']:.2e}", f"{row['top1']:.2%}", f"{row['kl']:.2e}")
    return table
