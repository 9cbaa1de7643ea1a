"""TRL's DPOTrainer on rows that are tokens already: the one method of TRL's that is overridden, in one place."""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer

TOKENS = {"prompt_ids", "chosen_ids", "rejected_ids"}


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes the tokens of `prepare_preferences` as they are.

    TRL 1.16 (dpo_trainer.py, _prepare_dataset) tokenizes every row itself, and then drops without a word those whose
    prompt fills max_length. Rows that bring their tokens have been tokenized the same way, checked and accounted for;
    tests/test_preferences.py compares the two. Other rows go TRL's way.
    """

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if set(dataset.column_names or ()) >= TOKENS:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
