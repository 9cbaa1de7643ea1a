"""The pictures of README and docs: `make pictures`, after `make demo`, whose newest runs two of them show.

python docs/make_pictures.py house packed    # only these, which need no run
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from rich.console import Console

from helpers.core import REPO
from helpers.evaluation.answers import AnswerStore, SideBySide
from helpers.evaluation.questions import read_bench
from helpers.runs.curves import Curves
from helpers.runs.run import find_run

PICTURES = Path(__file__).parent / "pictures"
COLOURS = {"prompt": "#7a8ca8", "chosen": "#5a9e6f", "rejected": "#c56a5c", "padding": "#eeeeee"}
HOUSE = {"notebook": "#dbe4f3", "run": "#dcefe2", "helpers": "#f1ece2"}
WALK = (  # each notebook, what it does, the folder it leaves and what is in it
    ("01_sft.py", "instruction-tune\na base model", "sft-…", "model or adapter\nrun.json, curves"),
    ("02_dpo.py", "align it on\npreference pairs", "dpo-…", "adapter, samples\nrun.json, curves"),
    ("03_merge_push.py", "adapter + base, proved\nand published", "merge-…", "one model\nits proof"),
    ("04_vibes.py", "the same questions\nto several models", "vibes-…", "answers, and\na page to vote on"),
    ("05_judge.py", "which is better,\nand how surely", "judge-…", "judgments\nwin, loss, tie"),
)
GROUPS = {
    "settings": "settings fields layers trl_fields credentials paths errors processes display",
    "data": "loading columns formats preferences instructions chat chat_formats lengths rows accounts split "
    "data_report data_findings",
    "training": "models embeddings trainer shared_prefix prefix_attention prefix_packing guard checkpoints fit "
    "memory decoder workload",
    "runs, seeing": "runs sources provenance history curves health live samples tracking sweep "
    "report report_training report_results report_parts",
    "merging, publishing": "merging quantized_base weight_files merge_proof merged_folder publishing hub model_card "
    "secret_scan hub_errors",
    "answers, judging": "questions generation endpoint answers ledger vote_page bench judge_prompts judging judgments "
    "rules verdicts win_rates verdict_table",
}


def draw_packed() -> Figure:
    """A batch of two pairs as stock DPOTrainer computes it, and as one row in which each prompt stands once."""
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
    """Notebooks above, the folders they leave to each other in the middle, and below what they share."""
    figure = Figure(figsize=(11, 6.4), dpi=105, layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.3, 109.8), ylim=(4, 61))
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
        x = i * 22.2
        box(x, 50.2, 20, 8, HOUSE["notebook"], notebook, does)
        box(x, 34.5, 20, 8, HOUSE["run"], run, holds)
        arrow((x + 12, 50), (x + 12, 42.7))  # what a notebook writes
        if i < len(WALK) - 1:  # the next one reads
            arrow((x + 17, 42.7), (x + 27, 50))
    for i, (group, modules) in enumerate(GROUPS.items()):
        box(i * 18.5, 7, 17, 22.6, HOUSE["helpers"], group, modules.replace(" ", "\n"))
    says = "a notebook imports helpers; no helper imports a notebook, and no notebook another"
    axis.text(54.7, 5.2, says, ha="center", va="center", fontsize=8.5, style="italic")
    return figure


def main(names: list[str]) -> None:
    for name in names or DRAWN:
        DRAWN[name]().savefig(PICTURES / f"{name}.png")
    if not names:
        draw_demo()


def draw_demo() -> None:
    """The curves of the newest DPO run, and what the newest run of 04 answered."""
    dpo, vibes = (find_run(REPO / "outputs", "latest", step) for step in ("dpo", "vibes"))
    Curves.read(dpo.folder).figure.savefig(PICTURES / "curves.png", dpi=110)

    answers = AnswerStore(vibes.folder, read_bench(vibes.folder))
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(SideBySide.of(answers, list(vibes.record["metrics"]["characters"]), rows=8))
    svg = console.export_svg(title="python notebooks/04_vibes.py --recipe recipes/demo.yaml")
    svg = re.sub(
        r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL
    )  # rich's fonts come from a server: use the reader's
    (PICTURES / "answers.svg").write_text(svg)


DRAWN = {"packed": draw_packed, "house": draw_house}  # from nothing but this file

if __name__ == "__main__":
    main(sys.argv[1:])
