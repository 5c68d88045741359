"""`samestep data show RECIPE K --augment`: a training sentence before and after each kind of augmentation, epoch by epoch."""

from collections.abc import Iterator

import numpy as np

from trainer.config import ClassificationData, RunConfig, Target
from trainer.config.augment import MODEL_KINDS, WORD_KINDS
from trainer.data.augment import Augmenter, number_batch
from trainer.data.batches import GlobalBatches
from trainer.data.classify import RawSplits, read_splits
from trainer.errors import ConfigError

EPOCHS = 3
"""Shown, from the first."""


def show_augmented(config: RunConfig, sample: int) -> None:
    """Print training sample `sample` by each kind of data.augment.kinds, or where none is set by those that need no model."""
    data = config.data
    if not isinstance(data, ClassificationData):
        raise ConfigError(f"--augment: data.kind={data.kind} has no augmentation; give a recipe of kind classification")
    raw = read_splits(data)
    if sample >= len(raw.train):
        raise ConfigError(f"K ({sample}) must be below {len(raw.train):,}, the number of training samples")
    from trainer.model.rewrite import build_augmenter

    kinds = data.augment.kinds or WORD_KINDS
    augmenter = build_augmenter(data.augment.model_copy(update={"kinds": kinds}), raw.train, config.train.seed)
    print(f"training sample {sample:,} of {config.name}: {label_words(raw, sample, data.target)}")
    print(f"{'before':<18}{joined(augmenter.original(sample))}")
    for line in forms(augmenter, sample):
        print(line)
    for epoch in range(EPOCHS) if augmenter.settings.mixes else ():
        print(f"{f'mixup, epoch {epoch}':<18}{blend_words(config, augmenter, sample, epoch)}")


def label_words(raw: RawSplits, sample: int, target: Target) -> str:
    """The label of a training sample, its labels, or its number."""
    label = raw.train.labels[sample]
    if target == "single":
        return str(raw.label_names[label])
    if target == "regression":
        return f"{label[0]:g}"
    return ", ".join(name for name, holds in zip(raw.label_names, label, strict=True) if holds) or "no label"


def forms(augmenter: Augmenter, sample: int) -> Iterator[str]:
    """A line for each kind and epoch; what models wrote is the same in every epoch."""
    for kind in augmenter.settings.text_kinds:
        for epoch in range(1 if kind in MODEL_KINDS else EPOCHS):
            title = kind if kind in MODEL_KINDS else f"{kind}, epoch {epoch}"
            yield f"{title:<18}{joined(augmenter.by_kind(kind, epoch, sample))}"


def blend_words(config: RunConfig, augmenter: Augmenter, sample: int, epoch: int) -> str:
    """Both sentences of a blend, in their form of this epoch, and their shares."""
    from trainer.data.tokens import tokenize
    from trainer.model.load import load_tokenizer

    assert isinstance(config.data, ClassificationData)
    train, tokenizer = config.train, load_tokenizer(config.model)
    lengths = tokenize(augmenter.samples, tokenizer, config.data.max_length).split.lengths
    batches = GlobalBatches(lengths, train.global_batch_size, train.seed, group_by_length=config.data.group_by_length)
    for step in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
        numbers = number_batch(augmenter, batches.at(step), step, epoch=epoch)
        _, partners, samples = augmenter.places(numbers)
        for place in np.flatnonzero(samples == sample):
            share = augmenter.shares(numbers[place : place + 1])[0]
            own, other = (joined(augmenter.texts_at(epoch, int(ids[place]))) for ids in (samples, partners))
            return f"{share:.3f} x {own!r} + {1 - share:.3f} x {other!r}"
    raise AssertionError("an epoch holds every sample")


def joined(texts: tuple[str, ...]) -> str:
    """A text, or both of a pair."""
    return " | ".join(texts)
