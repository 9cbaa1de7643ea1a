"""What a user can mend is one line, a status and nothing written, whatever it is."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from pathlib import Path

import pytest

from helpers.models.adapters import check_hub, describe_error
from tests import fake_hub as local
from tests.conftest import Project
from tests.tiny import weights

# Runs each command in one process as Python runs a script: an error goes to sys.excepthook, which gives the status.
DRIVER = """
import json, runpy, sys
for notebook, *flags in json.load(sys.stdin):
    sys.argv, status = [notebook, *flags], 0
    try:
        runpy.run_path("notebooks/" + notebook, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        except SystemExit as stop:
            status = stop.code
    print("ENDED", json.dumps(status), file=sys.stderr, flush=True)
"""


def test_what_the_hub_answers_says_what_to_do() -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def answered(status: int) -> str:
        request = httpx2.Request("GET", "http://127.0.0.1")
        error = LocalEntryNotFoundError("not there")
        error.__cause__ = HfHubHTTPError("refused", response=httpx2.Response(status, request=request))
        return describe_error(error)

    assert answered(503) == "the Hub fails (503). Run the same command again later"
    assert answered(403).startswith("your token may not do that (403)")
    assert describe_error(LocalEntryNotFoundError("x")).startswith(
        "it is not in the cache, and the Hub cannot be reached"
    )
    assert describe_error(ValueError("two\nlines")) == "two lines"


def test_a_hub_that_cannot_be_reached_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for hangs_up in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        check_hub.cache_clear()
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            asked: list[bytes] = []

            def answer(server: socket.socket, asked: list[bytes], hangs_up: bool) -> None:
                connection, _ = server.accept()
                asked.append(connection.recv(4))
                if not hangs_up:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                connection.close()

            answering = threading.Thread(target=answer, args=(server, asked, hangs_up))
            answering.start()
            check_hub()
            answering.join()
            assert asked == [b"HEAD"]
        assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == hangs_up
        assert ("The Hub cannot be reached: only its cache is used." in capsys.readouterr().err) == hangs_up
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    check_hub.cache_clear()
    check_hub()  # the server is gone
    check_hub()
    assert capsys.readouterr().err.count("The Hub cannot be reached") == 1
    check_hub.cache_clear()


@pytest.mark.long
def test_each_mistake_is_one_line_and_nothing_is_written(
    hub: local.Hub, hub_env: dict[str, str], demo_folder: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    project = Project(tmp_path_factory.mktemp("project"))
    tiny, pairs = str(demo_folder / "tiny-mistral"), str(demo_folder / "preferences")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(demo_folder / "tiny-mistral" / "config.json", bare)
    orphan = tmp_path / "orphan"
    orphan.mkdir()
    (orphan / "adapter_model.safetensors").write_text(weights())
    base = {
        "base_model_name_or_path": str(tmp_path / "gone"),
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj"],
    }
    (orphan / "adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?", "topic": "x"}\n' * 9)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    (tmp_path / "file").touch()
    for status in (401, 403, 429):  # the last is asked again for 23 s
        hub.fail[f"org/s{status}"] = status, {}
    hub.add("models", "org/hidden", {"config.json": b"{}"}, private=True)
    hub.add("models", "org/gated", {"config.json": b"{}"})
    hub.fail["org/gated"] = 403, {"X_Error_Code": "GatedRepo"}
    dpo = ["02_dpo.py", "--model_id", tiny, "--dataset_id", pairs, "--max_steps", "1"]
    cases: list[tuple[list[str], int, str]] = [
        ([*dpo, "--dpo_beta", "high"], 2, "--dpo_beta takes a number, not 'high'"),
        ([*dpo, "--loss_type", "sigmoyd"], 2, "--loss_type sigmoyd is none of TRL's losses: aot, "),
        ([*dpo, "--early_stopping_patience", "2", "--eval_strategy", "no"], 2, "transformers refuses these settings: "),
        ([*dpo, "--lora_target_modules", "q_proj"], 2, "--lora_target_modules: Target modules q_proj not found"),
        ([*dpo, "--lora_modules_to_save", "foo"], 2, "`--lora_modules_to_save foo` is not a module of the model. Use "),
        ([*dpo, "--attn_implementation", "nope"], 2,
         '--attn_implementation: Specified `attn_implementation="nope"` is not supported'),
        ([*dpo, "--dataset_id", "nowhere.jsonl"], 1, "dataset 'nowhere.jsonl'"),
        ([*dpo, "--dataset_id", str(tmp_path / "questions.jsonl")], 1,
         "has columns question, topic, which match no known format"),
        ([*dpo, "--dataset_id", str(tmp_path / "broken.jsonl")], 1, "broken.jsonl, line 2, is not JSON"),
        ([*dpo, "--model_id", str(tmp_path / "gone")], 1, "is neither a folder here nor a Hub id"),
        ([*dpo, "--model_id", str(bare)], 1, "has a config.json and no weights"),
        ([*dpo, "--sft_run", str(orphan), "--model_id", ""], 1, "is not the folder of a run"),
        ([*dpo, "--output_dir", str(tmp_path / "file")], 1, "is not writable. Use another --output_dir"),
        (["03_merge_push.py", "--adapter", str(orphan)], 1, "the base of the adapter in "),
        (["01_sft.py", "--model_id", tiny, "--dataset_id", str(tmp_path / "questions.jsonl")], 1,
         "Rename them to messages, prompt and"),
        ([*dpo, "--model_id", "org/s401"], 1, "'org/s401' cannot be loaded: the Hub does not accept your token (401)"),
        ([*dpo, "--model_id", "org/s403"], 1, "'org/s403' cannot be loaded: your token may not do that (403)"),
        ([*dpo, "--dataset_id", "org/s401"], 1, "cannot be loaded: the Hub does not accept your token (401)"),
        ([*dpo, "--dataset_id", "org/s403"], 1, "cannot be loaded: your token may not do that (403)"),
        ([*dpo, "--model_id", "org/hidden"], 1, "'org/hidden' cannot be loaded: it is not on the Hub, or your token"),
        ([*dpo, "--model_id", "org/gated"], 1, "HF_TOKEN"),
        ([*dpo, "--model_id", "org/absent"], 1, "'org/absent' cannot be loaded: it is not on the Hub, or your token"),
        ([*dpo, "--dataset_id", "org/absent"], 1, "'org/absent' doesn't exist on the Hub or cannot be accessed"),
        ([*dpo, "--model_id", "org/s429"], 1, "'org/s429' cannot be loaded: the Hub asks to slow down (429)"),
    ]  # fmt: skip
    done = project.python("-c", DRIVER, input=json.dumps([words for words, _, _ in cases]), **hub_env)
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    said: list[list[str]] = [[]]
    ended = []
    for line in done.stderr.splitlines():
        if line.startswith("ENDED "):
            ended.append(json.loads(line[6:]))
            said.append([])
        elif line.startswith("error: "):
            said[-1].append(line)
    for (words, status, expected), lines, got in zip(cases, said, ended, strict=False):
        assert len(lines) == 1, (words, lines)
        assert expected in lines[0], (words, lines)
        assert got == status, (words, lines, got)
    assert len(ended) == len(cases)
    assert not (project.root / "outputs").exists()
