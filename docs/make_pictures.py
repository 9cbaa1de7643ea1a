"""The README's pictures, from the newest runs of `make demo`: `make pictures`."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from helpers.curves import draw, read_history
from helpers.generation import SideBySide
from helpers.judging import RuleVerdicts
from helpers.paths import REPO
from helpers.rows import read_lines
from helpers.runs import find_run

PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    dpo, vibes = (find_run(REPO / "outputs", "latest", step) for step in ("dpo", "vibes"))
    draw(read_history(dpo.folder / "metrics.jsonl"), dpo.name).savefig(PICTURES / "curves.png", dpi=110)

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
