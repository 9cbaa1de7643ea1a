"""A merged model is compared with the trained policy, and is kept only if they are the same."""

from __future__ import annotations

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
    for wrong in ("v_proj", "down_proj"):
        copied = tmp_path / f"without-{wrong}"
        weights = tensors(folder)
        weights |= {n: w for n, w in tensors(base).items() if wrong in n}
        copied.mkdir()
        save_file(weights, copied / "model.safetensors")
        assert compare_layers(StreamingMerger(base, adapter), copied)["relative"] > 0.05


def test_a_merge_is_verified_by_its_kl_or_its_layers() -> None:
    rows = {"merged into original": {"max_abs": 1e-5, "mean_abs": 1e-6, "top1": 1.0, "kl": 2.9e-9}}
    rows["base alone"] = {"max_abs": 2.0, "mean_abs": 0.2, "top1": 0.7, "kl": 0.05}
    good = Verification(rows["merged into original"], rows)
    assert good.problem(0.01) == ""
    assert printed(good).splitlines()[0] == "Merge verified: KL 3e-9 nats; base alone 5e-2"
    assert "100.00%" in printed(good)
    assert good.problem(1e-10) == "The merged model has KL 2.90e-09, above --max_kl 1e-10"
    assert Verification({"kl": float("nan")}).problem(0.01) == "The merged model has KL nan, above --max_kl 0.01"
    layers = Verification({"layers": 14, "relative": 1e-6})
    assert layers.problem(0.01) == ""
    assert printed(layers).startswith("Merge verified: outputs of 14 layers differ by 1e-6 at most")
    wrong = Verification({"layers": 14, "relative": 0.1})
    assert printed(wrong).startswith("Merge differs from the trained policy: outputs of 14 layers")
    assert wrong.problem(0.01) == "Merged layers differ by 1.0e-01, more than rounding"


def test_a_merge_that_is_not_the_policy_is_deleted_and_another_replaces_an_older_one(tmp_path: Path) -> None:
    def merged() -> MergedModel:
        run = Run(tmp_path / "merge", {"step": "merge", "parent_folder": str(tmp_path)})
        folder = staging_dir(run)
        folder.mkdir()
        (folder / "merge.digest").touch()
        return MergedModel(run, folder, "original", LoadPrecision())

    bad = merged()
    with pytest.raises(UserError, match="The merge was deleted"):
        bad.finalize(Verification({"kl": 0.5}), max_kl=0.01)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "older").touch()
    good = merged()
    good.finalize(Verification({"kl": 1e-9}), max_kl=0.01)
    assert [folder.name for folder in tmp_path.glob("[!.]*")] == ["merge"]
    assert [file.name for file in good.folder.iterdir()] == ["run.json"]
    record = read_run(tmp_path / "merge")
    assert (record["status"], record["metrics"], record["merge_base"]) == ("finished", {"kl": 1e-9}, "original")
    good.finalize(Verification({"kl": 0.5}), max_kl=0.01)  # it is finished
    assert read_run(tmp_path / "merge") == record


def test_a_merge_of_before_is_verified_by_its_record(tmp_path: Path) -> None:
    metrics = {"max_abs": 1e-5, "mean_abs": 1e-6, "top1": 1.0, "kl": 2.9e-9}
    for more, verdict in (
        ({}, "KL 3e-9 nats"),
        ({"verification": {"base alone": metrics}}, "KL 3e-9 nats; base alone 3e-9"),
    ):
        run = Run(tmp_path, {"status": "finished", "metrics": metrics, "merge_base": "dequantized"} | more)
        merged = merge_adapter(Adapter(tmp_path, Run(tmp_path, {})), output=run)
        assert (merged.folder, merged.merge_base) == (tmp_path, "dequantized")
        text = printed(verify_merge(merged, Adapter(tmp_path, run)))
        assert text.splitlines()[0] == f"Merge verified: {verdict}"
    layers = Run(tmp_path, {"status": "finished", "metrics": {"layers": 2, "relative": 1e-7}, "merge_base": "original"})
    assert printed(verify_merge(merge_adapter(Adapter(tmp_path, layers), output=layers), Adapter(tmp_path, layers)))


def test_a_merge_is_compared_by_its_logits(tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig, get_peft_model

    talks = [[{"role": "user", "content": "What is 2 plus 3?"}], [{"role": "user", "content": "And 4?"}]]
    base = last_logits(tiny_mistral(len(tokenizer)), tokenizer, talks)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(tiny_mistral(len(tokenizer)), config)
    adapted = last_logits(policy, tokenizer, talks)
    assert [logits.shape[1] for logits in adapted] == [len(tokenizer)] * 2
    same = compare_logits(adapted, last_logits(policy.merge_and_unload(), tokenizer, talks))
    other = compare_logits(adapted, base)
    assert same["max_abs"] < 1e-4
    assert same["top1"] == 1
    assert same["kl"] < 1e-8
    assert other["kl"] > 1e-3
    p, q = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert compare_logits([p], [q])["kl"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_line_separators_in_a_held_out_prompt_do_not_break_the_verification(mark: str, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": f"one{mark}two"}]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n"] * 2
    (tmp_path / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    assert held_out_prompts(Run(tmp_path, {})) == [prompt, prompt]
