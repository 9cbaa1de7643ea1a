"""The data report: each finding fires where there is something to find, and is silent where there is not."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from matplotlib.image import imread
from matplotlib.text import Text
from pandas import DataFrame
from transformers import PreTrainedTokenizerBase

from helpers.core import SettingsError
from helpers.data.encode import LengthLimits
from helpers.data.prepare import load_preferences, prepare_rows
from helpers.data.report import (
    DataReport,
    find_data_issues,
    held_out_prompt,
    length_bias,
    main,
    near_ties,
    prefix_shortcuts,
    train_eval_overlap,
)
from helpers.data.row_report import RowReport
from tests.conftest import REPO
from tests.data.test_loading import settings


def answers(chosen: list[str], rejected: list[str], prompts: list[str] | None = None, margins: Any = ()) -> DataFrame:
    frame = DataFrame({"chosen": chosen, "rejected": rejected, "prompt tokens": 1})
    for side in ("chosen", "rejected"):
        frame[f"{side} tokens"] = frame[side].str.split().str.len()
    frame["margin"] = np.array(margins, float) if margins else np.nan
    return frame.assign(prompt=prompts or [f"p{i}" for i in range(len(chosen))], marker="", repeats=False)


@pytest.mark.parametrize(
    ("prompt", "marker"),
    [
        ("[INST] What is {i} and 2? [/INST]", "'[INST]'"),
        ("Below is a task.\n\n### Instruction:\nAdd {i}.", "'### Instruction'"),
        ("Human: What is {i}?\n\nAssistant: ", "'Human:'"),
        ("<|im_start|>user\nWhat is {i}?<|im_end|>", "'<|im_start|>'"),
        ("<start_of_turn>user\nWhat is {i}?", "'<start_of_turn>'"),
    ],
)
def test_prompts_that_are_rendered_already_are_counted(prompt: str, marker: str, tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    rows = [{"prompt": prompt.format(i=i), "chosen": f"It is {i}.", "rejected": "No."} for i in range(12)]
    good, report = prepare_rows(Dataset.from_list(rows), plain, LengthLimits())
    (found,) = [f for f in DataReport.from_datasets(good, good, report).findings if f.name == "rendered prompts"]
    assert found.is_warning
    assert found.text.startswith(f"12 of 12 prompts hold markers of a chat template, such as {marker}.")


def test_answers_that_repeat_their_prompt_are_counted(tokenizer: Any) -> None:
    ask = [f"What is {i} and 2?" for i in range(12)]
    rows = [{"prompt": p, "chosen": f"{p} It is {i}.", "rejected": f"{p} No."} for i, p in enumerate(ask)]
    good, report = prepare_rows(Dataset.from_list(rows), tokenizer, LengthLimits())
    (found,) = [f for f in DataReport.from_datasets(good, good, report).findings if f.name == "prompts in answers"]
    assert found.text.startswith("12 of 12 chosen answers begin with their prompt.")
    rows = [{"prompt": p, "chosen": f"It is {i}.", "rejected": "No."} for i, p in enumerate(ask)]
    good, report = prepare_rows(Dataset.from_list(rows), tokenizer, LengthLimits())
    assert {"prompts in answers", "rendered prompts"}.isdisjoint(
        f.name for f in DataReport.from_datasets(good, good, report).findings
    )


def words(count: int, draw: random.Random) -> str:
    return " ".join(draw.choice("abcdefghijklmnop") for _ in range(count))


def test_length_is_named_only_where_it_tells() -> None:
    found = length_bias(answers(["a b c"] * 8 + ["a"] * 2, ["a b"] * 10))
    assert (found.value, found.is_warning) == (0.8, True)
    assert found.text.startswith("The longer answer is the preferred one in 80% of pairs. Chosen answers are 1.3 times")
    assert "looks at length only would score 80%" in found.text
    assert "will teach the model to write longer answers" in found.text
    shorter = length_bias(answers(["a"] * 9 + ["a b c"], ["a b"] * 10))
    assert (shorter.value, shorter.is_warning) == (0.1, True)
    assert "teach the model to write shorter answers" in shorter.text
    even = length_bias(answers(["a b c"] * 4 + ["a"] * 4 + ["a b"] * 2, ["a b"] * 10))
    assert (even.value, even.is_warning) == (0.4, False)
    assert "looks at length only would score 50%: length says little" in even.text


def test_near_ties_by_rating_and_by_words() -> None:
    draw = random.Random(0)
    chosen = [words(30, draw) for _ in range(10)]
    other = [text.upper() for text in chosen]
    assert near_ties(answers(chosen, other)) == []
    close, same = near_ties(answers(chosen, chosen[:1] + other[1:], margins=[4.0] * 8 + [0.4, 0.2]))
    assert (close.value, close.is_warning, same.value, same.is_warning) == (0.1, True, 0.1, True)
    assert "`--min_margin 0.4` drops these pairs" in close.text


def test_openings_that_give_the_label_away() -> None:
    draw = random.Random(0)
    plain = [words(8, draw) for _ in range(400)]
    (fair,) = prefix_shortcuts(answers(plain[:200], plain[200:]))
    assert not fair.is_warning
    assert 0.4 < fair.value < 0.6
    (telling,) = prefix_shortcuts(answers(plain[:200], ["As an AI, I " + text for text in plain[200:]]))
    assert (telling.value, telling.is_warning) == (1.0, True)
    assert "'As an AI,' opens 0 chosen and 200 rejected answers" in telling.text
    # openings that stand there once each say nothing, however they are counted
    (rare,) = prefix_shortcuts(answers([f"x{i} y z" for i in range(50)], [f"u{i} v w" for i in range(50)]))
    assert (rare.value, rare.is_warning) == (0.5, False)


def test_leaks_between_train_and_held_out() -> None:
    train = answers(["the same long answer of many words"] * 2, ["x"] * 2, prompts=["what is it", "who"])
    clean = answers(["another"], ["y"], prompts=["where"])
    (none,) = train_eval_overlap(train, clean)
    assert (none.value, none.is_warning) == (0.0, False)
    prompts, said = train_eval_overlap(train, answers(["the same long answer of many words"], ["y"], prompts=["who"]))
    assert (prompts.value, said.value, prompts.is_warning) == (1.0, 1.0, True)
    assert "ignoring case, spaces and punctuation" in prompts.text


def test_rows_that_are_lost_are_named_with_what_would_keep_them() -> None:
    rows = answers(["a b"] * 4, ["c d"] * 4)
    report = RowReport(read=20, kept=4, lengths={"longer than max_length": [300, 200, 900] * 5})
    report.count(report.dropped, ["longer than max_length"] * 15 + ["tie"], [*range(15), 19])
    report.count(report.changed, ["answer truncated"], [1])
    found = {f.name: f for f in find_data_issues(rows, rows, report, 128)}
    assert found["dropped"].value == 0.8
    assert "Most frequent reason: longer than max_length (15)" in found["dropped"].text
    assert "(200 to 900 tokens)" in found["too long"].text
    assert "`--max_length 900` would keep" in found["too long"].text
    assert found["cut answers"].text.startswith("1 rows have an answer truncated at --max_length 128")
    assert list(found)[-1] in ("longer is chosen", "openings")  # what does not matter comes last


def test_the_report_of_a_set_as_a_table_a_page_and_json(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from rich.console import Console

    rows = [{"prompt": f"What is {i} plus 1?", "chosen": "It is " * 9 + str(i), "rejected": "No."} for i in range(40)]
    rows[7]["rejected"] = rows[7]["chosen"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = settings(str(tmp_path / "rows.jsonl"), max_prompt_length=64, max_length=128, eval_rows=8)
    train, held_out, row_report = load_preferences(given, tokenizer)
    report = DataReport.from_datasets(train, held_out, row_report, 128)
    report.save(tmp_path)
    saved = json.loads((tmp_path / "data_report.json").read_text())
    assert saved["rows"] == {"train": 31, "held_out": 8, "read": 40}
    assert saved["share_of_rows"] == {"chosen equals rejected": 1 / 40}
    chosen = sorted(len(ids) for ids in train["chosen_ids"][:] + held_out["chosen_ids"][:])
    assert saved["lengths"]["chosen"]["longest"] == chosen[-1]
    assert saved["lengths"]["chosen"]["median"] == chosen[len(chosen) // 2]
    assert saved["findings"][0]["name"] == "longer is chosen"
    assert saved["findings"][0]["value"] == 1.0
    height, width, _ = imread(tmp_path / "data_report.png").shape
    assert (height, width) == (432, 1800)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(report)
    said = console.export_text()
    assert "! The longer answer is the preferred one in 100% of pairs" in said
    assert re.search(r"tokens of +mean +5 % +median +95 %", said)
    lengths, difference, begin = report.figure.axes
    assert f"chosen, median {np.median(chosen):,.0f}" in [text.get_text() for text in lengths.get_legend().get_texts()]
    assert [lengths.get_ylabel(), difference.get_ylabel(), begin.get_xlabel()] == ["pairs"] * 3
    ticks = [*lengths.get_yticks(), *difference.get_yticks(), *begin.get_xticks()]
    assert all(tick == int(tick) for tick in ticks)
    report.figure.draw_without_rendering()
    figures = {"1", "10", "100"}  # of a logarithmic axis, as numbers and not as formulas
    assert figures <= {text.get_text() for text in lengths.get_xticklabels()}
    assert not any("$" in text.get_text() for text in report.figure.findobj(Text))


@pytest.mark.long
def test_the_command_reads_a_recipe_and_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_folder: Path
) -> None:
    pairs, talks = (demo_folder / name / "train.jsonl" for name in ("preferences", "instructions"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_id: {demo_folder / 'tiny-mistral'}\nsft: {{dataset_id: {talks}, max_length: 256}}\n"
        f"dpo: {{dataset_id: {pairs}, dpo_beta: 0.3, loss_type: [sigmoid], eval_rows: 50}}\n"
    )
    main(["--recipe", str(recipe), "--out", str(tmp_path / "pairs")])
    assert re.search(r"eval +50 *\n", capsys.readouterr().out)
    assert json.loads((tmp_path / "pairs" / "data_report.json").read_text())["rows"]["read"] == 3000
    main(["--recipe", str(recipe), "--sft", "--out", str(tmp_path / "talks"), "--eval-rows", "7"])
    saved = json.loads((tmp_path / "talks" / "data_report.json").read_text())
    assert (saved["rows"]["held_out"], list(saved["lengths"])) == (7, ["conversation", "learned"])
    for given, said in {
        ("--dataset_idd", "x"): "unknown setting --dataset_idd: did you mean --dataset_id?",
        ("--max_length", "long"): "--max_length takes an integer, not 'long'",
    }.items():
        with pytest.raises(SettingsError, match=said):
            main(list(given))


def test_a_mistake_of_the_command_is_one_line() -> None:
    words = [
        sys.executable,
        "-m",
        "helpers",
        "data",
        "--dataset_id",
        "no/such.jsonl",
        "--model_id",
        "no/such/model",
    ]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert (done.returncode, line) == (1, "error: 'no/such/model' is neither a folder here nor a Hub id")


def test_held_out_prompts_keep_the_tokens_that_they_have_in_training() -> None:
    """With tools, calls and variables of the template, which their texts do not have."""
    asked, said = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
    pair = {"prompt": [asked], "chosen": [said], "prompt_ids": [5, 6, 7]}
    assert held_out_prompt(pair) == {"prompt": [asked], "ids": [5, 6, 7]}
    ids, labels = [1, 2, 3, 4, 5, 6, 7, 8], [-100, -100, 3, -100, -100, 6, 7, -100]
    talk = {"messages": [asked, said, asked, said], "input_ids": ids, "labels": labels}
    assert held_out_prompt(talk) == {"prompt": [asked, said, asked], "ids": [1, 2, 3, 4, 5]}
