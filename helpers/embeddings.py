"""Rows of the embeddings and the LM head for tokens that a chat format added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokens beyond the model's vocabulary a row each in embeddings and LM head: the mean of all others.

    The same base and tokenizer always give the same rows, so an adapter that replaces them (`token_rows`) finds the
    base that it was trained on.
    """
    from peft.utils.other import TrainableTokensWrapper

    # trl 1.16 (trainer/utils.py, add_fused_lm_head) asks the LM head for its bias, which peft 0.21's wrapper has not
    bias = property(lambda wrapper: getattr(wrapper.original_module, "bias", None))
    TrainableTokensWrapper.bias = bias  # type: ignore[attr-defined]
    before = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) <= before:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            with _whole(layer.weight) as weight:
                weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


@contextlib.contextmanager
def _whole(weight: Any) -> Iterator[torch.Tensor]:
    """The data of a weight; under ZeRO-3, where each process holds a piece, put together and shared out again."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            yield weight.data
    else:
        yield weight.data


def token_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> dict[str, list[int]] | None:
    """`trainable_token_indices` for PEFT: the rows of `tokens` in the embeddings and, where it is not tied to them, in
    the LM head; None for no tokens."""
    if not tokens:
        return None
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]  # type: ignore[arg-type]
    layers = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    return {name: ids for name, module in model.named_modules() if any(module is layer for layer in layers)}
