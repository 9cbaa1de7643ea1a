"""Estimate rows, steps, tokens and time of a training run without downloading anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import UserError, find_path
from helpers.data.formats import PairingConfig
from helpers.data.loading import DatasetSpec, choose_format, load_rows, parse_dataset_specs
from helpers.data.messages import Message, add_system_prompt
from helpers.data.prepare import LengthLimits
from helpers.data.row_report import Split, config_from
from helpers.models.resolve import Start
from helpers.runs.curves import MIN_STEPS, read_history
from helpers.runs.run import list_runs

if TYPE_CHECKING:
    from datasets import Dataset


SAMPLED_ROWS = 200  # of each dataset
CHARACTERS_PER_TOKEN = 4  # if the tokenizer is not cached
Count = Callable[[list[Message]], int]


def estimate_workload(settings: Any, start: Start) -> str:
    """The work of `settings` in words, from a sample of each dataset.

    Raises UserError if a local dataset cannot be used.
    """
    count, note = _token_counter(start)
    max_steps, split = settings.trl.get("max_steps", -1), config_from(settings, Split)
    kept, tokens, has_eval_split = 0.0, 0.0, False
    for spec in parse_dataset_specs(settings):
        try:
            with _offline():
                rows = load_rows(spec)
        except UserError:
            if spec.is_file_name or find_path(spec.id) is not None:
                raise
            steps = f"{max_steps:,} steps, unknown tokens" if max_steps > 0 else "Unknown steps and tokens"
            return f"{steps}: {spec.id} has not been downloaded yet."
        lengths, share = _sample_lengths(rows, settings, spec, count)
        kept, tokens = kept + len(lengths) * share, tokens + sum(lengths) * share
        has_eval_split = has_eval_split or bool(spec.eval_split)
    mean = tokens / max(1.0, kept)
    evaluated = float(split.eval_rows)
    if not has_eval_split:  # as split_by_prompt does
        quarter = max(1.0, split.eval_fraction * kept)
        evaluated = min(split.eval_rows, max(quarter, kept // 4)) if split.eval_rows else quarter
        kept -= evaluated
    if kept < 1:
        raise UserError("none of the sampled rows can be used. Run `python -m helpers data` to see why.")
    trained = min(split.train_rows or math.inf, kept)
    units = trained * mean / settings.max_length if settings.trl.get("packing") else trained
    epoch = max(1, math.ceil(round(units) / settings.rows_per_step()))
    steps = max_steps if max_steps > 0 else math.ceil(settings.num_train_epochs * epoch)
    note = f" ({note})" if note else ""
    tokens = steps / epoch * trained * mean
    work = f"About {round(trained):,} rows to train on, {steps:,} steps, {tokens:,.0f} tokens{note}."
    return (
        work
        + _describe_evaluation(settings, steps, evaluated, steps / epoch * trained)
        + _describe_time(settings, tokens)
    )


def _describe_evaluation(settings: Any, steps: int, evaluated: float, trained: float) -> str:
    """A line with the number of evaluations and their share of the computation; "" without one.

    A forward pass counts 1 a row, and the reference's of an evaluation row is needed once. A row that is trained on
    takes a forward pass, another with checkpointing, a backward pass (2 with all weights) and the reference's.
    """
    trl, is_dpo = settings.trl, settings.step == "dpo"
    every = trl.get("eval_steps", 0.2)
    count = steps // math.ceil(every * steps if every < 1 else every)
    count = {"no": 0, "epoch": math.ceil(settings.num_train_epochs)}.get(str(trl.get("eval_strategy")), count)
    count += bool(trl.get("eval_on_start", is_dpo)) if count else 0
    if not count or evaluated < 1:
        return ""
    own = evaluated * (count + is_dpo)
    all_of_it = own + trained * (2 + trl.get("gradient_checkpointing", True) + (settings.tuning == "full") + is_dpo)
    return f"\nEvaluation: {count} times {round(evaluated):,} rows, {own / all_of_it:.0%} of the computation."


def _describe_time(settings: Any, tokens: float) -> str:
    """A line with the time at the speed of the newest finished run of this step, model and tuning; "" without one."""
    same = {name: getattr(settings, name) for name in ("model_id", "tuning", "quantization")}
    for run in list_runs(settings.output_dir, settings.step):
        speed = run.record.get("metrics", {}).get("tokens_per_second")
        if not speed or not run.finished or not same.items() <= run.record.get("settings", {}).items():
            continue
        if max((log["step"] for log in read_history(run.folder / "metrics.jsonl")), default=0) >= MIN_STEPS:
            seconds = tokens / speed
            minutes = round(seconds / 60)
            time = f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
            time = time if minutes > 1 else f"{seconds:.0f} s"
            return f"\nAbout {time}, at {speed:,.0f} tokens per second as in {run.name}."
    return ""


def _sample_lengths(rows: Dataset, settings: Any, spec: DatasetSpec, count: Count) -> tuple[list[float], float]:
    """Tokens to compute for each usable example of a sample, and how many examples each of them represents."""
    limits, pairing = config_from(settings, LengthLimits), config_from(settings, PairingConfig)
    max_prompt, max_total = limits.bounds
    row_format = choose_format(rows, spec.format, use_pairs=settings.step == "dpo")
    sample = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)))
    lengths: list[float] = []
    for example in (example for row in sample for example in row_format.read(row, pairing)):
        if isinstance(example, str):
            continue
        prompt = count(add_system_prompt(example.prompt, settings.system_prompt))
        answers = [count(side) for side in (example.chosen, example.rejected) if side]
        if limits.overlong == "truncate_prompt":
            prompt = max(1, min(prompt, max_prompt, max_total - max(answers)))
        elif limits.overlong == "truncate_completion":
            answers = [min(answer, max(1, max_total - prompt)) for answer in answers]
        if prompt <= max_prompt and prompt + max(answers) <= max_total:
            lengths.append(sum(prompt + answer for answer in answers))
    return lengths, spec.fraction * len(rows) / len(sample)


def _token_counter(start: Start) -> tuple[Count, str]:
    """A function that counts the tokens of messages (without those of the chat template), and a note on how it does."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    folder = start.parent.folder if start.parent else find_path(start.model)
    cached = None if folder else try_to_load_from_cache(start.model, "tokenizer.json", revision=start.revision)
    file = folder / "tokenizer.json" if folder else Path(cached) if isinstance(cached, str) else Path()
    if not file.is_file():
        note = f"at {CHARACTERS_PER_TOKEN} characters per token, because the tokenizer is not downloaded yet"
        return lambda talk: sum(len(m["content"]) for m in talk) // CHARACTERS_PER_TOKEN + 1, note
    tokenizer = Tokenizer.from_file(str(file))
    return lambda talk: sum(len(tokenizer.encode(m["content"], add_special_tokens=False)) for m in talk), ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Use the Hub's cache only."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
