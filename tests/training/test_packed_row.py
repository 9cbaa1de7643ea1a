"""A packed row holds each prefix once, and attention sees in it what a dense mask allows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.training import prefix_sharing
from helpers.training.prefix_sharing import PackingPlan, flash_packed, pack_pairs, packed_attention, torch_packed
from tests.training.pairs import adapter, build, compare, step, train_with


def test_a_packed_row_holds_each_prompt_once() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    answers = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])
    batch = pack_pairs(ids, mask, ids.masked_fill(answers == 0, -100))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 6, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]]
    assert batch.plan.lengths == [(3, 2, 1), (2, 1, 3)]
    assert batch.labels.tolist() == [[4, 5, 9, 6, 10, 11, 12]]
    assert batch.plan.gather.tolist() == [2, 3, 6, 2, 6, 9, 10]  # the last of a prompt scores both first tokens
    assert batch.plan.sizes == [5, 3, 1, 3]
    assert list(batch.plan.tails()) == [(0, 3), (1, 2)]


def dense(lengths: list[tuple[int, int, int]]) -> torch.Tensor:
    """Who sees whom in the whole packed row."""
    owners = [(pair, i < p, "chosen", i) for pair, (p, c, _) in enumerate(lengths) for i in range(p + c)]
    owners += [(pair, False, "rejected", p + i) for pair, (p, _, r) in enumerate(lengths) for i in range(r)]
    seen = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for i, (pair, _, side, at) in enumerate(owners):
        for j, (other, in_prefix, its, there) in enumerate(owners):
            seen[i, j] = pair == other and there <= at and (side == its or in_prefix)
    return seen


@pytest.mark.parametrize("lengths", [[(3, 2, 1), (2, 1, 3)], [(5, 0, 4)], [(4, 2, 0), (1, 1, 1)], [(4, 2, 0)]])
def test_the_borders_for_flash_attention_say_what_a_dense_mask_says(lengths: list[tuple[int, int, int]]) -> None:
    first, second, key_positions = PackingPlan(lengths, torch.empty(0)).varlen
    seen = torch.zeros_like(dense(lengths))
    for start, end in itertools.pairwise(first["cu_seq_lens_q"].tolist()):
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    assert torch.equal(first["cu_seq_lens_q"], first["cu_seq_lens_k"])
    assert first["max_length_q"] == first["max_length_k"] == max(p + c for p, c, _ in lengths)
    if second:
        tails = sum(p + c for p, c, _ in lengths) + second["cu_seq_lens_q"]
        borders = zip(itertools.pairwise(tails), itertools.pairwise(second["cu_seq_lens_k"]), strict=True)
        for queries, keys in borders:
            columns = key_positions[slice(*keys)].tolist()
            for row, query in enumerate(range(*queries)):  # causal, aligned at the lower right
                seen[query, columns[: len(columns) - len(range(*queries)) + row + 1]] = True
        assert second["max_length_q"] == max(r for _, _, r in lengths)
        assert second["max_length_k"] == max(p + r for p, _, r in lengths if r)
        assert second["cu_seq_lens_q"].dtype == second["cu_seq_lens_k"].dtype == torch.int32
    assert bool(second) == any(r for _, _, r in lengths)
    assert torch.equal(seen, dense(lengths))


def varlen_by_hand(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), **more: Any,
) -> Any:  # fmt: skip
    """What flash-attention's varlen kernel gives, (tokens, heads, size), sequence by sequence."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max(b - a for a, b in itertools.pairwise(q)) == max_seqlen_q
    assert max(b - a for a, b in itertools.pairwise(k)) == max_seqlen_k
    assert causal
    out = torch.zeros_like(query)
    for i in range(len(q) - 1):
        queries, keys = slice(q[i], q[i + 1]), slice(k[i], k[i + 1])
        score = torch.einsum("ihd,jhd->hij", query[queries], key[keys]) * softmax_scale
        own, there = (
            torch.arange(score.shape[1])[:, None] + score.shape[2] - score.shape[1],
            torch.arange(score.shape[2]),
        )
        seen = there <= own
        if window_size[0] >= 0:
            seen &= there >= own - window_size[0]
        out[queries] = torch.einsum("hij,jhd->ihd", score.masked_fill(~seen, -torch.inf).softmax(-1), value[keys])
    return out


@pytest.mark.parametrize("kind", ["mistral", "sliding mistral"])
def test_the_varlen_path_is_what_stock_computes(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kernels = (None, varlen_by_hand, None, None, None), (flash._lazy_define_process_function(varlen_by_hand), dict)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *words, **more: kernels)
    packed = packed_attention(flash_attention_forward, flash_packed)

    def attend(*words: Any, plan: PackingPlan | None = None, **more: Any) -> Any:
        if plan is None:  # there is no padding without the package's own code
            return sdpa_attention_forward(*words, **more)
        return packed(*words, plan=plan, **more)

    attend.supports_plans = True  # type: ignore[attr-defined]
    stock = step(train_with("off", build(kind), tokenizer, tmp_path, adapter()))
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", attend)
    try:
        compare(stock, step(train_with("on", build(kind), tokenizer, tmp_path, adapter())))
    finally:
        AttentionInterface.register("sdpa", before)


def weights(query: Any, key: Any, q: list[int], k: list[int], window: list[int], scale: Any) -> Iterator[Any]:
    """Where each sequence's queries and keys are, and its attention weights (heads, queries, keys); causal at the lower
    right, as in flash-attention."""
    for (a, b), (c, d) in zip(itertools.pairwise(q), itertools.pairwise(k), strict=True):
        own = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        seen = torch.arange(d - c) <= own
        if window[0] >= 0:
            seen &= torch.arange(d - c) >= own - window[0]
        score = torch.einsum("ihd,jhd->hij", query[a:b], key[c:d]) * scale
        yield slice(a, b), slice(c, d), score.masked_fill(~seen, -torch.inf).softmax(-1)


@pytest.fixture
def varlen_kernels() -> Iterator[None]:
    """Kernels on the CPU for PyTorch's two operators of attention over sequences of any length."""
    from torch.nn.attention import varlen

    def forward(
        query: Any, key: Any, value: Any, q: Any, k: Any, max_q: int, max_k: int, is_causal: bool = False,
        scale: Any = None, window_size: Any = None, enable_gqa: bool = False, *unused: Any, **more: Any
    ) -> Any:  # fmt: skip
        assert is_causal == (tuple(window_size) == (-1, 0))
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert (max_q, max_k) == tuple(int(x.diff().max()) for x in (q, k))
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        out = torch.zeros_like(query)
        for own, seen, weight in weights(query, key, q.tolist(), k.tolist(), window_size, scale):
            out[own] = torch.einsum("hij,jhd->ihd", weight, value[seen])
        return out, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, q: Any, k: Any, max_q: int, max_k: int,
        is_causal: bool, state: Any, scale: Any = None, window_size: Any = None, *unused: Any, **more: Any
    ) -> Any:  # fmt: skip
        shape = key.shape
        key, value = (x.repeat_interleave(query.shape[1] // shape[1], 1) for x in (key, value))
        of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
        for own, seen, weight in weights(query, key, q.tolist(), k.tolist(), window_size, scale):
            of_value[seen] += torch.einsum("hij,ihd->jhd", weight, grad[own])
            of_weight = torch.einsum("ihd,jhd->hij", grad[own], value[seen])
            of_score = weight * (of_weight - (of_weight * weight).sum(-1, keepdim=True)) * scale
            of_query[own] += torch.einsum("hij,jhd->ihd", of_score, key[seen])
            of_key[seen] += torch.einsum("hij,ihd->jhd", of_score, query[own])
        return of_query, *(x.view(shape[0], shape[1], -1, shape[2]).sum(2) for x in (of_key, of_value))

    with contextlib.ExitStack() as kernels:
        for operator, kernel in ((varlen._varlen_attn, forward), (varlen._varlen_attn_backward, backward)):
            operator.register_kernel("cpu")(kernel)
            kernels.callback(operator.register_kernel("cpu"), operator._init_fn)
        yield


@pytest.mark.usefixtures("varlen_kernels")
@pytest.mark.parametrize("lengths", [
    [(40, 30, 20), (10, 25, 60)], [(5, 0, 4)], [(4, 2, 0), (3, 1, 1)], [(64, 1, 1)], [(3, 2, 0)],
])  # fmt: skip
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_pytorch_s_varlen_attention_equals_sdpa(
    lengths: list[tuple[int, int, int]], window: int | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tokens = sum(map(sum, lengths))
    inputs = [torch.randn(1, n, tokens, 16, dtype=torch.float64, requires_grad=True) for n in (*heads, heads[1])]
    grad, results, masks = torch.randn(1, tokens, heads[0], 16, dtype=torch.float64), [], []

    def one(q: Any, k: Any, v: Any, mask: Any = None, **unused: Any) -> Any:
        masks.append(mask)
        k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.3).transpose(1, 2)

    for dtype in (None, torch.float64):
        monkeypatch.setattr(prefix_sharing, "varlen_dtype", lambda *tensors, dtype=dtype: dtype)
        calls, plan = len(masks), PackingPlan(lengths, torch.empty(0, dtype=torch.long))
        out = torch_packed(one, plan, *inputs, {"sliding_window": window, "scaling": 0.3, "dropout": 0.0})
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
        assert (len(masks) > calls) is (dtype is None)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*results, strict=True))


def test_where_pytorch_s_varlen_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(kind: Any, size: int = 128, capability: tuple[int, int] = (8, 9), autocast: bool = False) -> Any:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        query = SimpleNamespace(device=torch.device("cuda"), shape=(1, 8, 5, size))
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            value = SimpleNamespace(dtype=kind, shape=query.shape)
            return prefix_sharing.varlen_dtype(cast(Any, query), cast(Any, value))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    assert dtype(torch.bfloat16) == torch.bfloat16
    assert dtype(torch.float16) == torch.float16
    assert dtype(torch.float32, autocast=True) == torch.bfloat16
    assert dtype(torch.float32) is None
    assert dtype(torch.float16, capability=(7, 5)) is None  # a T4
    assert dtype(torch.bfloat16, size=512) is None
    assert prefix_sharing.varlen_dtype(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)) is None
