"""Publishing on the Hub: upload, model card, scan for secrets."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__, {"push": ["check_push", "merge_and_push", "push_before_merge", "push_model"]}
)
