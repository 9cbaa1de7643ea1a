"""Which format a preference set is in, by its columns."""

from __future__ import annotations

from typing import Any


def list_columns(rows: Any) -> dict[str, bool]:
    """Columns of a dataset, and whether each holds lists."""
    return {name: str(kind).startswith(("List", "LargeList", "[")) for name, kind in rows.features.items()}


def recognise(columns: dict[str, bool]) -> str:
    """The format of a dataset with these columns (True where a column holds lists), or "" where it is none of ours."""
    have = set(columns)
    if {"chosen", "rejected"} <= have:
        if columns["chosen"]:
            return "messages"
        if "question" in have or ("input" in have and "prompt" not in have):
            return "orca"
        return "triplet" if "prompt" in have else "transcript"
    if {"instruction", "output_1", "output_2", "preference"} <= have:
        return "alpaca_farm"
    if {"prompt", "answers"} <= have and columns["answers"]:
        return "ranked"
    if {"prompt", "instruction", "question"} & have and (columns.get("completions") or {"responses", "scores"} <= have):
        return "scored"
    return ""
