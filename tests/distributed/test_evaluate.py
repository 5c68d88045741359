"""Evaluation counts each example once, under any number of ranks, and gives the numbers of scikit-learn on the whole split."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator
from trainer.config import FullConfig, RunConfig, TrainConfig
from trainer.data.classify import ClassificationSet, Split
from trainer.evaluate import evaluate_logits
from trainer.loop import Trainer
from trainer.task.classification import ClassificationTask

NUM_EXAMPLES, NUM_CLASSES, PAD = 1511, 3, 0  # 1511 is prime: no number of ranks or batch size divides it
METRICS = {"loss", "accuracy", "precision", "recall", "f1", "count"}
RUNS = [("single", 1), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("zero3", 2)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle's tiny matrices on more threads than there are free cores take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model() -> torch.nn.Module:
    """With the usual dropout, which evaluation must turn off, and weights large enough for varied predictions."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=NUM_CLASSES, initializer_range=0.5, pad_token_id=PAD,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@cache
def examples(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of `count` examples of 3 to 12 tokens, and their labels, rarer by class."""
    rng = np.random.default_rng(count)
    texts = [rng.integers(1, 50, int(length)) for length in rng.integers(3, 13, count)]
    return texts, rng.choice(NUM_CLASSES, count, p=[0.6, 0.3, 0.1])


def split_of(count: int) -> Split:
    texts, labels = examples(count)
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return Split(np.concatenate(texts).astype(np.int32), offsets, None, labels.astype(np.int64))


def measure(counts: tuple[int, ...], eval_batch_size: int) -> dict[str, Any]:
    """Metrics and logits of splits of these sizes through a Trainer; runs on every rank."""
    train = TrainConfig(max_steps=1, global_batch_size=12, eval_batch_size=eval_batch_size)
    config = RunConfig(name="t", method=FullConfig(), train=train)
    accelerator = build_accelerator(config)
    splits = {count: split_of(count) for count in counts}
    first = splits[counts[0]]
    data = ClassificationSet(first, first, None, ("a", "b", "c"), tokenizer=None, pad_token_id=PAD)  # type: ignore[arg-type]
    trainer = Trainer(config, accelerator, model(), ClassificationTask(config, data))
    metrics = {}
    for count, split in splits.items():
        trainer.task = ClassificationTask(config, replace(data, validation=split))
        metrics[count] = trainer.evaluate()
    training = trainer.engine.model.training
    trainer.engine.model.eval()
    logits = evaluate_logits(trainer.engine.forward, data, first, trainer.engine, batch_size=eval_batch_size)
    return {"metrics": metrics, "logits": logits, "training": training}


@cache
def oracle_logits(count: int) -> np.ndarray:
    """Plain transformers, one call for all examples of one length, so that nothing is padded."""
    texts, _ = examples(count)
    plain = model().eval()
    lengths = np.array([len(text) for text in texts])
    logits = np.zeros((count, NUM_CLASSES))
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        with torch.no_grad():
            logits[rows] = plain(torch.tensor(np.stack([texts[row] for row in rows]))).logits.double().numpy()
    return logits


def oracle_metrics(count: int) -> dict[str, float]:
    """scikit-learn over the whole split."""
    logits, (_, labels) = oracle_logits(count), examples(count)
    predicted = logits.argmax(axis=1)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    return {
        "loss": sklearn.metrics.log_loss(labels, probabilities, labels=range(NUM_CLASSES)),
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "precision": sklearn.metrics.precision_score(labels, predicted, **macro),
        "recall": sklearn.metrics.recall_score(labels, predicted, **macro),
        "f1": sklearn.metrics.f1_score(labels, predicted, **macro),
        "count": count,
    }


def assert_same_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == METRICS
    assert found["count"] == expected["count"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name in METRICS - {"loss", "count"}:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name


def test_the_oracle_has_no_ties_and_predicts_every_class() -> None:
    logits = np.sort(oracle_logits(NUM_EXAMPLES), axis=1)
    assert (logits[:, -1] - logits[:, -2]).min() > 1e-5  # rounding cannot change a prediction
    assert len(set(oracle_logits(NUM_EXAMPLES).argmax(axis=1))) == NUM_CLASSES


@pytest.mark.parametrize(("backend", "world_size"), RUNS)
def test_1511_examples_count_1511_and_give_the_metrics_of_scikit_learn(backend: str, world_size: int) -> None:
    results = run_ranks(measure, backend, world_size, args=((NUM_EXAMPLES, 1, 4), 64))
    for result in results:  # the same on every rank
        for count in (NUM_EXAMPLES, 1, 4):  # fewer than ranks, and a last batch that leaves ranks without a share
            assert_same_metrics(result["metrics"][count], oracle_metrics(count))
        assert np.allclose(result["logits"], oracle_logits(NUM_EXAMPLES), rtol=0, atol=1e-5)  # in the split's order
        assert result["training"]  # dropout is back on


def test_metrics_do_not_depend_on_the_evaluation_batch_size() -> None:
    for batch_size in (7, 2000):
        for result in run_ranks(measure, "ddp", 2, args=((NUM_EXAMPLES,), batch_size)):
            assert_same_metrics(result["metrics"][NUM_EXAMPLES], oracle_metrics(NUM_EXAMPLES))
