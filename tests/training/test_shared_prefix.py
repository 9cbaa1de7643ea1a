"""The shared prefix gives what stock DPOTrainer gives: log-probabilities, losses, metrics and gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import DPOConfig
from trl.trainer import utils

from helpers.core import SettingsError, UserError
from helpers.models.plan import disable_cpu_4bit_repacking, upcast_adapter
from helpers.training import trainer as shared_prefix
from helpers.training.prefix_sharing import PackingPlan, VarlenLayout, flash_packed, pack_pairs, packed_attention
from helpers.training.trainer import SharedPrefixDPOTrainer

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


def rejected_sees_chosen(self: PackingPlan) -> Iterator[tuple[int, int]]:
    for row, _ in TAILS(self):
        yield row, self.sizes[row]


def a_prompt_token_is_dropped(self: PackingPlan) -> Iterator[tuple[int, int]]:
    for row, seen in TAILS(self):
        yield row, seen - 1


def positions_go_on(*words: Any) -> Any:
    batch = pack_pairs(*words)
    return dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


TAILS = PackingPlan.tails
WRONG: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rejected attends to chosen": (PackingPlan, "tails", rejected_sees_chosen),
    "positions are not restarted": (shared_prefix, "pack", positions_go_on),
    "one prompt token is dropped": (PackingPlan, "tails", a_prompt_token_is_dropped),
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


@pytest.mark.parametrize("wrong", WRONG)
def test_in_bfloat16_a_run_finds_what_is_wrong_and_takes_what_is_right(
    wrong: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step(train_with("on", build(dtype=torch.bfloat16), tokenizer, tmp_path, adapter()))
    assert "shared prefix: on; the first batch's log-probabilities differ" in capsys.readouterr().out
    monkeypatch.setattr(*WRONG[wrong])
    with pytest.raises(UserError, match=r"--shared_prefix on cannot be: the first batch's log-probabilities differ"):
        step(train_with("on", build(dtype=torch.bfloat16), tokenizer, tmp_path, adapter()))


def test_on_weights_in_4_bits(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    found = []
    for mode in ("off", "on"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
        )
        disable_cpu_4bit_repacking(model)
        torch.manual_seed(0)
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter())))
    compare(*found)


def test_layers_of_several_kinds_as_gemma_has_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Windows in some layers, norms within attention, and positions that differ by layer."""
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter())))
    compare(*found)


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
    from helpers.settings.trl_fields import loss_names

    named = [given.get("loss_type", "sigmoid") for given in LOSSES]
    assert {name for names in named for name in ([names] if isinstance(names, str) else names)} == loss_names()


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
        metrics = {name: value for name, value in metrics.items() if not name.endswith("time")}
        found.append(step(trainer) | metrics)
        assert trainer.sharing is None if mode == "off" else trainer.sharing.on
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
    batch = pack_pairs(ids, mask, ids.masked_fill(answers == 0, -100))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 6, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]]
    assert batch.plan.lengths == [(3, 2, 1), (2, 1, 3)]
    assert batch.labels.tolist() == [[4, 5, 9, 6, 10, 11, 12]]
    assert batch.plan.gather.tolist() == [2, 3, 6, 2, 6, 9, 10]  # the last of a prompt scores both first tokens
    assert batch.plan.sizes == [5, 3, 1, 3]
    assert list(batch.plan.tails()) == [(0, 3), (1, 2)]


def dense(lengths: list[tuple[int, int, int]]) -> torch.Tensor:
    """Who sees whom in the whole packed row."""
    owners = [(pair, i < p, "chosen", i) for pair, (p, c, _) in enumerate(lengths) for i in range(p + c)]
    owners += [(pair, False, "rejected", p + i) for pair, (p, _, r) in enumerate(lengths) for i in range(r)]
    seen = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for i, (pair, _, side, at) in enumerate(owners):
        for j, (other, in_prefix, its, there) in enumerate(owners):
            seen[i, j] = pair == other and there <= at and (side == its or in_prefix)
    return seen


@pytest.mark.parametrize("lengths", [[(3, 2, 1), (2, 1, 3)], [(5, 0, 4)], [(4, 2, 0), (1, 1, 1)], [(4, 2, 0)]])
def test_the_borders_for_flash_attention_say_what_a_dense_mask_says(lengths: list[tuple[int, int, int]]) -> None:
    plan = PackingPlan(lengths, torch.empty(0))
    where = VarlenLayout.of(plan, torch.device("cpu"))
    seen = torch.zeros_like(dense(lengths))
    for start, end in zip(where.chosen[:-1].tolist(), where.chosen[1:].tolist(), strict=True):
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    for i in range(len(where.rejected) - 1):
        queries = range(plan.first + int(where.rejected[i]), plan.first + int(where.rejected[i + 1]))
        keys = where.keys[where.rejected_keys[i] : where.rejected_keys[i + 1]].tolist()
        for row, query in enumerate(queries):  # causal, aligned at the lower right
            seen[query, keys[: len(keys) - len(queries) + row + 1]] = True
    assert torch.equal(seen, dense(lengths))
    assert where.longest_chosen == max(p + c for p, c, _ in lengths)
    assert where.longest_rejected == max(r for _, _, r in lengths)
    assert where.longest_keys == max((p + r for p, _, r in lengths if r), default=0)
    assert where.chosen.dtype == where.rejected.dtype == where.rejected_keys.dtype == torch.int32


def varlen_by_hand(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), **more: Any,
) -> Any:  # fmt: skip
    """What flash-attention's varlen kernel gives, (tokens, heads, size), sequence by sequence."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max(b - a for a, b in itertools.pairwise(q)) == max_seqlen_q
    assert max(b - a for a, b in itertools.pairwise(k)) == max_seqlen_k
    assert causal
    out = torch.zeros_like(query)
    for i in range(len(q) - 1):
        queries, keys = slice(q[i], q[i + 1]), slice(k[i], k[i + 1])
        score = torch.einsum("ihd,jhd->hij", query[queries], key[keys]) * softmax_scale
        own, there = (
            torch.arange(score.shape[1])[:, None] + score.shape[2] - score.shape[1],
            torch.arange(score.shape[2]),
        )
        seen = there <= own
        if window_size[0] >= 0:
            seen &= there >= own - window_size[0]
        out[queries] = torch.einsum("hij,jhd->ihd", score.masked_fill(~seen, -torch.inf).softmax(-1), value[keys])
    return out


@pytest.mark.parametrize("kind", ["mistral", "sliding mistral"])
def test_the_varlen_path_is_what_stock_computes(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kernels = (None, varlen_by_hand, None, None, None), (flash._lazy_define_process_function(varlen_by_hand), dict)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *words, **more: kernels)
    packed = packed_attention(flash_attention_forward, flash_packed)

    def attend(*words: Any, plan: PackingPlan | None = None, **more: Any) -> Any:
        if plan is None:  # there is no padding without the package's own code
            return sdpa_attention_forward(*words, **more)
        return packed(*words, plan=plan, **more)

    attend.computes_plans = True  # type: ignore[attr-defined]
    stock = step(train_with("off", build(kind), tokenizer, tmp_path, adapter()))
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", attend)
    try:
        compare(stock, step(train_with("on", build(kind), tokenizer, tmp_path, adapter())))
    finally:
        AttentionInterface.register("sdpa", before)


def test_a_second_trainer_of_a_model_shares_too_and_nothing_of_it_is_saved(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build()
    keys = set(model.config.to_dict())
    found = []
    for mode in ("on", "on", "off"):
        trainer = train_with(mode, model, tokenizer, tmp_path)
        trainer.ref_model.load_state_dict(build().state_dict())
        model.load_state_dict(build().state_dict())
        found.append(step(trainer))
        model.zero_grad()
    for name, value in found[2].items():
        if not name.startswith("gradient"):
            torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert {k for k in json.loads((tmp_path / "saved" / "config.json").read_text()) if k.startswith("_")} <= keys
    assert "shared_prefix" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_model_that_does_not_pass_the_plan_on_goes_on_as_stock(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(
        "stablelm", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    found = []
    for mode in ("off", "auto"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # TRL writes into it
        found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter())))
    compare(*found)
    assert "shared prefix: off, because the model does not take a packed row (" in capsys.readouterr().out


def test_layers_with_windows_of_their_own_and_rows_that_are_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=2,
    )  # fmt: skip
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    for most in (None, 30, 22):  # of the third pair only the prompt is left, or not even that
        found = []
        for mode in ("off", "on"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # TRL writes into it
            found.append(step(train_with(mode, model, tokenizer, tmp_path, adapter(), max_length=most)))
        compare(*found)


def test_other_words_and_settings_that_cannot_be_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="--shared_prefix takes auto, on or off, not 'onn'"):
        train_with("onn", build(), tokenizer, tmp_path, adapter())
    with pytest.raises(UserError, match="torch_compile would compile anew"):
        train_with("on", build(), tokenizer, tmp_path, adapter(), torch_compile=True)
    with pytest.raises(UserError, match="dropout would be the same for both answers"):
        train_with("on", build(), tokenizer, tmp_path, adapter(), disable_dropout=False)
