"""Chat formats: which tokens a model learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from helpers.core import SettingsError, UserError
from helpers.models.chat import (
    CHAT_TEMPLATES,
    PROBE,
    TEMPLATE_FOLDER,
    find_template_fault,
    read_template,
    render,
    set_chat_template,
    tokenize,
    tokenize_with_labels,
)
from helpers.models.plan import lora_module_args, resize_embeddings

MISTRAL = read_template("mistral")
TALK = [
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "Of course, it is 5."},
    {"role": "user", "content": "And the opposite of hot?"},
    {"role": "assistant", "content": "Certainly, it is cold."},
]
# The same text as MISTRAL, with TRL's and transformers' own marks around what is learned.
MARKED = MISTRAL.replace(
    "{{- ' ' + message['content'] + eos_token -}}",
    "{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}",
)


def test_only_assistant_turns_and_their_ends_are_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    row = tokenize_with_labels(tokenizer, TALK)
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == " Of course, it is 5.</s> Certainly, it is cold.</s>"
    assert learned == [label for label in row["labels"] if label != -100]
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_labels_equal_those_of_a_template_with_generation_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    row = tokenize_with_labels(tokenizer, TALK)
    marked = tokenizer.apply_chat_template(
        TALK, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    assert row["input_ids"] == marked["input_ids"]
    assert [label != -100 for label in row["labels"]] == [bool(m) for m in marked["assistant_masks"]]
    assert 0 < sum(marked["assistant_masks"]) < len(row["input_ids"])


def test_what_is_learned_is_what_follows_the_prompt_at_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer(render(tokenizer, TALK[:3], prompt=True), add_special_tokens=False)["input_ids"]
    row = tokenize_with_labels(tokenizer, TALK)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt) - 1] == -100
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]


def test_mistral_format_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    text = "<s> [INST] What is 2 plus 3? [/INST] Of course, it is 5.</s>"
    assert render(tokenizer, TALK[:2]) == text
    assert render(tokenizer, system + TALK[:2]) == text.replace("What", "Be brief.\n\nWhat")


SYSTEM = {"role": "system", "content": "Be brief."}
RENDERED = {
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Yes.</s> [INST] Why? [/INST] So.</s>",
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Yes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>",
    "tulu": "<s><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nYes.</s>\n<|user|>\nWhy?\n<|assistant|>\nSo.</s>",
    "alpaca": "<s>### Instruction:\nBe brief.\n\nHi\n\n### Response:\nYes.</s>\n\n### Instruction:\nWhy?\n\n"
    "### Response:\nSo.</s>",
    "vicuna": "<s>USER: Be brief.\n\nHi ASSISTANT: Yes.</s>USER: Why? ASSISTANT: So.</s>",
    "hh": "<s>\n\nHuman: Be brief.\n\nHi\n\nAssistant: Yes.</s>\n\nHuman: Why?\n\nAssistant: So.</s>",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_as_text(name: str, demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    roles = ("user", "assistant") * 2
    talk = [SYSTEM, *({"role": r, "content": c} for r, c in zip(roles, ("Hi", "Yes.", "Why?", "So."), strict=True))]
    tokenizer.chat_template = read_template(name)
    assert render(tokenizer, talk) == RENDERED[name]
    for count in (2, 4):  # a prompt is how a longer conversation begins
        assert RENDERED[name].startswith(render(tokenizer, talk[:count], prompt=True))
    file = TEMPLATE_FOLDER / f"{name}.jinja"  # given by hand, the same file renders the same
    set_chat_template(tokenizer, str(file))
    assert render(tokenizer, talk) == RENDERED[name]


def test_a_conversation_that_the_template_refuses_is_a_user_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="roles must alternate"):
        render(tokenizer, TALK[:1] + TALK[:1])


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else 'x' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match="renders turn 1 differently"):
        tokenize_with_labels(other, TALK)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_format_is_safe_to_train_on(name: str, demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    set_chat_template(tokenizer, name)
    for talk in (TALK, TALK[:2], [{"role": "system", "content": "Be brief."}, *TALK], PROBE):
        assert find_template_fault(tokenizer, talk) == ""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("{{- bos_token -}}", "{{- bos_token + bos_token -}}"), "it has more than one beginning-of-sequence token"),
        (("{{- bos_token -}}", ""), "<s> is missing, which this tokenizer puts before any other text"),
        ((" + eos_token", ""), "the answer does not end with </s>, so the model"),
        (("' [/INST]'", "' [/INST] '"), "the prompt at generation differs from the text before the answer in training"),
        (("+ message['content'] + ' [/INST]'", "+ message['content'][:5] + ' [/INST]'"), "a turn is missing"),
    ],
)  # fmt: skip
def test_what_makes_a_template_unsafe_is_found(change: tuple[str, str], fault: str, demo_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral", add_bos_token=True)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.chat_template = MISTRAL
    assert find_template_fault(tokenizer, TALK[:2]) == ""
    tokenizer.chat_template = MISTRAL.replace(*change)
    if "[/INST] '" in change[1]:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{- ' ' + message", "{{- message")
    assert find_template_fault(tokenizer, TALK[:2]).startswith(fault)


class Slow:
    """A tokenizer without offsets, as those are that come as a model's own code."""

    is_fast = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.fast = tokenizer

    def __call__(self, texts: Any, **words: Any) -> Any:
        assert not words.get("return_offsets_mapping")
        return self.fast(texts, **words)

    def __getattr__(self, name: str) -> Any:
        assert name != "backend_tokenizer"
        return getattr(self.fast, name)


def test_a_tokenizer_without_offsets_gives_the_same_labels_and_trims(tokenizer: PreTrainedTokenizerBase) -> None:
    from helpers.data.encode import truncate_prompt

    slow: Any = Slow(tokenizer)
    assert tokenize_with_labels(slow, TALK) == tokenize_with_labels(tokenizer, TALK)
    assert tokenize(slow, ["a b", "c"]) == tokenize(tokenizer, ["a b", "c"])
    assert tokenize(slow, []) == tokenize(tokenizer, []) == []
    (short,) = truncate_prompt(slow, [{"role": "user", "content": "one " * 50 + "What is 2 plus 3?"}], 20)
    assert short["content"].endswith("What is 2 plus 3?")
    assert 10 < len(tokenizer(render(tokenizer, [short], prompt=True), add_special_tokens=False)["input_ids"]) <= 20


def test_what_a_tokenizer_was_last_asked_to_truncate_to_does_not_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenize(tokenizer, ["What is 2 plus 3?"])
    tokenizer("something else", truncation=True, max_length=3, padding="max_length")
    assert tokenize(tokenizer, ["What is 2 plus 3?"]) == whole


def test_a_format_that_is_not_known_is_refused_and_a_file_is_taken(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"`--chat_template chatlm` is unknown\. Use one of mistral, chatml"):
        set_chat_template(other, "chatlm")
    assert other.chat_template == tokenizer.chat_template
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    assert set_chat_template(other, str(tmp_path / "mine.jinja")) == ("mine.jinja", [])
    assert render(other, TALK) == TALK[0]["content"]


@pytest.mark.parametrize("tied", [False, True])
def test_added_chat_tokens_have_rows_that_are_trained_and_survive_merge_and_reload(
    tied: bool, demo_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tiny-mistral")
    known = len(tokenizer)
    assert set_chat_template(tokenizer, "chatml") == ("chatml", ["<|im_start|>", "<|im_end|>"])
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.tokenize("<|im_start|>user")[0] == "<|im_start|>"
    config = AutoConfig.from_pretrained(demo_folder / "tiny-mistral", tie_word_embeddings=tied)

    def base() -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # resizing writes into it
        resize_embeddings(model, tokenizer)
        return model

    model, before = base(), base().state_dict()
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())  # the same rows every time
    embeddings = before["model.embed_tokens.weight"]
    assert embeddings.shape[0] == model.config.vocab_size == known + 2
    assert torch.allclose(embeddings[known], embeddings[:known].mean(0), atol=1e-6)
    arguments = lora_module_args(model, tokenizer, ["<|im_start|>", "<|im_end|>"], modules_to_save=())
    rows = arguments["trainable_token_indices"]
    new = [known, known + 1]
    assert rows == {"model.embed_tokens": new} | ({} if tied else {"lm_head": new})
    config_of_adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **arguments)
    model = get_peft_model(model, config_of_adapter)
    row = {name: torch.tensor([ids]) for name, ids in tokenize_with_labels(tokenizer, TALK).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**row).loss.backward()
        optimizer.step()
    model.eval()
    trained = model(input_ids=row["input_ids"]).logits
    model.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=row["input_ids"]).logits, trained)
    merged = again.merge_and_unload()
    after = merged.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == new, name
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(input_ids=row["input_ids"]).logits, trained, atol=1e-5, rtol=1e-5)


def test_a_model_that_has_the_rows_is_left_alone(demo_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_folder / "tiny-mistral")
    weight = model.get_input_embeddings().weight
    resize_embeddings(model, tokenizer)
    assert model.get_input_embeddings().weight is weight
    assert lora_module_args(model, tokenizer, [], modules_to_save=()) == {
        "modules_to_save": None, "trainable_token_indices": None,
    }  # fmt: skip
    with pytest.raises(SettingsError, match=r"`--lora_modules_to_save head` is not a module of the model\. Use one of"):
        lora_module_args(model, tokenizer, [], modules_to_save=("lm_head", "head"))


def test_a_base_model_without_a_template_gets_mistral_s_and_pads(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    assert set_chat_template(bare, "auto") == ("the tokenizer's own", [])
    bare.chat_template = None
    bare.pad_token = None
    assert set_chat_template(bare, "auto") == ("mistral", [])
    assert bare.chat_template == MISTRAL
    assert bare.pad_token == "<unk>"
