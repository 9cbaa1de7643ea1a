"""Long conversations and huge rows cost no more than their length."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from helpers.data.encode import LengthLimits
from helpers.data.prepare import prepare_rows
from helpers.models import chat
from tests.data.test_formats import bot, user


def talk(messages: int) -> list[dict[str, Any]]:
    return [(bot if i % 2 else user)(f"What is {i} plus 3?") for i in range(messages)]


@pytest.mark.parametrize("head", [[], [{"role": "system", "content": "Be kind."}]])
def test_parts_of_a_long_conversation_have_the_labels_of_the_exact_way(head: list[Any], tokenizer: Any) -> None:
    messages = [*head, *talk(40)]
    text = chat.render(tokenizer, messages)
    spans = chat._short_spans(tokenizer, messages, None, text)
    assert spans == chat._exact_spans(tokenizer, messages, None, text)
    assert spans is not None
    assert len(spans) == 20


def test_a_template_that_looks_further_back_is_rendered_the_exact_way(tokenizer: Any) -> None:
    messages = talk(40)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}" + template
        assert chat._short_spans(tokenizer, messages, None, chat.render(tokenizer, messages)) is None
    finally:
        tokenizer.chat_template = template


def test_the_text_that_is_rendered_grows_with_the_turns(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    render = chat.render

    def count(*args: Any, **options: Any) -> str:
        text = render(*args, **options)
        rendered.append(len(text))
        return text

    monkeypatch.setattr(chat, "render", count)
    totals = []
    for turns in (200, 400):
        rendered.clear()
        chat.tokenize_with_labels(tokenizer, talk(turns))
        totals.append(sum(rendered))
    assert totals[1] < 2.2 * totals[0]


@pytest.mark.parametrize(
    ("overlong", "reasons"),
    [
        ("drop", {"longer than max_length": 2}),
        ("truncate_prompt", {"prompt truncated from the left": 1, "longer than max_length": 1}),
        ("truncate_completion", {"answer truncated": 1, "longer than max_length": 1}),
    ],
)
def test_a_huge_row_is_never_tokenized_whole(
    overlong: Any, reasons: dict[str, int], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[int] = []
    tokenize = chat.tokenize

    def watch(tokenizer: Any, texts: list[str]) -> Any:
        longest.extend(map(len, texts))
        return tokenize(tokenizer, texts)

    monkeypatch.setattr(chat, "tokenize", watch)
    huge = "What is 3 plus 4? " * 20_000
    rows = [{"prompt": huge, "chosen": "5.", "rejected": "6."}, {"prompt": "a?", "chosen": huge, "rejected": "6."}]
    _, report = prepare_rows(Dataset.from_list(rows), tokenizer, LengthLimits(64, 128, overlong))
    assert report.as_dict()["reasons"] == reasons
    assert max(longest, default=0) < 20_000


def test_a_prompt_of_many_turns_is_cut_to_its_newest_ones(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    render = chat.render
    monkeypatch.setattr(chat, "render", lambda *args, **kw: rendered.append(1) or render(*args, **kw))
    row = {"prompt": talk(1999), "chosen": "5.", "rejected": "6."}
    good, report = prepare_rows(Dataset.from_list([row]), tokenizer, LengthLimits(64, 128, "truncate_prompt"))
    assert report.as_dict()["reasons"] == {"prompt truncated from the left": 1}
    assert good[0]["prompt"] == talk(1999)[-len(good[0]["prompt"]) :]
    assert len(good[0]["prompt"]) >= 3
    assert len(rendered) < 60


def test_a_huge_conversation_is_cut_after_its_last_answer_that_fits(tokenizer: Any) -> None:
    messages = [*talk(4), user("What is 3 plus 4? " * 20_000), bot("7.")]
    limits = LengthLimits(0, 128, "truncate_completion")
    good, report = prepare_rows(Dataset.from_list([{"messages": messages}]), tokenizer, limits, use_pairs=False)
    assert report.as_dict()["reasons"] == {"turns after the last complete answer removed": 1}
    assert len(good[0]["input_ids"]) == 128
