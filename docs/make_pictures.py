"""The README's pictures, from the newest runs of `make demo`: `make pictures`."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console

from helpers.curves import Curves
from helpers.generation import SideBySide
from helpers.judging import RuleVerdicts
from helpers.paths import REPO
from helpers.rows import read_lines
from helpers.runs import find_run

PICTURES = Path(__file__).parent / "pictures"
COLOURS = {"prompt": "#7a8ca8", "chosen": "#5a9e6f", "rejected": "#c56a5c", "padding": "#eeeeee"}


def draw_packed() -> Figure:
    """A batch of two pairs as stock DPOTrainer computes it, and as one row in which each prompt stands once."""
    pairs = [(9, 3, 6), (5, 7, 2)]  # tokens of prompt, chosen and rejected
    width = max(p + max(c, r) for p, c, r in pairs)
    rows = [[("prompt", p), (side, n), ("padding", width - p - n)] for i, side in ((1, "chosen"), (2, "rejected"))
            for p, n in ((pair[0], pair[i]) for pair in pairs)]  # fmt: skip
    packed = [part for p, c, _ in pairs for part in (("prompt", p), ("chosen", c))]
    packed += [("rejected", r) for _, _, r in pairs]
    figure = Figure(figsize=(10, 2.9), layout="constrained")
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


def main() -> None:
    draw_packed().savefig(PICTURES / "packed.png", dpi=130)
    dpo, vibes = (find_run(REPO / "outputs", "latest", step) for step in ("dpo", "vibes"))
    Curves.read(dpo.folder).figure.savefig(PICTURES / "curves.png", dpi=110)

    rows = read_lines(vibes.folder / "answers.jsonl")
    names = list(rows[0]["answers"])
    table = SideBySide([r["prompt"] for r in rows], {name: [r["answers"][name] for r in rows] for name in names})
    verdicts = {k: v for k, v in vibes.record["metrics"].items() if k != "win_rate"}
    console = Console(record=True, width=110, file=(PICTURES / "answers.txt").open("w"))
    console.print(table.sample(8), RuleVerdicts(**verdicts))
    svg = console.export_svg(title="python notebooks/04_vibes.py --recipe recipes/demo.yaml")
    svg = re.sub(
        r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL
    )  # rich's fonts come from a server: use the reader's
    (PICTURES / "answers.svg").write_text(svg)
    (PICTURES / "answers.txt").unlink()


if __name__ == "__main__":
    main()
