"""TRL's DPOTrainer on rows that are tokens already: what of it is overridden, in one place."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from trl.trainer.dpo_trainer import DPOTrainer

TOKENS = {"prompt_ids", "chosen_ids", "rejected_ids"}


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes the tokens of `prepare_preferences` as they are.

    TRL 1.16 (dpo_trainer.py, _prepare_dataset) tokenizes every row itself, and then drops without a word those whose
    prompt fills max_length. Rows that bring their tokens have been tokenized the same way, checked and accounted for;
    tests/test_preferences.py compares the two. Other rows go TRL's way.

    The frozen copy of an adapter that is trained further (dpo_trainer.py, __init__) lacks the rows of tokens that were
    added for a chat format, and would be another model than the policy starts as: they are copied too.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        weights = dict(model.named_parameters()) if isinstance(model, PeftModel) else {}
        exact = {name: w.detach().clone() for name, w in weights.items() if name.endswith(".default")}
        super().__init__(model, *args, **kwargs)
        weights = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        for name, weight in exact.items():
            weights[name.removesuffix("default") + "ref"].data.copy_(weight)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if set(dataset.column_names or ()) >= TOKENS:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
