"""A base whose linear layers are stored in 4 or 8 bits by bitsandbytes, for qlora. On CPU and GPU.

Invariant: heads and newly drawn layers stay fp32, since they are trained. 4-bit weights are stored as fp32 words, eight weights each,
because sharding backends handle float tensors only.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from trainer.config import QloraConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantization_config(method: QloraConfig, precision: str, kept: Sequence[str]) -> BitsAndBytesConfig:
    """How transformers loads the base. precision: the run's, `no` is fp32. kept: modules that are not quantized."""
    if method.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))
    name = method.compute_dtype if method.compute_dtype != "auto" else precision.replace("no", "fp32")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quantize,
        bnb_4bit_use_double_quant=method.double_quantization is not False,
        bnb_4bit_compute_dtype=DTYPES[name],
        bnb_4bit_quant_storage=torch.float32,
        llm_int8_skip_modules=list(kept),
    )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting 4-bit weights at the first evaluation on a CPU with AVX512-BF16. In place.

    bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward) repacks them there for a bf16 kernel: the blocks' scales are rounded to bf16 for
    good, layers narrower than a block fail, and the weights no longer have the size that a sharding backend knows.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def num_elements(parameter: Tensor) -> int:
    """Weights that a parameter stands for: of a 4-bit one eight in every stored word."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def stored_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter with the scales of its blocks."""
    size = parameter.numel() * parameter.element_size()
    state = cast(Any, getattr(parameter, "quant_state", None))
    if state is not None:
        parts = [state.absmax, *([state.state2.absmax, state.state2.code] if state.nested else [])]
        size += sum(part.numel() * part.element_size() for part in parts)
    return size
