"""Dropout that costs a fifth of torch's on a CPU, where torch draws each mask element by element in one thread.

Every element gets a 16-bit draw, four to a 64-bit random word, from a generator seeded by one draw of torch's global generator:
torch's RNG state alone decides the mask, as gradient checkpointing and exact resume need. The drop rate is rounded to a
multiple of 1/65536, and the scale 1 / (1 - p) follows the rounded rate, so the expected output is exactly the input.
Kept for the backward pass: the draws, 2 bytes per element. On a GPU torch's own dropout stays.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LEVELS = 1 << 16  # values of one draw
FAST_ATTENTION = "samestep_sdpa"


class FastDropout(nn.Module):
    """Like nn.Dropout(p): drops in training, is the identity in evaluation and for p = 0. For CPU tensors of a float dtype."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x with each element dropped with probability p, or scaled by 1 / (1 - p)."""
        return fast_dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        """As nn.Dropout prints itself."""
        return f"p={self.p}"


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """x with each element dropped with probability p, rounded to 1/65536. Draws one number of torch's global generator."""
    num_dropped = round(p * LEVELS)
    if num_dropped == 0:
        return x
    assert num_dropped < LEVELS and x.device.type == "cpu", (p, x.device)
    return DropoutFunction.apply(x, draw_levels(x.shape), num_dropped)


class DropoutFunction(torch.autograd.Function):
    """y = x * mask / (1 - p), with the mask made again from the draws in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, num_dropped: int) -> Tensor:
        """levels: int16, of x's shape; the `num_dropped` lowest values drop."""
        ctx.save_for_backward(levels)
        ctx.num_dropped = num_dropped
        return apply_mask(x, levels, num_dropped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient through the same mask and scale."""
        return apply_mask(grads[0], ctx.saved_tensors[0], ctx.num_dropped), None, None


def draw_levels(shape: torch.Size) -> Tensor:
    """Uniform int16 values from -32768 on. numpy's SFC64 takes half the time of torch's Mersenne twister."""
    seed = int(torch.randint(0, 2**62, (), dtype=torch.int64))
    num_words = (shape.numel() + 3) // 4
    words = np.random.SFC64(seed).random_raw(num_words)
    return torch.from_numpy(words.view(np.int16))[: shape.numel()].view(shape)


def apply_mask(x: Tensor, levels: Tensor, num_dropped: int) -> Tensor:
    """A new tensor. The comparison writes zeros and ones in x's dtype: torch is three times slower through a bool mask."""
    mask = torch.ge(levels, num_dropped - LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype))
    scale = LEVELS / (LEVELS - num_dropped)
    return torch.addcmul(x.new_zeros(()), mask, x, value=scale, out=mask)  # 0 + scale * mask * x in one pass


def use_fast_dropout(model: nn.Module) -> None:
    """Put FastDropout in the place of every nn.Dropout of a model that runs on a CPU, PEFT's included."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                replacement = FastDropout(child.p)
                replacement.train(child.training)
                module._modules[name] = replacement


def fast_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, but for CPU training with dropout, where torch's kernel falls back to a slow path.

    query: (B, heads, T, D); key and value: (B, key heads, S, D); attention_mask: additive (B, 1, T, S), never None in a decoder.
    Returns (B, T, heads, D).
    """
    plain = dropout == 0.0 or query.device.type != "cpu" or "position_bias" in options
    if plain or (attention_mask is None and query.shape[2] > 1 and is_causal(module, options)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = fast_dropout(torch.softmax(scores, dim=-1), dropout)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


def is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether a missing mask means a causal one, by transformers' rule."""
    given = options.get("is_causal")
    return bool(given if given is not None else getattr(module, "is_causal", True))


# transformers finds attention kernels by name in these two tables. Additive masks: made once per forward pass, not once per layer.
ALL_ATTENTION_FUNCTIONS.register(FAST_ATTENTION, fast_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(FAST_ATTENTION, eager_mask)
