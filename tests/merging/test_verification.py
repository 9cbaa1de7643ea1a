"""A merged model is compared with the trained policy, and is kept only if they are the same."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from helpers.core import UserError
from helpers.merging.merge import (
    Adapter,
    LoadPrecision,
    MergedModel,
    merge_adapter,
    staging_dir,
)
from helpers.merging.verify import (
    Verification,
    compare_layers,
    compare_logits,
    held_out_prompts,
    last_logits,
    verify_merge,
)
from helpers.merging.weights import (
    StreamingMerger,
)
from helpers.models.chat import encode_prompt
from helpers.runs.run import Run, read_run
from tests.merging.models import LORA, build, our_merge, save, tensors
from tests.tiny import tiny_mistral


def printed(thing: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_layers_are_compared_where_a_model_is_too_large(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, build(), LORA)
    folder = our_merge(base, adapter)
    good = compare_layers(StreamingMerger(base, adapter), folder)
    assert good["layers"] == 14  # two of each of seven kinds
    assert good["relative"] < 1e-5
    assert good["applied"] == pytest.approx(1, abs=1e-4)
    for wrong in ("v_proj", "down_proj"):
        copied = tmp_path / f"without-{wrong}"
        weights = tensors(folder)
        weights |= {n: w for n, w in tensors(base).items() if wrong in n}
        copied.mkdir()
        save_file(weights, copied / "model.safetensors")
        found = compare_layers(StreamingMerger(base, adapter), copied)
        assert found["relative"] > 0.05
        assert found["applied"] == pytest.approx(0, abs=1e-4)


def test_a_merge_is_verified_by_its_kl_or_its_layers() -> None:
    rows = {"merged into original": {"max_abs": 1e-5, "mean_abs": 1e-6, "top1": 1.0, "kl": 2.9e-9}}
    rows["base alone"] = {"max_abs": 2.0, "mean_abs": 0.2, "top1": 0.7, "kl": 0.05}
    good = Verification(rows["merged into original"], rows)
    assert good.problem == ""
    assert printed(good).splitlines()[0] == "Merge verified: KL 3e-9 nats; base alone 5e-2"
    assert "100.00%" in printed(good)
    layers = Verification({"layers": 14, "relative": 1e-6, "applied": 1.0})
    assert layers.problem == ""
    assert printed(layers).startswith("Merge verified: outputs of 14 layers differ by 1e-6 at most")
    wrong = Verification({"layers": 14, "relative": 0.1})
    assert wrong.problem.startswith("layers differ by 1e-1, more than rounding. Check the adapter")
    empty = Verification({"layers": 14, "relative": 1e-4, "applied": 0.01}, dtype="bfloat16")
    assert empty.problem == f"{ROUNDED}. Use `--merge_dtype float32`."


ROUNDED = "inconclusive: the adapter changes the model less than rounding to bfloat16 does"
NO_EFFECT = "inconclusive: the adapter changes the model less than rounding to float32 does. Train it further"
FURTHER = "KL {} is not below that of the base alone, {}"


@pytest.mark.parametrize(
    ("kl", "base", "computing", "max_kl", "dtype", "expected"),
    [
        (2.9e-9, 0.05, None, 1e-10, "float32", "KL 3e-9 is above --max_kl 1e-10. Check"),
        (0.5, 0.8, None, 1.0, "float32", ""),  # an allowed difference is no second verdict
        (float("nan"), 0.05, None, 0.01, "float32", "KL nan is above --max_kl 0.01"),
        (1e-5, float("nan"), None, 0.01, "float32", "KL 1e-5 is not below"),
        (2e-3, 1e-3, None, 0.01, "float32", FURTHER.format("2e-3", "1e-3")),
        (1.7e-3, 8.5e-5, 1.6e-3, 0.01, "bfloat16", ROUNDED),
        (8e-5, 8.5e-5, 1.6e-3, 0.01, "bfloat16", ROUNDED),  # the adapter is rounded away
        (1e-7, 8.5e-5, 1.6e-3, 0.01, "bfloat16", ""),  # its weights are right, whatever bfloat16 computes with them
        (9e-3, 8e-3, 1e-5, 0.01, "bfloat16", FURTHER.format("9e-3", "8e-3")),  # more than rounding
        (2e-3, 1e-3, None, 0.01, "bfloat16", ROUNDED),  # too large for float32: both are rounded
        (5e-4, 1e-3, None, 0.01, "bfloat16", ""),
        (0.0, 0.0, None, 0.01, "float32", NO_EFFECT),  # an adapter that was never trained
        (3e-10, 2e-10, None, 0.01, "float32", NO_EFFECT),
        (3e-10, 2e-8, None, 0.01, "float32", ""),
    ],
)
def test_the_verdict_is_relative_to_the_base_and_the_only_one(
    kl: float, base: float, computing: float | None, max_kl: float, dtype: str, expected: str
) -> None:
    rest = {"max_abs": 1.0, "mean_abs": 0.1, "top1": 0.9}
    rows = {"merged into original": rest | {"kl": kl}, "base alone": rest | {"kl": base}}
    rows |= {} if computing is None else {f"computed in {dtype}": rest | {"kl": computing}}
    verification = Verification(rows["merged into original"], rows, max_kl, dtype)
    assert verification.problem.startswith(expected) if expected else verification.problem == ""
    lines = printed(verification).splitlines()
    assert sum(line.startswith("Merge ") for line in lines) == 1
    assert lines[0].startswith("Merge refused: " if expected else "Merge verified: KL ")


def test_a_merge_that_is_not_the_policy_is_deleted_and_another_replaces_an_older_one(tmp_path: Path) -> None:
    def merged() -> MergedModel:
        run = Run(tmp_path / "merge", {"step": "merge", "parent_folder": str(tmp_path)})
        folder = staging_dir(run)
        folder.mkdir()
        (folder / "merge.digest").touch()
        return MergedModel(run, folder, "original", LoadPrecision())

    bad = merged()
    with pytest.raises(UserError, match=r"The merge was deleted: KL 5e-1 is above --max_kl 0.01"):
        bad.finalize(Verification({"kl": 0.5}))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "older").touch()
    good = merged()
    good.finalize(Verification({"kl": 1e-9}))
    assert [folder.name for folder in tmp_path.glob("[!.]*")] == ["merge"]
    assert [file.name for file in good.folder.iterdir()] == ["run.json"]
    record = read_run(tmp_path / "merge")
    assert (record["status"], record["metrics"], record["merge_base"]) == ("finished", {"kl": 1e-9}, "original")
    good.finalize(Verification({"kl": 0.5}))  # it is finished
    assert read_run(tmp_path / "merge") == record


def test_a_merge_of_before_is_verified_by_its_record(tmp_path: Path) -> None:
    metrics = {"max_abs": 1e-5, "mean_abs": 1e-6, "top1": 1.0, "kl": 2.9e-9}
    for more, verdict in (
        ({}, "KL 3e-9 nats"),
        ({"verification": {"base alone": metrics | {"kl": 1e-3}}}, "KL 3e-9 nats; base alone 1e-3"),
    ):
        record = {"status": "finished", "metrics": metrics, "merge_base": "dequantized", "settings": {"max_kl": 1.0}}
        run = Run(tmp_path, record | more)
        merged = merge_adapter(Adapter(tmp_path, Run(tmp_path, {})), output=run)
        assert (merged.folder, merged.merge_base) == (tmp_path, "dequantized")
        text = printed(verify_merge(merged, Adapter(tmp_path, run), max_kl=1e-12))  # it was judged by another
        assert text.splitlines()[0] == f"Merge verified: {verdict}"
    layers = Run(tmp_path, {"status": "finished", "metrics": {"layers": 2, "relative": 1e-7}, "merge_base": "original"})
    assert printed(verify_merge(merge_adapter(Adapter(tmp_path, layers), output=layers), Adapter(tmp_path, layers)))


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_the_policy_is_compared_with_the_attention_that_is_asked_for(
    attention: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base, folder = save(tmp_path, build(), LORA)
    tokenizer.save_pretrained(folder)
    adapter = Adapter(folder, Run(folder, {}), str(base), attn_implementation=attention)
    policy = adapter.load_policy(LoadPrecision(), "cpu")
    assert policy.get_base_model().config._attn_implementation == ("sdpa" if attention == "auto" else attention)
    assert adapter.loading.get("attn_implementation", "auto") == attention  # of the merge, too


def test_a_merge_is_compared_by_its_logits(tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig, get_peft_model

    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("What is 2 plus 3?", "And?")]
    base = last_logits(tiny_mistral(len(tokenizer)), prompts)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(tiny_mistral(len(tokenizer)), config)
    adapted = last_logits(policy, prompts)
    assert [logits.shape[1] for logits in adapted] == [len(tokenizer)] * 2
    same = compare_logits(adapted, last_logits(policy.merge_and_unload(), prompts))
    other = compare_logits(adapted, base)
    assert same["max_abs"] < 1e-4
    assert same["top1"] == 1
    assert 0 <= same["kl"] < 1e-10  # in single precision 1e-8, of either sign
    assert other["kl"] > 1e-3
    p, q = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert compare_logits([p], [q])["kl"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_line_separators_in_a_held_out_prompt_do_not_break_the_verification(
    mark: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompt = [{"role": "user", "content": f"one{mark}two"}]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n"] * 2
    (tmp_path / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    assert held_out_prompts(Run(tmp_path, {}), tokenizer) == [encode_prompt(tokenizer, prompt)] * 2


def test_prompts_to_verify_on_are_those_of_training_or_rendered_with_its_variables(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages[0].content }}{{ mode }}"
    talk, variables = [{"role": "user", "content": "Say"}], {"mode": " so"}
    data = {"rendered_with": {json.dumps(variables): 2}}
    (tmp_path / "run.json").write_text(json.dumps({"step": "dpo", "data": data}))
    run, file = Run(tmp_path, {}), tmp_path / "held_out.jsonl"
    file.write_text(json.dumps({"prompt": talk, "ids": [5, 6]}) + "\n" + json.dumps({"prompt": talk}) + "\n")
    rendered = own("Say so", add_special_tokens=False)["input_ids"]
    assert held_out_prompts(run, own) == [[5, 6], rendered]
    file.unlink()
    asked = held_out_prompts(run, own)  # five questions
    assert len(asked) == 5
    assert all(ids[-1] == rendered[-1] for ids in asked)
