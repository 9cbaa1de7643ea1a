"""The Hub: what is uploaded, the model card, and the scan for secrets."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {},
)
