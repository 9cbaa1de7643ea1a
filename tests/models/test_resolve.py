"""What a name refers to: models and adapters, in folders, on the Hub, and the run that they came from."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from helpers.core import REPO, SettingsError, UserError
from helpers.data.report import ReportSettings
from helpers.merging.merge import find_adapter
from helpers.models import load_tokenizer, resolve, resolve_start
from helpers.runs import checkpoints
from helpers.runs.checkpoints import check_model_folder, read_run
from helpers.runs.run import Run
from helpers.runs.start import settings_of as settings_of_notebook
from helpers.settings import load_settings
from tests.tiny import settings_of, weights


def test_a_model_that_lacks_a_shard_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_text(weights())
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        UserError, match=r"lacks model-00002-of-00002\.safetensors, which its model\.safetensors\.index"
    ):
        resolve.resolve_model(str(tmp_path))


def test_of_two_formats_only_the_one_that_transformers_reads_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = json.dumps({"weight_map": {"a": "gone"}})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    (tmp_path / "consolidated.safetensors.index.json").write_text(index)
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_text("a pickle")
    (tmp_path / "model-00001-of-00001.safetensors").write_text(weights())
    with pytest.raises(UserError, match=r"lacks gone, which its pytorch_model\.bin\.index"):
        resolve.resolve_model(str(tmp_path))
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="is a pointer of Git LFS"):
        resolve.resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(index.replace("gone", "model-00001-of-00001.safetensors"))
    assert resolve.resolve_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / "model.safetensors").write_text(weights())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert resolve.resolve_model(str(tmp_path)) == str(tmp_path)


def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    for name in ("empty", "bare", "gone"):
        (tmp_path / name).mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for name, said in (
        (str(tmp_path / "empty"), "has no config.json"),
        ("not/a/model", "neither a folder here nor"),
        (str(tmp_path / "bare"), r"has a config.json and no weights \(\*.safetensors or pytorch_model\*.bin\)"),
    ):
        with pytest.raises(UserError, match=said):
            resolve.resolve_model(name)
    adapter = '{"peft_type": "LORA", "base_model_name_or_path": "BASE"}'.replace("BASE", str(tmp_path / "nowhere"))
    (tmp_path / "gone" / "adapter_config.json").write_text(adapter)
    with pytest.raises(UserError, match=r"adapter_config.json and no weights"):
        resolve.resolve_adapter(str(tmp_path / "gone"))
    (tmp_path / "gone" / "adapter_model.safetensors").write_text(weights())
    gone = str(tmp_path / "gone")
    said = "nowhere' is neither a folder here nor a Hub id"
    with pytest.raises(UserError, match=f"{said}. Restore it, or repeat that run"):
        resolve.resolve_models((gone,), tmp_path)
    with pytest.raises(UserError, match=f"{said}. Use `--base_model_id`"):
        resolve.resolve_adapter(gone, "")


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match="'org/m' cannot be loaded: it is not in the cache, and the Hub cannot be"):
        resolve.resolve_model("org/m")
    assert time.monotonic() - began < 5


def test_rank_and_targets_of_an_adapter_that_goes_on_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    settings = settings_of(tmp_path)
    resolve.adopt_adapter_settings(tmp_path, settings)
    assert (settings.lora_r, settings.lora_target_modules, settings.sources["lora_r"]) == (4, ["q_proj"], "parent")
    with pytest.raises(SettingsError, match="`--lora_target_modules all-linear` contradicts the adapter"):
        resolve.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--lora_target_modules", "all-linear"))
    with pytest.raises(SettingsError, match="`--tuning full` cannot train the adapter"):
        resolve.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--tuning", "full"))
    assert resolve.adopt_adapter_settings(tmp_path, settings_of(tmp_path))["r"] == 4
    assert resolve.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--lora_r", "4"))["r"] == 4
    with pytest.raises(
        SettingsError, match=f"`--lora_r 64` contradicts the adapter in {tmp_path.name}, which has 4. Remove"
    ):
        resolve.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--lora_r", "64"))
    with pytest.raises(SettingsError, match=r"`--tuning dora` contradicts the adapter in .*, which has lora\. Remove"):
        resolve.adopt_adapter_settings(tmp_path, settings_of(tmp_path, "--tuning", "dora"))
    theirs = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(theirs))
    resolve.adopt_adapter_settings(tmp_path, settings := settings_of(tmp_path, "--tuning", "lora"))
    assert (settings.tuning, settings.lora_modules_to_save) == ("dora", ("lm_head",))


def test_candidates_are_what_a_run_started_from_and_the_run(tmp_path: Path) -> None:
    base = tmp_path / "sft-full"
    made = {"sft-full": None, "dpo-a": "sft-full", "sft-lora": None, "dpo-b": "sft-lora", "dpo-full": "sft-full"}
    for name, parent in made.items():
        folder = tmp_path / name
        folder.mkdir()
        if name.endswith("full"):
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_text(weights())
        else:
            (folder / "adapter_model.safetensors").write_text(weights())
            config = {"base_model_name_or_path": str(base), "revision": "v2", "peft_type": "LORA"}
            (folder / "adapter_config.json").write_text(json.dumps(config))
        record = {"step": name[:3], "status": "finished", "finished": "2026", "base_model": "org/m"}
        record["parent_folder"] = str(tmp_path / parent) if parent else None
        (folder / "run.json").write_text(json.dumps(record))
    names = [c.name for c in resolve.resolve_models((str(tmp_path / "dpo-a"), "org/other", "us/other"), tmp_path)]
    assert names == ["sft-full", "dpo-a", "other (1)", "other (2)"]
    before, after = resolve.resolve_models(("dpo-b",), tmp_path)
    assert (before.name, before.adapter, before.base) == ("sft-lora", str(tmp_path / "sft-lora"), str(base))
    assert (after.name, after.adapter, after.revision) == ("dpo-b", str(tmp_path / "dpo-b"), "v2")
    assert after.tokenizer == str(base)  # the adapter came without one
    (tmp_path / "dpo-b" / "tokenizer_config.json").write_text("{}")
    assert after.tokenizer == str(tmp_path / "dpo-b")
    before, after = resolve.resolve_models(("dpo-full",), tmp_path)
    assert (before.base, after.base, after.adapter) == (str(base), str(tmp_path / "dpo-full"), None)


def test_a_start_is_a_model_a_run_or_the_adapter_of_a_run(
    tmp_path: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = demo_folder / "tiny-mistral"
    start = resolve_start(settings_of(tmp_path, "--model_id", str(base)))
    assert (start.path, start.revision, start.base_model) == (str(base), None, str(base))
    assert (start.parent, start.adapter, start.tokenizer) == (None, None, str(base))
    absent = resolve_start(settings_of(tmp_path, "--model_id", "not/a/model", "--revision", "v2"))
    assert (absent.base_model, absent.revision) == ("not/a/model", "v2")  # not looked for yet
    with pytest.raises(UserError, match="neither a folder here nor a Hub id"):
        print(absent.path)

    record = {"step": "sft", "status": "finished", "finished": "2026", "base_model": str(base)}
    for name in ("full", "lora"):
        shutil.copytree(base, tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    settings = settings_of(tmp_path, "--sft_run", "full")
    start = resolve_start(settings)
    assert (start.path, start.tokenizer, start.adapter) == (str(tmp_path / "full"), str(tmp_path / "full"), None)
    assert (start.base_model, settings.model_id, settings.sources["model_id"]) == (str(base), str(base), "parent")
    assert start.parent is not None
    assert start.parent.name == "full"

    config = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "revision": "v3"}
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    settings = settings_of(tmp_path, "--sft_run", "lora")
    start = resolve_start(settings)
    assert (start.path, start.revision, start.adapter) == (str(base), "v3", tmp_path / "lora")
    assert (start.tokenizer, settings.lora_r) == (str(tmp_path / "lora"), 4)
    capsys.readouterr()
    tokenizer, new_tokens = load_tokenizer(start, settings)
    assert (len(tokenizer), new_tokens) == (len(AutoTokenizer.from_pretrained(base)), [])
    assert capsys.readouterr().out == "Chat template: the tokenizer's own\n"
    settings.chat_template = "chatml"
    with pytest.raises(SettingsError, match=r"needs <\|im_start\|>, <\|im_end\|>, which the adapter in lora"):
        load_tokenizer(start, settings)


def test_a_moved_run_is_compared_with_the_run_beside_it(tmp_path: Path) -> None:
    for name, parent in (("sft", None), ("dpo", "sft")):
        (tmp_path / "moved" / name).mkdir(parents=True)
        (tmp_path / "moved" / name / "config.json").write_text("{}")
        record = {"step": name, "status": "finished", "parent": parent, "parent_folder": parent and "/gone/sft"}
        (tmp_path / "moved" / name / "run.json").write_text(json.dumps(record))
    models = resolve.resolve_models(("dpo",), tmp_path / "moved")
    assert [model.base for model in models] == [str(tmp_path / "moved" / name) for name in ("sft", "dpo")]


@pytest.mark.parametrize(
    ("config", "max_length", "message"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, 1512, "--max_length 1512 is beyond the 1024 learned positions"),
        ({"model_type": "opt", "max_position_embeddings": 2048}, 0, "--max_length 0 (no limit) is beyond the 2048"),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024, ""),
        ({"model_type": "mistral", "max_position_embeddings": 512}, 1512, ""),
        ({"model_type": "bloom"}, 0, ""),
    ],
)
def test_rows_beyond_learned_positions_are_refused(
    config: dict[str, object], max_length: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if message:
        with pytest.raises(SettingsError) as caught:
            resolve.check_positions(config, max_length)
        assert message in str(caught.value)
        return
    resolve.check_positions(config, max_length)
    is_far = config["model_type"] == "mistral"
    assert ("beyond the 512 positions that this model was trained for" in capsys.readouterr().out) == is_far


def test_eos_and_pad_tokens_are_set_before_the_template_is_checked(demo_folder: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--model_id", str(demo_folder / "tiny-mistral"), "--pad_token", "<s>")
    tokenizer, _ = load_tokenizer(resolve_start(settings), settings)
    assert tokenizer.pad_token == "<s>"
    settings = settings_of(tmp_path, "--model_id", str(demo_folder / "tiny-mistral"), "--pad_token", "<nothing>")
    with pytest.raises(SettingsError, match="--pad_token '<nothing>' is not in the tokenizer's vocabulary"):
        load_tokenizer(resolve_start(settings), settings)


@pytest.mark.parametrize("name", ["01_sft.py", "02_dpo.py", "data"])
def test_the_end_of_an_answer_is_a_setting_wherever_rows_are_rendered(name: str, demo_folder: Path) -> None:
    cls = ReportSettings if name == "data" else settings_of_notebook(REPO / "notebooks" / name)
    words = ["--model_id", str(demo_folder / "tiny-mistral")]
    plain, given = load_settings(cls, {}, words), load_settings(cls, {}, [*words, "--eos_token", "<unk>"])
    assert (given.trl, "eos_token" in plain.hashed_settings()) == ({}, False)
    assert plain.digest() != given.digest()
    assert load_tokenizer(resolve_start(plain), plain)[0].eos_token == "</s>"
    assert load_tokenizer(resolve_start(given), given)[0].eos_token == "<unk>"
    chatml = load_settings(cls, {}, [*words, "--eos_token", "<unk>", "--chat_template", "chatml"])
    assert load_tokenizer(resolve_start(chatml), chatml)[0].eos_token == "<unk>"
    unknown = load_settings(cls, {}, [*words, "--eos_token", "<nothing>"])
    with pytest.raises(SettingsError, match="--eos_token '<nothing>' is not in the tokenizer's vocabulary"):
        load_tokenizer(resolve_start(unknown), unknown)


def test_a_run_or_an_adapter_as_model_is_taken_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = tmp_path / "sft-out"
    sft.mkdir()
    (sft / "config.json").write_text("{}")
    run = {"step": "sft", "status": "finished", "base_model": "org/base", "fingerprint": "f"}
    (sft / "run.json").write_text(json.dumps(run))
    start = resolve_start(settings_of(tmp_path, "--model_id", str(sft)))
    assert (start.base_model, start.parent and start.parent.folder) == ("org/base", sft.resolve())
    assert "is a run of 01_sft.py, taken as --sft_run." in capsys.readouterr().out
    for name, step in (("dpo", "dpo"), ("other", "")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        if step:
            (folder / "run.json").write_text(json.dumps({"step": step, "status": "finished"}))
        words = "is an adapter, not a model. Merge it with .*03_merge_push.py --adapter "
        with pytest.raises(SettingsError, match=words):
            resolve_start(settings_of(tmp_path, "--model_id", str(folder)))


def finished_run(folder: Path, step: str, files: dict[str, str], **record: object) -> Run:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    run = Run(folder, {"step": step, "base_model": "org/base"} | record)
    run.finish()
    return run


ADAPTER = {"adapter_model.safetensors": weights(), "adapter_config.json": '{"peft_type": "LORA", "lora_alpha": 16}'}
MODEL = {"config.json": "{}", "model.safetensors": weights(), "generation_config.json": "{}"}


@pytest.mark.parametrize("name", [*ADAPTER, *MODEL])
def test_a_file_that_changed_after_its_run_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = finished_run(folder, "dpo", ADAPTER if name in ADAPTER else MODEL)
    check_model_folder(folder)
    (folder / "report.html").write_text("not of the model")
    (folder / "run.json").write_text(json.dumps(run.record | {"note": "mine"}))
    check_model_folder(folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1  # one bit, of the same size
    (folder / name).write_bytes(content)
    fix = f"Restore it, or repeat that run .*`python -m helpers accept {folder}`"
    with pytest.raises(UserError, match=rf"{folder} has changed since its run finished: {name} has changed\. {fix}"):
        check_model_folder(folder)
    (folder / name).write_text("longer than it was before, so that it need not be read at all")
    with pytest.raises(UserError, match=f"{name} has changed"):
        check_model_folder(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        check_model_folder(folder)


def test_a_change_on_purpose_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(finished_run(tmp_path / "run", "dpo", ADAPTER).record)
    checkpoints.main([str(tmp_path / "run")])
    (tmp_path / "run" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja was added, adapter_config\.json has changed\. Restore"):
        check_model_folder(tmp_path / "run")
    checkpoints.main([str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert out.startswith("Nothing has changed.\n")
    assert out.endswith("run: chat_template.jinja was added, adapter_config.json has changed. Accepted.\n")
    check_model_folder(tmp_path / "run")
    after = read_run(tmp_path / "run")
    assert after["fingerprint"] != before["fingerprint"]  # what was merged or answered before was another model's
    assert {name: after[name] for name in ("status", "finished")} == {n: before[n] for n in ("status", "finished")}
    with pytest.raises(SettingsError, match="usage: python -m helpers accept outputs/<run>"):
        checkpoints.main([str(tmp_path)])


def test_long_hashing_is_announced_and_done_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(tmp_path / "run", "sft", MODEL)
    monkeypatch.setattr(checkpoints, "SLOW_BYTES", 5)
    checkpoints._sha256.cache_clear()
    check_model_folder(tmp_path / "run")
    assert checkpoints._sha256.cache_info().misses == len(MODEL)
    check_model_folder(tmp_path / "run")
    assert checkpoints._sha256.cache_info().misses == len(MODEL)
    assert f"Comparing 0.00 MB in {tmp_path / 'run'} with the hashes in its run.json." in capsys.readouterr().out


def changed_runs(outputs: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each way to read a run, with the run's file that has changed."""
    base = finished_run(outputs / "full", "sft", MODEL, finished="2026").folder
    text = json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 8, "lora_alpha": 16,
                       "target_modules": ["q_proj"]})  # fmt: skip
    adapter = ADAPTER | {"adapter_config.json": text}
    finished_run(outputs / "sft", "sft", adapter)
    finished_run(outputs / "dpo", "dpo", adapter)
    finished_run(outputs / "merged", "merge", MODEL)
    changes = [
        ("full", "config.json", " {}"),
        ("sft", "adapter_model.safetensors", weights("y")),
        ("dpo", "adapter_config.json", text.replace("16", "61")),
        ("merged", "model.safetensors", weights("y")),
    ]
    for name, file, content in changes:
        (outputs / name / file).write_text(content)
    settings = SimpleNamespace(output_dir=outputs, max_shard_size="2GB", adapter="", run="dpo", base_model_id="")
    settings.trust_remote_code, settings.attn_implementation = False, "auto"

    def start(*flags: str) -> str:
        return resolve_start(settings_of(outputs, *flags)).path

    yield "full: config.json", lambda: start("--sft_run", "full")
    yield "sft: adapter_model.safetensors", lambda: start("--sft_run", "sft")
    yield "merged: model.safetensors", lambda: start("--model_id", str(outputs / "merged"))
    yield "dpo: adapter_config.json", lambda: find_adapter(settings).base_model
    yield "merged: model.safetensors", lambda: resolve.resolve_models(("merged",), outputs)
    yield "sft: adapter_model.safetensors", lambda: resolve.resolve_models((str(outputs / "sft"),), outputs)
    (outputs / "dpo" / "adapter_config.json").write_text(text)
    yield "full: config.json", lambda: find_adapter(settings).base_model
    yield "full: config.json", lambda: resolve.resolve_models(("dpo",), outputs)


def test_a_changed_run_is_refused_by_every_notebook_that_reads_it(tmp_path: Path) -> None:
    for what, read in changed_runs(tmp_path):
        folder, file = what.split(": ")
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(
            f"{tmp_path / folder} has changed since its run finished: {file} has changed."
        ), what


@pytest.mark.parametrize(
    ("status", "fix"), [("finished", "Use {}. To use"), ("interrupted", "Finish that run, then use {}. To use")]
)
def test_a_checkpoint_is_named_and_its_run(status: str, fix: str, tmp_path: Path) -> None:
    for name, files in (("full", MODEL), ("lora", ADAPTER)):
        run = finished_run(tmp_path / name, "dpo" if name == "lora" else "sft", files)
        run.save(status=status)
        for place in ("checkpoint-4", "checkpoint-4/ref", "broken-checkpoint-6"):
            (tmp_path / name / place).mkdir()
            for file, text in files.items():
                (tmp_path / name / place / file).write_text(text)
    settings = SimpleNamespace(output_dir=tmp_path, max_shard_size="2GB", base_model_id="", trust_remote_code=False)
    settings.attn_implementation = "auto"
    lora, full = (str(tmp_path / name / "checkpoint-4") for name in ("lora", "full"))
    broken = str(tmp_path / "full" / "broken-checkpoint-6")

    def adapter(name: str, run: str = "latest") -> str:
        return find_adapter(SimpleNamespace(**vars(settings), adapter=name, run=run)).base_model

    ways: list[tuple[str, Callable[[], object]]] = [
        (lora, lambda: adapter(lora)),
        (f"{lora}/ref", lambda: adapter(f"{lora}/ref")),
        (lora, lambda: adapter("", run=lora)),
        (lora, lambda: resolve.resolve_models((lora,), tmp_path)),
        (full, lambda: resolve.resolve_models((full,), tmp_path)),
        (full, lambda: resolve.resolve_models(("full/checkpoint-4",), tmp_path)),
        (full, lambda: resolve_start(settings_of(tmp_path, "--model_id", full))),
        (full, lambda: resolve_start(settings_of(tmp_path, "--sft_run", full))),
        (full, lambda: resolve.resolve_model(full)),
        (broken, lambda: resolve.resolve_model(broken)),
    ]
    for checkpoint, use in ways:
        run = str(tmp_path / ("lora" if "lora" in checkpoint else "full"))
        with pytest.raises(UserError) as error:
            use()
        text = f"{checkpoint} is a checkpoint of the run {run} ({status}). {fix.format(run)}"
        assert str(error.value).startswith(text), checkpoint
    shutil.copytree(full, tmp_path / "checkpoint-4")  # it is in no run
    assert resolve.resolve_model(str(tmp_path / "checkpoint-4"))


def test_an_adapter_on_an_adapter_or_as_a_model_is_named_with_the_next_step(tmp_path: Path) -> None:
    for name, base in (("first", "org/base"), ("second", str(tmp_path / "first")), ("both", "org/base")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(weights())
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    for file, text in MODEL.items():
        (tmp_path / "both" / file).write_text(text)
    first, second = tmp_path / "first", tmp_path / "second"
    command = f"`python notebooks/03_merge_push.py --adapter {first}`"
    ways: list[Callable[[], object]] = [
        lambda: resolve.resolve_adapter(str(second)),
        lambda: resolve.resolve_adapter(str(second), ""),
        lambda: resolve.resolve_adapter(str(tmp_path / "both"), str(first)),
        lambda: resolve.resolve_models((str(second),), tmp_path),
    ]
    for use in ways:
        with pytest.raises(UserError) as error:
            use()
        assert f"is an adapter on another adapter, '{first}'. Merge that one first with {command}, then" in str(
            error.value
        )
    with pytest.raises(UserError, match=re.escape(f"'{first}' is an adapter, not a model. Merge it with {command}")):
        resolve.resolve_model(str(first))
    with pytest.raises(
        UserError, match="both' is an adapter, not a model"
    ):  # transformers loads org/base and the adapter
        resolve.resolve_model(str(tmp_path / "both"))
    with pytest.raises(SettingsError, match="both is an adapter, not a model"):
        resolve_start(settings_of(tmp_path, "--model_id", str(tmp_path / "both")))
