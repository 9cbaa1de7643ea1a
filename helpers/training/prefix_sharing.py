"""A batch of preference pairs as one row in which each shared prompt stands once: pure arithmetic on tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class PackingPlan:
    """Where everything is in a packed row: first all [prefix, chosen], pair by pair, then all rejected tails.

    `lengths` has (prefix, chosen, rejected) of each pair, in tokens; `gather` the position to score each label from.
    It travels through the model as a forward keyword, so that checkpointed layers find it again. (No dataclass: FSDP
    would copy one at every layer.)
    """

    def __init__(self, lengths: list[tuple[int, int, int]], gather: torch.Tensor) -> None:
        self.lengths, self.gather = lengths, gather
        self.masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self.varlen: VarlenLayout | None = None

    @property
    def first(self) -> int:
        """Tokens of all [prefix, chosen], which is where the rejected tails begin."""
        return sum(prefix + chosen for prefix, chosen, _ in self.lengths)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each [prefix, chosen], and then of each rejected tail that there is."""
        return [prefix + chosen for prefix, chosen, _ in self.lengths] + [r for *_, r in self.lengths if r]

    def tails(self) -> Iterator[tuple[int, int]]:
        """Of each rejected tail that there is: its pair, and how many tokens of that pair's row it sees."""
        for row, (prefix, _, rejected) in enumerate(self.lengths):
            if rejected:
                yield row, prefix

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """What the last `queries` of `keys` tokens see, (1, 1, queries, keys); None where that is plainly causal."""
        window = window if window is not None and window < keys else None
        if queries == keys and window is None:
            return None
        if (queries, keys, window, device) not in self.masks:
            i = torch.arange(keys - queries, keys, device=device)[:, None]
            j = torch.arange(keys, device=device)
            seen = j <= i if window is None else (j <= i) & (j > i - window)
            self.masks[queries, keys, window, device] = seen[None, None]
        return self.masks[queries, keys, window, device]


@dataclasses.dataclass(frozen=True)
class VarlenLayout:
    """What two varlen calls need: borders (cu_seqlens, int32) and longest lengths, for [prefix, chosen] and for the
    rejected tails, whose keys are `keys` of the packed row: their own prefix, and then themselves."""

    chosen: torch.Tensor
    longest_chosen: int
    rejected: torch.Tensor
    longest_rejected: int
    rejected_keys: torch.Tensor
    longest_keys: int
    keys: torch.Tensor

    @classmethod
    def of(cls, plan: PackingPlan, device: torch.device) -> VarlenLayout:
        """Pairs without a rejected tail have no sequence in the second call: an empty one has no row to compute."""
        pairs = len(plan.lengths)
        starts, tails = _borders(plan.sizes[:pairs]), _borders(plan.sizes[pairs:])
        keys, both = [], []
        for (row, seen), start, end in zip(plan.tails(), tails, tails[1:], strict=False):
            own = torch.arange(plan.first + start, plan.first + end)
            keys.append(torch.cat([torch.arange(starts[row], starts[row] + seen), own]))
            both.append(len(keys[-1]))
        return cls(
            chosen=torch.tensor(starts, dtype=torch.int32, device=device),
            longest_chosen=max(plan.sizes[:pairs]),
            rejected=torch.tensor(tails, dtype=torch.int32, device=device),
            longest_rejected=max(plan.sizes[pairs:], default=0),
            rejected_keys=torch.tensor(_borders(both), dtype=torch.int32, device=device),
            longest_keys=max(both, default=0),
            keys=torch.cat(keys).to(device) if keys else torch.empty(0, dtype=torch.long, device=device),
        )


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A packed batch: ids and positions (1, N); `labels` (1, S) of the S scored positions; where these stand in the
    padded batch, `scored` (2B, L - 1); and the plan."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor
    plan: PackingPlan


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> PackedBatch:
    """Pack a batch of TRL's collator: (2B, L), chosen rows and then rejected ones, padded on the right.

    What a pair's two rows share is their longest common prefix, which may reach into the answers. Positions of a
    rejected tail go on from the end of its prefix. A label is scored from the token before it, and the last token of a
    prefix from its one place for both rows.
    """
    rows, length = input_ids.shape
    pairs = rows // 2
    real, position = attention_mask.bool(), torch.arange(length, device=input_ids.device)
    same = (input_ids[:pairs] == input_ids[pairs:]) & real[:pairs] & real[pairs:]
    prefix = same.long().cumprod(1).sum(1)
    shared = position < prefix[:, None]
    kept = torch.cat([real[:pairs], real[pairs:] & ~shared])  # row-major: all [prefix, chosen], then all tails
    place = (kept.flatten().cumsum(0) - 1).view(rows, length)
    place = torch.cat([place[:pairs], torch.where(shared, place[:pairs], place[pairs:])])
    tails = real.sum(1) - prefix.repeat(2)
    lengths = torch.stack([prefix, tails[:pairs], tails[pairs:]], 1).tolist()  # waits for the device
    scored = labels[:, 1:] != -100
    return PackedBatch(
        input_ids=input_ids[kept][None],
        position_ids=position.expand(rows, length)[kept][None],
        labels=labels[:, 1:][scored][None],
        scored=scored,
        plan=PackingPlan([(p, c, r) for p, c, r in lengths], place[:, :-1][scored]),
    )


def _borders(lengths: list[int]) -> list[int]:
    """0 and the running sums."""
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    return borders


NO_PATH = ("s_aux", "position_bias", "cache")  # of attention, which a packed row has no place for
Attention = Callable[..., tuple[torch.Tensor, None]]


def register_attention(name: str) -> None:
    """From here on attention of this name computes packed rows too; without a plan it is what it was."""
    attention: Any = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(attention, "computes_plans"):
        attend: Any = packed_attention(attention, sdpa_packed if name == "sdpa" else flash_packed)
        attend.computes_plans = True
        AttentionInterface.register(name, attend)


def packed_attention(attention: Attention, packed: Callable[..., torch.Tensor]) -> Attention:
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


def sdpa_packed(one: Callable[..., torch.Tensor], plan: PackingPlan, q: Any, k: Any, v: Any, more: Any) -> torch.Tensor:
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


def flash_packed(
    one: Callable[..., torch.Tensor], plan: PackingPlan, q: Any, k: Any, v: Any, more: Any
) -> torch.Tensor:
    """Two calls for the whole batch. Flash-attention's causal mask is aligned at the lower right, so a tail's first
    query sees all of its prefix."""
    more.pop("position_ids", None)  # the borders of sequences are given
    plan.varlen = where = plan.varlen or VarlenLayout.of(plan, q.device)
    chosen, tails = q.split([plan.first, q.shape[2] - plan.first], 2)
    borders: dict[str, Any] = {"cu_seq_lens_q": where.chosen, "cu_seq_lens_k": where.chosen}
    borders |= {"max_length_q": where.longest_chosen, "max_length_k": where.longest_chosen}
    parts = [one(chosen, k[:, :, : plan.first], v[:, :, : plan.first], **borders)]
    if where.longest_rejected:
        borders = {"cu_seq_lens_q": where.rejected, "cu_seq_lens_k": where.rejected_keys}
        borders |= {"max_length_q": where.longest_rejected, "max_length_k": where.longest_keys}
        parts.append(one(tails, *(x.index_select(2, where.keys) for x in (k, v)), **borders))
    return torch.cat(parts, 1)
