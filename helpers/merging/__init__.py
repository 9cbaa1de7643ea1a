"""Merging: add an adapter to its base, one tensor at a time, and verify the result."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "merge": ["find_adapter", "merge_adapter"],
        "verify": ["verify_merge"],
        "weights": ["StreamingMerger", "write_merged"],
    },
)
