"""What Weights & Biases is given beside the Trainer's own logs: a run's settings, rows, curves and samples."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from helpers.history import read_samples

if TYPE_CHECKING:
    from helpers.runs import Run


def log_to_wandb(run: Run) -> None:
    """Add to the open wandb run, if there is one (--report_to wandb, main process), what makes it readable on its own.

    `settings` of its config, tables `settings`, `rows` (the account) and `samples`, the picture `curves`, and in its
    summary the names of the findings.
    """
    wandb = sys.modules.get("wandb")  # imported by the Trainer's callback, or not at all
    if wandb is None or wandb.run is None:
        return
    record, samples = run.record, read_samples(run.folder)
    account = {name: record["data"][name] for name in ("read", "kept", "changed", "dropped", "train", "eval")}
    account |= {f"dropped: {reason}": count for reason, count in record["data"]["reasons"].items()}
    sources = record["sources"]
    settings = [[name, str(value), sources.get(name, "")] for name, value in record["settings"].items()]
    given = {
        "settings": wandb.Table(["setting", "value", "from"], settings),
        "rows": wandb.Table(["rows", "count"], [[name, count] for name, count in account.items()]),
        "curves": wandb.Image(str(run.folder / "curves.png")),
    }
    if samples:
        given["samples"] = wandb.Table(list(samples[0]), [list(row.values()) for row in samples])
    wandb.run.config.update({"settings": record["settings"]}, allow_val_change=True)
    wandb.run.summary["findings"] = [finding["name"] for finding in record.get("findings", [])]
    wandb.log(given)
