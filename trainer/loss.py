"""Losses as sums over targets, so that the loop alone decides what they are divided by."""

import torch
from torch import Tensor

from trainer.data.batches import IGNORED


def classification_loss_sum(
    logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy summed over targets, in fp32, each times the weight of its class.

    logits: (B, C) any float dtype; labels: (B,) int64, -100 where not a target; weights: (C,) fp32. smoothing: the share of a target
    that is spread over all classes, each with its own weight, as torch does.
    Returns a scalar, 0.0 without targets. Local to the rank: no collective.
    """
    return torch.nn.functional.cross_entropy(
        logits.float(), labels, weights, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )


def soft_label_loss_sum(
    logits: Tensor, values: Tensor, labels: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """The same for targets that are shared among classes. values: (B, C) fp32, each class's share; labels: (B,) int64, -100 where not a
    target."""
    kept = labels != IGNORED
    return torch.nn.functional.cross_entropy(
        logits[kept].float(), values[kept], weights, reduction="sum", label_smoothing=smoothing
    )


def multi_label_loss_sum(logits: Tensor, values: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, averaged over labels and summed over targets, in fp32.

    logits: (B, C) any float dtype; values: (B, C) fp32 of 0 and 1; labels: (B,) int64, -100 where not a target; weights: (C,) fp32 of
    the labels that hold. Returns a scalar, 0.0 without targets. Local to the rank: no collective.
    """
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.float(), values, pos_weight=weights, reduction="none"
    )
    return torch.where(labels != IGNORED, losses.mean(dim=1), 0.0).sum()


def squared_error_sum(outputs: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """Squared differences summed over targets, in fp32.

    outputs: (B, 1) any float dtype; values: (B, 1) fp32; labels: (B,) int64, -100 where not a target.
    Returns a scalar, 0.0 without targets. Local to the rank: no collective.
    """
    return torch.where(labels != IGNORED, (outputs.float() - values).square().squeeze(1), 0.0).sum()


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many targets have their highest logit at the label: a scalar, int64. Local to the rank."""
    return (logits.argmax(dim=-1) == labels).sum()


def count_exact(logits: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """How many targets have all of their labels right, at probability 0.5: a scalar, int64. Shapes as above. Local to the rank."""
    right = ((logits > 0) == (values > 0.5)).all(dim=1)
    return (right & (labels != IGNORED)).sum()


def absolute_error_sum(outputs: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """Absolute differences summed over targets: a scalar, fp32. Shapes as above. Local to the rank."""
    return torch.where(labels != IGNORED, (outputs.float() - values).abs().squeeze(1), 0.0).sum()


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


def count_targets(batch: dict[str, Tensor]) -> int:
    """Examples or tokens of a CPU batch that count in the loss."""
    return int((batch["labels"] != IGNORED).sum())
