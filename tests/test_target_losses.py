"""Losses and metrics of one label, several labels and numbers: those of torch, transformers, scikit-learn and scipy."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import distributions
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from trainer.config import ClassificationData
from trainer.loss import (
    absolute_error_sum,
    classification_loss_sum,
    count_exact,
    multi_label_loss_sum,
    squared_error_sum,
)
from trainer.metrics import classification_metrics, f1_of_labels, multi_label_metrics, regression_metrics
from trainer.model.adapters import divergences, flat_logits
from trainer.progress import is_better
from trainer.task.targets import target_kind

RNG = np.random.default_rng(0)
LOGITS = torch.tensor(RNG.normal(size=(40, 4)), dtype=torch.float32)
LABELS = torch.tensor(RNG.integers(4, size=40))
VALUES = torch.tensor(RNG.integers(2, size=(40, 4)), dtype=torch.float32)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 7.0])
TARGETS = torch.zeros(40, dtype=torch.int64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_weighted_and_smoothed_cross_entropy_is_torchs_sum(weights: Any, smoothing: float) -> None:
    expected = functional.cross_entropy(LOGITS, LABELS, weights, reduction="sum", label_smoothing=smoothing)
    loss = classification_loss_sum(LOGITS, LABELS, weights=weights, smoothing=smoothing)
    assert torch.equal(loss, expected)
    padded = torch.cat([LABELS, torch.full((3,), -100)])
    with_padding = classification_loss_sum(
        torch.cat([LOGITS, LOGITS[:3]]), padded, weights=weights, smoothing=smoothing
    )
    torch.testing.assert_close(with_padding, expected)
    evaluated = classification_metrics(LOGITS, LABELS, weights=weights, smoothing=smoothing)["loss"]
    in_fp64 = functional.cross_entropy(
        LOGITS.double(),
        LABELS,
        None if weights is None else weights.double(),
        reduction="sum",
        label_smoothing=smoothing,
    )
    assert evaluated == pytest.approx(float(in_fp64) / 40, rel=1e-12)


def transformers_loss(kind: str, labels: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, float]:
    """(logits, loss) of transformers' own classification for a problem type."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=num_labels, problem_type=kind, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        outputs = model(
            input_ids=torch.arange(6).repeat(len(labels), 1) + torch.arange(len(labels))[:, None], labels=labels
        )
    return outputs.logits, float(outputs.loss)


def test_several_labels_have_transformers_loss() -> None:
    logits, loss = transformers_loss("multi_label_classification", VALUES[:8], 4)
    ours = multi_label_loss_sum(logits, VALUES[:8], TARGETS[:8])
    assert float(ours) / 8 == pytest.approx(loss, rel=1e-6)
    assert multi_label_metrics(logits, VALUES[:8])["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_number_has_transformers_loss() -> None:
    values = torch.linspace(-2, 3, 8)
    outputs, loss = transformers_loss("regression", values, 1)
    ours = squared_error_sum(outputs, values[:, None], TARGETS[:8])
    assert float(ours) / 8 == pytest.approx(loss, rel=1e-6)
    assert regression_metrics(outputs, values[:, None])["loss"] == pytest.approx(loss, rel=1e-6)


def test_weights_of_several_labels_are_torchs_pos_weight() -> None:
    expected = functional.binary_cross_entropy_with_logits(LOGITS, VALUES, pos_weight=WEIGHTS)
    assert float(multi_label_loss_sum(LOGITS, VALUES, TARGETS, weights=WEIGHTS)) / 40 == pytest.approx(float(expected))
    assert multi_label_metrics(LOGITS, VALUES, weights=WEIGHTS)["loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("target", ["multi", "regression"])
def test_what_is_no_target_has_no_loss_no_count_and_no_gradient(target: Any) -> None:
    kind = target_kind(ClassificationData(target=target), None)
    width = 4 if target == "multi" else 1
    logits = LOGITS[:5, :width].clone().requires_grad_()
    batch = {"labels": torch.tensor([0, -100, 0, 0, -100]), "values": VALUES[:5, :width]}
    kept = batch["labels"] == 0
    loss = kind.loss_sum(logits, batch)
    only = kind.loss_sum(logits[kept], {name: tensor[kept] for name, tensor in batch.items()})
    torch.testing.assert_close(loss, only)
    loss.backward()
    assert logits.grad is not None and not logits.grad[~kept].any() and logits.grad[kept].any()
    dummy = {"labels": torch.tensor([-100]), "values": VALUES[:1, :width]}
    assert float(kind.loss_sum(LOGITS[:1, :width], dummy)) == float(kind.count(LOGITS[:1, :width], dummy)) == 0


def test_counts_in_training_are_the_metrics_of_evaluation() -> None:
    exact = float(count_exact(LOGITS, VALUES, TARGETS)) / 40
    assert exact == pytest.approx(multi_label_metrics(LOGITS, VALUES)["accuracy"])
    errors = float(absolute_error_sum(LOGITS[:, :1], LOGITS[:, 1:2], TARGETS)) / 40
    assert errors == pytest.approx(regression_metrics(LOGITS[:, :1], LOGITS[:, 1:2])["mae"], rel=1e-6)


def test_metrics_of_several_labels_are_scikit_learns() -> None:
    logits = np.where(RNG.random((40, 4)) < 0.3, -1.0, 1.0) * (2 * VALUES.numpy() - 1)  # some rows are right
    predicted, true = torch.tensor(logits).sigmoid().numpy() > 0.5, VALUES.numpy().astype(int)
    metrics = multi_label_metrics(logits, VALUES)
    assert metrics["accuracy"] == sklearn_metrics.accuracy_score(true, predicted) and 0 < metrics["accuracy"] < 1
    assert metrics["f1"] == sklearn_metrics.f1_score(true, predicted, average="macro")
    assert metrics["micro_f1"] == sklearn_metrics.f1_score(true, predicted, average="micro")
    assert metrics["count"] == 40
    assert f1_of_labels(logits, VALUES).mean() == pytest.approx(metrics["f1"])


def test_a_label_that_is_neither_there_nor_predicted_counts_0() -> None:
    metrics = multi_label_metrics([[5.0, -5.0], [-5.0, -5.0]], [[1, 0], [0, 0]])
    assert (metrics["accuracy"], metrics["f1"], metrics["micro_f1"]) == (1.0, 0.5, 1.0)


def test_large_logits_do_not_overflow() -> None:
    assert multi_label_metrics([[1e4, -1e4]], [[1, 1]])["loss"] == pytest.approx(5e3)


def test_metrics_of_numbers_are_scikit_learns_and_scipys() -> None:
    true = RNG.integers(6, size=(50, 1)).astype(float)  # with ties
    said = np.round(true + RNG.normal(size=(50, 1)), 1)
    metrics = regression_metrics(said, true)
    assert metrics["loss"] == pytest.approx(sklearn_metrics.mean_squared_error(true, said), rel=1e-12)
    assert metrics["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(true, said), rel=1e-12)
    assert metrics["pearson"] == pytest.approx(stats.pearsonr(said[:, 0], true[:, 0]).statistic, rel=1e-12)
    assert metrics["spearman"] == pytest.approx(stats.spearmanr(said[:, 0], true[:, 0]).statistic, rel=1e-12)


def test_a_correlation_with_a_constant_is_nan_and_any_other_is_better() -> None:
    metrics = regression_metrics(np.ones((5, 1)), np.arange(5.0)[:, None])
    assert np.isnan(metrics["pearson"]) and np.isnan(metrics["spearman"]) and metrics["mae"] == 1.4
    assert is_better("pearson", -0.5, metrics["pearson"])


@pytest.mark.parametrize(("name", "falls"), [("loss", True), ("mae", True), ("pearson", False), ("micro_f1", False)])
def test_errors_improve_by_falling_and_the_rest_by_rising(name: str, falls: bool) -> None:
    assert is_better(name, 0.1, 0.2) is falls and is_better(name, 0.2, 0.1) is not falls


def test_a_merge_is_judged_by_the_divergence_that_fits_the_target() -> None:
    one, two = LOGITS[:, :3].double(), LOGITS[:, 1:].double()
    settings = BertConfig(num_labels=3)
    classes = distributions.kl_divergence(distributions.Categorical(logits=one), distributions.Categorical(logits=two))
    torch.testing.assert_close(divergences(flat_logits(one, settings), flat_logits(two, settings)), classes)
    settings.problem_type = "multi_label_classification"
    labels = distributions.kl_divergence(distributions.Bernoulli(logits=one), distributions.Bernoulli(logits=two))
    torch.testing.assert_close(divergences(flat_logits(one, settings), flat_logits(two, settings)), labels.flatten())
    numbers = distributions.kl_divergence(distributions.Normal(one[:, :1], 1.0), distributions.Normal(two[:, :1], 1.0))
    torch.testing.assert_close(divergences(one[:, :1], two[:, :1]), numbers[:, 0])
