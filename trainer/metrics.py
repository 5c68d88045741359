"""Metrics of classes, by scikit-learn and over a whole split at once, and of generated texts, one by one.

Place in the flow: evaluation gathers the logits of every example, in order and each once, and hands them here. Pure: no
collective, no I/O, so every rank computes the same numbers. scikit-learn is imported at first use: it takes a second.
"""

import re
from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.batches import IGNORED


def classification_metrics(
    logits: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None, smoothing: float = 0.0
) -> dict[str, float]:
    """Loss, accuracy, macro precision, recall and F1, and the number of examples that count.

    logits: (N, C) any float dtype; labels: (N,) class ids, -100 where the row does not count; at least one row must.
    weights: (C,), smoothing: those of training. The loss is the mean cross-entropy in fp64. Precision, recall and F1 are means
    over the classes that occur among labels or predictions; a class that is never predicted has precision 0. A row of NaN
    predicts its first NaN class and makes the loss NaN.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    scores, truth = _counted_rows(logits, labels)
    predicted = scores.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    return {
        "loss": cross_entropy(scores, truth, weights=weights, smoothing=smoothing),
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


def cross_entropy(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    weights: ArrayLike | None = None,
    smoothing: float = 0.0,
) -> float:
    """Mean of -log softmax(logits)[label], each times the weight of its class; the divisor is N.

    logits: (N, C) fp64; labels: (N,), all counting; weights: (C,). smoothing: the share of a target that is spread over all classes.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp cannot overflow
    losses = np.log(np.exp(shifted).sum(axis=1, keepdims=True)) - shifted
    if weights is not None:
        losses = losses * np.asarray(weights)
    of_labels = losses[np.arange(len(labels)), labels]
    return float(((1 - smoothing) * of_labels + smoothing * losses.mean(axis=1) if smoothing else of_labels).mean())


def multi_label_metrics(logits: ArrayLike, values: ArrayLike, *, weights: ArrayLike | None = None) -> dict[str, float]:
    """Loss, subset accuracy (all labels of an example right), macro and micro F1 at probability 0.5, and the number of examples.

    logits: (N, C) any float dtype; values: (N, C) of 0 and 1; weights: (C,) of the labels that hold. The loss is the mean binary
    cross-entropy in fp64. Macro F1 is the mean over all labels; one that is neither there nor predicted counts 0.
    """
    from sklearn.metrics import accuracy_score, f1_score

    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(values, dtype=np.float64)
    assert scores.shape == truth.shape, f"{scores.shape} logits do not fit {truth.shape} values"
    positive = np.logaddexp(0, -scores) * truth * (1.0 if weights is None else np.asarray(weights))
    predicted, expected = (scores > 0).astype(np.int64), truth.astype(np.int64)
    return {
        "loss": float((positive + np.logaddexp(0, scores) * (1 - truth)).mean()),
        "accuracy": float(accuracy_score(expected, predicted)),
        "f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "micro_f1": float(f1_score(expected, predicted, average="micro", zero_division=0)),
        "count": len(truth),
    }


def f1_of_labels(logits: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """(C,) F1 of each label at probability 0.5. Shapes as above."""
    from sklearn.metrics import f1_score

    predicted, expected = np.asarray(logits) > 0, np.asarray(values) > 0.5
    return np.asarray(f1_score(expected, predicted, average=None, zero_division=0))


def regression_metrics(outputs: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """Loss (mean squared error), mean absolute error, Pearson's and Spearman's correlation, and the number of examples, in fp64.

    outputs, values: (N, 1). A correlation is NaN where one of the two is constant.
    """
    said, true = (np.asarray(numbers, dtype=np.float64)[:, 0] for numbers in (outputs, values))
    return {
        "loss": float(np.square(said - true).mean()),
        "mae": float(np.abs(said - true).mean()),
        "pearson": correlation(said, true),
        "spearman": correlation(ranks(said), ranks(true)),
        "count": len(true),
    }


def correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Pearson's correlation of two (N,) arrays; NaN where one of them is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) the rank of each value from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[places])


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
