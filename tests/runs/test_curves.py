"""Curves of a run, and of several over one another; the lines and logs that they are made of."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from helpers.core import SettingsError, UserError
from helpers.runs import curves, report, sweep
from helpers.runs import curves as history
from helpers.training import callbacks as live
from helpers.training import diagnostics as health

HISTORY = [
    {"step": 1, "loss": 0.7, "rewards/margins": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "grad_norm": 1.0},
    {"step": 2, "loss": 0.5, "rewards/margins": 0.4, "rewards/chosen": 0.1, "rewards/rejected": -0.3, "grad_norm": 2.0},
    {"step": 2, "eval_loss": 0.6, "eval_rewards/margins": 0.2},
    {"step": 2, "train_runtime": 9.0},
]


def test_the_figure_has_a_panel_for_each_thing_that_was_logged() -> None:
    figure = curves.plot_run(HISTORY, "run")
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.axison}
    assert list(panels) == ["loss", "reward margin", "rewards", "gradient norm"]
    training, held_out = panels["loss"].lines
    assert training.get_xydata().tolist() == [[1, 0.7], [2, 0.5]]
    assert held_out.get_xydata().tolist() == [[2, 0.6]]
    assert panels["loss"].get_shared_x_axes().joined(panels["loss"], panels["gradient norm"])
    assert curves.plot_run([]).axes  # a run without logs still draws


def test_several_runs_are_drawn_over_one_another_a_colour_each() -> None:
    other = [{**log, "loss": log["loss"] / 2} for log in HISTORY[:2]]
    figure = curves.plot_runs({"beta 0.1": HISTORY, "beta 0.3": other})
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.axison}
    drawn = {
        line.get_color(): line.get_ydata().tolist() for line in panels["loss"].lines if line.get_linestyle() == "-"
    }
    assert drawn == {"C0": [0.7, 0.5], "C1": [0.35, 0.25]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["beta 0.1", "beta 0.3"]
    dashed = [line for line in panels["rewards"].lines if line.get_linestyle() == "--"]
    assert [line.get_ydata().tolist() for line in dashed] == [[0.0, -0.3], [0.0, -0.3]]  # rejected


def test_more_than_ten_runs_have_a_colour_each_too() -> None:
    figure = curves.plot_runs({f"run {i}": HISTORY for i in range(25)})
    colours = [to_hex(line.get_color()) for line in figure.legends[0].get_lines()]
    assert len(set(colours)) == 25
    (loss,) = (axis for axis in figure.axes if axis.get_title(loc="left") == "loss")
    assert [to_hex(line.get_color()) for line in loss.lines if line.get_linestyle() == "-"] == colours


def test_findings_stand_in_the_figure() -> None:
    diagnostic = health.Diagnostic("margin", "the reward margin is 12", "", "")
    assert curves.plot_run(HISTORY, "run", [diagnostic]).get_supxlabel() == "margin: the reward margin is 12"


def test_tokens_per_second_are_those_since_the_log_before_without_evaluations() -> None:
    def log(step: int, seen: int, seconds: float, tokens: int) -> dict[str, float]:
        return {
            "step": step, "loss": 1.0, "num_input_tokens_seen": seen, "train_runtime": seconds,
            "train_tokens_per_second": tokens / seconds,
        }  # fmt: skip

    logs = [log(1, 100, 2.0, 100), {"step": 1, "eval_loss": 1.0, "eval_runtime": 5.0}, log(2, 300, 9.0, 300)]
    resumed = [log(3, 400, 4.0, 100), log(4, 600, 6.0, 300)]  # its clock and its count begin anew
    found = history.with_speed(logs + resumed)
    assert [log["tokens_per_second"] for log in found if "loss" in log] == pytest.approx([50, 100, 25, 100])


def test_the_curves_of_a_run_come_with_findings_and_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no metrics\.jsonl"):
        curves.Curves.read(tmp_path)
    rates = [{"step": i, "loss": 1 / i, "learning_rate": 1e-6 * i} for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in rates))
    answers = [{"step": step, "prompt": "Why?", "answer": f"answer {step}", "tokens": 2} for step in (0, 5, 10)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert curves.Curves.read(tmp_path).diagnostics == []  # nobody knows how long it is to be
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished"}))
    read = curves.Curves.read(tmp_path)
    assert [diagnostic.name for diagnostic in read.diagnostics] == ["cold"]
    for status in ("interrupted", "finished"):  # by early stopping, say: half of what was planned is not over
        (tmp_path / "run.json").write_text(json.dumps({"status": status, "max_steps": 21}))
        assert curves.Curves.read(tmp_path).diagnostics == []
        (tmp_path / "run.json").write_text(json.dumps({"status": status, "max_steps": 20}))
        assert [
            diagnostic.observation.partition(" the")[0] for diagnostic in curves.Curves.read(tmp_path).diagnostics
        ] == ["at step 10 of 20"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(read)
    said = console.export_text()
    assert "cold: at step 10 of 10 the learning rate is 1e-05 and rising." in said
    assert [f"answer {step}" in said for step in (0, 5, 10)] == [True, False, True]


def test_findings_are_those_that_the_run_s_loss_has(tmp_path: Path) -> None:
    logs = [{"step": i, "loss": 1 / i, "rewards/margins": 2.0 * i} for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    for losses, found in ((["sigmoid"], ["margin"]), (["ipo"], [])):
        (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "settings": {"loss_type": losses}}))
        assert [diagnostic.name for diagnostic in curves.Curves.read(tmp_path).diagnostics] == found


def test_the_module_draws_runs_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in HISTORY))
    monkeypatch.chdir(tmp_path)
    curves.main(["a", "b", "--out", "both.png"])
    assert (tmp_path / "both.png").read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().out == "Drawn: both.png\n"
    (tmp_path / "z" / "a").mkdir(parents=True)
    (tmp_path / "z" / "a" / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in HISTORY[:1]))
    drawn: list[list[str]] = []
    monkeypatch.setattr(curves, "draw_over", lambda runs: drawn.append(list(runs)) or curves.plot_run([]))
    curves.main(["a", "z/a", "b", "./a"])
    assert drawn == [[f"{tmp_path.name}/a", "z/a", "b"]]  # one of them stood there twice
    for out, said in {
        "nodir/x.png": "--out nodir/x.png: there is no folder nodir",
        "x.xyz": "--out x.xyz is no picture: its name ends in .png",
        "x": "--out x is no picture",
    }.items():
        with pytest.raises(SettingsError, match=re.escape(said)):
            curves.main(["no-run", "--out", out])  # before anything is read
    for words in ([], ["a", "--colour", "red"]):
        with pytest.raises(SettingsError, match=r"usage: python -m helpers\.curves"):
            curves.main(words)


@pytest.mark.parametrize("module", [curves, report, sweep])
def test_help_has_the_commands_and_ends_well(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["outputs/a", "--help"]):
        with pytest.raises(SystemExit) as end:
            module.main(words)
        assert end.value.code == 0
        said = capsys.readouterr()
        assert re.search(rf"^ *python -m {module.__name__} \w+", said.out, re.MULTILINE)
        assert said.err == ""


def test_a_log_is_one_short_line() -> None:
    assert live.log_line(HISTORY[1]) == "loss 0.5  margin 0.4  grad norm 2"
    assert live.log_line(HISTORY[2]) == "held out:  loss 0.6  margin 0.2"
    assert live.log_line(HISTORY[3]) == ""


def test_a_history_ends_where_its_last_line_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert history.read_history(file) == []
    file.write_text(json.dumps(HISTORY[0]) + "\n" + '{"step": 2, "lo')
    assert history.read_history(file) == HISTORY[:1]
    (tmp_path / "samples.jsonl").write_text('{"answer": "one\u2028two\u0085three"}\n{"answer": "four"}\n', "utf-8")
    assert [row["answer"] for row in history.read_samples(tmp_path)] == ["one\u2028two\u0085three", "four"]
    assert history.series(HISTORY, "loss") == ([1, 2], [0.7, 0.5])
