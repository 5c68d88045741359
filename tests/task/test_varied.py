"""Augmented batches: a function of the samples' numbers, for any share of a global batch; training data alone is changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import Augmentation, ClassificationData, ModelConfig, RunConfig, TrainConfig
from trainer.config.augment import AugmentKind
from trainer.data.classify import read_splits
from trainer.task.classification import ClassificationTask, build
from trainer.task.targets import OneLabel
from trainer.task.varied import blended_values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("varied")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=60)
    (folder / "synonyms.tsv").write_text("film\tstory\nstory\tmusic\nlong\tshort\n", encoding="utf-8")
    return folder


def make(root: Path, *kinds: AugmentKind, probability: float = 1.0, **settings: Any) -> ClassificationTask:
    augment = Augmentation(
        kinds=kinds, probability=probability, fraction=0.3, synonyms=str(root / "synonyms.tsv"), **settings
    )
    data = ClassificationData(source=str(root / "data.csv"), augment=augment)
    train = TrainConfig(num_epochs=2, global_batch_size=8)
    config = RunConfig(name="varied", model=ModelConfig(source=str(root / "model")), data=data, train=train)
    return build(config, Accelerator(cpu=True))


def test_a_batch_holds_the_tokens_of_the_changed_texts(root: Path) -> None:
    task = make(root, "delete", "swap", "insert", "synonyms")
    assert task.varied is not None
    for step in (0, task.steps_per_epoch + 2):
        numbers = task.global_batch(step)
        taken = task.varied.augmenter.taken(numbers)
        expected = task.tokenizer(taken.texts, padding=True, return_tensors="pt")
        batch = task.training_batch(numbers)
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        assert batch["labels"].tolist() == task.data.train.labels[task.batches.at(step)].tolist()
        plain = task.data.collate(task.data.train, task.batches.at(step))
        assert batch["input_ids"].tolist() != plain["input_ids"].tolist()


def test_a_share_of_the_global_batch_holds_the_same_samples(root: Path) -> None:
    numbers = (task := make(root, "delete", "mixup")).global_batch(8)
    whole = task.training_batch(numbers)
    for start, end in ((0, 3), (3, 8), (7, 8)):
        part = task.training_batch(numbers[start:end])
        assert set(part) == set(whole)
        for name, tensor in part.items():
            same = whole[name][start:end]
            assert torch.equal(tensor, same[:, : tensor.shape[1]] if tensor.ndim == 2 else same), name


def test_a_blend_holds_both_texts_and_attends_where_either_has_a_token(root: Path) -> None:
    task = make(root, "mixup")
    assert task.varied is not None
    numbers = task.global_batch(0)
    _, partners, samples = task.varied.augmenter.places(numbers)
    batch, split = task.training_batch(numbers), task.data.train
    for row, (own, other) in enumerate(zip(samples, partners, strict=True)):
        lengths = split.lengths[[own, other]]
        for name, number, length in (("input_ids", own, lengths[0]), ("mix_ids", other, lengths[1])):
            tokens = split.tokens[split.offsets[number] : split.offsets[number + 1]].tolist()
            assert batch[name][row].tolist() == tokens + [0] * (batch[name].shape[1] - length)
        assert batch["attention_mask"][row].sum() == lengths.max()
        share, expected = float(batch["mix_share"][row]), np.zeros(2)
        expected[split.labels[own]] += share
        expected[split.labels[other]] += 1 - share
        assert batch["values"][row].tolist() == pytest.approx(expected.tolist())
    assert batch["labels"].tolist() == split.labels[samples].tolist()
    assert ((batch["mix_share"] >= 0.5) & (batch["mix_share"] <= 1)).all()
    assert set(task.model_inputs(batch)) == {"input_ids", "attention_mask", "mix_ids", "mix_share"}


def test_no_numbers_make_a_dummy_that_is_no_target(root: Path) -> None:
    task = make(root, "delete", "mixup")
    batch, real = task.training_batch(np.array([], np.int64)), task.training_batch(task.global_batch(0))
    assert batch["labels"].tolist() == [-100] and set(batch) == set(real)
    logits = torch.randn(1, 2, requires_grad=True)
    loss = OneLabel(None, 0.1).loss_sum(logits, batch)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_the_loss_is_the_share_of_each_labels_loss(weights: torch.Tensor | None, smoothing: float) -> None:
    logits, share = torch.randn(4, 3), torch.tensor([0.5, 0.9, 1.0, 0.7])
    labels, others = torch.tensor([0, 2, 1, -100]), torch.tensor([1, 2, 0, 0])
    own, other = (
        torch.nn.functional.cross_entropy(logits[:3], ids[:3], weights, reduction="none", label_smoothing=smoothing)
        for ids in (labels, others)
    )
    values = blended_values({"labels": labels}, {"labels": others}, share, 3)
    found = OneLabel(weights, smoothing).loss_sum(logits, {"labels": labels, "values": values})
    torch.testing.assert_close(found, (share[:3] * own + (1 - share[:3]) * other).sum())


def test_numbers_and_several_labels_are_blended_too() -> None:
    share = torch.tensor([0.75, 0.5])
    own, others = {"values": torch.tensor([[4.0], [1.0]])}, {"values": torch.tensor([[8.0], [3.0]])}
    assert blended_values(own, others, share, 1).tolist() == [[5.0], [2.0]]


def test_only_training_data_is_changed_and_its_order_is_not(root: Path) -> None:
    plain, task = make(root), make(root, "delete", "mixup")
    assert plain.varied is None
    for name in ("validation", "test"):
        assert task.split(name).tokens.tolist() == plain.split(name).tokens.tolist()
    assert task.varied is not None
    texts = read_splits(plain.config.data).train.texts  # type: ignore[arg-type]
    assert task.varied.augmenter.samples.texts == texts
    for step in range(2 * plain.steps_per_epoch):
        _, _, samples = task.varied.augmenter.places(task.global_batch(step))
        assert samples.tolist() == plain.global_batch(step).tolist()


def test_a_checkpoint_of_other_synonyms_is_of_other_data(root: Path) -> None:
    first, plain = make(root, "synonyms").identity()["data"], make(root).identity()["data"]
    (root / "synonyms.tsv").write_text("film\tstory\n", encoding="utf-8")
    assert len({first, plain, make(root, "synonyms").identity()["data"]}) == 3
