"""What a run wrote down while it trained: its log history in metrics.jsonl, and answers in samples.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

History = list[dict[str, float]]  # what the Trainer logged, one dictionary a log
SAMPLES = "samples.jsonl"
WINDOW = 5  # logs of training that are looked at together


def read_history(file: Path) -> History:
    """The logs of a run, oldest first; a last line cut short by a crash is left out."""
    return _read_lines(file)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Each answer sampled in a run: its step, prompt, answer and number of tokens; [] where there is none."""
    return _read_lines(folder / SAMPLES)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text("utf-8").split("\n") if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def series(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged name, without those that are not numbers."""
    points = [(log["step"], log[name]) for log in history if name in log and math.isfinite(log[name])]
    return [x for x, _ in points], [y for _, y in points]


def is_dpo(history: History) -> bool:
    return any("rewards/margins" in log for log in history)


def ends(history: History, name: str, of: Callable[..., float]) -> list[float]:
    """Where a value began and where it is now: the first evaluation and `of` (min or max) the last two of the others,
    which are of the same rows. Without those, or where the first came after logs of training, medians of the first and
    last window of training. [] before that."""
    (at, held_out), (steps, training) = series(history, f"eval_{name}"), series(history, name)
    if len(held_out) > 1 and at[0] <= min(steps, default=math.inf):
        return [held_out[0], of(held_out[1:][-2:])]
    return [median(training[:WINDOW]), median(training[-WINDOW:])] if len(training) >= 2 * WINDOW else []


def with_speed(history: History) -> History:
    """The history with `tokens_per_second` in each log of training: since the log before, evaluations left out.

    transformers 5.23 (trainer.py, log) gives tokens and seconds since the run was started or resumed; a resumed run
    begins to count anew, which is where its tokens do not grow by as many as all that were seen.
    """
    found, before, evaluating = [], (0.0, 0.0, 0.0), 0.0
    for log in history:
        evaluating += log.get("eval_runtime", 0.0)
        if "loss" in log and "train_tokens_per_second" in log:
            seconds, seen = log["train_runtime"], log["num_input_tokens_seen"]
            tokens = log["train_tokens_per_second"] * seconds
            if tokens - before[0] < (seen - before[2]) / 2:  # another start than the log before's
                before, evaluating = (0.0, 0.0, seen), 0.0
            took = seconds - before[1] - evaluating
            if took > 0 and tokens > before[0]:
                log = log | {"tokens_per_second": (tokens - before[0]) / took}
            before, evaluating = (tokens, seconds, seen), 0.0
        found.append(log)
    return found
