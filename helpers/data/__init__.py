"""Data: published datasets to tokenized pairs or conversations, with a report on every row."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "formats": ["PairingConfig"],
        "loading": ["DatasetSpec", "load_rows"],
        "prepare": ["LengthLimits"],
        "report": ["DataReport", "show_example"],
        "row_report": ["RowReport", "load_instructions", "load_preferences", "prepare_rows"],
        "workload": ["estimate_workload"],
    },
)
