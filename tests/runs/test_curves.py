"""Curves of a run, and of several over one another; the lines and logs that they are made of."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console

from helpers.core import SettingsError, UserError
from helpers.runs import curves
from helpers.training import callbacks as live

HISTORY = [
    {"step": 1, "loss": 0.7, "rewards/margins": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "grad_norm": 1.0},
    {"step": 2, "loss": 0.5, "rewards/margins": 0.4, "rewards/chosen": 0.1, "rewards/rejected": -0.3, "grad_norm": 2.0},
    {"step": 2, "eval_loss": 0.6, "eval_rewards/margins": 0.2},
    {"step": 2, "train_runtime": 9.0},
]
COLD = curves.Diagnostic(
    "lr_never_warm", "the learning rate is rising", "It hardly trains.", "a smaller --warmup_steps"
)


def panels_of(figure: Figure) -> dict[str, Axes]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.axison}


def test_the_figure_has_a_panel_for_each_thing_that_was_logged() -> None:
    figure = curves.plot_runs({"": HISTORY}, "run")
    panels = panels_of(figure)
    assert list(panels) == ["loss", "reward margin", "rewards", "gradient norm"]
    training, held_out, guide = panels["loss"].lines
    assert training.get_xydata().tolist() == [[1, 0.7], [2, 0.5]]
    assert held_out.get_xydata().tolist() == [[2, 0.6]]
    assert guide.get_ydata() == [math.log(2)] * 2
    assert panels["loss"].get_shared_x_axes().joined(panels["loss"], panels["gradient norm"])
    assert curves.plot_runs({"": []}).axes  # a run without logs still draws


def test_a_legend_tells_training_from_evaluation_and_axes_have_units() -> None:
    figure = curves.plot_runs({"": HISTORY})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "eval"]
    training, held_out, _ = panels_of(figure)["loss"].lines
    assert (training.get_color(), held_out.get_color()) == (curves.BLUE, curves.ORANGE)
    chosen, rejected = panels_of(figure)["rewards"].lines[::2]
    assert (chosen.get_color(), rejected.get_color()) == (curves.BLUE, curves.ORANGE)
    assert [axis.get_ylabel() for axis in panels_of(figure).values()] == [
        "nats",
        "nats scaled by β",
        "nats scaled by β",
        "L2 norm",
    ]
    assert panels_of(figure)["gradient norm"].get_xlabel() == "step"


def test_no_axis_makes_noise_look_like_a_collapse() -> None:
    logs = [{"step": i, "loss": 0.69 + i % 2 / 1000, "rewards/margins": i % 2 / 1000, "rewards/accuracies": 0.95,
             "logps/chosen": -200 - i % 2 / 10, "logps/rejected": -200.0} for i in range(1, 20)]  # fmt: skip
    limits = {title: axis.get_ylim() for title, axis in panels_of(curves.plot_runs({"": logs})).items()}
    assert limits["loss"][0] < 0 < 0.69 < limits["loss"][1]
    assert limits["reward accuracy"][0] < 0 < 1 < limits["reward accuracy"][1] < 1.1
    assert limits["reward margin"][1] - limits["reward margin"][0] > 0.1  # noise of 0.001 is flat
    assert limits["log-probabilities"][1] - limits["log-probabilities"][0] > 20


def test_guides_are_only_for_dpo_and_the_accuracy_before_the_first_step_is_not_drawn() -> None:
    (loss,) = panels_of(curves.plot_runs({"": [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}]})).values()
    assert len(loss.lines) == 2
    logs = [{"step": 0, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0},
            {"step": 1, "rewards/accuracies": 0.5, "rewards/margins": 0.1},
            {"step": 2, "eval_rewards/accuracies": 0.8, "eval_rewards/margins": 0.2}]  # fmt: skip
    _, held_out, guide = panels_of(curves.plot_runs({"": logs}))["reward accuracy"].lines
    assert held_out.get_xydata().tolist() == [[2, 0.8]]
    assert guide.get_ydata() == [0.5, 0.5]


def test_several_runs_are_drawn_over_one_another_a_colour_each() -> None:
    other = [{**log, "loss": log["loss"] / 2} for log in HISTORY[:2]]
    figure = curves.plot_runs({"beta 0.1": HISTORY, "beta 0.3": other})
    panels = panels_of(figure)
    drawn = {
        line.get_color(): line.get_ydata().tolist() for line in panels["loss"].lines if line.get_linestyle() == "-"
    }
    assert drawn == {curves.BLUE: [0.7, 0.5], curves.ORANGE: [0.35, 0.25]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["beta 0.1", "beta 0.3", "train", "eval"]
    assert [text.get_text() for text in panels["rewards"].get_legend().get_texts()] == ["chosen", "rejected"]
    dashed = [line for line in panels["rewards"].lines if line.get_linestyle() == "--"]
    assert [line.get_ydata().tolist() for line in dashed] == [[0.0, -0.3], [0.0, -0.3]]  # rejected


def test_many_runs_have_a_colour_each_too() -> None:
    figure = curves.plot_runs({f"run {i}": HISTORY for i in range(25)})
    colours = [to_hex(line.get_color()) for line in figure.legends[0].get_lines()[:25]]
    assert len(set(colours)) == 25
    loss = panels_of(figure)["loss"]
    assert [to_hex(line.get_color()) for line in loss.lines if line.get_linestyle() == "-"] == colours


def test_diagnostics_are_listed_below_the_figure() -> None:
    diagnostic = curves.Diagnostic("margin", "the reward margin is 12", "", "")
    assert curves.plot_runs({"": HISTORY}, "run", [diagnostic]).get_supxlabel() == "margin: the reward margin is 12"


def test_names_with_dollar_signs_are_text(tmp_path: Path) -> None:
    diagnostic = curves.Diagnostic("margin", "$x_{ is not closed", "", "")
    for figure in (
        curves.plot_runs({"": HISTORY}, "$a_{", [diagnostic]),
        curves.plot_runs({"$b_{": HISTORY, "c$^": HISTORY}),
    ):
        figure.savefig(tmp_path / "figure.png")  # as mathematics these would raise


def test_the_curves_of_a_run_come_with_diagnostics_and_completions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no metrics\.jsonl"):
        curves.Curves.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in HISTORY))
    answers = [{"step": step, "prompt": "Why?", "answer": f"answer {step}", "tokens": 2} for step in (0, 5, 10)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    read = curves.Curves.read(tmp_path)  # without run.json
    assert read.diagnostics == []
    assert "Too few steps to judge: 2. Diagnostics need 20 or more." in printed(read)
    (tmp_path / "run.json").write_text(json.dumps({"diagnostics": [dataclasses.asdict(COLD)]}))
    read = curves.Curves.read(tmp_path)
    assert read.diagnostics == [COLD]
    text = printed(read)
    assert "lr_never_warm: the learning rate is rising. It hardly trains. Try a smaller --warmup_steps." in text
    assert [f"answer {step}" in text for step in (0, 5, 10)] == [True, False, True]


def printed(thing: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_the_command_plots_runs_and_prints_their_diagnostics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in HISTORY))
    monkeypatch.chdir(tmp_path)
    curves.main(["a", "b", "--out", "both.png"])
    assert (tmp_path / "both.png").read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().out == "Wrote both.png.\n"
    (tmp_path / "z" / "a").mkdir(parents=True)
    (tmp_path / "z" / "a" / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in HISTORY[:1]))
    drawn: list[list[str]] = []
    monkeypatch.setattr(curves, "plot_runs", lambda runs: drawn.append(list(runs)) or Figure())
    curves.main(["a", "z/a", "b", "./a"])
    assert drawn == [["a", "z/a", "b"]]  # one of them was named twice
    for out in ("nodir/x.png", "x.xyz"):
        with pytest.raises(SettingsError, match=re.escape(f"--out {out} cannot be written: ")):
            curves.main(["a", "b", "--out", out])
    assert not (tmp_path / "x.xyz").exists()
    for words in ([], ["a", "--colour", "red"]):
        with pytest.raises(SettingsError, match="usage: python -m helpers curves"):
            curves.main(words)


@pytest.mark.parametrize("name", ["curves", "report", "sweep", "accept"])
def test_help_has_the_commands_and_ends_well(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("helpers.core.install_error_hook", lambda: None)
    for words in (["--help"], ["-h"], ["outputs/a", "--help"]):
        monkeypatch.setattr(sys, "argv", ["helpers", name, *words])
        runpy.run_module("helpers", run_name="__main__")
        said = capsys.readouterr()
        assert re.search(rf"(^ *|: )python -m helpers {name} \w+", said.out, re.MULTILINE)
        assert said.err == ""


def test_a_log_is_one_short_line() -> None:
    assert live.log_line(HISTORY[1]) == "loss 0.5  margin 0.4  grad norm 2"
    assert live.log_line(HISTORY[2]) == "held out:  loss 0.6  margin 0.2"
    assert live.log_line(HISTORY[3]) == ""


def test_a_history_ends_where_its_last_line_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert curves.read_history(file) == []
    file.write_text(json.dumps(HISTORY[0]) + "\n" + '{"step": 2, "lo')
    assert curves.read_history(file) == HISTORY[:1]
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 1, "answer": "one\u2028two\u0085three"}\n{"step": 2, "answer": "four"}\n', "utf-8"
    )
    assert [row["answer"] for row in curves.read_samples(tmp_path)] == ["one\u2028two\u0085three", "four"]
    assert curves.series(HISTORY, "loss") == ([1, 2], [0.7, 0.5])


def test_a_bad_line_in_the_middle_is_said_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(log).encode() for log in HISTORY]
    bad = [b"{", b"\xff", b"3", b'{"loss": 1}', b'{"step": "x"}', b"[" * 100_000]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], *bad, *lines[1:], b""]))
    assert curves.read_history(tmp_path / "metrics.jsonl") == HISTORY
    assert "metrics.jsonl: 6 lines are not logs and were skipped (first: line 2)." in capsys.readouterr().out


def test_final_metrics_begin_with_the_training_loss_and_are_of_the_saved_weights() -> None:
    history = [{"step": 4, "train_tokens_per_second": 9.0}, {"step": 4, "eval_loss": 0.5, "num_input_tokens_seen": 7},
               {"step": 4, "train_loss": 0.6}]  # fmt: skip
    state = SimpleNamespace(log_history=history, global_step=4, num_input_tokens_seen=7)
    args = SimpleNamespace(load_best_model_at_end=False)
    trainer: Any = SimpleNamespace(state=state, args=args, evaluate=lambda: {"eval_loss": 0.1})
    result: Any = SimpleNamespace(training_loss=0.6)
    metrics = curves.final_metrics(trainer, result)
    assert list(metrics.items()) == [
        ("train_loss", 0.6), ("tokens_seen", 7.0), ("tokens_per_second", 9.0), ("step", 4), ("eval_loss", 0.5),
    ]  # fmt: skip
    args.load_best_model_at_end, state.best_model_checkpoint = True, "outputs/x/checkpoint-2"
    steps: list[int] = []
    trainer.evaluate = lambda: steps.append(state.global_step) or {"eval_loss": 0.1}
    metrics = curves.final_metrics(trainer, result)
    assert (metrics["eval_loss"], metrics["best_step"], steps, state.global_step) == (0.1, 2, [2], 4)
    args.load_best_model_at_end, state.global_step = False, 5  # no evaluation at the last step
    assert curves.final_metrics(trainer, result)["eval_loss"] == 0.1
