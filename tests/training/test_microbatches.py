"""Micro-batches by tokens: gradients, metrics and weights of whole batches, and no end for lack of memory."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig
from trl import DPOConfig

from helpers.core import UserError
from helpers.models.memory import GB, TrainingSpec, memory_by_part, read_decoder
from helpers.models.plan import no_microbatch_reason
from helpers.runs.run import Run
from helpers.settings.fields import PAIR_LOSSES
from helpers.training.microbatches import MicroBatchDPOTrainer, PairBatch, microbatch_tokens
from helpers.training.trainer import is_out_of_memory
from tests.models.test_memory import QLORA
from tests.training.pairs import VOCABULARY, adapter, build, exactly

# of prompts, shared beginnings, both answers
LENGTHS = ((20, 3, 9, 14), (1, 0, 5, 30), (40, 0, 12, 1), (7, 2, 2, 2), (12, 0, 33, 4), (3, 1, 6, 1), (25, 0, 1, 18))
TOKENS = [sum(lengths) for lengths in LENGTHS]  # of each pair, packed: 46, 36, 53, 13, 49, 11, 44


def rows() -> Dataset:
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()

    made = []
    for prompt, common, chosen, rejected in LENGTHS:
        beginning = ids(common)
        better, worse = [*beginning, 3, *ids(chosen - 1)], [*beginning, 4, *ids(rejected - 1)]
        made.append({"prompt_ids": ids(prompt), "chosen_ids": better, "rejected_ids": worse})
    return Dataset.from_list(made)


def trainer_of(
    tokenizer: Any, folder: Path, budget: int, full: bool = False, shared: str = "on", **given: Any
) -> MicroBatchDPOTrainer:
    given = {"max_length": None, "per_device_train_batch_size": 7, "use_cpu": True, "bf16": False} | given
    given = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.01} | given
    model, reference = build(dtype=torch.float64), None
    if full:
        reference = copy.deepcopy(model)
        with torch.no_grad():
            for i, weight in enumerate(model.parameters()):
                weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    trainer = MicroBatchDPOTrainer(
        model=model, ref_model=reference, args=DPOConfig(output_dir=str(folder), **given), train_dataset=rows(),
        eval_dataset=rows(), processing_class=tokenizer, peft_config=None if full else adapter(), shared_prefix=shared,
        tokens_per_microbatch=budget,
    )  # fmt: skip
    trainer.model.to(torch.float64)
    return trainer


def step(trainer: MicroBatchDPOTrainer) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients of one batch of all pairs."""
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, batch)
    found = {"loss": loss} | {name: torch.tensor(v) for name, v in trainer._metrics["train"].items()}
    return found | {f"gradient {n}": p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def check_equal(whole: dict[str, torch.Tensor], cut: dict[str, torch.Tensor]) -> None:
    assert set(whole) == set(cut)
    gradients = [name for name in whole if name.startswith("gradient")]
    for name in set(whole) - set(gradients):
        torch.testing.assert_close(cut[name].double(), whole[name].double(), atol=1e-10, rtol=1e-10, msg=name)
    a, b = (torch.cat([found[name].flatten() for name in gradients]) for found in (whole, cut))
    assert float(a.norm()) > 0
    assert float((a - b).norm() / a.norm()) < 1e-12


def forwards(trainer: MicroBatchDPOTrainer) -> list[int]:
    """The tokens of each row that the model is given from now on."""
    found: list[int] = []
    hook: Any = lambda module, args, kwargs: found.append(kwargs["input_ids"].numel())  # noqa: E731
    trainer.accelerator.unwrap_model(trainer.model).get_base_model().model.register_forward_pre_hook(
        hook, with_kwargs=True
    )
    return found


LOSSES: dict[str, dict[str, Any]] = {name: {"loss_type": [name]} for name in sorted(PAIR_LOSSES)}
LOSSES["exo_pair"]["label_smoothing"] = LOSSES["robust"]["label_smoothing"] = 0.1
LOSSES |= {
    "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "weighted": {"loss_type": ["sigmoid"], "use_weighting": True},
    "ld": {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
    "js": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_have_the_gradient_of_the_whole_batch(name: str, tokenizer: Any, tmp_path: Path) -> None:
    with exactly(torch.float64):
        whole = step(trainer_of(tokenizer, tmp_path, 0, **LOSSES[name]))
        for budget in (1, 100, 10_000):
            check_equal(whole, step(trainer_of(tokenizer, tmp_path, budget, **LOSSES[name])))


@pytest.mark.parametrize("given", [{"full": True}, {"shared": "off"}, {"gradient_checkpointing": False}], ids=str)
def test_so_they_have_in_other_ways_to_train(given: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    with exactly(torch.float64):
        whole = step(trainer_of(tokenizer, tmp_path, 0, **given))
        for budget in (60, 130):
            check_equal(whole, step(trainer_of(tokenizer, tmp_path, budget, **given)))


def train(trainer: MicroBatchDPOTrainer) -> dict[str, torch.Tensor]:
    """The trained weights."""
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def check_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(two)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-10, rtol=1e-10, msg=name)


STEPS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
STEPS |= {"logging_steps": 1, "optim": "sgd", "learning_rate": 1.0, "eval_strategy": "no"}


@pytest.mark.parametrize("loss", [["sigmoid"], ["sigmoid", "sft"]], ids="-".join)
def test_the_batches_of_a_step_are_computed_together(loss: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """The last batch of an epoch has one pair, and the last step of it one batch."""
    with exactly(torch.float64):
        stock = trainer_of(tokenizer, tmp_path, 0, loss_type=loss, **STEPS)
        weights = train(stock)
        cut = trainer_of(tokenizer, tmp_path, 200, loss_type=loss, **STEPS)
        passes = forwards(cut)
        check_weights(weights, train(cut))
    assert [log["loss"] for log in cut.state.log_history[:-1]] == pytest.approx(
        [log["loss"] for log in stock.state.log_history[:-1]]
    )
    # the comparison with TRL, and 2 epochs of a step of 6 pairs and one of 1, of the reference and the policy each
    batches = (2 + 1) if loss == ["sigmoid"] else (3 + 1)
    assert len(passes) <= 4 + 2 * 2 * batches
    assert max(passes) <= 200


class Failing:
    """Raises torch.OutOfMemoryError in the n-th forward or backward pass of a model's last layer, once."""

    def __init__(self, trainer: MicroBatchDPOTrainer, where: str, number: int) -> None:
        self.where, self.number, self.count, self.is_raised = where, number, 0, False
        layers = trainer.model.get_base_model().model.layers
        self.layer = layers[0]
        self.layer.register_forward_hook(self.forward)
        self.layer.register_full_backward_hook(self.backward)

    def forward(self, *_: Any) -> None:
        if self.where == ("policy" if torch.is_grad_enabled() else "reference"):
            self.fail()

    def backward(self, *_: Any) -> None:
        if self.where == "backward":
            self.fail()

    def is_due(self) -> bool:
        self.count += 1
        return self.count == self.number

    def fail(self) -> None:
        if self.is_due():
            self.is_raised = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    "where", ["backward", *(pytest.param(where, marks=pytest.mark.long) for where in ("policy", "reference"))]
)
def test_a_micro_batch_that_does_not_fit_is_computed_again(
    where: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = STEPS | {"num_train_epochs": 1, "gradient_checkpointing": False}
    with exactly(torch.float64):
        weights = train(trainer_of(tokenizer, tmp_path, 0, **given))
        number, was_raised = 1, True
        while was_raised:  # at every micro-batch
            trainer = trainer_of(tokenizer, tmp_path, 100, **given)
            trainer._is_compared = True
            failing = Failing(trainer, where, number)
            check_weights(weights, train(trainer))
            was_raised, number = failing.is_raised, number + 1
            found = capsys.readouterr().out
            assert found.count("Out of memory: a micro-batch of ") == was_raised
            assert (trainer._budget < 100) == ("--tokens_per_microbatch is" in found)  # not for a single pair
    assert number > 4


@pytest.mark.parametrize("where", ["policy", "backward", "reference"])
def test_a_pair_that_never_fits_ends_the_run_with_its_row(where: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tokenizer, tmp_path, 100, **STEPS | {"gradient_checkpointing": False})
    trainer._is_compared = True
    failing = Failing(trainer, where, 1)
    failing.is_due = lambda: True  # type: ignore[method-assign]
    run = Run(tmp_path / "run", {"step": "dpo", "status": "running"})
    trainer.keep_budget(run)
    with pytest.raises(UserError, match=r"^Row \d of the training pairs, of \d+ tokens, is too large for the memory"):
        trainer.train()
    assert "tokens_per_microbatch" not in run.record  # nothing was computed with a smaller one


def test_parts_are_full_and_every_pair_is_in_one() -> None:
    prompts, answers = [20, 1, 40, 7, 12, 3, 25], [(9, 14), (5, 30), (12, 1), (2, 4), (33, 4), (6, 1), (1, 18)]
    ids, mask = torch.zeros(14, 60, dtype=torch.long), torch.zeros(14, 60, dtype=torch.long)
    for i, (prompt, sides) in enumerate(zip(prompts, answers, strict=True)):
        for side, length in enumerate(sides):
            ids[i + 7 * side, :prompt], ids[i + 7 * side, prompt:] = 7, 8 + side
            mask[i + 7 * side, : prompt + length] = 1
    batch = PairBatch([{"input_ids": ids, "attention_mask": mask}])
    assert batch.lengths == [(p, *sides) for p, sides in zip(prompts, answers, strict=True)]
    for packed in (True, False):
        for budget in (1, 40, 70, 106, 150, 1000):
            parts = batch.cut(budget, packed, range(7))
            assert sorted(pair for part in parts for pair in part) == list(range(7))
            assert all(batch.tokens(part, packed) <= budget for part in parts if len(part) > 1)
    assert [batch.tokens(part, True) for part in batch.cut(106, True, range(7))] == [102, 100, 46]
    assert len(batch.cut(1, True, range(7))) == 7
    assert batch.cut(180, False, range(7)) == [[2], [4, 6], [0, 1], [3, 5]]


def test_the_reference_of_evaluation_pairs_is_computed_once(tokenizer: Any, tmp_path: Path) -> None:
    given = STEPS | {"per_device_eval_batch_size": 3}
    with exactly(torch.float64):
        plain = trainer_of(tokenizer, tmp_path, 0, **given)
        cut = trainer_of(tokenizer, tmp_path, 90, **given)
        passes, found = forwards(cut), []
        for trainer in (plain, cut):
            first = trainer.evaluate()
            before = len(passes)
            trainer.train()
            trained, second = len(passes), trainer.evaluate()
            found.append([first, second])
            assert first["eval_rewards/margins"] != second["eval_rewards/margins"]
    ours = len(passes) - trained
    assert ours == 2 + 1 + 1  # the policy alone, of 3 batches
    assert before > 2 * ours  # with the reference, and the comparison with TRL
    for one, two in zip(*found, strict=True):
        for name in set(one) - {n for n in one if n.endswith(("_time", "runtime", "per_second"))}:
            assert two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-9), name


def test_a_smaller_budget_is_kept_in_the_run(tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tokenizer, tmp_path, 100, **STEPS | {"gradient_checkpointing": False, "max_steps": 1})
    trainer._is_compared = True
    run = Run(tmp_path / "run", {"step": "dpo", "status": "running"})
    trainer.keep_budget(run)
    Failing(trainer, "backward", 2)
    trainer.train()
    found = json.loads((tmp_path / "run" / "run.json").read_text())["tokens_per_microbatch"]
    assert 0 < found == trainer._budget < 100
    # by --tokens_per_microbatch and its number of tokens: auto with much more memory, and a number, are taken
    for given, tokens, expected in (
        ("auto", 100, found), ("auto", 105, found), ("auto", 200, 200), ("auto", found - 1, found - 1), (100, 100, 100),
        (found + 1, found + 1, found + 1), (10, 10, 10), (0, 0, 0),
    ):  # fmt: skip
        run.record["settings"] = {"tokens_per_microbatch": given}
        resumed = trainer_of(tokenizer, tmp_path, tokens, **STEPS)
        resumed.keep_budget(run)
        assert resumed._budget == expected, (given, tokens)
    run.record["settings"] = {"tokens_per_microbatch": 200}
    resumed = trainer_of(tokenizer, tmp_path, 200, **STEPS | {"max_steps": 1})
    resumed.keep_budget(run)
    resumed.train()
    assert run.record["tokens_per_microbatch"] == 200  # which was enough


@pytest.mark.parametrize("where", ["policy", "reference"])
def test_a_pair_that_fails_once_is_computed_again_and_leaves_the_budget(
    where: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = STEPS | {"gradient_checkpointing": False, "max_steps": 1}
    with exactly(torch.float64):
        weights = train(trainer_of(tokenizer, tmp_path, 0, **given))
        trainer = trainer_of(tokenizer, tmp_path, 50, **given)  # of pairs with 11 to 53 tokens
        trainer._is_compared = True
        run = Run(tmp_path / "run", {"step": "dpo", "status": "running"})
        trainer.keep_budget(run)
        failing, passes = Failing(trainer, where, 1), forwards(trainer)
        check_weights(weights, train(trainer))
    assert failing.is_raised
    assert max(passes) in (46, 49, 53)
    assert trainer._budget == 50
    assert "tokens_per_microbatch" not in run.record
    assert re.search(r"^Out of memory: a micro-batch of \d+ tokens is computed again\.$", capsys.readouterr().out, re.M)


def test_what_needs_the_whole_batch_is_not_cut(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with exactly(torch.float64):
        whole, cut = (step(trainer_of(tokenizer, tmp_path, budget, loss_type=["aot"])) for budget in (0, 20))
    check_equal(whole, cut)
    assert "Micro-batches: off, because the loss aot compares all pairs of a batch." in capsys.readouterr().out
    model, args = build(), DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    assert no_microbatch_reason(model.config, vars(args)) == ""
    for optimizer in ("adalomo", "galore_adamw_layerwise"):
        own = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", optim=optimizer)
        assert no_microbatch_reason(model.config, vars(own)) == f"{optimizer} updates weights in the backward pass"
    for kind in ("dynamic", "longrope"):
        model.config.rope_parameters = {"rope_type": kind}
        assert no_microbatch_reason(model.config, vars(args)) == "rotary embeddings follow the longest row of a batch"
    model.config.rope_parameters = {"full_attention": {"rope_type": "default"}}
    assert no_microbatch_reason(model.config, vars(args)) == ""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert no_microbatch_reason(model.config, vars(args)) == "DeepSpeed and FSDP need as many passes in every process"


@pytest.mark.parametrize(
    ("text", "is_lack"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("MPS backend out of memory (MPS allocated: 1 GB)", True),
        ("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_lack_of_memory_has_many_names(text: str, is_lack: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) == is_lack
    assert is_out_of_memory(torch.OutOfMemoryError("")) is True


def test_auto_fills_the_memory_that_the_model_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("mistral", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    values = QLORA | {"gradient_accumulation_steps": 16, "memory_gb": 24.0, "tokens_per_microbatch": "auto"}
    settings: Any = SimpleNamespace(values=lambda: dict(values), step="dpo", accumulation_steps=lambda: 16)
    model = SimpleNamespace(config=config, device=torch.device("cpu"))
    assert microbatch_tokens(settings, model) == 4096
    model.device = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 3 * GB)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 2 * GB)
    found = []
    for free in (4, 6, 8, 70):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free * GB, 80 * GB))
        found.append(microbatch_tokens(settings, model))
        decoder = read_decoder(config.to_dict())
        parts = memory_by_part(decoder, TrainingSpec(values, "dpo", decoder), found[-1])
        assert parts["peak"] - parts["weights"] <= 0.9 * (free + 1) * GB
    assert 2 * 1512 < found[0] < found[1] < found[2] < found[3] == 16 * 2 * 1512
    values["tokens_per_microbatch"] = 1234
    assert microbatch_tokens(settings, model) == 1234
