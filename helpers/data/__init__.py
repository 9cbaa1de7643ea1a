"""Data: published rows to pairs or conversations, with an account of every row."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "prepare": ["load_preferences", "load_instructions"],
        "report": ["DataReport"],
    },
)
