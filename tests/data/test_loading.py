"""Where rows come from: files, globs, folders, the Hub; one set or several, with a share of each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from helpers.core import SettingsError, UserError
from helpers.data.encode import LengthLimits
from helpers.data.loading import DatasetSpec, load_rows, parse_dataset_specs
from helpers.data.prepare import load_instructions, load_preferences, prepare_rows, subsample

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]


def settings(*dataset_id: str, **more: Any) -> Any:
    common = {"dataset_config": "", "dataset_split": "train", "dataset_revision": "", "data_format": "auto"}
    sources = {"dataset_split": "flag" if "dataset_split" in more else "default"}
    rest = {"eval_split": "", "system_prompt": "", "dataset_num_proc": 0, "strict": False, "sources": sources}
    return SimpleNamespace(dataset_id=dataset_id, **common | rest | more)


def write_pairs(file: Path, prompts: list[str], chosen: str = "yes") -> str:
    rows = [{"prompt": p, "chosen": f"{chosen} {p}", "rejected": "no"} for p in prompts]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow", "folder", "saved", "splits"])
def test_rows_load_from_files_and_folders(suffix: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    file = tmp_path / f"rows.{suffix}"
    if suffix in ("json", "jsonl"):
        rows.to_json(file)
    elif suffix == "csv":
        rows.to_csv(file)
    elif suffix == "parquet":
        rows.to_parquet(file)
    elif suffix == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    elif suffix == "saved":
        rows.save_to_disk(file)
    elif suffix == "splits":
        DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(file)
        assert len(load_rows(DatasetSpec(str(file)), "test")) == 1
    else:
        file.mkdir()
        rows.to_json(file / "train.jsonl")
    assert load_rows(DatasetSpec(str(file))).to_list() == rows.to_list()


def test_a_glob_reads_its_files_in_order_and_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, row in enumerate(ROWS):
        (tmp_path / f"part-{i}.jsonl").write_text(json.dumps(row))
    assert load_rows(DatasetSpec(str(tmp_path / "part-*.jsonl"))).to_list() == ROWS
    monkeypatch.chdir(tmp_path)
    assert load_rows(DatasetSpec("part-*.jsonl")).to_list() == ROWS
    Dataset.from_list(ROWS).to_parquet(tmp_path / "part-2.parquet")
    for pattern, said in (("part-*", "must be files of one type"), ("none-*.jsonl", "does not exist. Check its path")):
        with pytest.raises(UserError, match=said):
            load_rows(DatasetSpec(pattern))


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n\n{broken\n")
    said = {"rows.txt": "must be files of one type. Use one of .json", "rows.jsonl": "rows.jsonl, line 3, is not JSON"}
    for name, reason in said.items():
        with pytest.raises(UserError) as raised:
            load_rows(DatasetSpec(str(tmp_path / name)))
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ROWS[0]).replace("a", "é").encode("latin-1"))
    (tmp_path / "list.jsonl").write_text("[1]")
    Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "none")
    said = {
        "empty.jsonl": "empty.jsonl is empty", "latin.jsonl": "latin.jsonl, line 1, is not UTF-8",
        "list.jsonl": "list.jsonl is a JSON array", "none": "none', split 'train', has no rows",
    }  # fmt: skip
    for name, reason in said.items():
        with pytest.raises(UserError, match=reason):
            load_rows(DatasetSpec(str(tmp_path / name)))
    for name in ("no such/data set/at all", "no/such.jsonl"):
        with pytest.raises(UserError, match=f"dataset '{name}'"):
            load_rows(DatasetSpec(name))
    DatasetDict({"train_prefs": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "named")
    with pytest.raises(UserError, match="split 'train', cannot be loaded: it has train_prefs"):
        load_rows(DatasetSpec(str(tmp_path / "named")))


def test_cells_of_a_csv_are_text_and_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "w[1].csv").write_text("prompt,chosen,rejected\na,None,12\nb,2020-01-01,NA\n")
    rows = load_rows(DatasetSpec(str(tmp_path / "w[1].csv"))).to_list()
    assert [tuple(row.values()) for row in rows] == [("a", "None", "12"), ("b", "2020-01-01", "NA")]


def test_a_set_saved_with_a_format_is_read_as_it_is(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).with_format("numpy", columns=["prompt"]).save_to_disk(tmp_path / "set")
    assert load_rows(DatasetSpec(str(tmp_path / "set"))).to_list() == ROWS


def test_an_evaluation_split_is_another_one_and_not_of_a_file(tmp_path: Path) -> None:
    for given, said in (
        ("a/b", "is also the training split"),
        (write_pairs(tmp_path / "x.jsonl", ["a"]), "a file has no splits"),
    ):
        with pytest.raises(SettingsError, match=said):
            parse_dataset_specs(settings(given, eval_split="train" if given == "a/b" else "test"))


def test_a_row_of_another_type_is_one_row_of_the_report(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [talk[0], {"role": "assistant", "content": "c"}]
    rows: list[dict[str, Any]] = [{"chosen": talk, "rejected": other}]
    rows += [
        {"chosen": 3, "rejected": other},
        {"chosen": [*talk[:1], {"role": "assistant", "content": 1}], "rejected": other},
    ]
    rows += [
        {
            "chosen": [{**m, "content": m["content"] + "x"} for m in talk],
            "rejected": [{**m, "content": m["content"] + "x"} for m in other],
        }
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, report = prepare_rows(load_rows(DatasetSpec(str(tmp_path / "rows.jsonl"))), tokenizer, LengthLimits())
    assert (report.format, report.examples, len(pairs)) == (
        "messages", {"a number or a date, not text": [2, 3]}, 2,
    )  # fmt: skip


def test_dataset_id_names_one_set_or_several_with_their_own_settings() -> None:
    assert parse_dataset_specs(settings("a/b", data_format="pairs")) == [
        DatasetSpec("a/b", format="pairs", any_split=True)
    ]
    some = parse_dataset_specs(
        settings("a/b", '{"id": "c/d", "fraction": 0.5, "split": "test"}', dataset_split="train_prefs")
    )
    assert some == [DatasetSpec("a/b", split="train_prefs"), DatasetSpec("c/d", split="test", fraction=0.5)]
    for text, said in {
        '{"id": "a", "fracton": 0.5}': "unknown key 'fracton'. Use id, config, split, revision, format",
        '{"id": "a", "fraction": 0}': "a fraction above 0 and at most 1",
        '{"id": "a", "fraction": "half"}': "fraction must be a number",
        '{"fraction": 0.5}': "needs an id",
        '{"id": "a"': "is not JSON",
    }.items():
        with pytest.raises(SettingsError, match=said):
            parse_dataset_specs(settings(text))
    with pytest.raises(SettingsError, match="--dataset_id is empty"):
        parse_dataset_specs(settings())


def test_a_split_that_was_not_asked_for_gives_way_to_the_one_for_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train_prefs": rows, "test_prefs": rows}).save_to_disk(tmp_path / "set")
    (source,) = parse_dataset_specs(settings(str(tmp_path / "set")))
    assert load_rows(source).to_list() == ROWS
    assert "has no split 'train'; using 'train_prefs'" in capsys.readouterr().out
    (source,) = parse_dataset_specs(settings(str(tmp_path / "set"), dataset_split="validation"))
    with pytest.raises(UserError, match="it has train_prefs, test_prefs"):
        load_rows(source)
    (source,) = parse_dataset_specs(settings(str(tmp_path / "set"), eval_split="test_perfs"))
    with pytest.raises(UserError, match="split 'test_perfs', cannot be loaded: it has train_prefs, test_prefs"):
        load_rows(source, source.eval_split)  # what is evaluated on is never what is trained on
    file = write_pairs(tmp_path / "x.jsonl", ["a", "b"])
    for sources in ({"dataset_split": "default"}, {"dataset_split": "recipe", "dataset_id": "flag"}):
        (source,) = parse_dataset_specs(settings(file, dataset_split="train_prefs", sources=sources))
        assert len(load_rows(source)) == 2
    (source,) = parse_dataset_specs(settings(json.dumps({"id": file, "split": "train[:1]"})))
    assert len(load_rows(source)) == 1
    for sources in ({"dataset_split": "flag"}, {"dataset_split": "recipe", "dataset_id": "recipe"}):
        (source,) = parse_dataset_specs(settings(file, dataset_split="train_prefs", sources=sources))
        with pytest.raises(SettingsError, match=r"x\.jsonl has rows under train\. .* or the split of this dataset, to"):
            load_rows(source)
    (tmp_path / "folder").mkdir()
    rows.to_json(tmp_path / "folder" / "alpaca_noisy_multi_preference.json")
    (source,) = parse_dataset_specs(settings(str(tmp_path / "folder")))
    assert load_rows(dataclasses.replace(source, split="train_sft")).to_list() == ROWS


def test_a_share_of_the_rows_is_the_seed_s_and_keeps_their_numbers() -> None:
    rows = Dataset.from_dict({"i": list(range(100))})
    some, numbers = subsample(rows, 0.25, seed=1)
    assert some["i"][:] == numbers == sorted(set(numbers))
    assert (len(numbers), subsample(rows, 0.25, 1)[1] == numbers, subsample(rows, 0.25, 2)[1] == numbers) == (
        25,
        True,
        False,
    )
    assert subsample(rows, 1, 0)[1] == list(range(100))


def test_sets_mix_and_the_report_of_all_adds_up(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    one = write_pairs(tmp_path / "one.jsonl", [f"a{i}" for i in range(20)])
    talk = [[{"role": "user", "content": f"b{i}"}, {"role": "assistant", "content": "yes"}] for i in range(10)]
    rows = [
        {"chosen": t, "rejected": [t[0], {"role": "assistant", "content": "yes" if i == 4 else "no"}]}
        for i, t in enumerate(talk)
    ]
    rows[7] = {
        side: [{"role": "user", "content": "a3"}, {"role": "assistant", "content": a}]
        for side, a in (("chosen", "no"), ("rejected", "yes a3"))
    }
    Dataset.from_list(rows).to_parquet(tmp_path / "two.parquet")
    two = str(tmp_path / "two.parquet")
    train, held_out, report = load_preferences(settings(one, two, eval_rows=5), tokenizer)
    assert report.format == "pairs, messages"
    assert (report.read, report.kept, report.dropped.total()) == (30, 27, 3)
    assert report.examples == {
        "the same pair with both labels": ["one.jsonl train 4", "two.parquet train 8"],
        "chosen equals rejected": ["two.parquet train 5"],
    }
    assert len(train) + len(held_out) == 27
    assert report.as_dict()["sets"] == {
        "one.jsonl train": {"read": 20, "kept": 19, "changed": 0, "dropped": 1,
                            "dropped: the same pair with both labels": 1},
        "two.parquet train": {"read": 10, "kept": 8, "changed": 0, "dropped": 2,
                              "dropped: the same pair with both labels": 1, "dropped: chosen equals rejected": 1},
    }  # fmt: skip
    assert report.as_dict()["by"]["dropped"] == report.dropped
    assert (report.as_dict()["train"], report.as_dict()["eval"]) == (len(train), len(held_out)) == (22, 5)
    half = json.dumps({"id": one, "fraction": 0.5})
    _, _, report = load_preferences(settings(half, two, eval_rows=5), tokenizer)
    assert report.read == 20
    with pytest.raises(SettingsError, match=r"cannot be used. chosen equals rejected: 1 \(row two.parquet train 5\)"):
        load_preferences(settings(half, two, eval_rows=5, strict=True), tokenizer)


def test_datasets_of_one_id_and_several_configs_are_counted_apart(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("a", "b")]
    (tmp_path / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    for name, count in (("a", 8), ("b", 5)):
        write_pairs(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(count)])
    entries = [json.dumps({"id": str(tmp_path), "config": name}) for name in ("a", "b", "b")]
    _, _, report = load_preferences(settings(*entries, eval_rows=2), tokenizer)
    read = {name.removeprefix(str(tmp_path)): (counts["read"], counts["kept"]) for name, counts in report.sets.items()}
    assert read == {" a train": (8, 8), " b train": (10, 5)}


def test_a_split_for_evaluation_is_not_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sets = {"train_prefs": [f"a{i}" for i in range(12)], "test_prefs": ["a2", "a5", "c1", "c2"]}
    rows = {s: [{"prompt": p, "chosen": f"{s} {p}", "rejected": "no"} for p in prompts] for s, prompts in sets.items()}
    DatasetDict({s: Dataset.from_list(r) for s, r in rows.items()}).save_to_disk(tmp_path / "set")
    splits = {"dataset_split": "train_prefs", "eval_split": "test_prefs"}
    given = settings(str(tmp_path / "set"), **splits)
    train, held_out, report = load_preferences(
        settings(str(tmp_path / "set"), train_rows=7, eval_rows=3, **splits), tokenizer
    )
    assert (len(train), len(held_out)) == (7, 3)
    assert report.examples == {"prompt is in the evaluation split": ["set train_prefs 3", "set train_prefs 6"]}
    assert (report.read, report.kept) == (16, 14)
    assert {p[0]["content"] for p in held_out["prompt"]} < set(sets["test_prefs"])
    conversations, held, report = load_instructions(given, tokenizer)
    assert (len(conversations), len(held), report.kept) == (10, 4, 14)
    rows["test_prefs"] = [{"prompt": "c", "chosen": "x", "rejected": "x"}]
    DatasetDict({s: Dataset.from_list(r) for s, r in rows.items()}).save_to_disk(tmp_path / "tied")
    with pytest.raises(UserError, match="No row of --eval_split is left"):
        load_preferences(settings(str(tmp_path / "tied"), **splits), tokenizer)


def test_processes_give_what_one_gives(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = load_rows(DatasetSpec(write_pairs(tmp_path / "rows.jsonl", [f"What is {i}?" for i in range(230)] * 2)))
    one, report = prepare_rows(rows, tokenizer, LengthLimits(8, 64, "truncate_prompt"), num_proc=1)
    # the same work under another name, for the cache not to answer
    two, report_of_two = prepare_rows(
        rows.select(range(len(rows))), tokenizer, LengthLimits(8, 64, "truncate_prompt"), num_proc=2
    )
    assert one._fingerprint != two._fingerprint
    assert one.to_list() == two.to_list()
    assert report.as_dict() == report_of_two.as_dict()
    assert report.dropped == {"duplicate pair": 230}


def test_where_nothing_is_forked_one_process_does_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import multiprocess

    from helpers.data.prepare import worker_count

    assert [worker_count(*n) for n in ((0, 10), (3, 10), (3, 2), (1, 9000))] == [None, 3, 2, None]
    monkeypatch.setattr(multiprocess, "get_start_method", lambda: "spawn")
    assert worker_count(0, 90_000) is worker_count(4, 90_000) is None
    assert "this system does not fork processes" in capsys.readouterr().out
