"""Metrics of classes, by scikit-learn and over a whole split at once, and of generated texts, one by one.

Place in the flow: evaluation gathers the logits of every example, in order and each once, and hands them here. Pure: no
collective, no I/O, so every rank computes the same numbers. scikit-learn is imported at first use: it takes a second.
"""

import re
from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.batches import IGNORED


def classification_metrics(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Loss, accuracy, macro precision, recall and F1, and the number of examples that count.

    logits: (N, C) any float dtype; labels: (N,) class ids, -100 where the row does not count; at least one row must.
    The loss is the mean cross-entropy in fp64. Precision, recall and F1 are means over the classes that occur among
    labels or predictions; a class that is never predicted has precision 0. A row of NaN predicts its first NaN class
    and makes the loss NaN.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    scores, truth = _counted_rows(logits, labels)
    predicted = scores.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    return {
        "loss": cross_entropy(scores, truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "count": len(truth),
    }


def confusion(logits: ArrayLike, labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Counts of (label, prediction) as a (C, C) int64 matrix: rows are labels, columns predictions. Shapes as above."""
    from sklearn.metrics import confusion_matrix

    scores, truth = _counted_rows(logits, labels)
    matrix = confusion_matrix(truth, scores.argmax(axis=1), labels=np.arange(num_classes))
    return np.asarray(matrix, dtype=np.int64)


def cross_entropy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean of -log softmax(logits)[label]. logits: (N, C) fp64; labels: (N,), all counting."""
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp cannot overflow
    log_total = np.log(np.exp(shifted).sum(axis=1))
    return float((log_total - shifted[np.arange(len(labels)), labels]).mean())


def exact_match(answer: str, reference: str) -> float:
    """1 where the two are equal, else 0."""
    return float(answer == reference)


def rouge_1(answer: str, reference: str) -> float:
    """F1 of shared lower-case words (ROUGE-1, Lin 2004), each as often as both have it; 0 where one is empty."""
    return _shared_runs(answer, reference, 1)


def rouge_2(answer: str, reference: str) -> float:
    """The same of pairs of neighbouring words; 0 where one has fewer than two words."""
    return _shared_runs(answer, reference, 2)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words (ROUGE-L, Lin 2004); 0 where one is empty."""
    one, other = _words(answer), _words(reference)
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, with_word in enumerate(other, start=1):
            kept = lengths[place]
            lengths[place] = before + 1 if word == with_word else max(lengths[place], lengths[place - 1])
            before = kept
    common = lengths[-1]
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shared_runs(answer: str, reference: str, length: int) -> float:
    """F1 of the runs of `length` words that two texts share."""
    one, other = (
        Counter(zip(*(words[start:] for start in range(length)), strict=False))
        for words in (_words(answer), _words(reference))
    )
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def _counted_rows(logits: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    assert scores.ndim == 2, f"logits must be (N, C), not {scores.shape}"
    assert truth.shape == scores.shape[:1], f"{scores.shape} logits do not fit {truth.shape} labels"
    counts = truth != IGNORED
    assert counts.any(), "no example counts"
    return scores[counts], truth[counts]
