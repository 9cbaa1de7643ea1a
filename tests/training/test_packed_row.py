"""A packed row holds each prefix once, and attention sees in it what a dense mask allows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.training.prefix_sharing import PackingPlan, flash_packed, pack_pairs, packed_attention
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
