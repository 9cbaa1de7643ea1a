"""A batch of token pairs, tiny models, and one step of DPOTrainer with shared prefixes or without."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)
from trl import DPOConfig
from trl.trainer import utils

from helpers.core import UserError
from helpers.models.adapters import upcast_adapter
from helpers.training import trainer as shared_prefix
from helpers.training.prefix_sharing import PackingPlan, pack_pairs
from helpers.training.trainer import SharedPrefixDPOTrainer

VOCABULARY = 300
TIMES = ("runtime", "per_second", "seconds", "_time")  # parts of names of logged times


LENGTHS = ((20, 3, 9, 14), (1, 0, 5, 30), (40, 0, 12, 1), (7, 2, 2, 2))  # of prompts, shared beginnings, both answers


KINDS = {"mistral": {}, "sliding mistral": {"sliding_window": 8}, "llama": {}, "qwen2": {}, "gpt_neox": {}}


def rows() -> Dataset:
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()

    made = []
    for prompt, common, chosen, rejected in LENGTHS:
        prompt_ids, beginning = ids(prompt), ids(common)
        sides = {"chosen_ids": beginning + ids(chosen), "rejected_ids": beginning + ids(rejected)}
        made.append({"prompt_ids": prompt_ids, **sides})
    return Dataset.from_list(made)


def build(kind: str = "mistral", dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    name = kind.split()[-1]
    groups = {} if name == "gpt_neox" else {"num_key_value_heads": 2}
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.2, **groups, **KINDS[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for module in model.modules() if dtype == torch.float64 else ():
        if type(module).__name__.endswith("RMSNorm"):  # which rounds to float32 whatever it is given
            module.forward = functools.partial(exact_norm, module)
    return model


def exact_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def adapter(**more: Any) -> LoraConfig:
    given = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | more
    return LoraConfig(**given)


def train_with(
    mode: str, model: Any, tokenizer: Any, folder: Path, peft: LoraConfig | None = None, data: Dataset | None = None,
    **given: Any,
) -> SharedPrefixDPOTrainer:  # fmt: skip
    given = {"max_length": None, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False} | given
    args = DPOConfig(output_dir=str(folder), report_to="none", **given)
    reference = None if peft or isinstance(model, PeftModel) else copy.deepcopy(model)
    if reference is not None:  # a policy that has left its reference
        with torch.no_grad():
            for i, weight in enumerate(model.parameters()):
                weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    trainer = SharedPrefixDPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=data or rows(), eval_dataset=data or rows(),
        processing_class=tokenizer, peft_config=peft, shared_prefix=mode,
    )  # fmt: skip
    if getattr(model, "is_quantized", False):
        upcast_adapter(trainer.model)
    else:
        trainer.model.to(model.dtype)
    return trainer


def step(trainer: SharedPrefixDPOTrainer) -> dict[str, torch.Tensor]:
    """Loss, per-token log-probabilities, reference log-probabilities, every metric and every gradient of a batch."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or model, batch)
    with torch.no_grad():
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
        )
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {"loss": loss.detach(), "logps": out.log_probs, "reference": torch.stack([chosen, rejected])}
    found |= {name: torch.tensor(values[-1]) for name, values in trainer._metrics["train"].items()}
    return found | {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(stock: dict[str, torch.Tensor], shared: dict[str, torch.Tensor], exact: bool = False) -> None:
    """float64 within 1e-12 relative; float32 loss within 1e-5, log-probabilities 2e-5 and gradients 1e-4 relative."""
    assert set(stock) == set(shared)
    assert any(name.startswith("gradient") for name in stock)
    gradients = [n for n in stock if n.startswith("gradient")]
    for name in set(stock) - set(gradients):
        a, b = stock[name].double(), shared[name].double()
        within = 1e-10 if exact else 1e-5 if name == "loss" else 2e-5 if name == "logps" else 2e-4
        torch.testing.assert_close(b, a, atol=within, rtol=within if exact else 1e-5, msg=lambda m, n=name: f"{n}: {m}")
    a, b = (torch.cat([found[name].flatten() for name in gradients]).double() for found in (stock, shared))
    assert float(a.norm()) > 0
    assert float((a - b).norm() / a.norm()) < (1e-12 if exact else 1e-4)


class ExactHead:
    """TRL's log-probability kernel rounds to float32 whatever it is given; this one does not."""

    @staticmethod
    def apply(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *more: Any) -> tuple[Any, ...]:
        logits = hidden @ weight.T / temperature
        logps = logits.log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        top = logits.argmax(-1) == targets
        squares = (2 * logps).logsumexp(-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy, squares, logits.mean(-1), top


@contextlib.contextmanager
def exactly(dtype: torch.dtype) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(utils, "_ChunkedLogProbFunction", ExactHead)
        yield


def check_same_logs(first: list[dict[str, Any]], second: list[dict[str, Any]], tolerance: float) -> int:
    """Every number that two runs have logged is the same, times apart. Returns how many were compared."""
    assert len(first) == len(second)
    compared = 0
    for one, two in zip(first, second, strict=True):
        assert set(one) == set(two)
        for name, value in two.items():
            if isinstance(value, float | int) and not any(word in name for word in TIMES):
                assert one[name] == pytest.approx(value, abs=tolerance, rel=1e-3), (name, two.get("step"))
                compared += 1
    return compared


TAILS = PackingPlan.tails


def _rejected_sees_chosen(self: PackingPlan) -> Iterator[tuple[int, int]]:
    for row, _ in TAILS(self):
        yield row, self.sizes[row]


def _prompt_token_is_lost(self: PackingPlan) -> Iterator[tuple[int, int]]:
    for row, seen in TAILS(self):
        yield row, seen - 1


def _positions_go_on(*words: Any) -> Any:
    batch = pack_pairs(*words)
    return dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


def _positions_off_by_one(*words: Any) -> Any:
    batch = pack_pairs(*words)
    tails = torch.arange(batch.input_ids.shape[1]) >= sum(batch.plan.sizes[: len(batch.plan.lengths)])
    return dataclasses.replace(batch, position_ids=batch.position_ids + tails)


# Faults of a packed row: what is replaced, and by what.
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rejected attends to chosen": (PackingPlan, "tails", _rejected_sees_chosen),
    "positions are not restarted": (shared_prefix, "pack_pairs", _positions_go_on),
    "positions are off by one": (shared_prefix, "pack_pairs", _positions_off_by_one),
    "the last prompt token is lost": (PackingPlan, "tails", _prompt_token_is_lost),
}


def faults_accepted(trainer: SharedPrefixDPOTrainer, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, str]]:
    """What the check of a first batch prints for the right packed row, and for each fault that it accepts.

    TRL's own log-probabilities, which no fault changes, are computed once.
    """
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    sharing, compute = trainer.sharing, trainer._log_probs
    assert sharing is not None
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def log_probs(model: Any, ids: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        key = (id(model), *ids.flatten().tolist())
        if sharing.enabled or key not in known:
            found = compute(model, ids, *tensors)
            return found if sharing.enabled else known.setdefault(key, found)
        return known[key]

    accepted = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_log_probs", log_probs)
        trainer._check_first_batch(trainer.model, batch)
        (printed,) = capsys.readouterr().out.splitlines()[-1:]
        for name, fault in FAULTS.items():
            trainer._is_compared, trainer.shared_prefix, sharing.enabled = False, "on", True
            with pytest.MonkeyPatch.context() as seeded:
                seeded.setattr(*fault)
                sharing.pack = functools.lru_cache(maxsize=1)(shared_prefix.pack_pairs)
                with contextlib.suppress(UserError):
                    trainer._check_first_batch(trainer.model, batch)
                    accepted[name] = capsys.readouterr().out
    return printed, accepted
