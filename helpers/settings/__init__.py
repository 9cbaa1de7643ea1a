"""Settings: one dataclass per notebook, resolved from flags, environment, .env, recipe and defaults."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "fields": ["RunSettings", "TrainSettings"],
        "load": ["load_settings"],
    },
)
