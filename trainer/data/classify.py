"""Sentences with labels: read, checked, split, tokenized. Every rank reads the same data and arrives at the same splits.

`read_splits` needs neither torch nor a tokenizer, so that mistakes in the data are found before anything is launched.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import ClassificationData, ModelConfig, RunConfig
from trainer.data.batches import Ids, epoch_batches
from trainer.data.labels import Examples, read_examples, stratified_split
from trainer.data.tables import describe_source, is_file_source, read_table
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class RawSplits:
    """Texts and class ids of each split, before tokenizing. `notes`: dropped rows, for the screen."""

    train: Examples
    validation: Examples
    test: Examples | None
    label_names: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Tokenized examples in flat arrays.

    tokens: int32, all examples one after another; offsets: int64 (N+1,); token_types: int8 like tokens, or None;
    labels: int64 (N,).
    """

    tokens: NDArray[np.int32]
    offsets: Ids
    token_types: NDArray[np.int8] | None
    labels: Ids

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Ids:
        """Tokens per example, (N,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class ClassificationSet:
    """What the loop reads: splits, label names, and how examples become a batch."""

    train: Split
    validation: Split
    test: Split | None
    label_names: tuple[str, ...]
    tokenizer: Any
    pad_token_id: int = 0

    def collate(self, split: Split, ids: Ids) -> "dict[str, Tensor]":
        """A batch of CPU tensors, padded on the right to its longest example.

        input_ids, attention_mask and (where the tokenizer makes them) token_type_ids: (B, T) int64; labels: (B,) int64.
        Without ids: one dummy example, the split's first, whose label is -100, so that ranks make equally many forward passes.
        """
        import torch

        chosen = ids if len(ids) else np.zeros(1, np.int64)
        lengths = split.lengths[chosen]
        columns = np.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        source = np.where(mask, split.offsets[chosen][:, None] + columns, 0)
        batch = {"input_ids": np.where(mask, split.tokens[source], self.pad_token_id), "attention_mask": mask}
        if split.token_types is not None:
            batch["token_type_ids"] = np.where(mask, split.token_types[source], 0)
        batch["labels"] = split.labels[chosen] if len(ids) else np.full(1, IGNORED)
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


def read_splits(config: ClassificationData) -> RawSplits:
    """Read, check and split. DataError names file, line, rule and fix."""
    notes: list[str] = []
    table = read_table(config.source, subset=config.subset)
    names = config.labels
    whole, names = read_examples(table, config, names, notes)
    parts = {name: named_split(config, name, names, notes) for name in ("validation", "test")}
    fractions = [
        config.validation_fraction * (parts["validation"] is None),
        config.test_fraction * (parts["test"] is None),
    ]
    train, cut_validation, cut_test = stratified_split(whole, names, fractions, config.split_seed, config.source)
    return RawSplits(
        train=train,
        validation=parts["validation"] or cut_validation,
        test=parts["test"] or (cut_test if len(cut_test) else None),
        label_names=names,
        notes=tuple(notes),
    )


def named_split(config: ClassificationData, field: str, names: tuple[str, ...], notes: list[str]) -> Examples | None:
    """The split that `data.validation` or `data.test` names: a file, or a split of the hub dataset; None where it names none."""
    source = getattr(config, field)
    if source is None:
        return None
    if is_file_source(source) or is_file_source(config.source) or config.source.startswith("asset:"):
        table = read_table(source) if is_file_source(source) else None
        if table is None:
            raise DataError(
                f"data.{field} ({source}) is no file; only a hub dataset has named splits, and data.source is {config.source}"
            )
    else:
        table = read_table(config.source, subset=config.subset, split=source)
    return read_examples(table, config, names, notes)[0]


def build_data(config: RunConfig, accelerator: "Accelerator") -> ClassificationSet:
    """Read and tokenize the data and print what it is. Every rank calls it; rank 0 prints."""
    from trainer.model.load import load_tokenizer

    raw = read_splits(config.data)
    tokenizer = load_tokenizer(config.model)
    pad_token_id = padding_token(tokenizer, config.model)
    check_max_length(config.data.max_length, tokenizer)
    splits = [
        None if part is None else tokenize(part, tokenizer, config.data.max_length)
        for part in (raw.train, raw.validation, raw.test)
    ]
    train, validation, test = (None if pair is None else pair[0] for pair in splits)
    assert train is not None and validation is not None and splits[0] is not None
    data = ClassificationSet(train, validation, test, raw.label_names, tokenizer, pad_token_id)
    accelerator.print(describe(config, data, raw.notes, num_cut=splits[0][1]))
    return data


def padding_token(tokenizer: Any, model: ModelConfig) -> int:
    """The id that fills short examples; models without one (GPT-2) pad with the end token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        f"model.source ({model.source}): the tokenizer has neither a padding nor an end token; use another tokenizer"
    )


def check_max_length(max_length: int, tokenizer: Any) -> None:
    """ConfigError where texts may become longer than the model can read."""
    limit = tokenizer.model_max_length
    if limit < 10**6 and max_length > limit:
        raise ConfigError(
            f"data.max_length ({max_length}) must be at most the tokenizer's limit ({limit}); set data.max_length={limit}"
        )


def tokenize(examples: Examples, tokenizer: Any, max_length: int) -> tuple[Split, int]:
    """The examples as a Split, and how many of them were cut to `max_length` tokens."""
    encoded = encode(tokenizer, examples.texts, examples.pairs, truncation=True, max_length=max_length)
    ids = encoded["input_ids"]
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    full = np.flatnonzero(lengths >= max_length)
    pairs = [examples.pairs[i] for i in full] if examples.pairs else None
    whole = encode(tokenizer, [examples.texts[i] for i in full], pairs)["input_ids"] if len(full) else []
    num_cut = sum(len(tokens) > max_length for tokens in whole)
    types = encoded.get("token_type_ids")
    split = Split(
        tokens=np.fromiter((t for tokens in ids for t in tokens), np.int32, int(lengths.sum())),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_types=None
        if types is None
        else np.fromiter((t for row in types for t in row), np.int8, int(lengths.sum())),
        labels=examples.labels,
    )
    return split, num_cut


def encode(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any) -> Any:
    """One batched call of the tokenizer, without padding; `verbose` off, since too long texts are counted here."""
    return tokenizer(list(texts), None if pairs is None else list(pairs), padding=False, verbose=False, **options)


def describe(config: RunConfig, data: ClassificationSet, notes: Sequence[str], *, num_cut: int) -> str:
    """What the data is, for the screen before training."""
    batch_size, lengths = config.train.global_batch_size, data.train.lengths
    batches = epoch_batches(lengths, batch_size, config.train.seed, 0, group_by_length=config.data.group_by_length)
    padded = sum(len(ids) * int(lengths[ids].max()) for ids in batches)
    lines = [
        f"data       {config.data.source} ({describe_source(config.data.source)})",
        *(f"           {note}" for note in notes),
    ]
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if split is not None:
            counts = Counter(split.labels.tolist())
            shares = "  ".join(f"{label} {counts[i]:,}" for i, label in enumerate(data.label_names))
            lines.append(f"{name:<10} {len(split):,} samples: {shares}")
    lines.append(f"batches    {len(batches):,} of {batch_size} per epoch, {1 - lengths.sum() / padded:.1%} padding")
    lines.append(
        f"tokens     mean {lengths.mean():.1f}, p95 {np.percentile(lengths, 95):.0f}, max {lengths.max()}, "
        f"{num_cut / len(lengths):.1%} cut to {config.data.max_length}"
    )
    return "\n".join(lines)
