"""Losses as sums over targets, so that the loop alone decides what they are divided by."""

import torch
from torch import Tensor

from trainer.data.batches import IGNORED


def classification_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over targets, in fp32.

    logits: (B, C) any float dtype; labels: (B,) int64, -100 where not a target.
    Returns a scalar, 0.0 without targets. Local to the rank: no collective.
    """
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many targets have their highest logit at the label: a scalar, int64. Local to the rank."""
    return (logits.argmax(dim=-1) == labels).sum()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token, in fp32.

    logits: (B, P + T, V) any float dtype, of which the first P are of virtual tokens and no targets; labels: (B, T) int64, already
    shifted: the token after each position; -100 where not a target.
    Returns (B, T) fp32, 0.0 where there is no target. Local to the rank: no collective.
    """
    losses = torch.nn.functional.cross_entropy(
        logits[:, -labels.shape[1] :].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)
