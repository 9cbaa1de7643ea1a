"""How many rows, steps and tokens training has, about, where its rows are here already: nothing is downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import UserError, find_path
from helpers.data.conversations import Message
from helpers.data.formats import FORMAT_READERS, PairingConfig, check_columns, detect_format, list_columns
from helpers.data.loading import DatasetSpec, load_rows, parse_dataset_specs
from helpers.data.prepare import INSTRUCTION_READERS, read_chosen
from helpers.runs.run import Run, read_run
from helpers.settings.fields import TrainSettings

if TYPE_CHECKING:
    from datasets import Dataset


LOOKED_AT = 200  # rows of a set that stand for all
CHARACTERS = 4  # to a token, where the tokenizer is not here

Count = Callable[[list[Message]], int]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows that are trained on, optimizer steps, and tokens that they hold; None for what is not known, and why."""

    rows: int | None
    steps: int | None
    tokens: float | None
    note: str = ""


def estimate_work(settings: TrainSettings, parent: Run | None = None) -> list[str]:
    """Lines on rows, steps, tokens and time. Raises UserError where a set that is here cannot be used."""
    folder = parent.folder if parent and not parent.is_adapter else find_path(settings.values()["model_id"])
    model = str(folder or settings.values()["model_id"])
    return _work_lines(estimate_workload(settings, model, settings.accumulation_steps()), settings)


def estimate_workload(settings: TrainSettings, model: str, accumulation: int) -> Workload:
    """What there is to do, from some rows of each set; `model` is a folder or Hub id. Raises UserError."""
    values = settings.values()
    count, by_characters = _counter(model, values["revision"])
    given = values.get("max_steps", -1)
    train, tokens, own_evaluation = 0.0, 0.0, False
    for source in parse_dataset_specs(settings):
        try:
            with _offline():
                rows = load_rows(source)
        except UserError:
            if source.is_file_name or find_path(source.id) is not None:  # nothing that could still be downloaded
                raise
            return Workload(None, given if given > 0 else None, None, f"{source.id} has not been downloaded yet")
        mean, kept = _look(rows, values, settings.step, source, count)
        train, tokens = train + kept, tokens + kept * mean
        own_evaluation = own_evaluation or bool(source.eval_split)
    mean = tokens / max(1.0, train)
    train -= 0.0 if own_evaluation else _held_out(train, values)
    if train < 1:
        raise UserError("none of the rows looked at can be used: python -m helpers data says why")
    trained = min(values["train_rows"] or math.inf, train)
    units = trained * mean / values["max_length"] if values.get("packing") else trained
    per_step = values["per_device_train_batch_size"] * accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    epoch = max(1, math.ceil(round(units) / per_step))
    steps = given if given > 0 else math.ceil(values["num_train_epochs"] * epoch)
    return Workload(round(trained), steps, steps / epoch * trained * mean, by_characters)


def _held_out(kept: float, values: dict[str, Any]) -> float:
    """As `split_by_prompt` has it, but for prompts that stand there twice."""
    share = max(1.0, values["eval_fraction"] * kept)
    return float(min(values["eval_rows"], max(share, kept // 4))) if values["eval_rows"] else share


def _look(rows: Dataset, values: dict[str, Any], step: str, source: DatasetSpec, count: Count) -> tuple[float, float]:
    """Mean tokens that are computed for a pair or conversation, and about how many there are."""
    name, columns = "" if source.format == "auto" else source.format, set(rows.column_names)
    if step == "sft":
        name = name or next((n for n, (needed, _) in INSTRUCTION_READERS.items() if needed <= columns), "")
    name = name or detect_format(list_columns(rows))
    talks = step == "sft" and name in INSTRUCTION_READERS and INSTRUCTION_READERS[name][0] <= columns
    if not talks and name not in FORMAT_READERS:
        raise UserError(
            f"the dataset has columns {', '.join(rows.column_names)}: none of the formats that --help names; rename "
            "them, or name one with --data_format"
        )
    if not talks:
        check_columns(name, rows.column_names)
    looked_at = rows.select(range(0, len(rows), max(1, len(rows) // LOOKED_AT)))
    total, prompts = (values.get(name) or math.inf for name in ("max_length", "max_prompt_length"))
    options = PairingConfig(
        values.get("pairing", "best_vs_worst"), values.get("recommended", False), values.get("min_margin", 0.0)
    )
    shortened = values["overlong"] in ("truncate_prompt", "truncate_completion")
    found: list[int] = []
    for row in looked_at:
        if step == "sft":
            talk = INSTRUCTION_READERS[name][1](row) if talks else read_chosen(row, name)
            tokens = math.inf if isinstance(talk, str) else count(talk)
            if tokens <= total or (shortened and tokens < math.inf):
                found.append(int(min(tokens, total)))
            continue
        made = FORMAT_READERS[name](row, options)
        for pair in [] if isinstance(made, str) else made:
            if not isinstance(pair, str):
                prompt, chosen, rejected = count(pair.prompt), count(pair.chosen), count(pair.rejected)
                longest = max(chosen, rejected)
                if shortened:
                    prompt = int(max(1, min(prompt, prompts, total - longest)))
                if prompt <= prompts and prompt + longest <= total:
                    found.append(2 * prompt + chosen + rejected)
    share = source.fraction * len(rows) / len(looked_at)
    return sum(found) / max(1, len(found)), len(found) * share


def _counter(model: str, revision: str) -> tuple[Count, str]:
    """What counts the tokens of messages (without a chat format's own), and a note where it does so by characters."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    folder = find_path(model)
    cached = try_to_load_from_cache(model, "tokenizer.json", revision=revision or None) if folder is None else None
    file = folder / "tokenizer.json" if folder else Path(cached) if isinstance(cached, str) else None
    if file is None or not file.is_file():
        by_hand: Count = lambda talk: sum(len(m["content"]) for m in talk) // CHARACTERS + 1  # noqa: E731
        return by_hand, f"counted as {CHARACTERS} characters each, because its tokenizer is not here yet"
    tokenizer = Tokenizer.from_file(str(file))
    return lambda talk: sum(len(tokenizer.encode(m["content"], add_special_tokens=False)) for m in talk), ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched from the Hub: what is cached is found, and what is not is an error."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _work_lines(work: Workload, settings: TrainSettings) -> list[str]:
    if work.steps is None:
        return [f"Steps, tokens and time: unknown, because {work.note}."]
    if work.tokens is None:
        return [f"{work.steps:,} steps; tokens and time unknown, because {work.note}."]
    note = f" ({work.note})" if work.note else ""
    lines = [f"About {work.rows:,} rows to train on, {work.steps:,} steps, {work.tokens:,.0f} tokens{note}."]
    if found := _speed_so_far(settings):
        speed, run = found
        lines.append(f"About {_duration(work.tokens / speed)}, at {speed:,.0f} tokens a second as in {run}.")
    return lines


def _speed_so_far(settings: TrainSettings) -> tuple[float, str] | None:
    """Tokens a second of the newest finished run of this step, model and tuning, and its name."""
    found = []
    for file in settings.output_dir.glob("*/run.json"):
        record = read_run(file.parent)
        before, now = record.get("settings", {}), settings.values()
        alike = all(before.get(name) == now[name] for name in ("model_id", "tuning", "quantization"))
        speed = record.get("metrics", {}).get("tokens_per_second")
        if speed and alike and record.get("step") == settings.step and record.get("status") == "finished":
            found.append((str(record["finished"]), float(speed), file.parent.name))
    return max(found)[1:] if found else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
