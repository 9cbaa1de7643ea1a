"""Rows in the shapes of other tools: the text that is trained on is the text that was meant."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from helpers.core import SettingsError, UserError
from helpers.data.encode import LengthLimits, truncate_prompt
from helpers.data.formats import INSTRUCTION_FORMATS, PAIR_FORMATS, PairingConfig, TrackedRow
from helpers.data.prepare import prepare_rows
from helpers.data.row_report import RowReport
from tests.data.test_formats import bot, user

SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = {"chosen": "Because.", "rejected": "No."}
CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare(
    tokenizer: Any, rows: list[dict[str, Any]], use_pairs: bool = True, **options: Any
) -> tuple[Any, RowReport]:
    return prepare_rows(Dataset.from_list(rows), tokenizer, LengthLimits(), use_pairs, **options)


def first_pair(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[list[Any], str, str]:
    good, report = prepare(tokenizer, [row], **options)
    assert report.kept == 1, report.as_dict()
    return good[0]["prompt"], good[0]["chosen"][0]["content"], good[0]["rejected"][0]["content"]


@pytest.fixture
def chatml(tokenizer: PreTrainedTokenizerBase, tmp_path: Any) -> Any:
    """The demo's tokenizer with a template that has a system role."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    own.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "# ")
    return own


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Name it.", "input": "", **PAIR}, [user("Name it.")]),
        ({"instruction": "Name it.", "input": "A lemon.", **PAIR}, [user("Name it.\n\nA lemon.")]),
        ({"instruction": "Name it.", "system": "Be kind.", **PAIR}, [SYSTEM, user("Name it.")]),
        ({"prompt": "Why?", "system_prompt": "Be kind.", **PAIR}, [SYSTEM, user("Why?")]),
        ({"question": "Why?", "system": "Be kind.", **PAIR}, [SYSTEM, user("Why?")]),
        ({"prompt": "Why?", "system": "", **PAIR}, [user("Why?")]),
        (
            {"instruction": "And?", "input": "", "history": [["Who?", "Me."]], **PAIR},
            [user("Who?"), bot("Me."), user("And?")],
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}], **{
                side: {"from": "gpt", "value": text} for side, text in PAIR.items()
            }},
            [user("Why?")],
        ),
        ({"messages": [user("Why?")], **{side: bot(text) for side, text in PAIR.items()}}, [user("Why?")]),
        ({"messages": [user("Why?")], **PAIR}, [user("Why?")]),
        ({"prompt": [{"role": "User", "content": [{"type": "text", "text": "Why?"}]}], **PAIR}, [user("Why?")]),
        ({"prompt": [{"role": "developer", "content": "Be kind."}, user("Why?")], **PAIR}, [SYSTEM, user("Why?")]),
    ],
)  # fmt: skip
def test_pairs_in_the_shapes_of_other_tools(row: dict[str, Any], prompt: list[Any], chatml: Any) -> None:
    assert first_pair(chatml, row) == (prompt, "Because.", "No.")


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_lists_of_messages_that_became_text_are_parsed(write: Any, chatml: Any) -> None:
    talk = {side: write([user("What is it?"), bot(text)]) for side, text in PAIR.items()}
    assert first_pair(chatml, {"prompt": "What is it?", **talk}) == ([user("What is it?")], "Because.", "No.")
    good, _ = prepare(chatml, [{"messages": write([user("Why?"), bot("Because.")])}], use_pairs=False)
    assert good[0]["messages"] == [user("Why?"), bot("Because.")]


def test_text_that_looks_like_a_list_of_messages_and_cannot_be_parsed_is_refused(chatml: Any) -> None:
    broken = {"prompt": "Why?", "chosen": "[{'role': 'assistant' 'content': 'a'}]", "rejected": "[{'role': 'as"}
    with pytest.raises(UserError, match="column chosen holds lists as text that cannot be parsed"):
        prepare(chatml, [broken, broken])


def test_an_answer_in_json_stays_text_where_answers_are_texts(chatml: Any) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(5)]
    rows.append({"prompt": "As JSON?", "chosen": '[{"role": "user"}]', "rejected": "No."})
    good, _ = prepare(chatml, rows)
    assert good[5]["chosen"][0]["content"] == '[{"role": "user"}]'


@pytest.mark.parametrize(
    ("high", "low"),
    [("chosen_rating", "rejected_rating"), ("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"),
     ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected")],
)  # fmt: skip
def test_ratings_make_the_margin_under_any_of_their_names(high: str, low: str, chatml: Any) -> None:
    rates = [(5.0, 3.0), (3.0, 5.0), (3.0, 3.0), (5.0, 4.0)]
    rows = [{"prompt": f"{i}?", **PAIR, high: a, low: b} for i, (a, b) in enumerate(rates)]
    good, report = prepare(chatml, rows, pairing=PairingConfig(min_margin=1.5))
    assert good["margin"][:] == [2.0]
    assert dict(report.dropped) == {"rejected answer rated higher": 1, "tie": 1, "margin below --min_margin": 1}


def test_a_margin_without_ratings_is_an_error(chatml: Any) -> None:
    with pytest.raises(SettingsError, match="--min_margin needs ratings"):
        prepare(chatml, [{"prompt": "Why?", **PAIR}], pairing=PairingConfig(min_margin=1.0))


def test_columns_that_are_not_read_are_named(chatml: Any) -> None:
    rows = [{"prompt": "Why?", **PAIR, "source": "me", "id": 1, "chosen_rating": 5, "rejected_rating": 1}]
    report = prepare(chatml, rows)[1]
    assert report.unused == ["source", "id"]
    assert report.as_dict()["unused"] == ["source", "id"]
    talk = [{"messages": [{**user("Why?"), "lang": "en"}, {**bot("Because."), "lang": "en"}], "topic": "x"}]
    assert prepare(chatml, talk, use_pairs=False)[1].unused == ["topic", "messages.lang"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", **PAIR, "images": ["a.png"]}, "images"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "text": None}]}], **PAIR}, "images"),
        ({"prompt": [{"role": "narrator", "content": "x"}], **PAIR}, "unknown role 'narrator'"),
        ({"prompt": [{"role": None, "content": "x"}], **PAIR}, "a message without a role"),
        ({"prompt": "Why?", **PAIR, "history": "Who? Me."}, "a list as text that cannot be parsed"),
        ({"prompt": "Why?", **PAIR, "history": "3"}, "a number or a date, not text"),
        ({"prompt": "Why?", **PAIR, "system": ["Be kind."]}, "not text"),
        *(
            ({"prompt": "Why?", **PAIR, "tools": odd}, "tools that are not JSON objects")
            for odd in ("colour_of", '[{"type": "function"', 5, ["colour_of"], [None])
        ),
        *(
            ({"prompt": "Why?", **PAIR, "chat_template_kwargs": odd}, "chat_template_kwargs that are not JSON objects")
            for odd in ("no thinking", "false", '["enable_thinking"]', '{"enable_thinking": fal', 5)
        ),
        (
            {"prompt": "Why?", **PAIR, "chat_template_kwargs": '[{"a": 1}, {"b": 2}]'},
            "chat_template_kwargs with more than one object",
        ),
        *(
            (
                {"prompt": "Why?", **PAIR, "chat_template_kwargs": {name: "x"}},
                f"chat_template_kwargs with {name}, which is not a variable of a template",
            )
            for name in ("chat_template", "tools", "tokenize", "add_generation_prompt")
        ),
        *(
            (
                {"prompt": [user("Why?"), {**bot("So."), "tool_calls": odd}, user("And?")], **PAIR},
                "tool_calls that are not JSON objects",
            )
            for odd in (5, "[{", ["colour_of(0)"], True)
        ),
        (
            {"prompt": [{**user("Why?"), "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], **PAIR},
            "tool_calls of another role than the assistant",
        ),
        (
            {"prompt": [{**user("Why?"), "thinking": "Hm."}], **PAIR},
            "reasoning_content of another role than the assistant",
        ),
        ({"prompt": [user("Why?"), {**bot("So."), "reasoning_content": {"a": 1}}, user("And?")], **PAIR}, "not text"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_by_its_reason(row: dict[str, Any], reason: str, chatml: Any) -> None:
    assert dict(prepare(chatml, [row])[1].dropped) == {reason: 1}


@pytest.mark.parametrize(
    ("row", "talk"),
    [
        (
            {"instruction": "And?", "input": "", "output": "Yes.", "system": "Be kind.", "history": [["Who?", "Me."]]},
            [SYSTEM, user("Who?"), bot("Me."), user("And?"), bot("Yes.")],
        ),
        ({"prompt": "Why?", "completion": "Yes.", "system_prompt": "Be kind."}, [SYSTEM, user("Why?"), bot("Yes.")]),
        ({"question": "Why?", "answer": "Yes."}, [user("Why?"), bot("Yes.")]),
        ({"instruction": "Why?", "context": "A lemon.", "response": "Yes."}, [user("Why?\n\nA lemon."), bot("Yes.")]),
        ({"system": "Be kind.", "messages": [user("Why?"), bot("Yes.")]}, [SYSTEM, user("Why?"), bot("Yes.")]),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Yes."}]},
            [user("Why?"), bot("Yes.")],
        ),
    ],
)
def test_conversations_in_the_shapes_of_other_tools(row: dict[str, Any], talk: list[Any], chatml: Any) -> None:
    good, report = prepare(chatml, [row], use_pairs=False)
    assert report.kept == 1, report.as_dict()
    assert good[0]["messages"] == talk
    learned = chatml.decode([i for i in good[0]["labels"] if i != -100])
    assert all(m["content"] in learned for m in talk if m["role"] == "assistant")
    assert not any(m["content"] in learned for m in talk if m["role"] != "assistant")


def test_a_turn_of_weight_0_is_read_and_not_learned(chatml: Any) -> None:
    talk = [user("Why?"), {**bot("Wrong."), "weight": 0}, user("Again?"), {**bot("Right."), "weight": 1}]
    good, _ = prepare(chatml, [{"messages": talk}], use_pairs=False)
    assert "Wrong." in chatml.decode(good[0]["input_ids"])
    learned = chatml.decode([i for i in good[0]["labels"] if i != -100])
    assert "Right." in learned
    assert "Wrong." not in learned
    nothing = [user("Why?"), {**bot("Wrong."), "weight": 0}]
    assert dict(prepare(chatml, [{"messages": nothing}], use_pairs=False)[1].dropped) == {"no turn is trained on": 1}


TOOLS = [{"type": "function", "function": {"name": "colour_of", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "colour_of", "arguments": '{"number": 0}'}}]
CALLING = {"role": "assistant", "content": "Wait.", "tool_calls": CALL}
TOOL_ROW = {
    "tools": TOOLS, "chosen": [user("Which?"), CALLING], "rejected": [user("Which?"), bot("Blue.")],
}  # fmt: skip
TOOL_TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}# {{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments }}>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)


def test_tools_and_calls_are_rendered_where_the_template_has_them(chatml: Any) -> None:
    assert dict(prepare(chatml, [TOOL_ROW])[1].dropped) == {"tools, which the chat template does not render": 1}
    chatml.chat_template = TOOL_TEMPLATE
    good, report = prepare(chatml, [TOOL_ROW])
    assert report.kept == 1
    full = chatml.apply_chat_template([user("Which?"), CALLING], tools=TOOLS, tokenize=False)
    assert good[0]["prompt_ids"] + good[0]["chosen_ids"] == chatml(full, add_special_tokens=False)["input_ids"]
    assert '<colour_of {"number": 0}>' in chatml.decode(good[0]["chosen_ids"])
    assert "colour_of" in chatml.decode(good[0]["prompt_ids"])


def test_tools_and_calls_may_be_one_or_a_list_and_objects_or_text(chatml: Any) -> None:
    chatml.chat_template = TOOL_TEMPLATE
    expected = prepare(chatml, [TOOL_ROW])[0][0]
    for tools in (TOOLS[0], json.dumps(TOOLS), json.dumps(TOOLS[0]), [json.dumps(TOOLS[0])], str(TOOLS)):
        for calls in (CALL[0], json.dumps(CALL), [json.dumps(CALL[0])]):
            row = TOOL_ROW | {"tools": tools, "chosen": [user("Which?"), CALLING | {"tool_calls": calls}]}
            good, report = prepare(chatml, [row])
            assert report.kept == 1, report.as_dict()
            for name in ("prompt_ids", "chosen_ids"):
                assert good[0][name] == expected[name]


def test_empty_tools_variables_calls_and_thoughts_are_none(chatml: Any) -> None:
    chatml.chat_template = TOOL_TEMPLATE
    expected = prepare(chatml, [{"prompt": "Why?", **PAIR}])[0][0]
    for name in ("tools", "chat_template_kwargs"):
        for empty in (None, "", [], "[]", "{}", "null"):
            good, report = prepare(chatml, [{"prompt": "Why?", **PAIR, name: empty}])
            assert good[0]["chosen_ids"] == expected["chosen_ids"]
            assert dict(report.rendered_with) == {"{}": 1}
    for name, nothing in (("tool_calls", []), ("tool_calls", ""), ("thinking", ""), ("reasoning_content", " ")):
        row = {"prompt": "Why?", "chosen": [{**bot("Because."), name: nothing}], "rejected": [bot("No.")]}
        assert dict(prepare(chatml, [row])[1].rendered_with) == {"{}": 1}, name


def test_a_pair_of_equal_answers_in_a_row_of_several_is_counted(chatml: Any) -> None:
    row = {"prompt": "Why?", "responses": ["Because.", "No.", "No. "], "scores": [3.0, 2.0, 1.0]}
    good, report = prepare(chatml, [row], pairing=PairingConfig("all_pairs"))
    assert (len(good), report.kept, report.dropped.total()) == (1, 1, 0)
    others = "(other pairs of the row are kept)"
    assert dict(report.dropped_pairs) == {f"chosen equals rejected {others}": 1, f"duplicate pair {others}": 1}


def test_thoughts_are_rendered_where_the_template_has_them(chatml: Any) -> None:
    row = {"messages": [user("Why?"), {**bot("Yes."), "reasoning_content": "Let me see."}]}
    reason = "reasoning_content, which the chat template does not render"
    assert dict(prepare(chatml, [row], use_pairs=False)[1].dropped) == {reason: 1}
    chatml.chat_template = TOOL_TEMPLATE
    good, _ = prepare(chatml, [row], use_pairs=False)
    assert "(Let me see.)Yes." in chatml.decode([i for i in good[0]["labels"] if i != -100])
    for key in ("reasoning", "thinking", "reasoning_content"):
        thoughts: tuple[Any, ...] = ("Let me see.", ["Let me ", "see."], [{"type": "text", "text": "Let me see."}])
        for thought in thoughts:
            talk = [user("Why?"), {**bot("Yes."), key: thought}]
            again, _ = prepare(chatml, [{"messages": talk}], use_pairs=False)
            assert again[0]["labels"] == good[0]["labels"]


def test_a_template_that_renders_the_prompt_differently_is_named_for_that(chatml: Any) -> None:
    chatml.chat_template = "{{ 'Short. ' if messages | length == 1 }}" + chatml.chat_template
    dropped = dict(prepare(chatml, [{"prompt": "Why?", **PAIR}])[1].dropped)
    assert dropped == {"the chat template renders the prompt differently before an answer": 1}


def test_the_message_of_a_template_is_whole(chatml: Any) -> None:
    long = (
        "this template takes only conversations about fruit, of which there were none in this one, as far as it knows"
    )
    chatml.chat_template = (
        "{{ raise_exception('" + long + "') if 'odd' in messages[0]['content'] }}" + chatml.chat_template
    )
    dropped = dict(prepare(chatml, [{"prompt": "odd", **PAIR}])[1].dropped)
    assert dropped == {f"the chat template refuses a conversation: {long}": 1}


def test_rows_are_counted_from_1(chatml: Any) -> None:
    rows = [{"prompt": "Why?", **PAIR}, {"prompt": "", **PAIR}]
    assert prepare(chatml, rows)[1].examples == {"no prompt": [2]}


COLUMNS = [
    "prompt", "instruction", "question", "input", "messages", "conversations", "chosen", "rejected", "completion",
    "output", "response", "answer", "system", "system_prompt", "history", "tools", "images", "label", "score_chosen",
    "score_rejected", "chosen_rating", "rejected_rating", "rating", "source", "id", "context", "status", "weight",
]  # fmt: skip
VALUES: Any = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.sampled_from(["", "Why?", "Because.", "[{'role': 'user'}]"]),
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "human", "narrator"]), "content": st.just("x")},
            optional={"weight": st.just(0), "lang": st.just("en"), "reasoning_content": st.just("Hm.")},
        ),
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), st.just("user"), max_size=2),
    st.lists(st.lists(st.just("x"), min_size=2, max_size=2), max_size=2),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, min_size=2, max_size=8), min_size=1, max_size=4))
def test_any_columns_are_read_or_named_and_the_account_adds_up(rows: list[dict[str, Any]], chatml: Any) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    filled = [dict.fromkeys(columns) | row for row in rows]
    for formats in (PAIR_FORMATS, INSTRUCTION_FORMATS):
        for row_format in formats:
            if row_format.missing(dict.fromkeys(columns, True)):
                continue
            read: set[str] = set()
            kept = dropped = 0
            for row in filled:
                tracked = TrackedRow(row)
                results = row_format.read(tracked, PairingConfig())
                read |= tracked.read
                kept += any(not isinstance(result, str) for result in results)
                dropped += all(isinstance(result, str) and result for result in results)
            assert kept + dropped == len(rows)
            if kept:  # the columns that the examples are made of were read
                assert read & set(columns)


def test_the_column_that_is_filled_in_a_row_is_read(chatml: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "A?", "question": None, "completion": "1.", "answer": None},
        {"prompt": None, "question": "B?", "completion": None, "answer": "2."},
        {"prompt": "", "question": "C?", "completion": "", "answer": "3."},
        {"prompt": None, "question": None, "completion": "4.", "answer": ""},
    ]
    good, report = prepare(chatml, rows, use_pairs=False)
    assert good["messages"][:] == [[user(f"{q}?"), bot(f"{a}.")] for q, a in ("A1", "B2", "C3")]
    assert dict(report.dropped) == {"no prompt": 1}
    pairs = [{name: row[name] for name in ("prompt", "question")} | PAIR for row in rows]
    assert [row[-1]["content"] for row in prepare(chatml, pairs)[0]["prompt"]] == ["A?", "B?", "C?"]
    answers = {"scores": [1.0, 2.0], "completions": None, "responses": ["No.", "Yes."]}
    scored = [answers | {"prompt": "A?"}, answers | {"prompt": "B?", "completions": ["No.", "Yes."], "responses": None}]
    good, report = prepare(chatml, scored)
    assert (report.kept, good["chosen"][:]) == (2, [[bot("Yes.")]] * 2)


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            **{k: {"from": "gpt", "value": v} for k, v in PAIR.items()},
        },
        {"messages": [user("Why?")], **{k: bot(v) for k, v in PAIR.items()}},
        {"messages": [user("Why?")], **PAIR},
        {"prompt": "Why?", "answer": "42.", **PAIR},
        {"instruction": "Why?", "input": "", "output": "42.", **PAIR},
        {"question": "Why?", "response": "42.", **PAIR},
    ],
)  # fmt: skip
def test_instructions_of_pairs_are_their_chosen_answers(row: dict[str, Any], chatml: Any) -> None:
    good, report = prepare(chatml, [row], use_pairs=False)
    assert (report.format.endswith(", the chosen side"), report.kept) == (True, 1)
    assert good[0]["messages"] == [user("Why?"), bot("Because.")]


def test_whole_conversations_next_to_pairs_are_learned_as_they_are(chatml: Any) -> None:
    talk = [user("Why?"), bot("Because.")]
    for messages in (talk, json.dumps(talk)):
        row = {"prompt": "Why?", "messages": messages, "chosen": talk, "rejected": talk}
        good, report = prepare(chatml, [row], use_pairs=False)
        assert (report.format, good[0]["messages"]) == ("messages", talk)


def test_a_tool_s_answer_that_is_truncated_stays_one(chatml: Any) -> None:
    chatml.chat_template = TOOL_TEMPLATE
    answer = {"role": "tool", "content": "word " * 100 + "end", "name": "colour_of", "tool_call_id": "1"}
    short = truncate_prompt(chatml, [user("Which?"), CALLING, answer], 80)
    assert short[:2] == [user("Which?"), CALLING]
    assert short[2] == answer | {"content": short[2]["content"]}
    assert len(short[2]["content"]) < 200
    assert short[2]["content"].endswith("word end")


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_content": "So </s> it is."},
        {"thinking": "</s>"},
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": "</s>"}'}}]},
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": ["</s>"]}}}]},
        {"content": "</s>"},
    ],
)
def test_a_control_token_drops_a_row_wherever_it_is(extra: dict[str, Any], chatml: Any) -> None:
    chatml.chat_template = TOOL_TEMPLATE
    fault = {"control token in the text": 1}
    talk = [user("Why?"), {**bot("Yes."), **extra}]
    assert dict(prepare(chatml, [{"messages": talk}], use_pairs=False)[1].dropped) == fault
    row = {"prompt": [user("Who?"), talk[1], user("Why?")], **PAIR}
    assert dict(prepare(chatml, [row])[1].dropped) == fault


def test_a_control_token_in_a_tool_drops_the_row(chatml: Any) -> None:
    chatml.chat_template = TOOL_TEMPLATE
    tools = [{"type": "function", "function": {"name": "f", "description": "</s>"}}]
    assert dict(prepare(chatml, [TOOL_ROW | {"tools": tools}])[1].dropped) == {"control token in the text": 1}


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_as_text_may_have_any_key_first(write: Any, chatml: Any) -> None:
    for first in ({"index": 0}, {"text": "Why?"}, {"id": 'a {b} " c', "lang": None}):
        talk = [first | {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "Yes."))]
        good, report = prepare(chatml, [{"messages": write(talk)}], use_pairs=False)
        assert report.kept == 1, report.as_dict()
        assert good[0]["messages"] == [user("Why?"), bot("Yes.")]
    talk = [{"text": "Why?", "role": "user"}, {"text": "Yes.", "role": "assistant"}]
    good, _ = prepare(chatml, [{"messages": write(talk)}], use_pairs=False)
    assert good[0]["messages"] == [user("Why?"), bot("Yes.")]


def test_answers_in_json_with_a_role_of_their_own_stay_texts(chatml: Any) -> None:
    for answer in ('[{"name": "Ann", "role": "chief"}]', '{"text": "a", "label": 1}', '{"a": {"role": "user"}}'):
        good, report = prepare(chatml, [{"prompt": "Who?", "completion": answer}], use_pairs=False)
        assert report.kept == 1, report.as_dict()
        assert good[0]["messages"][1]["content"] == answer


def test_a_label_that_is_a_number_is_no_verdict(chatml: Any) -> None:
    rows = [{"prompt": f"{i}?", "completion": "Yes.", "label": i} for i in range(4)]
    assert prepare(chatml, rows, use_pairs=False)[1].kept == 4
    rows = [row | {"label": str(row["label"] > 0)} for row in rows]
    assert dict(prepare(chatml, rows, use_pairs=False)[1].dropped) == {"labelled as undesired": 1}
