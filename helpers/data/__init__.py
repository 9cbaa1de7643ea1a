"""Data: published datasets to tokenized pairs or conversations, with a report on every row."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "encode": ["LengthLimits"],
        "formats": ["PairingConfig"],
        "loading": ["DatasetSpec", "load_rows"],
        "prepare": ["load_instructions", "load_preferences", "prepare_rows"],
        "report": ["DataReport", "show_example"],
        "row_report": ["RowReport", "estimate_workload"],
    },
)
