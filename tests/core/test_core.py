"""Errors, paths, user modules and tokens."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.core import (
    REPO,
    SettingsError,
    UserError,
    add_user_paths,
    import_user_module,
    is_notebook,
    read_jsonl,
    show,
)
from helpers.models.adapters import hf_token
from tests.conftest import Project


def test_this_is_no_kernel_and_a_user_error_shows_one_line_in_one() -> None:
    assert not is_notebook()
    assert UserError("do this")._render_traceback_() == ["UserError: do this"]


def test_a_user_s_module_is_found_where_the_command_was_typed_and_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(REPO))])
    (tmp_path / "my_rules.py").write_text("def compare(a, b, question):\n    return 'tie'\n")
    assert import_user_module("my_rules", "judge_module").compare("a", "b", {}) == "tie"
    del sys.modules["my_rules"]
    assert import_user_module("recipes.demo.questions", "judge_module").__name__ == "recipes.demo.questions"
    assert sys.path[-2:] == [str(tmp_path), str(REPO)]
    add_user_paths()
    assert sys.path.count(str(tmp_path)) == 1
    with pytest.raises(SettingsError, match="--judge_module no_rules cannot be imported: No module named 'no_rules'"):
        import_user_module("no_rules", "judge_module")


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n[3]\n')
    assert read_jsonl(file, end=21) == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"rows.jsonl, line 4, is not a JSON object"):
        read_jsonl(file)
    file.write_bytes(b'{"a": \n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 1, is not JSON: Expecting value, column"):
        read_jsonl(file)
    file.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 1, is not UTF-8: invalid start byte"):
        read_jsonl(file)


def test_a_figure_is_saved_and_a_text_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.figure import Figure

    show("[bold] " + "x" * 200, Figure(), save_as=tmp_path / "figure.png")
    assert capsys.readouterr().out == "[bold] " + "x" * 200 + "\n"
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))


def test_without_a_terminal_nothing_is_asked(no_terminal: None) -> None:
    with pytest.raises(UserError, match=r"pushing needs a Hub token\. Set HF_TOKEN"):
        hf_token("pushing")


def test_the_environment_s_token_is_used(no_terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert hf_token("pushing") == "hf_mine"


def test_someone_at_a_terminal_is_asked() -> None:
    pty = pytest.importorskip("pty", reason="terminals of POSIX only")
    code = "from helpers.models.adapters import hf_token; print('GOT', hf_token('pushing'))"
    parent, child = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    said = b""
    while b"HF_TOKEN (not shown" not in said:
        said += os.read(parent, 1000)
    os.write(parent, b"hf_typed\n")
    while b"GOT" not in said or not said.endswith(b"\n"):
        said += os.read(parent, 1000)
    process.wait(30)
    os.close(parent)
    assert b"GOT hf_typed" in said
    assert said.count(b"hf_typed") == 1  # not shown while typed


REFUSED = """
from helpers.core import install_error_hook
install_error_hook()
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_mistral
"""


@pytest.mark.parametrize(
    ("code", "status", "start"),
    [
        (
            "config = LoraConfig(modules_to_save=['embed_tokens'], trainable_token_indices={'embed_tokens': [1]},"
            " target_modules=['q_proj'])\nget_peft_model(tiny_mistral(), config)", 2, "error: PEFT refuses these",
        ),
        ("tiny_mistral().set_attn_implementation('nothing')", 2, "error: "),
        ("raise ValueError('a fault of our own')", 1, "Traceback"),
    ],
)  # fmt: skip
def test_what_a_library_refuses_is_one_line_and_our_own_faults_keep_their_traceback(
    code: str, status: int, start: str, project: Project
) -> None:
    done = project.python("-c", REFUSED + code, PYTHONPATH=f"{project.root}:{REPO}")
    assert done.returncode == status
    assert done.stderr.startswith(start), done.stderr
    assert (len(done.stderr.strip().splitlines()) == 1) == (status == 2)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("OSError(28, 'No space left on device', '/data/a.bin')", "The disk is full (/data/a.bin). Free some space"),
        (
            "RuntimeError('[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0')",
            "The disk is full. Free",
        ),
        ("Exception('Error while serializing: I/O error: No space left on device (os error 28)')", "The disk is full."),
        ("PermissionError(13, 'Permission denied', '/data/x')", "/data/x: Permission denied. Fix its permissions"),
        ("OSError(36, 'File name too long', 'aaa')", "aaa: File name too long. Use a shorter name."),
    ],
)
def test_what_the_system_refuses_is_one_line(raised: str, line: str) -> None:
    code = f"from helpers.core import install_error_hook\ninstall_error_hook()\nraise {raised}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"error: {line}")
