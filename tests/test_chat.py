"""Chat formats: which tokens a model learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.chat import apply_chat_format, encode, render
from helpers.chat_formats import MISTRAL
from helpers.errors import UserError

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
    row = encode(tokenizer, TALK)
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == " Of course, it is 5.</s> Certainly, it is cold.</s>"
    assert learned == [label for label in row["labels"] if label != -100]
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_labels_equal_those_of_a_template_with_generation_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(tokenizer, TALK)
    marked = tokenizer.apply_chat_template(
        TALK, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    assert row["input_ids"] == marked["input_ids"]
    assert [label != -100 for label in row["labels"]] == [bool(m) for m in marked["assistant_masks"]]
    assert 0 < sum(marked["assistant_masks"]) < len(row["input_ids"])


def test_what_is_learned_is_what_follows_the_prompt_at_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer(render(tokenizer, TALK[:3], prompt=True), add_special_tokens=False)["input_ids"]
    row = encode(tokenizer, TALK)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt) - 1] == -100
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]


def test_mistral_format_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    text = "<s> [INST] What is 2 plus 3? [/INST] Of course, it is 5.</s>"
    assert render(tokenizer, TALK[:2]) == text
    assert render(tokenizer, system + TALK[:2]) == text.replace("What", "Be brief.\n\nWhat")


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
        encode(other, TALK)


def test_a_format_whose_tokens_are_missing_or_that_is_not_known_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>, which"):
        apply_chat_format(other, "chatml")
    with pytest.raises(UserError, match="--chat_format 'chatlm' is not one of mistral, chatml"):
        apply_chat_format(other, "chatlm")
    assert other.chat_template == tokenizer.chat_template
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    assert apply_chat_format(other, str(tmp_path / "mine.jinja")) == "mine.jinja"
    assert render(other, TALK) == TALK[0]["content"]


def test_a_base_model_without_a_template_gets_mistral_s_and_pads(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    assert apply_chat_format(bare, "auto") == "the tokenizer's own"
    bare.chat_template = None
    bare.pad_token = None
    assert apply_chat_format(bare, "auto") == "mistral"
    assert bare.chat_template == MISTRAL
    assert bare.pad_token == "<unk>"
