"""Which rows are trained on and which are held out: by prompt, in an order that the seed decides."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

from helpers.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclasses.dataclass(frozen=True)
class Split:
    """How many rows are trained on (0: all) and held out (0: `eval_fraction` of them), in the order of `seed`."""

    train_rows: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.1
    seed: int = 0


def split_by_prompt(rows: Dataset, split: Split) -> tuple[Dataset, Dataset]:
    """Train and evaluation rows with no prompt in both; the order is the seed's, not the file's."""
    order, prompts = _order(rows, split.seed)
    if not (split.eval_rows or split.eval_fraction):
        raise UserError("--eval_rows 0 and --eval_fraction 0: something has to be held out, to see what is learned")
    share = max(1, round(split.eval_fraction * len(order)))
    wanted = min(split.eval_rows or share, max(share, len(order) // 4), len(order) - 1)
    if wanted < split.eval_rows:
        print(f"Held out: {wanted:,} rather than --eval_rows {split.eval_rows:,}, of {len(order):,} that there are.")
    while 0 < wanted < len(order) and prompts[order[wanted]] == prompts[order[wanted - 1]]:
        wanted += 1  # the prompt at the border goes to the evaluation rows as a whole
    chosen = order[wanted : wanted + split.train_rows] if split.train_rows else order[wanted:]
    if not chosen:
        raise UserError(f"{len(prompts)} rows are too few for --eval_rows {wanted}: nothing is left to train on")
    return rows.select(chosen), rows.select(order[:wanted])


def first_rows(rows: Dataset, count: int, seed: int) -> Dataset:
    """The first `count` rows in the seed's order; 0 takes all."""
    order, _ = _order(rows, seed)
    return rows.select(order[:count] if count else order)


def _order(rows: Dataset, seed: int) -> tuple[list[int], list[str]]:
    """Row numbers with rows of one prompt together, in an order that the seed and the prompts decide."""
    prompts = rows["prompt_key"][:]
    rank = {p: hashlib.sha256(f"{seed} {p}".encode()).digest() for p in set(prompts)}
    return sorted(range(len(prompts)), key=lambda i: (rank[prompts[i]], i)), prompts
