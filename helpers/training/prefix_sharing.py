"""A batch of preference pairs as one packed row that contains each shared prefix once, and attention for such rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")  # of a model's outputs
Attention = Callable[..., tuple[torch.Tensor, None]]


class PackingPlan:
    """The layout of a packed row: first all [prefix, chosen], pair by pair, then all rejected tails.

    `lengths` has (prefix, chosen, rejected) of each pair, in tokens. `gather` has the position that scores each label.
    The model's forward takes the plan as a keyword. It is no dataclass: FSDP copies dataclasses at every layer.
    """

    def __init__(self, lengths: list[tuple[int, int, int]], gather: torch.Tensor) -> None:
        self.lengths, self.gather = lengths, gather
        self._masks: dict[tuple[int, int, int], torch.Tensor] = {}

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Tokens of each [prefix, chosen], then of each rejected tail that is not empty."""
        return [prefix + chosen for prefix, chosen, _ in self.lengths] + [r for *_, r in self.lengths if r]

    def tails(self) -> Iterator[tuple[int, int]]:
        """For each rejected tail that is not empty: its pair, and how many tokens of that pair's row it sees."""
        for pair, (prefix, _, rejected) in enumerate(self.lengths):
            if rejected:
                yield pair, prefix

    def mask(self, queries: int, keys: int, window: int | None) -> torch.Tensor | None:
        """The mask of the last `queries` of `keys` tokens, (1, 1, queries, keys); None where it is plainly causal."""
        window = min(window or keys, keys)
        if queries == keys == window:
            return None
        if (queries, keys, window) not in self._masks:
            device = self.gather.device
            i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
            self._masks[queries, keys, window] = ((j <= i) & (j > i - window))[None, None]
        return self._masks[queries, keys, window]

    @functools.cached_property
    def varlen(self) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor | None]:
        """Arguments of two varlen calls, for [prefix, chosen] and for tails, and where the keys of the second one are.

        These are each tail's prefix, then the tail. Without tails, the last two are empty and None.
        """
        chosen, tails = self.sizes[: len(self.lengths)], self.sizes[len(self.lengths) :]
        starts, device = list(itertools.accumulate(self.sizes, initial=0)), self.gather.device
        keys = [
            torch.cat([torch.arange(starts[pair], starts[pair] + seen), torch.arange(start, start + tail)])
            for (pair, seen), start, tail in zip(self.tails(), starts[len(chosen) :], tails, strict=False)
        ]
        second = _varlen_args(tails, [len(each) for each in keys], device) if tails else {}
        return _varlen_args(chosen, chosen, device), second, torch.cat(keys).to(device) if tails else None


def _varlen_args(queries: list[int], keys: list[int], device: torch.device) -> dict[str, Any]:
    """The borders and largest lengths of sequences, as transformers names them for flash-attention, in the order in
    which PyTorch's `varlen_attn` takes them."""
    q, k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (queries, keys))
    return {"cu_seq_lens_q": q, "cu_seq_lens_k": k, "max_length_q": max(queries), "max_length_k": max(keys)}


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Token and position ids (1, N), `labels` of the S scored positions (1, S), the mask of these positions in the
    padded batch, `scored` (2B, L - 1), and the plan."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor
    plan: PackingPlan


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> PackedBatch:
    """Pack a batch of TRL's collator, (2B, L): chosen rows, then rejected rows, padded on the right.

    A pair shares the longest common prefix of its rows, which may reach into the answers. Each label is scored from the
    token before it; the last token of a prefix scores the first label of both rows.
    """
    rows, length = input_ids.shape
    pairs = rows // 2
    real, position = attention_mask.bool(), torch.arange(length, device=input_ids.device)
    same = (input_ids[:pairs] == input_ids[pairs:]) & real[:pairs] & real[pairs:]
    prefix = same.long().cumprod(1).sum(1)
    shared = position < prefix[:, None]
    packed = torch.cat([real[:pairs], real[pairs:] & ~shared])  # row-major: all [prefix, chosen], then all tails
    place = (packed.flatten().cumsum(0) - 1).view(rows, length)
    place = torch.cat([place[:pairs], torch.where(shared, place[:pairs], place[pairs:])])
    tails = real.sum(1) - prefix.repeat(2)
    lengths = torch.stack([prefix, tails[:pairs], tails[pairs:]], 1).tolist()  # waits for the device
    scored = labels[:, 1:] != -100
    return PackedBatch(
        input_ids=input_ids[packed][None],
        position_ids=position.expand(rows, length)[packed][None],
        labels=labels[:, 1:][scored][None],
        scored=scored,
        plan=PackingPlan([(p, c, r) for p, c, r in lengths], place[:, :-1][scored]),
    )


def register_attention(name: str) -> None:
    """Make attention of this name compute packed rows too; without a plan it is unchanged."""
    attention: Any = ALL_ATTENTION_FUNCTIONS.get(name, eager_attention)
    if not hasattr(attention, "supports_plans"):
        attend: Any = packed_attention(attention, PACKED.get(name, flash_packed))
        attend.supports_plans = True
        AttentionInterface.register(name, attend)


def eager_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the module's model, which transformers keeps in the model's file, not by name."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", eager_attention_forward)
    return own(module, *args, **kwargs)


def packed_attention(attention: Attention, packed: Callable[..., torch.Tensor]) -> Attention:
    """`attention`, but `packed` for calls with a plan, whose query, key and value are (1, heads, N, size)."""

    @functools.wraps(attention)
    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        plan = kwargs.pop("plan", None)
        if plan is None:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)

        def one(q: Any, k: Any, v: Any, mask: Any = None, **borders: Any) -> torch.Tensor:
            return attention(module, q, k, v, mask, *args, **kwargs, **borders)[0]

        return packed(one, plan, query, key, value, kwargs), None

    return attend


def torch_packed(one: Callable[..., torch.Tensor], plan: PackingPlan, q: Any, k: Any, v: Any, kwargs: Any) -> Any:
    """PyTorch's own attention: two calls of its flash kernel where there is one, or SDPA."""
    dtype = varlen_dtype(q, v)
    if dtype is None or kwargs.get("dropout"):
        return sdpa_packed(one, plan, q, k, v, kwargs)
    window = kwargs.get("sliding_window")
    options: Any = {"scale": kwargs.get("scaling"), "window_size": (-1 if window is None else window - 1, 0)}
    options["enable_gqa"] = q.shape[1] != k.shape[1]

    def call(*tensors: torch.Tensor, **borders: Any) -> torch.Tensor:
        """Attention of tensors of (1, heads, tokens, size)."""
        rows: list[Any] = [x[0].transpose(0, 1).to(dtype) for x in tensors]
        return cast(torch.Tensor, varlen_attn(*rows, *borders.values(), **options))[None]

    return flash_packed(call, plan, q, k, v, kwargs)


def varlen_dtype(query: torch.Tensor, value: torch.Tensor) -> torch.dtype | None:
    """The dtype in which PyTorch's flash kernel for sequences of any length computes; None where it cannot.

    It needs a GPU of compute capability 8, half precision, and heads of at most 256. Under autocast, queries and keys
    may be in float32.
    """
    kind = query.device.type
    if kind != "cuda" or torch.version.hip or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    is_possible = dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1] <= 256
    return dtype if is_possible else None


def sdpa_packed(one: Callable[..., torch.Tensor], plan: PackingPlan, q: Any, k: Any, v: Any, kwargs: Any) -> Any:
    """Two calls a pair: [prefix, chosen], and the rejected tail over its prefix and itself.

    Tensors are split, not sliced: the backward of a slice fills a full row with zeros first.
    """
    window, sizes, pairs = kwargs.pop("sliding_window", None), plan.sizes, len(plan.lengths)
    queries, keys, values = (x.split(sizes, 2) for x in (q, k, v))
    parts = [one(queries[i], keys[i], values[i], plan.mask(sizes[i], sizes[i], window)) for i in range(pairs)]
    for tail, (pair, seen) in enumerate(plan.tails(), pairs):
        own_keys, own_values = (torch.cat([x[pair][:, :, :seen], x[tail]], 2) for x in (keys, values))
        if window is None and 3 * seen <= sizes[tail]:
            # computing a short prefix again, plainly causal, is cheaper than a mask over all that the tail sees
            own_queries = torch.cat([queries[pair][:, :, :seen], queries[tail]], 2)
            parts.append(one(own_queries, own_keys, own_values)[:, seen:])
        else:
            mask = plan.mask(sizes[tail], own_keys.shape[2], window)
            parts.append(one(queries[tail], own_keys, own_values, mask))
    return torch.cat(parts, 1)


def eager_packed(one: Callable[..., torch.Tensor], plan: PackingPlan, q: Any, k: Any, v: Any, kwargs: Any) -> Any:
    """The calls of `sdpa_packed`, with the mask of each in numbers: eager attention sees all where it has none."""

    def call(q: Any, k: Any, v: Any, mask: Any = None) -> torch.Tensor:
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return one(q, k, v, q.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(q.dtype).min))

    return sdpa_packed(call, plan, q, k, v, kwargs)


def flash_packed(one: Callable[..., torch.Tensor], plan: PackingPlan, q: Any, k: Any, v: Any, kwargs: Any) -> Any:
    """Two calls for all pairs. The causal mask is aligned at the lower right, so a tail sees all of its prefix."""
    kwargs.pop("position_ids", None)  # the borders of sequences are explicit
    first, second, keys = plan.varlen
    end = sum(plan.sizes[: len(plan.lengths)])
    chosen, tails = q.split([end, q.shape[2] - end], 2)
    parts = [one(chosen, k[:, :, :end], v[:, :, :end], **first)]
    if second:
        parts.append(one(tails, k.index_select(2, keys), v.index_select(2, keys), **second))
    return torch.cat(parts, 1)


PACKED = {"sdpa": torch_packed, "eager": eager_packed}  # by name of attention; all others are flash-attention


class PairBatch:
    """Batches of TRL's collator as one of B pairs, (2B, L), with (prefix, chosen, rejected) tokens of each pair."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.sizes = [len(batch["input_ids"]) // 2 for batch in batches]
        self.width = max(batch["input_ids"].shape[1] for batch in batches)
        columns = {name: [batch[name] for batch in batches] for name in batches[0]}
        self.inputs = {name: self._concatenate(values) for name, values in columns.items()}
        self.failed = set[int]()  # pairs that did not fit into memory alone
        self.lengths = pack_pairs(*(self.inputs[n] for n in ("input_ids", "attention_mask", "input_ids"))).plan.lengths

    def _concatenate(self, values: list[Any]) -> Any:
        """Chosen rows of all batches, then rejected ones, padded on the right; or one value a pair."""
        if len(values) == 1 or not isinstance(values[0], torch.Tensor) or not values[0].dim():
            return values[0]
        if values[0].dim() == 1:
            return torch.cat(values)
        halves = [pad(value, (0, self.width - value.shape[1])).chunk(2) for value in values]
        return torch.cat([half[side] for side in (0, 1) for half in halves])

    def tokens(self, part: list[int], packed: bool) -> int:
        """Tokens that a model computes for the pairs `part`: packed, or padded to their longest row."""
        lengths = [self.lengths[pair] for pair in part]
        return sum(map(sum, lengths)) if packed else 2 * len(part) * max(p + max(c, r) for p, c, r in lengths)

    def cut(self, budget: int, packed: bool, pairs: Iterable[int]) -> list[list[int]]:
        """Split `pairs` into few parts of at most `budget` tokens, or of one pair.

        The longest pair that is left goes where it has room: packed, into any part; padded, next to the one before it.
        """
        parts: list[list[int]] = []
        for pair in sorted(pairs, key=lambda i: -self.tokens([i], packed)):
            options = parts if packed else parts[-1:]
            room = (part for part in options if self.tokens([*part, pair], packed) <= budget)
            if (part := next(room, None)) is not None:
                part.append(pair)
            else:
                parts.append([pair])
        return [sorted(part) for part in parts]

    def groups(self, by_batch: bool) -> dict[int, list[list[int]]]:
        """The pairs that may share a part, by the size of their batches: of all batches of a size, or of each alone."""
        groups: dict[int, list[list[int]]] = {}
        for end, size in zip(itertools.accumulate(self.sizes), self.sizes, strict=True):
            pairs = list(range(end - size, end))
            if by_batch or size not in groups:
                groups.setdefault(size, []).append(pairs)
            else:
                groups[size][0] += pairs
        return groups

    def rows(self, part: list[int]) -> torch.Tensor:
        """The rows of the pairs `part`: their chosen answers, then their rejected ones."""
        rows = [*part, *(pair + len(self.lengths) for pair in part)]
        return torch.tensor(rows, device=self.inputs["input_ids"].device)

    def take(self, part: list[int], values: dict[str, Any] | None = None) -> dict[str, Any]:
        """The pairs `part` of `values`, by default of the batch, without columns of padding."""
        rows, width = self.rows(part), max(p + max(c, r) for p, c, r in (self.lengths[pair] for pair in part))
        taken = dict(self.inputs if values is None else values)
        for name, value in taken.items():
            if isinstance(value, torch.Tensor) and value.dim():
                taken[name] = value[rows][:, :width] if value.dim() > 1 else value[rows[: len(part)]]
        return taken

    def join(self, outputs: Iterable[tuple[list[int], Any]]) -> SimpleNamespace:
        """The outputs of a model for the batch, of those for its parts; zeros where there was padding."""
        joined: dict[str, Any] = {}
        for part, output in outputs:
            for name in PER_TOKEN:
                if (value := getattr(output, name, None)) is not None:
                    values = joined.setdefault(name, value.new_zeros(2 * len(self.lengths), self.width - 1))
                    values[self.rows(part), : value.shape[1]] = value.detach()
        return SimpleNamespace(**joined)
