"""Draw the pictures of README and docs. Run `make real` first: most show its runs.

python docs/make_pictures.py house packed    # only these two, which need no run

Screenshots of report.html and answers.html, at 1400 and 400 pixels, need playwright and Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from rich.console import Console

from helpers.core import REPO
from helpers.evaluation import AnswerStore, read_bench
from helpers.runs import Curves, find_run

PICTURES = Path(__file__).parent / "pictures"
COLOURS = {"prompt": "#7a8ca8", "chosen": "#0072b2", "rejected": "#d55e00", "padding": "#eeeeee"}
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
HOUSE = {"notebook": "#dbe4f3", "run": "#dcefe2", "helpers": "#f1ece2"}
WALK = (  # each notebook, what it does, its run folder and what is in it
    ("01_sft.py", "instruction-tune\na base model", "sft-…", "model or adapter\nrun.json, report"),
    ("02_dpo.py", "align it on\npreference pairs", "dpo-…", "adapter, completions\nrun.json, report"),
    ("03_merge_push.py", "merge, verify\nand publish", "merge-…", "one model\nits verification"),
    ("04_vibes.py", "ask several models\nthe same questions", "vibes-…", "answers, and\na page to vote on"),
    ("05_judge.py", "judge which\nanswers are better", "judge-…", "judgments\nwin, loss, tie"),
    ("06_pairs.py", "make new pairs of\na model's answers", "pairs-…", "preferences for\nthe next run of 02"),
)
ROOMS = (  # helpers/, in the order of their imports
    ("settings", "flags,\nenvironment,\nrecipes"),
    ("runs", "run folders,\ncheckpoints,\ncurves, report"),
    ("models", "loading, chat\ntemplates,\nmemory"),
    ("data", "formats, filters,\nlength limits,\ndata report"),
    ("training", "shared prefix,\ncallbacks,\ndiagnostics"),
    ("merging", "merge,\nverification"),
    ("hub", "upload,\nmodel card,\nsecret scan"),
    ("evaluation", "answers,\nvote page,\njudges, results"),
)


def draw_packed() -> Figure:
    """A batch of two pairs as stock DPOTrainer computes it, and as one row with each prompt once."""
    pairs = [(9, 3, 6), (5, 7, 2)]  # tokens of prompt, chosen and rejected
    width = max(p + max(c, r) for p, c, r in pairs)
    rows = [[("prompt", p), (side, n), ("padding", width - p - n)] for i, side in ((1, "chosen"), (2, "rejected"))
            for p, n in ((pair[0], pair[i]) for pair in pairs)]  # fmt: skip
    packed = [part for p, c, _ in pairs for part in (("prompt", p), ("chosen", c))]
    packed += [("rejected", r) for _, _, r in pairs]
    figure = Figure(figsize=(10, 2.9), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[4, 1])
    for axis, lines, title in (
        (above, rows, f"TRL: {len(rows)} rows of {width}, {len(rows) * width} tokens computed"),
        (below, [packed], f"here: one row, {sum(n for _, n in packed)} tokens computed"),
    ):
        for y, line in enumerate(reversed(lines)):
            x = 0
            for kind, count in line:
                for i in range(count):
                    axis.add_patch(Rectangle((x + i, y), 0.9, 0.8, color=COLOURS[kind]))
                x += count
        axis.set(xlim=(0, 34), ylim=(0, len(lines)), aspect="equal")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_axis_off()
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    above.legend(handles, COLOURS, frameon=False, fontsize=9, loc="center right")
    return figure


def draw_house() -> Figure:
    """Notebooks at the top, their run folders in the middle, and the rooms of helpers/ below."""
    figure = Figure(figsize=(11, 5.3), dpi=105, layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.3, 109.8), ylim=(15, 61))
    axis.set_axis_off()

    def box(x: float, y: float, width: float, height: float, colour: str, title: str, text: str = "") -> None:
        shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", color=colour)
        axis.add_patch(shape)
        top = y + height - (1.2 if text else height / 2)
        middle = x + width / 2
        axis.text(middle, top, title, ha="center", va="top" if text else "center", fontsize=9.5, weight="bold")
        axis.text(middle, top - 2.4, text, ha="center", va="top", fontsize=8, linespacing=1.35)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#555555", linewidth=1.1))

    axis.text(0, 59.7, "notebooks/", fontsize=10, family="monospace", va="center")
    axis.text(0, 44.2, "outputs/", fontsize=10, family="monospace", va="center")
    axis.text(0, 31, "helpers/", fontsize=10, family="monospace", va="center")
    for i, (notebook, does, run, holds) in enumerate(WALK):
        x = i * 18.5
        box(x, 50.2, 16.5, 8, HOUSE["notebook"], notebook, does)
        box(x, 34.5, 16.5, 8, HOUSE["run"], run, holds)
        arrow((x + 9.5, 50), (x + 9.5, 42.7))  # what a notebook writes
        if i < len(WALK) - 1:  # the next one reads
            arrow((x + 13.5, 42.7), (x + 22.5, 50))
    for i, (room, holds) in enumerate(ROOMS):
        x = i * 13.9
        box(x, 19, 11.5, 10.4, HOUSE["helpers"], room, holds)
        if i < len(ROOMS) - 1:
            arrow((x + 13.8, 22.5), (x + 11.6, 22.5))  # imports
    note = "a notebook imports from rooms; a room imports only from rooms to its left, and never from a notebook"
    axis.text(54.7, 16.6, note, ha="center", va="center", fontsize=8.5, style="italic")
    return figure


def main(names: list[str]) -> None:
    for name in names or DRAWN:
        DRAWN[name]().savefig(PICTURES / f"{name}.png")
    if not names:
        draw_real()


def draw_real() -> None:
    """The curves of `make real`, its report, and its answers before and after."""
    outputs = REPO / "outputs"
    dpo, vibes = find_run(outputs, "real-dpo", "dpo"), find_run(outputs, "real-answers", "vibes")
    Curves.read(dpo.folder).figure.savefig(PICTURES / "curves.png", dpi=110)

    answers = AnswerStore(vibes.folder, read_bench(vibes.folder))
    console = Console(record=True, width=110, file=io.StringIO())
    before, after = vibes.record["models"][0], vibes.record["models"][-1]
    console.print(answers.side_by_side([before, after], rows=4))  # of several categories
    svg = console.export_svg(title="python notebooks/04_vibes.py --recipe recipes/real.yaml")
    fonts = r"@font-face \{.*?\}\s*"  # of rich's server: use the reader's own
    (PICTURES / "answers.svg").write_text(re.sub(fonts, "", svg, flags=re.DOTALL))
    take_screenshots({"report": dpo.folder / "report.html", "answers": vibes.folder / "answers.html"})


def take_screenshots(pages: dict[str, Path], folder: Path = PICTURES) -> None:
    """The top of each page as NAME_1400.png and NAME_400.png, in Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if chromium is None:
        raise SystemExit(f"Chromium is not installed. Install one of {', '.join(CHROMIUMS)}.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, height in ((1400, 1600), (400, 1600)):
            page = browser.new_page(viewport={"width": width, "height": height})
            for name, file in pages.items():
                page.goto(file.resolve().as_uri())
                page.screenshot(path=folder / f"{name}_{width}.png")
        browser.close()


DRAWN = {"packed": draw_packed, "house": draw_house}  # need no run

if __name__ == "__main__":
    main(sys.argv[1:])
