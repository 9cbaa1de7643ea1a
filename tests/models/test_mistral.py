"""The real Mistral-7B tokenizer, which ships in mistral-common: our tokens are Mistral's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.models.chat import find_template_fault, render, set_chat_template, tokenize_with_labels
from tests.data.test_formats import bot, user

mistral_common = pytest.importorskip("mistral_common")
SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = [
    [user("Hello")],
    [user("Hello"), bot("Hi there"), user("How are you?")],
    [SYSTEM, user("Hello")],
    [SYSTEM, user("Hello"), bot("Hi."), user("Why?\n\nTell me.")],
    [user("naïve ¿qué? 日本語 🙂"), bot("  two spaces"), user("1 + 1 =")],
]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 32_000
    assert set_chat_template(tokenizer, "auto") == ("mistral", [])
    return tokenizer


def own_encoding(messages: list[dict[str, str]]) -> list[int]:
    """Mistral's own."""
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    request = ChatCompletionRequest(messages=[kinds[m["role"]](content=m["content"]) for m in messages])
    return list(MistralTokenizer.v1().encode_chat_completion(request).tokens)


@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
def test_prompts_are_mistral_s_own_token_for_token(
    talk: list[dict[str, str]], mistral: PreTrainedTokenizerBase
) -> None:
    ids = mistral(render(mistral, talk, prompt=True), add_special_tokens=False)["input_ids"]
    assert ids == own_encoding(talk)


def test_what_is_learned_with_the_real_tokenizer(mistral: PreTrainedTokenizerBase) -> None:
    talk = [user("Hello"), bot("Hi there"), user("How are you?"), bot("Fine.")]
    row = tokenize_with_labels(mistral, talk)
    assert row["input_ids"][:13] == [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793, 15359, 736, 2, 733]
    learned = [label for label in row["labels"] if label != -100]
    assert mistral.convert_ids_to_tokens(learned) == ["▁Hi", "▁there", "</s>", "▁Fine", ".", "</s>"]
    assert not find_template_fault(mistral, talk)
