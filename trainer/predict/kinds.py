"""What a classification model says of one text, by the target it was trained for: one label, several, or a number.

Below trainer/predict/classify.py. No torch. `columns` is a line on the screen, `facts` a JSON line, both without the text itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLD = 0.5
"""From this probability on one of several labels holds."""


@dataclass(frozen=True)
class Prediction:
    """One label."""

    label: str
    """The most probable label."""
    confidence: float
    """Its probability."""
    probabilities: dict[str, float]
    """Of every label; they sum to 1."""
    is_cut: bool
    """The text was longer than the model's max_length tokens and its end was not read."""

    def columns(self, width: int) -> str:
        """Label, padded to `width`, and confidence."""
        return f"{self.label:<{width}}  {self.confidence:.4f}"

    def facts(self) -> dict[str, Any]:
        """With the probability of every label."""
        return {"label": self.label, "confidence": self.confidence, "probabilities": self.probabilities}


@dataclass(frozen=True)
class LabelsPrediction:
    """Several labels."""

    labels: tuple[str, ...]
    """Those with a probability above 0.5, the most probable first."""
    probabilities: dict[str, float]
    """Of every label, each by itself."""
    is_cut: bool
    """As above."""

    def columns(self, width: int) -> str:
        """Each label with its probability; a dash where none holds. The width is not used: there is no telling how many there are."""
        return ", ".join(f"{label} {self.probabilities[label]:.4f}" for label in self.labels) or "-"

    def facts(self) -> dict[str, Any]:
        """With the probability of every label."""
        return {"labels": list(self.labels), "probabilities": self.probabilities}


@dataclass(frozen=True)
class NumberPrediction:
    """A number."""

    value: float
    """In the unit of the training labels."""
    is_cut: bool
    """As above."""

    def columns(self, width: int) -> str:
        """The value, right-aligned."""
        return f"{self.value:>{max(width, 10)}.4f}"

    def facts(self) -> dict[str, Any]:
        """The value."""
        return {"value": self.value}


AnyPrediction = Prediction | LabelsPrediction | NumberPrediction


def scores_of(logits: np.ndarray, target: str) -> np.ndarray:
    """(B, C) fp64 of logits (B, C): probabilities that sum to 1 (single), one by one (multi), or the value itself (regression)."""
    scores = logits.astype(np.float64)
    if target == "regression":
        return scores
    if target == "multi":
        return np.exp(-np.logaddexp(0, -scores))
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))


def prediction_of(scores: np.ndarray, names: Sequence[str], target: str, *, is_cut: bool) -> AnyPrediction:
    """What a row of scores (C,) says."""
    if target == "regression":
        return NumberPrediction(float(scores[0]), is_cut)
    by_name = dict(zip(names, map(float, scores), strict=True))
    best_first = [names[index] for index in np.argsort(-scores, kind="stable")]
    if target == "multi":
        return LabelsPrediction(tuple(name for name in best_first if by_name[name] > THRESHOLD), by_name, is_cut)
    return Prediction(best_first[0], by_name[best_first[0]], by_name, is_cut)
