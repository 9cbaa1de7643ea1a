"""How a merge is compared with the policy as trained."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from helpers.merging.verify import compare_logits, last_logits
from tests.tiny import tiny_mistral


def test_a_merge_is_compared_by_its_logits(tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig, get_peft_model

    talks = [[{"role": "user", "content": "What is 2 plus 3?"}], [{"role": "user", "content": "And 4?"}]]
    base = last_logits(tiny_mistral(len(tokenizer)), tokenizer, talks)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(tiny_mistral(len(tokenizer)), config)
    adapted = last_logits(policy, tokenizer, talks)
    assert [logits.shape[1] for logits in adapted] == [len(tokenizer)] * 2
    same = compare_logits(adapted, last_logits(policy.merge_and_unload(), tokenizer, talks))
    other = compare_logits(adapted, base)
    assert same["max_abs"] < 1e-4
    assert same["top1"] == 1
    assert same["kl"] < 1e-8
    assert other["kl"] > 1e-3
    p, q = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert compare_logits([p], [q])["kl"] == pytest.approx(expected.item(), abs=1e-6)
