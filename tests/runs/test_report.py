"""The report of a run: finished, broken, old and hostile ones; and how it looks in Chromium."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.core import REPO, Interrupted, SettingsError, UserError, atomic_write
from helpers.hub.push import write_card
from helpers.runs import report
from helpers.runs.report import format_value, hide_paths, save_partial_report
from helpers.runs.run import Run, find_parent

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></title></script><img src=x onerror=\"alert('2')\"> & &lt;b&gt; 'single'",
    "مرحبا <b>بالعالم</b> \u202e reversed",
    "{{ 7 * 7 }} {% raw %} one\u2028two",
]
SETTINGS = {"recipe": "recipes/demo.yaml", "output_dir": str(REPO / "outputs"), "seed": 42, "dpo_beta": 0.1,
            "dataset_id": ["org/pairs", "/data/me/mine.jsonl"], "dataset_revision": "abc", "revision": "v2",
            "system_prompt": HOSTILE[1], "loss_type": ["sigmoid", "sft"], "learning_rate": float("nan")}  # fmt: skip
SOURCES = dict.fromkeys(SETTINGS, "default") | {"recipe": "flag", "dpo_beta": "flag", "system_prompt": HOSTILE[0],
                                                "model_id": "default, but sft_run wins"}  # fmt: skip
DPO: dict[str, Any] = {
    "step": "dpo", "status": "finished", "started": "2026-01-02T10:00:00.000+00:00", "base_model": "org/base",
    "finished": "2026-01-02T11:30:00.000+00:00", "settings": SETTINGS, "sources": SOURCES, "parent": "sft",
    "parent_folder": "/nowhere/sft", "fingerprint": "f1", "commit": "0123abc+", "versions": {"trl": "1.16.0"},
    "plan": {"device": "cpu"}, "processes": 1,
    "metrics": {"train_loss": 0.5, "eval_loss": float("nan"), "eval_rewards/margins": 0.25,
                "eval_rewards/accuracies": 0.9},
    "data": {"read": 3000, "kept": 2964, "changed": 2, "dropped": 36, "train": 2700, "eval": 264,
             "reasons": {HOSTILE[0]: 36, "trimmed": 2}, "examples": {HOSTILE[0]: [5, "pairs 7"]},
             "by": {"dropped": {HOSTILE[0]: 36}, "changed": {"trimmed": 2}},
             "sets": {"org/pairs train": {"read": 1000, "kept": 990, "changed": 2, "dropped": 10,
                                      f"dropped: {HOSTILE[0]}": 10}}},
}  # fmt: skip
SFT = {"step": "sft", "status": "finished", "base_model": "org/base", "finished": "2026-01-01T11:00:00.000+00:00",
       "settings": {"dataset_id": "org/talks", "revision": "v2"}}  # fmt: skip
MERGE: dict[str, Any] = {
    "step": "merge", "status": "finished", "finished": "2026-01-03T11:00:00.000+00:00", "parent": "dpo",
         "merge_base": "dequantized", "origin": "f1",
         "metrics": {"kl": 1.5e-8, "top1": 1.0, "max_abs": 2e-5, "mean_abs": 9e-7}}  # fmt: skip
MERGE["verification"] = {"merged into dequantized": MERGE["metrics"],
                         "base alone": {"kl": 0.05, "top1": 0.9, "max_abs": 1.5, "mean_abs": 0.1}}  # fmt: skip
WON = {"win": 55, "loss": 5, "tie": 420, "win_rate": 0.1146, "loss_rate": 0.0104, "win_rate_adjusted": 0.552}
LOST = {"win": 5, "loss": 55, "tie": 420, "win_rate": 0.0104, "loss_rate": 0.1146, "win_rate_adjusted": 0.448}
PAIR = {"baseline": "sft", "candidate": "dpo", "errors": 3, "interval": [0.54, 0.57], "sign_p": 5.6e-17,
        "consistency": None, "longer_won": 0.02, "decided_unequal": 55, "length_controlled": 0.585, **WON,
        "length_controlled_interval": [0.57, 0.6], "categories": {"sum": WON, HOSTILE[0]: LOST}}  # fmt: skip
JUDGE = {"step": "judge", "status": "finished", "finished": "2026-01-04T11:00:00.000+00:00",
         "answers_dir": "outputs/vibes",
         "metrics": {"judge": "gpt", "baseline": "sft", "candidate": "dpo", "models": {"dpo": WON, "sft": LOST},
                     "pairs": [PAIR], "scores": {"dpo": {"correct": 0.99}}, "notes": [HOSTILE[1]],
                     "method": "Counted so."}}  # fmt: skip
DIAGNOSTIC = {"name": "lr_never_warm", "observation": "at step 10 of 20 the learning rate is 1e-05 and rising",
              "reason": "It hardly trains.", "suggestion": "a smaller --warmup_steps"}  # fmt: skip
SECTIONS = ["result", "merge", "curves", "data", "next", "completions", "metrics", "settings", "lineage", "environment"]
LOGS = [
    {"step": 1, "loss": 0.7, "rewards/margins": 0.0},
    {"step": 2, "loss": 0.5, "rewards/margins": 0.4},
    {"step": 2, "eval_loss": 0.6},
]
SAMPLES = [{"step": s, "prompt": p, "answer": f"{s}: {p}", "tokens": 3} for s in (0, 5, 10) for p in HOSTILE]


def png() -> bytes:
    from matplotlib.figure import Figure

    Figure(figsize=(11, 6)).savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def make(folder: Path, record: dict[str, Any], **files: Any) -> Path:
    """A run's folder: its run.json, rows as JSONL, bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    for name, content in files.items():
        file = folder / name.replace("_jsonl", ".jsonl").replace("_png", ".png").replace("_json", ".json")
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            rows = content if isinstance(content, list) else [content]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DPO run between a model it started from, its merge and a comparison."""
    outputs, picture = tmp_path_factory.mktemp("road") / "outputs", png()
    (make(outputs / "sft", SFT) / "report.html").write_text("sft")
    make(outputs / "merge", MERGE)
    make(outputs / "judge", JUDGE, results_png=picture)
    (make(outputs / "vibes", {"step": "vibes"}) / "answers.html").write_text("answers")
    data = {
        "findings": [{"text": HOSTILE[2], "is_warning": True}],
        "lengths": {"prompt": {"median": 14.0, "longest": 22.0}},
    }
    files = dict(metrics_jsonl=LOGS, samples_jsonl=SAMPLES, data_report_json=data)
    folder = make(outputs / "dpo", DPO, **files, curves_png=picture, data_report_png=picture)
    (folder / "adapter_config.json").write_text("{}")
    return folder


class Reader(HTMLParser):
    """The visible text of each section, its rows of cells, its links and its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {"": ""}
        self.rows: dict[str, list[list[str]]] = {"": []}
        self.links, self.alts = [], []
        self.labels, self.figures = list[str](), list[str]()
        self.section, self.cell, self.tile = "", False, None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "section":
            self.section = given["data-section"]
            self.text[self.section], self.rows[self.section] = "", []
        elif tag == "tr":
            self.rows[self.section].append([])
        elif tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self.cell = True
        elif not self.section and (tag == "dt" or given.get("class", "").startswith("figure")):
            self.tile = self.labels if tag == "dt" else self.figures
        elif tag == "a":
            self.links.append(given["href"])
        elif tag == "img":
            assert given["src"].startswith("data:image/png;base64,iVBOR")
            self.alts.append(given["alt"])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        self.text[self.section] += data
        if self.tile is not None:
            self.tile.append(data)
            self.tile = None
        if self.cell:
            self.rows[self.section][-1][-1] += data


def read(folder: Path) -> Reader:
    return Reader(report.write_report(folder).read_text(encoding="utf-8"))


def test_a_report_has_every_section_with_the_run_s_numbers(road: Path) -> None:
    page = read(road)
    assert list(page.text)[1:] == SECTIONS
    assert "Alignment with DPO of sft" in page.text[""]
    assert "finished 2026-01-02 11:30 UTC" in page.text[""]
    assert "Too few steps to judge" in page.text["curves"]
    assert page.rows["metrics"][1:3] == [["loss", "nan"], ["rewards/margins", "0.25"]]
    assert ["train_loss", "0.5"] in page.rows["metrics"]
    assert page.rows["data"][:3] == [
        ["rows of", "read", "kept", "changed", "dropped", "train", "eval"],
        ["org/pairs train", "1,000", "990", "2", "10", "-", "-"],
        ["all", "3,000", "2,964", "2", "36", "2,700", "264"],
    ]
    assert ["dropped", HOSTILE[0], "36", "5, pairs 7"] in page.rows["data"]
    assert ["dropped of org/pairs train", HOSTILE[0], "10", ""] in page.rows["data"]
    assert page.rows["merge"][1:] == [
        ["merged into dequantized", "1.5e-08", "100.00%", "2e-05", "9e-07"],
        ["base alone", "0.05", "90.00%", "1.5", "0.1"],
    ]
    assert "Merged into the dequantized weights" in page.text["merge"]
    assert page.rows["environment"][1:3] == [["trl", "1.16.0"], ["commit", "0123abc+"]]
    assert (
        "03_merge_push.py --run PATH/TO/dpo --push_to_hub --hub_repo_id NAME/MODEL --recipe recipes/demo.yaml"
        in (page.text["next"])
    )


def test_changed_settings_come_first_with_their_sources(road: Path) -> None:
    rows = read(road).rows["settings"]
    assert rows[1:4] == [
        ["recipe", "recipes/demo.yaml", "flag"],
        ["dpo_beta", "0.1", "flag"],
        ["system_prompt", HOSTILE[1], HOSTILE[0]],
    ]
    assert ["output_dir", "outputs", "default"] in rows  # no folder of this machine
    assert ["dataset_id", "org/pairs mine.jsonl", "default"] in rows
    assert ["learning_rate", "nan", "default"] in rows


def test_a_model_that_the_parent_run_settled_is_shown_as_its_base(tmp_path: Path) -> None:
    given = {"settings": {"model_id": "org/base", "sft_run": "latest"}, "sources": {"model_id": "parent"}}
    page = read(make(tmp_path / "dpo", DPO | given | {"parent": "sft-9b7849"}))
    assert ["model_id", "org/base", "base model of sft-9b7849"] in page.rows["settings"]
    assert "Alignment with DPO of sft-9b7849" in page.text[""]
    alone = read(make(tmp_path / "alone", DPO | {"parent": None})).text[""]
    assert "Alignment with DPO of org/base" in alone


def test_the_win_table_comes_first_and_its_reliability_is_folded(road: Path) -> None:
    page = read(road)
    rows = page.rows["result"]
    assert rows[:3] == [
        ["model", "win", "loss", "tie", "win rate", "95% interval"],
        ["dpo", "55", "5", "420", "55.2%", "54.0% to 57.0%"],
        ["sft", "5", "55", "420", "44.8%", "43.0% to 46.0%"],
    ]
    assert "A tie counts as half a win." in page.text["result"]
    assert ["Win rate at equal lengths", "58.5%", "57.0% to 60.0%"] in rows
    assert ["Sign test", "p = 5.6e-17", "-"] in rows
    assert ["Same verdict in both orders", "-", "-"] in rows
    assert ["Decided for the longer answer", "2.0%", "of 55 decided"] in rows
    assert ["Comparisons without a readable verdict", "3", "-"] in rows
    assert [HOSTILE[0], "5", "55", "420", "44.8%"] in rows
    assert HOSTILE[1] in page.text["result"]
    assert "../vibes/answers.html" in page.links


def test_the_page_opens_with_a_summary_of_what_was_measured(road: Path, tmp_path: Path) -> None:
    assert tiles(read(road)) == [
        ("Held-out accuracy", "90.0%"), ("Held-out margin", "0.25"), ("Win rate", "55.2%"), ("Merge", "verified"),
        ("Diagnostics", "not judged"),  # of few steps
    ]  # fmt: skip
    long = read(make(tmp_path / "long", DPO, metrics_jsonl=[{"step": step, "loss": 0.6} for step in range(1, 21)]))
    assert tiles(long)[-1] == ("Diagnostics", "no problems")
    text = read(road).text[""]
    assert "Too few steps to judge: 2. Diagnostics need 20 or more." in text
    assert "95% interval 54.0% to 57.0%, against sft" in text
    assert "KL 1.5e-08 nats; base alone 0.05" in text
    assert tiles(read(road.parent / "sft")) == [
        ("Held-out token accuracy", "not measured yet"), ("Held-out loss", "not measured yet"), ("Win rate", "44.8%"),
        ("Diagnostics", "nothing logged"),
    ]  # fmt: skip
    (road.parent / "sft" / "report.html").write_text("sft")
    found = {"name": "margin", "observation": "it is 12", "reason": "It grows.", "suggestion": "a higher --dpo_beta"}
    ended = read(make(tmp_path / "new", {"step": "dpo", "status": "failed", "diagnostics": [found]}))
    assert tiles(ended)[2:] == [
        ("Win rate", "not compared yet"), ("Merge", "not merged yet"),
        ("Diagnostics", "1 found"),
    ]  # fmt: skip
    assert "margin" in ended.text[""]


def tiles(page: Reader) -> list[tuple[str, str]]:
    """Label and figure of each part of the summary strip."""
    return list(zip(page.labels, page.figures, strict=True))


def test_the_lineage_leads_back_to_the_base_model(road: Path) -> None:
    page = read(road)
    assert page.rows["lineage"][1:] == [
        ["dpo", "aligned with DPO", "org/pairs, mine.jsonl at revision abc", "2026-01-02 11:30 UTC"],
        ["sft", "instruction-tuned", "org/talks", "2026-01-01 11:00 UTC"],
        ["org/base at revision v2", "base model", "-", "-"],
    ]
    assert [link for link in page.links if not link.startswith("#")] == ["../vibes/answers.html", "../sft/report.html"]


def test_a_copy_of_the_runs_keeps_to_itself(road: Path, tmp_path: Path) -> None:
    shutil.copytree(road.parent, tmp_path / "copy")
    elsewhere = {"parent_folder": str(road)}  # where the run was when it was merged
    make(tmp_path / "copy" / "merge", MERGE | elsewhere)
    report.show_report(tmp_path / "copy" / "merge")
    assert "1.5e-08" in read(tmp_path / "copy" / "dpo").text["merge"]
    assert find_parent(tmp_path / "copy" / "merge", MERGE | elsewhere) == tmp_path / "copy" / "dpo"
    assert find_parent(tmp_path / "alone", MERGE | elsewhere) == road


def test_pictures_say_in_words_what_is_in_them(road: Path, tmp_path: Path) -> None:
    verdicts, loss, margin, data = read(road).alts
    assert loss == "loss: train from 0.7 to 0.5, eval from 0.6 to 0.6"
    assert margin == "reward margin: train from 0 to 0.4"
    assert data == "Plots of the data. Tokens: prompt median 14, longest 22. Rows: 2,964 of 3,000 kept."
    assert verdicts == "Verdicts: dpo wins 55, loses 5, ties 420; sft wins 5, loses 55, ties 420."
    more = {"rewards/accuracies": 0.5, "logps/chosen": -9, "logps/rejected": -8, "entropy": 2, "grad_norm": 1.5}
    logs = [{"step": 1, "loss": 0.7, "rewards/margins": 0.1} | more]
    *_, logps, others = read(make(tmp_path / "more", DPO, metrics_jsonl=logs)).alts  # no curve is drawn twice
    assert logps.startswith("log-probabilities, chosen: train from -9 to -9")
    assert others == "Other training curves: entropy: train from 2 to 2; gradient norm: train from 1.5 to 1.5."


def test_sections_without_content_say_so_in_a_line(tmp_path: Path) -> None:
    folder = make(tmp_path / "new", {"step": "dpo", "status": "running"})
    text = read(folder).text
    assert "Nothing has been logged yet." in text["curves"]
    assert "All settings have their defaults." in text["settings"]
    assert "No data was read." in text["data"]
    assert "--completion_steps" in text["completions"]
    assert "Not merged yet." in text["merge"]
    assert "Not compared yet." in text["result"]
    assert "python" not in text["merge"] + text["result"]  # an unfinished run can be neither merged nor compared
    assert "No versions were recorded." in text["environment"]
    assert "could not be rendered" not in "".join(text.values())


def test_a_stopped_run_says_why_and_how_to_resume_it(tmp_path: Path) -> None:
    settings = {"recipe": "r.yaml", "max_steps": 1000, "loss_type": ["sigmoid", "sft"], "resume": "never", "seed": 42}
    sources = dict.fromkeys(settings, "flag") | {"seed": "default"}
    record = {"step": "dpo", "status": "failed", "error": f"full: {REPO}/outputs/x and /home/me/secret/cache",
              "settings": settings, "sources": sources}  # fmt: skip
    page = read(make(tmp_path / "stopped", record, metrics_jsonl=LOGS))
    assert "full: outputs/x and …/cache" in page.text[""]
    assert "python notebooks/02_dpo.py --recipe r.yaml --max_steps 1000 --loss_type sigmoid sft" in page.text["next"]
    assert len(page.alts) == 2  # the panels that have been logged so far
    logs = [*LOGS, {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7, "eval_rewards/margins": 0.1}]
    page = read(make(tmp_path / "stopped", record, metrics_jsonl=logs))  # the last evaluation, before there are metrics
    assert tiles(page)[:2] == [("Held-out accuracy", "70.0%"), ("Held-out margin", "0.1")]


def test_a_command_names_no_folder_of_this_machine_and_says_what_to_fill_in(tmp_path: Path) -> None:
    settings = {"output_dir": "/mnt/big/outputs", "dataset_id": ["org/pairs", f"{REPO}/mine.jsonl"],
                "recipe": "/r.yaml", "model_id": '{"a": "/mnt/big/a"}'}  # fmt: skip
    record = {"step": "dpo", "status": "failed", "settings": settings, "sources": dict.fromkeys(settings, "flag")}
    text = read(make(tmp_path / "my runs" / "x", record)).text
    assert (
        "02_dpo.py --output_dir PATH/TO/outputs --dataset_id org/pairs mine.jsonl --recipe PATH/TO/r.yaml "
        """--model_id '{"a": "PATH/TO/a"}'\n"""
    ) in text["next"] + "\n"
    finished = make(tmp_path / "my runs" / "x", record | {"status": "finished"})
    (finished / "adapter_config.json").write_text("{}")
    text = read(finished).text
    assert "python notebooks/03_merge_push.py --run PATH/TO/x" in text["merge"]
    assert "python notebooks/04_vibes.py --models PATH/TO/x" in text["result"]
    paths = (REPO / "outputs" / "x", REPO, f"{REPO}-old/x", "org/model", "a b")
    assert [hide_paths(str(path), fill_in=True) for path in paths] == [
        "outputs/x", ".", "PATH/TO/x", "org/model", "a b",
    ]  # fmt: skip


@pytest.mark.parametrize(("source", "words"), [("flag", ""), ("recipe", " --stop_on_diagnostic")])
def test_a_run_that_a_diagnostic_ended_is_resumed_without_that_flag(tmp_path: Path, source: str, words: str) -> None:
    settings = {"seed": 1, "stop_on_diagnostic": ["margin", "nan"]}
    record = {"step": "sft", "status": "interrupted", "settings": settings, "diagnostics": [{"name": "margin"}],
              "sources": {"seed": "flag", "stop_on_diagnostic": source}}  # fmt: skip
    text = read(make(tmp_path / "found", record)).text["next"]
    assert "The same command without --stop_on_diagnostic resumes it" in text
    assert f"python notebooks/01_sft.py --seed 1{words}\n" in text
    text = read(make(tmp_path / "told", record | {"diagnostics": [{"name": "lr_never_warm"}]})).text["next"]
    assert "The same command resumes it" in text
    assert f"--seed 1{' --stop_on_diagnostic margin nan' * (source == 'flag')}\n" in text


def train(run: Run, logs: list[dict[str, float]], end: BaseException) -> None:
    """Log, then raise."""
    with run.training():
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
        raise end


def test_a_run_that_is_ended_early_leaves_its_curves_and_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "run", {"step": "dpo", "diagnostics": [DIAGNOSTIC]}, when_stopped=save_partial_report)
    with pytest.raises(Interrupted, match=r"^stopped$"):
        train(run, LOGS, Interrupted("stopped", 3))
    assert capsys.readouterr().out == "Report: run/report.html\n"
    assert (run.folder / "curves.png").read_bytes()[1:4] == b"PNG"
    page = Reader((run.folder / "report.html").read_text(encoding="utf-8"))
    assert "interrupted" in page.text[""]
    assert "at step 10 of 20 the learning rate is 1e-05 and rising" in page.text["curves"]


def test_an_error_is_never_replaced_by_what_goes_wrong_with_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(file))

    def told_again(folder: Path) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    for i, (name, fails) in enumerate({"write_report": told_again, "atomic_write": full}.items()):
        run = Run(tmp_path / str(i), {"step": "dpo"}, when_stopped=save_partial_report)
        monkeypatch.setattr(report, name, fails)
        with pytest.raises(ZeroDivisionError):
            train(run, LOGS, ZeroDivisionError())
        assert capsys.readouterr().out == ""
        assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"
        assert signal.getsignal(signal.SIGTERM) == before
    other = Run(tmp_path / "other", {"step": "dpo"}, when_stopped=save_partial_report)
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    other.folder.mkdir()
    with pytest.raises(ZeroDivisionError):
        train(other, LOGS, ZeroDivisionError())
    assert [file.name for file in other.folder.iterdir()] == ["metrics.jsonl"]  # the main process's is the only one


def test_what_a_full_disk_cuts_short_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "report.html", b"new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_diagnostics_are_below_the_curves_with_why_and_what_to_try(tmp_path: Path) -> None:
    folder = make(tmp_path / "cold", {"step": "sft", "status": "finished", "diagnostics": [DIAGNOSTIC]})
    text = read(folder).text["curves"]
    assert re.search(r"lr_never_warm.*observed.*is 1e-05 and rising.*why it matters.*Try a smaller", text, re.DOTALL)


def test_a_section_that_cannot_be_rendered_says_why_in_its_place(tmp_path: Path) -> None:
    broken = {"step": "dpo", "status": "finished", "data": {"reasons": 7}, "settings": SETTINGS, "sources": None,
              "metrics": {"eval_loss": 1}}  # fmt: skip
    folder = make(tmp_path / "broken", broken, samples_jsonl=[{"step": 1}], curves_png=b"\x89PNG")
    page = Reader(report.write_report(folder).read_text(encoding="utf-8").replace("iVBORw==", "iVBOR"))
    assert "This section could not be rendered (UndefinedError: 'int object'" in page.text["data"]
    assert (
        "This section could not be rendered (UndefinedError: 'dict object' has no attribute 'prompt')."
        in page.text["completions"]
    )
    assert ["dpo_beta", "0.1", "unknown"] in page.rows["settings"]
    assert ["loss", "1"] in page.rows["metrics"]


def test_a_merge_or_comparison_of_other_weights_is_outdated(tmp_path: Path) -> None:
    folder = make(tmp_path / "dpo", DPO | {"finished": "2026-02-01T00:00:00.000+00:00", "fingerprint": "f2"})
    (folder / "adapter_config.json").write_text("{}")
    make(tmp_path / "merge", MERGE)
    make(tmp_path / "judge", JUDGE)
    text = read(folder).text
    assert "This merge is older than the run" in text["merge"]
    assert "This comparison is older than the run" in text["result"]
    assert text[""].count("outdated") == 2
    assert "03_merge_push.py --run PATH/TO/dpo" in text["next"]


def test_a_comparison_is_of_the_weights_that_were_judged_whatever_the_run_is_called_now(tmp_path: Path) -> None:
    weights = {"dpo": "w1", "merge": "w2"}
    make(tmp_path / "vibes", {"step": "vibes", "weights": weights})
    make(tmp_path / "judge", JUDGE | {"answers_dir": "outputs/vibes", "finished": "2026-03-01T00:00:00.000+00:00"})
    renamed = make(tmp_path / "renamed", DPO | {"fingerprint": "w1"})
    another = make(tmp_path / "dpo", DPO | {"fingerprint": "w3"})
    assert "judge" in read(renamed).text["lineage"]
    assert "judge" not in read(another).text["lineage"]
    for folder, is_judged in ((renamed, True), (another, False)):
        assert ("judged by gpt" in write_card(folder, "me/model")) is is_judged
    unfinished = make(tmp_path / "unfinished", {"step": "dpo", "status": "running"})
    make(tmp_path / "older", JUDGE)  # of answers whose weights are not recorded
    assert "older" not in read(unfinished).text.get("lineage", "")
    again = make(tmp_path / "dpo", DPO | {"fingerprint": "w3", "finished": "2026-04-01T00:00:00.000+00:00"})
    assert "This comparison is older than the run" in read(again).text["result"]


def test_ratings_are_shown_where_models_were_rated(tmp_path: Path) -> None:
    models = {"dpo": {"average": 7.5, "interval": [7.0, 8.0], "errors": 1}, "sft": {"average": None, "interval": None}}
    make(tmp_path / "single", JUDGE | {"metrics": {"judge": "gpt", "models": models}, "status": "interrupted"})
    page = read(make(tmp_path / "dpo", DPO))
    assert ["dpo", "7.50", "7.00 to 8.00", "1"] in page.rows["result"]
    assert ["sft", "-", "-", "-"] in page.rows["result"]
    assert "This comparison is interrupted" in page.text["result"]


def test_half_a_surrogate_pair_is_written_as_what_cannot_be_read(tmp_path: Path) -> None:
    rows = [{"step": 0, "prompt": "half \ud800 a pair", "answer": "whole 😀", "tokens": 1}]
    text = read(make(tmp_path / "run", DPO, samples_jsonl=rows)).text["completions"]
    assert "half \ufffd a pair" in text
    assert "whole 😀" in text


def test_many_steps_of_samples_are_a_few_side_by_side(tmp_path: Path) -> None:
    rows = [{"step": step, "prompt": "Why?", "answer": f"because {step}.", "tokens": 2} for step in range(0, 101, 10)]
    text = read(make(tmp_path / "run", DPO, samples_jsonl=rows)).text["completions"]
    assert re.findall(r"because (\d+)\.", text) == ["0", "20", "40", "60", "80", "100"]
    assert "5 more steps are in samples.jsonl." in text


def test_a_report_is_written_atomically_and_twice_the_same(road: Path) -> None:
    before = sorted(file.name for file in road.iterdir())
    pages = [report.write_report(road).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert sorted({*before, "report.html"}) == sorted(file.name for file in road.iterdir())


def test_the_report_of_a_merge_is_that_of_the_merged_run(
    road: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(road.parent.parent)
    for show in (lambda: report.show_report(road.parent / "merge"), lambda: report.main(["outputs/merge"])):
        (road / "report.html").unlink(missing_ok=True)
        show()
        assert capsys.readouterr().out == "Report: outputs/dpo/report.html\n"
        assert (road / "report.html").is_file()


def test_no_run_fails_because_of_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report.show_report(tmp_path / "a-model-from-elsewhere")
    assert capsys.readouterr().out == ""
    folder = make(tmp_path / "run", DPO)
    monkeypatch.setattr(report, "TEMPLATES", [str(tmp_path)])
    report.show_report(folder)
    assert capsys.readouterr().out.startswith("Report: not written (TemplateNotFound: ")


def test_what_is_no_run_has_no_report(tmp_path: Path) -> None:
    make(tmp_path / "judge", JUDGE)
    with pytest.raises(UserError, match=r"has no report: it is not the folder of a run of 01_sft\.py or 02_dpo\.py"):
        report.main([str(tmp_path / "judge")])
    with pytest.raises(UserError, match=r"has no run\.json"):
        report.main([str(tmp_path)])
    with pytest.raises(SettingsError, match="usage"):
        report.main(["--all"])


def test_a_report_is_never_published(road: Path) -> None:
    from helpers.hub.push import PUBLISHED
    from helpers.runs.checkpoints import find_files

    report.write_report(road)
    assert [file.name for file in find_files(road, PUBLISHED)] == ["adapter_config.json", "curves.png"]


def test_values_are_shown_as_one_reads_them() -> None:
    assert [format_value(value) for value in (None, True, 1000, 5e-5, 1_040_396.0, [1, "a"], {"a": [1]}, [])] == [
        "-", "True", "1000", "5e-05", "1040396", "1 a", '{"a": [1]}', "",
    ]  # fmt: skip
    assert [hide_paths(text) for text in ("org/base", "/data/me/x", f"{REPO}/a b", "see http://host/a/b", "1/2")] == [
        "org/base", "x", "a b", "see http://host/a/b", "1/2",
    ]  # fmt: skip


# In Chromium


@pytest.fixture(scope="module")
def open_page(browser: Browser, road: Path) -> Iterator[Callable[[int], Page]]:
    """Opens the report at a width; in the end it has asked for nothing but its file, and nothing went wrong in it."""
    file, noise, contexts = report.write_report(road), list[str](), []

    def open_page(width: int) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request", lambda r: r.url == file.as_uri() or r.url.startswith("data:image/png") or noise.append(r.url)
        )
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("console", lambda line: noise.append(line.text))
        page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []


def test_hostile_text_is_shown_as_text(open_page: Callable[[int], Page]) -> None:
    page = open_page(1400)
    assert page.locator("script, b, img[onerror]").count() == 0
    assert page.locator("style").count() == 1
    for text in HOSTILE:
        assert text in [title.text_content() for title in page.locator("#completions h3").all()]
    assert page.locator("#completions dd").nth(0).text_content() == f"0: {HOSTILE[0]}"
    open_all(page)
    assert page.get_by_role("cell", name=HOSTILE[1], exact=True).count() == 1  # a setting
    assert HOSTILE[1] in page.locator("[data-section=result] li").all_text_contents()
    assert HOSTILE[2] in page.locator("[data-section=data] li").all_text_contents()
    assert page.locator("#completions h3").nth(2).evaluate("e => getComputedStyle(e).unicodeBidi") == "plaintext"


def open_all(page: Page) -> None:
    for fold in page.locator("details").all():
        fold.evaluate("e => e.open = true")


def test_every_section_is_reached_from_the_top_and_every_picture_is_drawn(open_page: Callable[[int], Page]) -> None:
    page = open_page(1400)
    assert page.title() == page.locator("h1").inner_text() == "dpo"
    assert page.locator("nav a").all_inner_texts() == page.locator("h2").all_inner_texts()
    assert page.locator("nav a").evaluate_all("all => all.map(e => e.hash)") == [f"#{name}" for name in SECTIONS]
    assert page.locator("#settings").is_hidden()
    for name in SECTIONS:
        page.locator(f"nav a[href='#{name}']").click()
        assert page.locator(f"#{name}").is_visible()  # what is folded is opened by its link
    widths = page.locator("img").evaluate_all("all => all.map(e => e.naturalWidth)")
    assert [widths[0], widths[3]] == [1100, 1100]  # files of other steps; the curves are drawn from the logs
    assert min(widths) > 400
    defaults = page.locator("#settings summary")
    assert defaults.inner_text() == "7 settings with their defaults"
    assert page.get_by_role("cell", name="output_dir").count() == 0
    defaults.click()
    assert page.get_by_role("cell", name="output_dir").is_visible()


def test_completions_are_side_by_side_if_there_is_room_and_no_page_scrolls_sideways(
    open_page: Callable[[int], Page],
) -> None:
    def corners(page: Page) -> list[tuple[int, int]]:
        open_all(page)
        boxes = [step.bounding_box() for step in page.locator("#completions .card").first.locator("dl > div").all()]
        return [(round(box["x"]), round(box["y"])) for box in boxes if box]

    wide = corners(open_page(1400))
    assert len({y for _, y in wide}) == 1
    assert len({x for x, _ in wide}) == 3
    page = open_page(400)
    narrow = corners(page)
    assert len({x for x, _ in narrow}) == 1
    assert len({y for _, y in narrow}) == 3
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    tables = page.locator(".scroll").evaluate_all("all => all.map(e => [e.scrollWidth > e.clientWidth, e.tabIndex])")
    assert [True, 0] in tables  # wide ones scroll in a box of their own, by keyboard too


def test_a_shadow_shows_that_a_table_continues_beyond_the_edge(open_page: Callable[[int], Page]) -> None:
    def edge(page: Page) -> float:
        """How bright the table's right edge is."""
        from matplotlib.image import imread

        box = page.locator("[data-section=result] .scroll").first.bounding_box()
        assert box
        clip = {"x": box["x"] + box["width"] - 5, "y": box["y"] + 4, "width": 2, "height": 2}
        return float(imread(io.BytesIO(page.screenshot(clip=clip, full_page=True)))[..., :3].mean())  # type: ignore[arg-type]

    page = open_page(400)
    wide = page.locator("[data-section=result] .scroll").first
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth")
    assert edge(page) < 0.9
    wide.evaluate("e => e.scrollLeft = e.scrollWidth")
    assert edge(page) == 1
    assert edge(open_page(1400)) == 1  # all of it is there


def test_light_and_dark_follow_the_reader_and_print_shows_what_is_folded(open_page: Callable[[int], Page]) -> None:
    page, grounds = open_page(1400), []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(244, 245, 247)", "rgb(20, 23, 27)"]
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    shown = page.locator("details").first.evaluate("e => getComputedStyle(e, '::details-content').contentVisibility")
    assert shown == "visible"
