"""Columns of a dataset: which format they make up, and messages and tokens written as Arrow arrays."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from helpers.errors import UserError
from helpers.rows import Message

# What each format of preference data reads, or of several names one.
NEEDED = {
    "messages": ("chosen", "rejected"),
    "triplet": ("prompt", "chosen", "rejected"),
    "orca": ("question or input", "chosen", "rejected"),
    "ranked": ("prompt", "answers"),
    "transcript": ("chosen", "rejected"),
    "alpaca_farm": ("instruction", "output_1", "output_2", "preference"),
    "scored": ("prompt or instruction or question", "completions or responses"),
}
LOOKED_AT = 100  # rows that show what a column of mixed types mostly holds


def list_columns(rows: Any) -> dict[str, bool]:
    """Columns of a dataset, and whether each holds lists."""
    kinds = {name: str(kind) for name, kind in rows.features.items()}
    found = {name: kind.startswith(("List", "LargeList", "[")) for name, kind in kinds.items()}
    for name in [name for name, kind in kinds.items() if kind.startswith("Json")]:  # a few rows are not like the rest
        values = rows.select(range(min(LOOKED_AT, len(rows))))[name][:]
        found[name] = 2 * sum(isinstance(value, list) for value in values) > len(values)
    return found


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


def refuse_lacking(name: str, columns: Collection[str]) -> None:
    """Raise UserError where a set has not the columns of the format that it is said to have."""
    if lacking := [one for one in NEEDED[name] if not set(one.split(" or ")) & set(columns)]:
        raise UserError(
            f"the dataset has columns {', '.join(columns)}, and no {', no '.join(lacking)}, which the format {name} "
            "needs: rename them, or name another with --data_format"
        )


def message_column(conversations: list[list[Message]]) -> Any:
    """Lists of {role, content} as an Arrow array, made from its columns rather than from dicts one by one."""
    import pyarrow as pa

    messages = list(itertools.chain.from_iterable(conversations))
    fields = [pa.array([m[name] for m in messages], pa.string()) for name in ("role", "content")]
    struct = pa.StructArray.from_arrays(fields, ["role", "content"])
    return pa.ListArray.from_arrays(_offsets(conversations), struct)


def token_column(lists: list[list[int]]) -> Any:
    """Lists of token ids as an Arrow array of int32."""
    import pyarrow as pa

    flat = pa.array(list(itertools.chain.from_iterable(lists)), pa.int32())
    return pa.ListArray.from_arrays(_offsets(lists), flat)


def _offsets(lists: Sequence[Sequence[Any]]) -> Any:
    import pyarrow as pa

    return pa.array([0, *itertools.accumulate(map(len, lists))], pa.int32())
