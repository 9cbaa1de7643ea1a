"""Settings: one dataclass per notebook, resolved from flags, environment, .env, recipe and defaults."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "fields": ["RunSettings", "TrainSettings"],
        "load": ["load_settings"],
    },
)
