"""Metrics against by-hand numbers and torch's own cross-entropy."""

import numpy as np
import pytest
import torch

from trainer.metrics import classification_metrics, confusion

# Predictions of these logits: 0 0 1 1 2 0; labels: 0 0 1 2 2 1.
LOGITS = np.array([[3, 1, 0], [2, 1, 1], [0, 4, 1], [0, 2, 1], [1, 0, 5], [2, 1, 0]], dtype=np.float32)
LABELS = np.array([0, 0, 1, 2, 2, 1])


def test_metrics_are_the_macro_means_computed_by_hand():
    metrics = classification_metrics(LOGITS, LABELS)
    precision = [2 / 3, 1 / 2, 1]
    recall = [1, 1 / 2, 1 / 2]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["precision"] == pytest.approx(np.mean(precision))
    assert metrics["recall"] == pytest.approx(np.mean(recall))
    assert metrics["f1"] == pytest.approx(np.mean(f1))
    assert metrics["count"] == 6


def test_loss_is_torchs_mean_cross_entropy_in_fp64():
    expected = torch.nn.functional.cross_entropy(torch.tensor(LOGITS).double(), torch.tensor(LABELS)).item()
    assert classification_metrics(LOGITS, LABELS)["loss"] == pytest.approx(expected, rel=1e-14)


def test_loss_of_huge_logits_does_not_overflow():
    metrics = classification_metrics([[1e4, -1e4], [1e4, -1e4]], [0, 1])
    assert metrics["loss"] == pytest.approx(1e4)


def test_padding_labels_do_not_count():
    padded = classification_metrics(np.vstack([LOGITS, LOGITS[:2]]), [*LABELS, -100, -100])
    assert padded == classification_metrics(LOGITS, LABELS)


def test_class_that_is_never_predicted_has_precision_zero_and_no_warning(recwarn):
    metrics = classification_metrics([[2.0, 0.0], [2.0, 0.0]], [0, 1])
    assert metrics["precision"] == pytest.approx(0.25)
    assert not recwarn.list


def test_nan_logits_give_a_nan_loss_and_still_count():
    metrics = classification_metrics([[np.nan, 0.0], [0.0, 1.0]], [0, 1])
    assert np.isnan(metrics["loss"])
    assert metrics["count"] == 2


def test_every_metric_is_a_plain_number_that_json_takes():
    assert {type(value) for value in classification_metrics(LOGITS, LABELS).values()} <= {float, int}


def test_confusion_counts_labels_in_rows_and_predictions_in_columns():
    assert confusion(LOGITS, LABELS, 3).tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_confusion_has_a_row_for_a_class_that_never_occurs():
    matrix = confusion([[1.0, 0.0, 0.0, 0.0]], [0], 4)
    assert matrix.shape == (4, 4)
    assert matrix.sum() == 1
    assert matrix.dtype == np.int64
