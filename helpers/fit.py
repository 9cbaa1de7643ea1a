"""Will it fit, and how long will it take: what --dry_run says before anything but config.json is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.decoder import read_decoder
from helpers.errors import SettingsError
from helpers.fields import TrainSettings
from helpers.memory import GB, STATES, Job, estimate, fitting, read_job
from helpers.paths import find_path
from helpers.runs import Run, read_run
from helpers.sources import local_or_hub, missing_weights
from helpers.workload import Work, read_work


def estimate_fit(settings: TrainSettings, parent: Run | None = None) -> list[Any]:
    """What `settings` would need and do, for `display.show`: a table of memory by part, and lines.

    The memory is that of a GPU with bfloat16, unless they say --use_cpu; steps and tokens are about, and known where
    the rows are here. Nothing is written. Raises UserError where there is no such model, or a set is here that cannot
    be used, and SettingsError where the settings contradict each other.
    """
    values, whole = settings.values(), parent is not None and not parent.is_adapter
    folder = parent.folder if parent and whole else find_path(values["model_id"])
    has_config = folder is not None and (folder / "config.json").is_file()  # nothing more is read of it
    root = str(folder) if has_config else local_or_hub(values["model_id"], values["revision"])
    accumulation = settings.accumulation()
    work = _work_lines(read_work(settings, root, accumulation), settings)
    if has_config and (lacking := missing_weights(Path(root))):
        work.append(f"The weights are not here yet: {Path(root).name} {lacking}.")
    try:
        decoder = read_decoder(json.loads(_config_file(root, values["revision"]).read_text()))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        return [f"Memory: unknown, because its config.json is of a kind that is not known here: {reason}", *work]
    job = read_job(values, settings.step, decoder, parent is not None and parent.is_adapter)
    if not job.full and not decoder.targets(job.targets):
        raise SettingsError(f"--lora_targets {job.targets!r} is the name of no linear layer of {values['model_id']}")
    parts, limit = estimate(decoder, job), values["memory_gb"] * GB
    lines = []
    if parts["peak"] > limit:
        found = fitting(decoder, job, 0 if values["global_batch_size"] else accumulation, limit)
        lines = [f"  {words}  ({_size(peak)})" for words, peak in found]
        fits = found[0][1] <= limit
        lines = [
            "What would make it fit:" if fits else "Nothing makes it fit. It needs least with:",
            *lines,
        ]
    return [_table(parts, job, limit), *lines, *work]


def _table(parts: dict[str, float], job: Job, limit: float) -> Any:
    from rich.table import Table

    plain = "float32" if job.compute == 4 or (job.full and not job.stage) else "bfloat16"
    known = any(job.optimizer.removeprefix("paged_").startswith(kind) for kind in STATES)
    pages = ", which may page to the CPU" if "paged" in job.optimizer else ""
    shape = f"batch {job.batch}, {job.length:,} tokens"
    said = {
        "weights": {4: "4-bit NF4", 8: "8-bit"}.get(job.bits, plain) if not job.full else plain,
        "adapter": "and its frozen copy, the reference" if job.frozen_copy else f"rank {job.rank}",
        "optimizer": job.optimizer + (pages if known else ", counted as AdamW"),
        "activations": shape if job.checkpointing else f"{shape}, no checkpointing",
        "reference": "another copy of the weights",
        "peak": f"{'fits' if parts['peak'] <= limit else 'does not fit'} into {limit / GB:g} GB (--memory_gb)",
    }
    table = Table("memory of one device", "", "", box=None, pad_edge=False)
    for name, size in parts.items():
        if size:
            table.add_row(name, _size(size), said.get(name, ""), style="bold" if name == "peak" else "")
    return table


def _work_lines(work: Work, settings: TrainSettings) -> list[str]:
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


def _config_file(root: str, revision: str) -> Path:
    """config.json of a folder, or of a Hub id where `local_or_hub` has fetched it."""
    from huggingface_hub import hf_hub_download

    file = Path(root) / "config.json"
    return file if file.is_file() else Path(hf_hub_download(root, "config.json", revision=revision or None))


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


def _size(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 10**6:.2f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
