"""--packing puts several conversations into a row, and none of them sees another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from helpers.core import SettingsError
from helpers.data.encode import LengthLimits
from helpers.data.prepare import prepare_rows
from helpers.settings.load import load_settings
from helpers.training.trainer import supports_packing
from tests.conftest import REPO, code_cells
from tests.notebooks.test_three_ways import _settings_class


def trainer(kind: str, attention: str, checkpointing: bool, tokenizer: Any, folder: Path) -> SFTTrainer:
    groups = {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, **groups,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    talks = [
        [{"role": "user", "content": f"What is {i} plus {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
        for i in range(24)
    ]
    rows = Dataset.from_list([{"messages": talk} for talk in talks])
    rows, _ = prepare_rows(rows, tokenizer, LengthLimits(), use_pairs=False)
    args = SFTConfig(
        output_dir=str(folder), packing=True, max_length=128, use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=1, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    rows = rows.select_columns(["input_ids", "labels"])
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("kind", "attention", "checkpointing"),
    [
        ("mistral", "sdpa", True),
        ("mistral", "eager", False),
        ("llama", "sdpa", False),
        ("qwen2", "sdpa", True),
        ("gpt_neox", "sdpa", True),
    ],
)
def test_a_packed_row_has_the_loss_and_gradients_of_its_conversations(
    kind: str, attention: str, checkpointing: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    packed = trainer(kind, attention, checkpointing, tokenizer, tmp_path)
    batch = next(iter(packed.get_train_dataloader()))
    model = packed.model.train()
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 3  # several conversations

    packed.compute_loss(model, dict(batch)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    together = float(packed.compute_loss(model, dict(batch)))

    model.zero_grad()
    total, count = torch.zeros(()), 0
    for start, end in itertools.pairwise(starts):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][:, start:end].clone()
        labels[:, 0] = -100
        learned = int((labels[:, 1:] != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss * learned, count + learned
    (total / count).backward()
    assert together == pytest.approx(float(total / count), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mistral", ""),
        ("llama", ""),
        ("qwen2", ""),
        ("gpt_neox", ""),
        ("opt", "--packing is off: "),
        ("falcon", "--packing is off: "),
        ("bloom", "--packing is off: "),
        ("mpt", "--packing is off: "),
    ],
)
def test_packing_is_used_only_where_a_packed_row_equals_its_conversations(
    kind: str, reason: str, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind in ("bloom", "mpt"):
        sizes = {"n_layer": 2, "n_head": 4, "hidden_size": 64, "d_model": 64, "n_heads": 4, "n_layers": 2}
    if kind in ("mistral", "llama", "qwen2"):
        sizes |= {"num_key_value_heads": 2}
    if kind == "opt":
        sizes |= {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes))
    rows = [tokenizer(f"What is {i} plus {i}? It is {2 * i}.")["input_ids"] for i in (3, 8)]
    train_set = Dataset.from_list([{"input_ids": row} for row in rows])
    assert supports_packing(model, train_set) == (not reason)
    assert capsys.readouterr().out.startswith(reason)
    assert model.training


def test_conversations_that_could_see_each_other_are_refused() -> None:
    settings = _settings_class(code_cells(REPO / "notebooks" / "01_sft.py"))
    assert load_settings(settings, {}, ["--packing"]).trl == {"packing": True}
    with pytest.raises(
        SettingsError, match="--packing_strategy wrapped lets conversations in one row attend to each other"
    ):
        load_settings(settings, {}, ["--packing", "--packing_strategy", "wrapped"])
