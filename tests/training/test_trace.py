"""A step of Mistral-7B as on a GPU: the memory that --dry_run estimates, and attention without needless masks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from helpers.models.memory import GB, TrainingSpec, memory_by_part, read_decoder, suggest_changes
from tests.conftest import marks
from tests.models.test_memory import MISTRAL_7B, QLORA
from tests.training.trace import Traced, trace_step

VALUES = QLORA | {"gradient_checkpointing": True}


def trace(layers: int, shared: bool, given: dict[str, Any], prompt: int = 1, **more: Any) -> tuple[Traced, float]:
    """A traced step of pairs as long as they may be, and the estimate of its peak divided by the traced one."""
    config = MISTRAL_7B | {"num_hidden_layers": layers, "sliding_window": None}
    values = VALUES | {"shared_prefix": "auto" if shared else "off"} | given
    answer = values["max_length"] - prompt
    pairs = [(prompt, answer, answer - 8)] * values["per_device_train_batch_size"]  # TRL pads the second row
    traced = trace_step(config, values, pairs, shared, **more)
    if values["tuning"] == "full":
        values |= {"optim": "adamw_8bit"}
    decoder = read_decoder(config)
    return traced, memory_by_part(decoder, TrainingSpec(values, "dpo", decoder))["peak"] / traced.peak


def check_calls(traced: Traced, shared: bool, varlen: bool) -> None:
    """No kernel that repeats what it need not: never a mask with GQA, and none where attention is plainly causal."""
    assert traced.calls
    assert not any(call.mask and call.gqa for call in traced.calls)
    if shared:
        assert not any(call.mask for call in traced.calls if call.square)
        assert any(call.square for call in traced.calls)
        assert {call.kernel for call in traced.calls} == ({"varlen"} if varlen else {"flash", "efficient"})


def test_a_small_step_holds_what_is_estimated_and_needs_no_mask() -> None:
    traced, ratio = trace(2, True, {"lora_r": 16, "max_length": 640})
    check_calls(traced, shared=True, varlen=True)
    assert 0.98 <= ratio <= 1.08


@pytest.mark.long
def test_without_the_varlen_kernel_only_tails_have_masks() -> None:
    traced, _ = trace(2, True, {"lora_r": 16, "max_length": 640}, prompt=400, varlen=False)
    check_calls(traced, shared=True, varlen=False)


@pytest.mark.long
@pytest.mark.parametrize("shared", [False, True], ids=["stock", "shared"])
def test_the_default_step_of_mistral_7b_holds_what_is_estimated(shared: bool) -> None:
    traced, ratio = trace(32, shared, {})
    check_calls(traced, shared=shared, varlen=True)
    assert 0.98 <= ratio <= 1.08


@pytest.mark.parametrize("shared", [False, True], ids=["stock", "shared"])
@pytest.mark.parametrize(
    ("batch", "rank"),
    [
        pytest.param(batch, rank, marks=marks(False, (batch, rank) in ((1, 16), (4, 256), (8, 16))))
        for batch in (1, 4, 8)
        for rank in (16, 256)
    ],
)
def test_a_step_of_a_quarter_of_mistral_7b_holds_what_is_estimated(batch: int, rank: int, shared: bool) -> None:
    """With eight layers of 32: less time, and activations weigh more."""
    traced, ratio = trace(8, shared, {"lora_r": rank, "per_device_train_batch_size": batch})
    check_calls(traced, shared=shared, varlen=True)
    assert 0.98 <= ratio <= 1.08


OTHERS: dict[str, dict[str, Any]] = {
    "without quantization": {"tuning": "lora", "lora_r": 16},
    "full": {"tuning": "full"},
    "without checkpointing": {"lora_r": 16, "gradient_checkpointing": False},
    "full without checkpointing": {"tuning": "full", "gradient_checkpointing": False},
    "short": {"lora_r": 16, "max_length": 256},
}


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        pytest.param(name, shared, marks=marks(False, shared == place % 2), id=f"{name}-{('stock', 'shared')[shared]}")
        for place, name in enumerate(OTHERS)
        for shared in (False, True)
    ],
)
def test_other_steps_of_mistral_hold_what_is_estimated(name: str, shared: bool) -> None:
    traced, ratio = trace(8, shared, OTHERS[name])
    check_calls(traced, shared=shared, varlen=True)
    assert 0.98 <= ratio <= 1.08


@pytest.mark.parametrize("memory", [pytest.param(gb, marks=marks(False, gb < 80)) for gb in (16, 24, 80)])
def test_what_dry_run_proposes_fits(memory: int) -> None:
    """The default recipe with 16 pairs at once, which fits 80 GB alone: the first change that is proposed otherwise."""
    decoder, values = read_decoder(MISTRAL_7B), VALUES | {"per_device_train_batch_size": 16, "shared_prefix": "auto"}
    peak = memory_by_part(decoder, TrainingSpec(values, "dpo", decoder))["peak"]
    assert (peak <= memory * GB) == (memory == 80)
    flags, expected = (f"--lora_r {values['lora_r']}", peak) if memory == 80 else suggest_changes(
        decoder, values, "dpo", memory * GB)[0]  # fmt: skip
    words = flags.replace("--", "").split()
    given = {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    traced, ratio = trace(32, True, values | given)
    assert traced.peak <= memory * GB
    assert 0.98 <= ratio <= 1.08
    assert expected == pytest.approx(ratio * traced.peak)


@pytest.mark.parametrize("memory", [pytest.param(gb, marks=marks(False, gb < 80)) for gb in (16, 24, 80)])
def test_a_micro_batch_of_the_size_that_dry_run_chooses_holds_what_is_estimated(memory: int) -> None:
    decoder = read_decoder(MISTRAL_7B)
    values = VALUES | {"per_device_train_batch_size": 16, "shared_prefix": "auto", "tokens_per_microbatch": "auto"}
    spec = TrainingSpec(values | {"memory_gb": memory}, "dpo", decoder)
    pairs = math.ceil(spec.tokens / spec.pair)
    given = {"per_device_train_batch_size": pairs, "max_length": spec.tokens // (2 * pairs)}
    traced, ratio = trace(32, True, given)
    assert traced.peak <= memory * GB
    assert 0.98 <= ratio <= 1.08
    assert memory_by_part(decoder, spec)["peak"] == pytest.approx(ratio * traced.peak, rel=0.01)
