"""The shared prefix gives what stock DPOTrainer gives: log-probabilities, losses, metrics and gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import DPOConfig
from trl.trainer import utils

from helpers import shared_prefix
from helpers.errors import UserError
from helpers.prefix_packing import Plan, Varlen, pack
from helpers.shared_prefix import SharedPrefixDPOTrainer

VOCABULARY = 300
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
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **more)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_stock_computes(
    kind: str, peft: bool, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with exactly(dtype):
        found = [
            step(train_with(mode, build(kind, dtype), tokenizer, tmp_path, adapter() if peft else None))
            for mode in ("off", "on")
        ]
        compare(*found, exact=dtype == torch.float64)


def rejected_sees_chosen(self: Plan) -> Iterator[tuple[slice, list[slice]]]:
    starts = [0]
    for prefix, chosen, _ in self.lengths:
        starts.append(starts[-1] + prefix + chosen)
    tailed = [i for i, (_, _, rejected) in enumerate(self.lengths) if rejected]
    for n, (queries, keys) in enumerate(BRANCHES(self)):
        i = n - len(self.lengths)
        yield queries, keys if i < 0 else [slice(starts[tailed[i]], starts[tailed[i] + 1]), keys[1]]


def a_prompt_token_is_dropped(self: Plan) -> Iterator[tuple[slice, list[slice]]]:
    for queries, keys in BRANCHES(self):
        yield queries, keys if len(keys) == 1 else [slice(keys[0].start, keys[0].stop - 1), keys[1]]


def positions_go_on(*words: Any) -> Any:
    batch = pack(*words)
    return dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


BRANCHES = Plan.branches
WRONG: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rejected attends to chosen": (Plan, "branches", rejected_sees_chosen),
    "positions are not restarted": (shared_prefix, "pack", positions_go_on),
    "one prompt token is dropped": (Plan, "branches", a_prompt_token_is_dropped),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_wrong_is_found_by_this_comparison_and_by_the_run_itself(
    wrong: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with exactly(dtype):
        stock = step(train_with("off", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        monkeypatch.setattr(*WRONG[wrong])
        trainer = train_with("on", build(dtype=dtype), tokenizer, tmp_path, adapter())
        trainer._compared = True  # go on without the run's own comparison
        with pytest.raises(AssertionError):
            compare(stock, step(trainer), exact=dtype == torch.float64)
        with pytest.raises(
            UserError, match=r"--shared_prefix on cannot be: the first batch's log-prob.*\(read in 1.16"
        ):
            step(train_with("on", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        capsys.readouterr()
        compare(
            stock, step(train_with("auto", build(dtype=dtype), tokenizer, tmp_path, adapter()))
        )  # it goes on, as stock
        assert "shared prefix: off, because the first batch's log-probabilities differ" in capsys.readouterr().out


LOSSES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        "discopop", "sft", "sigmoid_norm",
    )),
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"label_smoothing": 0.2},
    {"use_weighting": True},
    {"ld_alpha": 0.5},
    *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
]  # fmt: skip


@pytest.mark.parametrize("given", LOSSES, ids=lambda given: " ".join(f"{n}={v}" for n, v in given.items()))
def test_every_loss_is_what_stock_computes(
    given: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = [step(train_with(mode, build(), tokenizer, tmp_path, adapter(), **given)) for mode in ("off", "on")]
    compare(*found)


def test_every_loss_that_trl_has_is_among_them() -> None:
    from helpers.trl_fields import losses

    named = [given.get("loss_type", "sigmoid") for given in LOSSES]
    assert {name for names in named for name in ([names] if isinstance(names, str) else names)} == losses()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_of_both_kinds_and_an_adapter_that_is_trained_further(
    checkpointing: bool, reentrant: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    given = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = get_peft_model(build(), adapter(use_dora=True))  # TRL keeps a frozen copy of it, "ref"
        trainer = train_with(mode, model, tokenizer, tmp_path, **given)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad and "lora_B" in name:
                    weight += 0.1
        found.append(step(trainer))
    compare(*found)
    assert float(found[0]["rewards/margins"]) != 0


def test_reference_log_probabilities_computed_before_and_evaluation(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = []
    for mode in ("off", "on"):
        data = rows().add_column("mode", [mode] * len(LENGTHS))  # the cache of one does not answer the other
        given = {"precompute_ref_log_probs": True, "per_device_eval_batch_size": 3}
        trainer = train_with(mode, build(), tokenizer, tmp_path, adapter(), data.remove_columns("mode"), **given)
        metrics = {k: torch.tensor(v) for k, v in trainer.evaluate().items() if "eval_" in k and "per_second" not in k}
        metrics.pop("eval_runtime")
        found.append(step(trainer) | metrics)
        assert trainer.sharing is None if mode == "off" else trainer.sharing.packed is not None
    compare(*found)


def test_generation_is_left_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    texts = []
    for mode in ("off", "on"):
        trainer = train_with(mode, build(), tokenizer, tmp_path, adapter())
        step(trainer)
        texts.append(trainer.model.eval().generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert texts[0] == texts[1]


def test_where_it_does_not_apply_one_line_says_why(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = step(train_with("off", build(attention="eager"), tokenizer, tmp_path, adapter()))
    capsys.readouterr()
    compare(stock, step(train_with("auto", build(attention="eager"), tokenizer, tmp_path, adapter())))
    assert "shared prefix: off, because it has no path for eager attention" in capsys.readouterr().out
    with pytest.raises(UserError, match="--shared_prefix on cannot be: it has no path for eager attention"):
        train_with("on", build(attention="eager"), tokenizer, tmp_path, adapter())


def test_a_packed_row_holds_each_prompt_once() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    answers = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])
    batch = pack(ids, mask, ids.masked_fill(answers == 0, -100))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 6, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]]
    assert batch.plan.lengths == [(3, 2, 1), (2, 1, 3)]
    assert batch.labels.tolist() == [[4, 5, 9, 6, 10, 11, 12]]
    assert batch.plan.gather.tolist() == [2, 3, 6, 2, 6, 9, 10]  # the last of a prompt scores both first tokens
    branches = [(q.start, q.stop, [(k.start, k.stop) for k in keys]) for q, keys in batch.plan.branches()]
    assert branches == [(0, 5, [(0, 5)]), (5, 8, [(5, 8)]), (8, 9, [(0, 3), (8, 9)]), (9, 12, [(5, 7), (9, 12)])]


def dense(plan: Plan, window: int | None) -> torch.Tensor:
    """Who sees whom in the whole packed row, from the branches."""
    count = sum(map(sum, plan.lengths))
    seen = torch.zeros(count, count, dtype=torch.bool)
    for queries, keys in plan.branches():
        there = [i for where in keys for i in range(where.start, where.stop)]
        own = list(range(queries.start, queries.stop))
        for row, query in enumerate(own):
            last = len(there) - len(own) + row
            first = 0 if window is None else max(0, last - window + 1)
            seen[query, there[first : last + 1]] = True
    return seen


@pytest.mark.parametrize("lengths", [[(3, 2, 1), (2, 1, 3)], [(5, 0, 4)], [(4, 2, 0), (1, 1, 1)], [(4, 2, 0)]])
def test_the_borders_for_flash_attention_say_what_a_dense_mask_says(lengths: list[tuple[int, int, int]]) -> None:
    plan = Plan(lengths, torch.empty(0))
    where = Varlen.of(plan, torch.device("cpu"))
    seen = torch.zeros_like(dense(plan, None))
    for start, end in zip(where.chosen[:-1].tolist(), where.chosen[1:].tolist(), strict=True):
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    for i in range(len(where.rejected) - 1):
        queries = range(plan.first + int(where.rejected[i]), plan.first + int(where.rejected[i + 1]))
        keys = where.keys[where.rejected_keys[i] : where.rejected_keys[i + 1]].tolist()
        for row, query in enumerate(queries):  # causal, aligned at the lower right
            seen[query, keys[: len(keys) - len(queries) + row + 1]] = True
    assert torch.equal(seen, dense(plan, None))
    assert where.longest_chosen == max(p + c for p, c, _ in lengths)
    assert where.longest_rejected == max(r for _, _, r in lengths)
    assert where.longest_keys == max((p + r for p, _, r in lengths if r), default=0)
    assert where.chosen.dtype == where.rejected.dtype == where.rejected_keys.dtype == torch.int32


def varlen_by_hand(
    query: Any, key: Any, value: Any, attention_mask: Any, *, cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None,
    softmax_scale: float, sliding_window: int | None, max_length_q: int = 0, max_length_k: int = 0, **more: Any,
) -> Any:  # fmt: skip
    """What flash-attention's varlen call gives, sequence by sequence; without borders, the whole as one batch."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    if cu_seq_lens_q is None:
        rows = [(b, slice(None), slice(None)) for b in range(len(query))]
    else:
        q, k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
        rows = [(0, slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]
        assert max(b - a for a, b in itertools.pairwise(q)) == max_length_q
        assert max(b - a for a, b in itertools.pairwise(k)) == max_length_k
    out = torch.zeros_like(query)
    for b, queries, keys in rows:
        score = torch.einsum("ihd,jhd->hij", query[b, queries], key[b, keys]) * softmax_scale
        i, j = torch.arange(score.shape[1])[:, None] + score.shape[2] - score.shape[1], torch.arange(score.shape[2])
        seen = (j <= i) if sliding_window is None else (j <= i) & (j > i - sliding_window)
        out[b, queries] = torch.einsum("hij,jhd->ihd", score.masked_fill(~seen, -torch.inf).softmax(-1), value[b, keys])
    return out


@pytest.mark.parametrize("kind", ["mistral", "sliding mistral"])
def test_the_varlen_path_is_what_stock_computes(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = step(train_with("off", build(kind), tokenizer, tmp_path, adapter()))
    monkeypatch.setattr(shared_prefix, "_flash_attention_forward", varlen_by_hand)
    monkeypatch.setattr(
        shared_prefix, "SDPA", shared_prefix.FLASH
    )  # as where the model was loaded with flash-attention
    trainer = train_with("on", build(kind), tokenizer, tmp_path, adapter())
    trainer._compared = True  # stock has no kernel here to compare with
    assert trainer.model.config._attn_implementation == shared_prefix.FLASH
    compare(stock, step(trainer))
