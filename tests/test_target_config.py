"""Settings of head and target that do not go together: each is refused before a model loads, with the fix."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.resolve.cases import problems_of
from trainer.config import ClassificationData, ModelConfig, RunConfig, TrainConfig


def of_data(**data: Any) -> dict[str, Any]:
    return {"data": ClassificationData(**data)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data.target=regression", "data.label_smoothing=0.1"],
            "label_smoothing (0.1) spreads one target over all classes, which target=regression has not; set data.label_smoothing=0",
        ),
        (
            ["data.target=multi", "data.label_smoothing=0.1"],
            "label_smoothing (0.1) spreads one target over all classes, which target=multi has not; set data.label_smoothing=0",
        ),
        (
            ["data.target=regression", "data.class_weights=balanced"],
            "class_weights (balanced) is of classes, and target=regression has none; set data.class_weights=none",
        ),
        (
            ["data.target=regression", "data.labels=a,b"],
            "labels (a, b) is of classes, and target=regression has none; set data.labels=none",
        ),
        (
            ["data.labels=a,b", "data.class_weights=1,2,3"],
            "class_weights (1, 2, 3) must be one for each of the 2 labels: a, b; give 2 numbers in this order, or balanced",
        ),
        (
            ["data.target=regression", "train.metric=f1"],
            "train.metric (f1) must be one of loss, mae, pearson, spearman for data.target=regression",
        ),
        (
            ["data.target=multi", "train.metric=precision"],
            "train.metric (precision) must be one of loss, f1, micro_f1, accuracy for data.target=multi",
        ),
        (
            ["train.metric=mae"],
            "train.metric (mae) must be one of loss, accuracy, precision, recall, f1 for model.task=classification",
        ),
        (
            ["model.head_layers=2"],
            "head_layers (2) has no effect on the architecture's own head; set model.pooling=first or mean, or model.head_layers=none",
        ),
        (
            ["method.name=prefix", "model.pooling=mean"],
            "model.pooling (mean) reads the tokens of the text, and method.name=prefix puts virtual tokens before them; set "
            "model.pooling=model, or method.name=lora",
        ),
        (["model.head_layers=3"], "model.head_layers (3) on the command line: must be one of 1, 2 or none"),
        (
            ["data.class_weights=balence"],
            "data.class_weights (balence) on the command line: must be balanced or a list",
        ),
        (["data.class_weights=1,-1"], "class_weights (-1) must not be below 0; give factors such as 0.5,2"),
        (["data.label_separator=;"], "has no effect unless data.target=multi"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(arguments: list[str], message: str) -> None:
    assert any(message in problem for problem in problems_of(*arguments)), problems_of(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pooling": "mean"},
            "pooling (mean) is of the head of model.task=classification, not of clm; set model.pooling=model",
        ),
        (
            {"head_layers": 1},
            "head_layers (1) has no effect on the architecture's own head; set model.head_layers=none",
        ),
    ],
)
def test_a_head_is_of_classification_alone(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig(task="clm", **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "metric", "watched"),
    [
        ({}, None, "accuracy"),
        ({"target": "multi"}, None, "f1"),
        ({"target": "multi"}, "micro_f1", "micro_f1"),
        ({"target": "regression"}, None, "loss"),
        ({"target": "regression"}, "spearman", "spearman"),
        ({"class_weights": (1.0, 2.0)}, "f1", "f1"),
    ],
)
def test_the_watched_metric_is_the_setting_or_the_targets_usual_one(
    data: dict[str, Any], metric: Any, watched: str
) -> None:
    config = RunConfig(name="t", train=TrainConfig(num_epochs=1, metric=metric), **of_data(**data))
    assert config.watched_metric == watched
