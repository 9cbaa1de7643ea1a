# %% tags=["parameters"]
"""A notebook that trains nothing, in no time: what a sweep runs in its place. It stands for notebooks/02_dpo.py."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from helpers.runs.start import start_run
from helpers.settings import TrainSettings, load_settings


@dataclass
class Settings(TrainSettings):
    """A stub."""

    step: ClassVar[str] = "sft"

    dpo_beta: float = 0.1  # what is swept
    loss_type: tuple[str, ...] = ("sigmoid",)  # a setting of several words
    per_device_train_batch_size: int = 1  # rows
    gradient_accumulation_steps: int = 1  # batches
    wait_for: str = ""  # a file


# %%
settings = load_settings(Settings, globals())
run = start_run(settings, base_model="stub")
with (settings.output_dir / "started").open("a") as started:
    started.write(f"{settings.dpo_beta} {' '.join(settings.loss_type)}\n")
with run.training():
    if settings.dpo_beta > 1:
        raise ValueError("too stiff")
    for step in range(1, 11):
        print(f"step {step:>2}/10  loss {1 / step:.4g}", flush=True)
        log = {"step": step, "loss": 1 / step, "rewards/margins": settings.dpo_beta, "rewards/accuracies": 0.8}
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(log) + "\n")
    (settings.output_dir / "pid").write_text(str(os.getpid()))
    while settings.wait_for and settings.dpo_beta == 0.3 and not Path(settings.wait_for).exists():
        time.sleep(0.02)
run.finish(metrics={"eval_loss": settings.dpo_beta / 2, "step": 10.0}, diagnostics=[])
