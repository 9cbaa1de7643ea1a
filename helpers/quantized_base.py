"""What bitsandbytes makes of a weight: the base that a QLoRA adapter was trained against.

Read in transformers 5.23 (quantizers/base.py, integrations/bitsandbytes.py) and bitsandbytes 0.50 (functional.py).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


class QuantizedBase:
    """The weights of `model` (which may be on the meta device) as training with `config` computed with them.

    `stored` is the dtype in which the weights were loaded before they were quantized.
    """

    def __init__(self, model: PreTrainedModel, config: BitsAndBytesConfig, stored: torch.dtype) -> None:
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import HfQuantizer

        self.config, self.stored = config, stored
        keep = HfQuantizer.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, getattr(model, "_keep_in_fp32_modules", None)
        )
        twin = replace_with_bnb_linear(copy.deepcopy(model), keep, config)
        self.quantized = {n for n, m in twin.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight `name` of a checkpoint, quantized and back, in float32; as it is where it was left alone."""
        module, _, kind = name.rpartition(".")
        if module not in self.quantized or kind != "weight":
            return weight
        return round_trip(weight.to(self.stored), self.config).float()


def round_trip(weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Quantized as `Params4bit` or `Int8Params` does, and dequantized as their layers do."""
    from bitsandbytes import functional

    if config.load_in_8bit:
        rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
        whole: torch.Tensor = functional.int8_vectorwise_dequant(rows, scales).to(weight.dtype)
        return whole
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    found: torch.Tensor = functional.dequantize_4bit(packed, state).to(config.bnb_4bit_compute_dtype)
    return found
