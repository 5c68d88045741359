"""What classification predicts, by `data.target`: the loss, the metrics and the picture of each kind.

Below trainer/task/classification.py, which asks `target_kind` for one. Losses are sums over targets; the loop divides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.config import ClassificationData
from trainer.loss import (
    absolute_error_sum,
    classification_loss_sum,
    count_correct,
    count_exact,
    multi_label_loss_sum,
    soft_label_loss_sum,
    squared_error_sum,
)
from trainer.metrics import (
    classification_metrics,
    confusion,
    f1_of_labels,
    multi_label_metrics,
    regression_metrics,
)
from trainer.plots import plot_confusion
from trainer.task.pictures import plot_label_scores, plot_numbers
from trainer.task.protocol import Batch


class TargetKind(Protocol):
    """One kind of target."""

    @property
    def count_names(self) -> tuple[str, ...]:
        """What `count` counts."""

    @property
    def train_metric(self) -> str:
        """What the count by target is called in the log."""

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Of an evaluation, on the screen."""

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed over the targets of a micro-batch: a scalar, fp32. logits: (B, C)."""

    def count(self, logits: Tensor, batch: Batch) -> Tensor:
        """A scalar, summed over the targets of a micro-batch."""

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Of a whole split; the loss is that of training. logits: (N, C); labels: as `Split` has them."""

    def draw(self, folder: Path, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
        """Rank 0: the picture of a whole split."""


@dataclass(frozen=True)
class OneLabel:
    """Cross-entropy over classes."""

    weights: Tensor | None
    """(C,) fp32."""
    smoothing: float

    count_names, train_metric = ("correct",), "train/accuracy"
    shown_metrics = ("loss", "accuracy", "f1")

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.weights is None and not self.smoothing and "values" not in batch:
            return classification_loss_sum(logits, batch["labels"])
        weights = None if self.weights is None else self.weights.to(logits.device)
        if "values" in batch:  # blended samples, see trainer/task/varied.py
            return soft_label_loss_sum(
                logits, batch["values"], batch["labels"], weights=weights, smoothing=self.smoothing
            )
        return classification_loss_sum(logits, batch["labels"], weights=weights, smoothing=self.smoothing)

    def count(self, logits: Tensor, batch: Batch) -> Tensor:
        return count_correct(logits, batch["labels"])

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        weights = None if self.weights is None else self.weights.double().numpy()
        return classification_metrics(logits, labels, weights=weights, smoothing=self.smoothing)

    def draw(self, folder: Path, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
        plot_confusion(confusion(logits, labels, len(names)), names, folder / "confusion.png")


@dataclass(frozen=True)
class ManyLabels:
    """Binary cross-entropy of each label; one holds from probability 0.5 on."""

    weights: Tensor | None
    """(C,) fp32, of the labels that hold."""

    count_names, train_metric = ("exact",), "train/accuracy"
    shown_metrics = ("loss", "accuracy", "f1", "micro_f1")

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits.device)
        return multi_label_loss_sum(logits, batch["values"], batch["labels"], weights=weights)

    def count(self, logits: Tensor, batch: Batch) -> Tensor:
        return count_exact(logits, batch["values"], batch["labels"])

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        weights = None if self.weights is None else self.weights.double().numpy()
        return multi_label_metrics(logits, labels, weights=weights)

    def draw(self, folder: Path, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
        plot_label_scores(f1_of_labels(logits, labels), labels.sum(axis=0), names, folder / "labels.png")


@dataclass(frozen=True)
class Number:
    """Squared error of one output."""

    count_names, train_metric = ("absolute_error",), "train/mae"
    shown_metrics = ("loss", "mae", "pearson", "spearman")

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        return squared_error_sum(logits, batch["values"], batch["labels"])

    def count(self, logits: Tensor, batch: Batch) -> Tensor:
        return absolute_error_sum(logits, batch["values"], batch["labels"])

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return regression_metrics(logits, labels)

    def draw(self, folder: Path, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
        plot_numbers(logits[:, 0], labels[:, 0], names[0], folder / "numbers.png")


def target_kind(data: ClassificationData, class_weights: np.ndarray | None) -> TargetKind:
    """The kind that `data.target` names. class_weights: (C,)."""
    weights = None if class_weights is None else torch.from_numpy(class_weights.astype(np.float32))
    if data.target == "regression":
        return Number()
    return OneLabel(weights, data.label_smoothing) if data.target == "single" else ManyLabels(weights)
