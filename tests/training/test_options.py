"""Options of TRL and transformers with what the trainers add: references, evaluation, and a cell that is run again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DPOConfig

from helpers.core import UserError
from helpers.training.microbatches import MicroBatchDPOTrainer
from helpers.training.resume import REFERENCE, ResumeCallback
from helpers.training.trainer import TokenizedDPOTrainer, count_rows_once
from tests.training.pairs import VOCABULARY, build, rows
from tests.training.test_microbatches import trainer_of


def adapted() -> Any:
    """A model with an adapter that is trained further, whose rows for added tokens have learned something."""
    given = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(build(), LoraConfig(**given, trainable_token_indices={"embed_tokens": [*range(VOCABULARY)]}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name or "lora_B" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model


def references(trainer: Any) -> torch.Tensor:
    """The reference's log-probabilities of all pairs: chosen, rejected."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    if "ref_chosen_logps" in batch:
        return torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))


def options(folder: Path, **given: Any) -> DPOConfig:
    plain = {"max_length": None, "per_device_eval_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": "none"}
    return DPOConfig(output_dir=str(folder), **plain | given)


def test_a_reference_computed_before_has_the_rows_of_added_tokens(tokenizer: Any, tmp_path: Path) -> None:
    found = {}
    for precompute in (False, True):
        trainer = TokenizedDPOTrainer(
            model=adapted(), args=options(tmp_path, precompute_ref_log_probs=precompute), train_dataset=rows(),
            eval_dataset=rows(), processing_class=tokenizer,
        )  # fmt: skip
        found[precompute] = references(trainer)
        assert "add_adapter" not in vars(trainer.model)
    torch.testing.assert_close(found[True], found[False])


def test_a_reference_computed_before_is_that_of_its_ld_alpha(tokenizer: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"budget": 0, "full": True, "precompute_ref_log_probs": True}
    plain, longer = (trainer_of(tokenizer, tmp_path, **given, ld_alpha=alpha) for alpha in (None, 0.3))
    expected = trainer_of(tokenizer, tmp_path, budget=0, full=True, ld_alpha=0.3)
    torch.testing.assert_close(references(longer), references(expected))
    assert not torch.allclose(references(longer), references(plain))


def test_batches_of_packed_rows_are_evaluated_as_trl_does() -> None:
    def predict(*args: Any) -> None: ...

    trainer = SimpleNamespace(padding_free=True, prediction_step=predict, log=predict)
    count_rows_once(trainer)
    assert trainer.prediction_step is predict
    assert trainer.log is predict


@pytest.mark.parametrize(("drop_last", "expected"), [(False, 14), (True, 7)])
def test_an_evaluation_that_drops_its_last_batch_keeps_its_batch_size(
    drop_last: bool, expected: int, tokenizer: Any, tmp_path: Path
) -> None:
    given = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 7, "dataloader_drop_last": drop_last}
    assert trainer_of(tokenizer, tmp_path, budget=100, **given).args.per_device_eval_batch_size == expected


def synced(tokenizer: Any, folder: Path) -> MicroBatchDPOTrainer:
    given = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 4}
    given |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    trainer = trainer_of(tokenizer, folder, budget=0, full=True, **given)
    ResumeCallback(trainer, folder).add()
    return trainer


def test_a_reference_that_follows_the_policy_is_resumed(tokenizer: Any, tmp_path: Path) -> None:
    undisturbed = synced(tokenizer, tmp_path)
    undisturbed.train()
    resumed = synced(tokenizer, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, two in (
        (undisturbed.model, resumed.model),
        (undisturbed.ref_model, resumed.ref_model),
    ):
        for name, weight in one.state_dict().items():  # type: ignore[union-attr]
            torch.testing.assert_close(two.state_dict()[name], weight, rtol=0, atol=0)  # type: ignore[union-attr]
    (tmp_path / "checkpoint-2" / REFERENCE).unlink()
    with pytest.raises(UserError, match=r"^checkpoint-2 lacks the reference of --sync_ref_model\. Use"):
        synced(tokenizer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_model_that_was_trained_is_not_trained_again_as_if_it_were_new(tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tokenizer, tmp_path, budget=0, max_steps=1)
    ResumeCallback(trainer, tmp_path).add()
    trainer.train()
    with pytest.raises(UserError, match=r"was trained already, and no checkpoint was saved\. Run the cell that loads"):
        trainer.train()
    trainer.args.auto_find_batch_size = True  # transformers itself trains again, with smaller batches
    trainer.train()
    again = trainer_of(tokenizer, tmp_path, budget=0, max_steps=1)
    ResumeCallback(again, tmp_path).add()
    again.train()
