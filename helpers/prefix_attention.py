"""Attention over a packed row of preference pairs, for SDPA and for flash-attention.

Read in transformers 5.23 (integrations/sdpa_attention.py, integrations/flash_attention.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.prefix_packing import Plan, Varlen

NO_PATH = ("s_aux", "position_bias", "cache")  # of attention, which a packed row has no place for
Attention = Callable[..., tuple[torch.Tensor, None]]


def take_over(name: str) -> None:
    """From here on attention of this name computes packed rows too; without a plan it is what it was."""
    attention: Any = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(attention, "computes_plans"):
        attend: Any = with_plan(attention, by_branches if name == "sdpa" else by_varlen)
        attend.computes_plans = True
        AttentionInterface.register(name, attend)


def with_plan(attention: Attention, packed: Callable[..., torch.Tensor]) -> Attention:
    """`attention`, and `packed` in its place where a plan comes with query, key and value, (1, heads, N, size)."""

    @functools.wraps(attention)
    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *words: Any, **more: Any) -> Any:
        plan = more.pop("plan", None)
        if plan is None:
            return attention(module, query, key, value, attention_mask, *words, **more)
        for name in NO_PATH:
            if more.pop(name, None) is not None:
                raise NotImplementedError(f"attention with {name}")

        def one(q: Any, k: Any, v: Any, mask: Any = None, **borders: Any) -> torch.Tensor:
            return attention(module, q, k, v, mask, *words, **more, **borders)[0]

        return packed(one, plan, query, key, value, more), None

    return attend


def by_branches(one: Callable[..., torch.Tensor], plan: Plan, q: Any, k: Any, v: Any, more: Any) -> torch.Tensor:
    """Two calls a pair: [prefix, chosen], and the rejected tail over its prefix and itself.

    (split, for its backward writes each gradient once; a slice's would fill a whole row with zeros first.)
    """
    window, sizes = more.pop("sliding_window", None), plan.sizes
    queries, keys, values = (x.split(sizes, 2) for x in (q, k, v))
    pairs = len(plan.lengths)
    parts = []
    for row in range(pairs):
        mask = plan.mask(sizes[row], sizes[row], window, q.device)
        parts.append(one(queries[row], keys[row], values[row], mask))
    for tail, (row, seen) in enumerate(plan.tails(), pairs):
        own, there = (torch.cat([x[row][:, :, :seen], x[tail]], 2) for x in (keys, values))
        if window is None and 3 * seen <= sizes[tail]:
            # Plainly causal, for the prefix once more, is cheaper than a mask over all that the tail sees.
            whole = torch.cat([queries[row][:, :, :seen], queries[tail]], 2)
            parts.append(one(whole, own, there)[:, seen:])
        else:
            mask = plan.mask(sizes[tail], own.shape[2], window, q.device)
            parts.append(one(queries[tail], own, there, mask))
    return torch.cat(parts, 1)


def by_varlen(one: Callable[..., torch.Tensor], plan: Plan, q: Any, k: Any, v: Any, more: Any) -> torch.Tensor:
    """Two calls for the whole batch. Flash-attention's causal mask is aligned at the lower right, so a tail's first
    query sees all of its prefix."""
    more.pop("position_ids", None)  # the borders of sequences are given
    plan.varlen = where = plan.varlen or Varlen.of(plan, q.device)
    chosen, tails = q.split([plan.first, q.shape[2] - plan.first], 2)
    borders: dict[str, Any] = {"cu_seq_lens_q": where.chosen, "cu_seq_lens_k": where.chosen}
    borders |= {"max_length_q": where.longest_chosen, "max_length_k": where.longest_chosen}
    parts = [one(chosen, k[:, :, : plan.first], v[:, :, : plan.first], **borders)]
    if where.longest_rejected:
        borders = {"cu_seq_lens_q": where.rejected, "cu_seq_lens_k": where.rejected_keys}
        borders |= {"max_length_q": where.longest_rejected, "max_length_k": where.longest_keys}
        parts.append(one(tails, *(x.index_select(2, where.keys) for x in (k, v)), **borders))
    return torch.cat(parts, 1)
