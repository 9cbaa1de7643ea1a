"""What a merged model has besides its weights: generation settings, tokenizer, licence and other files of its base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from helpers.merging.merge import Adapter, MergedModel, merge_adapter
from helpers.merging.verify import Verification
from helpers.models.adapters import make_portable, save_model
from helpers.models.chat import eos_token_ids
from helpers.models.plan import prepare_model
from helpers.runs.run import Run
from tests.merging.test_families import save_base
from tests.tiny import tiny_mistral

FILES = ("tokenizer.model", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "NOTICE",
         "USE_POLICY.md", "modeling_own.py")  # fmt: skip
# An adapter that is merged tensor by tensor, and one that PEFT merges.
WAYS: dict[str, dict[str, Any]] = {"streamed": {}, "by PEFT": {"bias": "all"}}


def merge(folder: Path, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any], **files: str) -> Path:
    base = tiny_mistral(len(tokenizer))
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **given))
    policy.save_pretrained(str(folder / "adapter"))
    tokenizer.save_pretrained(folder / "adapter")
    base = tiny_mistral(len(tokenizer))
    base.save_pretrained(folder / "base")
    for name, text in files.items():
        (folder / "base" / name).write_text(text)
    (folder / "base" / "README.md").write_text("of the base")
    adapter = Adapter(folder / "adapter", Run(folder / "adapter", {}), str(folder / "base"))
    return merge_adapter(adapter, Run(folder / "merged", {})).folder


@pytest.mark.parametrize("given", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("before", "after"), [
    (2, 2), (0, [0, 2]), ([0, 7], [0, 7, 2]), ([7, 2], [7, 2]), ([0], [0, 2]),
])  # fmt: skip
def test_generation_settings_are_the_base_s_with_every_end(
    before: Any, after: Any, given: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.eos_token_id == 2
    base = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "eos_token_id": before, "_own": {"of": "theirs"}}
    folder = merge(tmp_path, tokenizer, given, **{"generation_config.json": json.dumps(base)})
    assert json.loads((folder / "generation_config.json").read_text()) == base | {"eos_token_id": after}
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == after


def test_a_base_that_names_its_ends_elsewhere_or_has_others(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = merge(tmp_path / "config", tokenizer, {}, **{"generation_config.json": '{"temperature": 0.9}'})
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.9, "eos_token_id": 2}
    folder = merge(tmp_path / "same", tokenizer, {})
    (tmp_path / "same" / "base" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "same" / "base" / "config.json").read_text())
    (tmp_path / "same" / "base" / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 7]}))
    adapter = Adapter(tmp_path / "same" / "adapter", Run(tmp_path, {}), str(tmp_path / "same" / "base"))
    again = merge_adapter(adapter, Run(tmp_path / "again", {})).folder
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [0, 7, 2]
    for ends, known in ((None, [2]), (0, [0, 2]), ([], [2]), ([2, 0], [2, 0])):
        assert eos_token_ids(tokenizer, SimpleNamespace(eos_token_id=ends)) == known


@pytest.mark.parametrize("given", WAYS.values(), ids=WAYS)
def test_files_of_the_base_are_carried(
    given: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = merge(tmp_path, tokenizer, given, **{name: f"{{}} {name}" for name in FILES})
    assert {name: (folder / name).read_text() for name in FILES} == {name: f"{{}} {name}" for name in FILES}
    assert not (folder / "README.md").exists()


def test_a_tokenizer_is_saved_in_terms_that_other_versions_know(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path / "local")
    mine = AutoTokenizer.from_pretrained(tmp_path / "local", local_files_only=True)
    mine.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    mine.add_tokens(["<think>"])
    mine.save_pretrained(tmp_path / "saved")
    make_portable(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & set(config)
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    added = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
    assert added["<|im_start|>"] == mine.convert_tokens_to_ids("<|im_start|>") == 983
    assert added["<think>"] == 984
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == mine.get_vocab()
    assert again.all_special_tokens == mine.all_special_tokens
    text = "<s>[INST] Hi <|im_start|>there<think> [/INST]</s>"
    assert again(text).input_ids == mine(text).input_ids
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == mine.decode(
        mine(text).input_ids, skip_special_tokens=True
    )
    assert again.chat_template == mine.chat_template


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_so_is_that_of_a_training_run_whose_base_has_odd_generation_settings(
    adapted: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tiny_mistral(len(tokenizer)).save_pretrained(tmp_path / "base")
    odd = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 2], "bos_token_id": 1}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(odd))
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("of the base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mine = AutoTokenizer.from_pretrained(tmp_path / "base")
    prepare_model(model, mine)
    arguments = SFTConfig(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no"
    )
    given = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapted else None
    rows = Dataset.from_list([{"text": "Hello there"}] * 2)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=mine, peft_config=given)
    trainer.train()
    save_model(trainer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in config
    if not adapted:
        assert (tmp_path / "saved" / "LICENSE").read_text() == "of the base"
        saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        assert {name: saved[name] for name in odd} == odd


def test_the_text_part_of_a_model_is_not_offered_to_servers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folders = {}
    for way, given in WAYS.items():
        base = tmp_path / way / "base"
        save_base(base, "qwen3_5", len(tokenizer))
        model = AutoModelForCausalLM.from_pretrained(base)
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", **given))
        policy.save_pretrained(str(tmp_path / way / "adapter"))
        tokenizer.save_pretrained(tmp_path / way / "adapter")
        adapter = Adapter(tmp_path / way / "adapter", Run(tmp_path / way / "adapter", {}), str(base))
        run = Run(tmp_path / way / "merged", {"step": "merge", "parent_folder": ""})
        merged = merge_adapter(adapter, run)
        merged.finalize(Verification({"kl": 0.0}))
        folders[way] = (merged, merge_adapter(adapter, run))
    for merged in folders["streamed"]:  # with its vision part
        assert merged.serve_commands().startswith("vllm serve ")
    for merged in folders["by PEFT"]:
        assert isinstance(merged, MergedModel)
        assert merged.serve_commands() == "not possible: this is the text part of a model that also has others"
    assert torch.is_tensor(next(iter(AutoModelForCausalLM.from_pretrained(merged.folder).parameters())))
