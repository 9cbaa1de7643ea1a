"""Settings of notebooks that these tests load."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from helpers.settings import RunSettings, TrainSettings, load_settings


@dataclasses.dataclass
class Settings(TrainSettings):
    """A notebook's settings."""

    step: ClassVar[str] = "dpo"
    exclusive: ClassVar = (("model_id", "sft_run"),)

    model_id: str = "org/model"  # the model
    sft_run: str = ""  # a run
    dpo_beta: float = 0.1  # beta
    lora_r: int = 8  # rank
    loss_type: tuple[str, ...] = ("sigmoid",)  # losses
    tuning: Literal["full", "lora"] = "lora"  # what is trained, in 100 % of the layers
    push_to_hub: bool = False  # publish
    strict: bool = True  # refuse
    notes: str = ""


@dataclasses.dataclass
class MergeSettings(RunSettings):
    """Settings of a notebook that trains nothing."""

    step: ClassVar[str] = "merge"

    private: bool = True  # visibility


@dataclasses.dataclass
class VibesSettings(RunSettings):
    """Settings of a notebook that compares models."""

    step: ClassVar[str] = "vibes"

    models: tuple[str, ...] = ("latest",)  # models
    max_new_tokens: int = 256  # tokens


def load(*words: str, **bound: Any) -> Settings:
    """The settings that these words on the command line and these names in the notebook give."""
    return load_settings(Settings, bound, list(words))
