"""Training: DPO with shared prefixes, callbacks and diagnostics."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "trainer": ["SharedPrefixDPOTrainer", "supports_packing"],
        "microbatches": ["MicroBatchDPOTrainer", "microbatch_tokens"],
        "callbacks": ["prepare_trainer"],
        "prefix_sharing": ["pack_pairs"],
    },
)
