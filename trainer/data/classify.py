"""Sentences with labels: read, checked, split, tokenized. Every rank reads the same data and arrives at the same splits.

`read_splits` needs neither torch nor a tokenizer, so that mistakes in the data are found before anything is launched;
`build_data` goes on to what the loop reads, and prints what it is. No collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import ClassificationData, RunConfig, TrainConfig
from trainer.data.augment import Augmenter, describe_augmentation
from trainer.data.batches import IGNORED, epoch_batches, micro_batches
from trainer.data.label_table import MOST_CLASSES_SHOWN, label_table
from trainer.data.labels import check_numbers, class_weights
from trainer.data.samples import Samples, bad_rows_report, check_labels, label_set, read_samples
from trainer.data.sources import read_named_split, read_source
from trainer.data.split import plain_split, stratified_split
from trainer.data.tables import Table
from trainer.data.tokens import Split, Tokenized, check_max_length, tokenize
from trainer.errors import DataError
from trainer.screen import announce

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["ClassificationSet", "RawSplits", "Split", "build_data", "read_splits"]

TARGETS = ("labels", "values")
"""What of a batch the model is not called with."""
BATCHES_LOOKED_AT = 200
"""For the padding share; the batches of an epoch come in random order, so that the first ones speak for all."""


@dataclass(frozen=True)
class RawSplits:
    """Texts and class ids of each split, before they are tokenized."""

    train: Samples
    validation: Samples
    test: Samples | None
    label_names: tuple[str, ...]
    """In the order of class ids."""
    sources: tuple[str, ...]
    """Where each table came from: what was asked for, what it is, and how splits were cut."""
    dropped: tuple[str, ...]
    """For each table with bad rows, a report of those that were left out."""
    class_weights: np.ndarray | None = None
    """(C,) float64: the factor of each label's loss."""


@dataclass(frozen=True)
class ClassificationSet:
    """What the loop reads: tokenized splits, and how samples become a batch."""

    train: Split
    validation: Split
    test: Split | None
    label_names: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"
    pad_token_id: int = 0
    """Fills short samples; the attention mask hides it."""
    class_weights: np.ndarray | None = None
    """(C,) float64: the factor of each label's loss."""
    augmenter: Augmenter | None = None
    """Makes other forms of the training samples; None where they are read as they are."""

    def collate(self, split: Split, ids: np.ndarray) -> "dict[str, Tensor]":
        """A batch of CPU tensors, padded on the right to its longest sample.

        input_ids, attention_mask and, where the model needs them, token_type_ids: (B, T) int64; labels: (B,) int64. Labels that are
        no class ids are in `values`, (B, C) fp32, and `labels` are 0. Without ids: one dummy sample, the split's first, whose label
        is -100, so that ranks make equally many forward passes.
        """
        import torch  # not at the top: read_splits runs where a second for torch is too long

        rows = ids if len(ids) else np.zeros(1, np.int64)
        places, mask = split.places(rows)
        batch = {"input_ids": np.where(mask, split.tokens[places], self.pad_token_id), "attention_mask": mask}
        if split.token_types is not None:
            batch["token_type_ids"] = np.where(mask, split.token_types[places], 0)
        of_classes = split.labels.ndim == 1
        batch["labels"] = (
            (split.labels[rows] if of_classes else np.zeros(len(rows))) if len(ids) else np.full(1, IGNORED)
        )
        tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}
        return tensors if of_classes else tensors | {"values": torch.from_numpy(split.labels[rows].astype(np.float32))}


def read_splits(data: ClassificationData) -> RawSplits:
    """Read, check and split. DataError names file, line, rule and fix, of all files at once."""
    tables = _read_tables(data)
    names = label_set(tables["train"], data)
    parts, problems, dropped = {}, [], []
    for name, table in tables.items():
        parts[name], bad, problem = read_samples(table, data, names, setting=_setting(name))
        if problem is not None:
            problems.append(problem)
        elif bad:
            dropped.append(f"{table.name}: {len(bad):,} of {len(table):,} rows left out\n{bad_rows_report(table, bad)}")
    if problems:
        raise DataError("\n".join(problems))
    check_labels(tables["train"], data, names)
    parts |= _cut(parts["train"], data, names)
    if data.target == "regression":
        check_numbers({name: part.labels for name, part in parts.items()}, data)
    weights = class_weights(parts["train"].labels, names, data)
    sources = _describe_sources(tables, data)
    return RawSplits(parts["train"], parts["validation"], parts.get("test"), names, sources, tuple(dropped), weights)


def build_data(config: RunConfig, accelerator: "Accelerator") -> ClassificationSet:
    """Read and tokenize the data and print what it is. Every rank calls it, and each does all of it; rank 0 prints.

    DataError, or ConfigError for a `data.max_length` that does not fit the model.
    """
    # Not at the top: of the data modules this function alone stands above the model.
    from trainer.model.load import load_architecture, load_tokenizer
    from trainer.model.rewrite import build_augmenter

    data = config.data
    assert isinstance(data, ClassificationData), data.kind
    raw = read_splits(data)
    tokenizer = load_tokenizer(config.model)
    positions = getattr(
        load_architecture(config.model, raw.label_names, target=data.target), "max_position_embeddings", None
    )
    pair = data.text_pair is not None
    check_max_length(
        data.max_length,
        tokenizer,
        pair=pair,
        source=config.model.source,
        positions=positions,
        virtual_tokens=getattr(config.method, "num_virtual_tokens", 0),
    )
    train, validation = (tokenize(part, tokenizer, data.max_length) for part in (raw.train, raw.validation))
    test = None if raw.test is None else tokenize(raw.test, tokenizer, data.max_length).split
    augmenter = None
    if data.augment.kinds:
        augmenter = build_augmenter(data.augment, raw.train, config.train.seed, accelerator.device)
    built = ClassificationSet(
        train.split,
        validation.split,
        test,
        raw.label_names,
        tokenizer,
        pad_token_id=tokenizer.pad_token_id,
        class_weights=raw.class_weights,
        augmenter=augmenter,
    )
    if accelerator.is_main_process:
        announce(_describe(config.train, data, raw, built, train, world_size=accelerator.num_processes), is_main=True)
    return built


def _setting(name: str) -> str:
    return "data.source" if name == "train" else f"data.{name}"


def _read_tables(data: ClassificationData) -> dict[str, Table]:
    """The source as "train", and the named splits. DataError for all that cannot be read."""
    columns = {"data.text": data.text, "data.label": data.label}
    if data.text_pair is not None:
        columns["data.text_pair"] = data.text_pair
    tables, problems = {}, []
    for name, source in (("train", data.source), ("validation", data.validation), ("test", data.test)):
        try:
            if name == "train":
                tables[name] = read_source(data, columns)
            elif source is not None:
                tables[name] = read_named_split(data, _setting(name), source, columns)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return tables


def _cut(whole: Samples, data: ClassificationData, names: tuple[str, ...]) -> dict[str, Samples]:
    """The training samples, and those held out for the splits that are not named."""
    fractions = {
        "validation": None if data.validation else data.validation_fraction,
        "test": None if data.test else data.test_fraction or None,
    }
    if not any(fractions.values()):
        return {}
    sizes = tuple(round(len(whole) * fraction) if fraction else 0 for fraction in fractions.values())
    for (name, fraction), size in zip(fractions.items(), sizes, strict=True):
        if fraction and not size:
            raise DataError(
                f"data.{name}_fraction ({fraction:g}) of {len(whole):,} samples is none; raise it, or name a {name} split"
            )
    if data.target == "single":
        cut = stratified_split(whole.labels, (sizes[0], sizes[1]), names, seed=data.split_seed)
    else:
        cut = plain_split(len(whole), (sizes[0], sizes[1]), seed=data.split_seed)
    train, validation, test = cut
    held_out = {"validation": validation, "test": test}
    return {"train": whole.take(train)} | {name: whole.take(held_out[name]) for name in fractions if fractions[name]}


def _describe_sources(tables: dict[str, Table], data: ClassificationData) -> tuple[str, ...]:
    lines = []
    for name, table in tables.items():
        what = f"{data.source} (asset, {table.name})" if table.kind == "asset" else f"{table.name} ({table.kind})"
        lines.append(f"{what}, {len(table):,} rows" if name == "train" else f"{name}: {what}, {len(table):,} rows")
    cut = [
        f"{name} {fraction:.0%}"
        for name, fraction in (("validation", data.validation_fraction), ("test", data.test_fraction))
        if name not in tables and fraction
    ]
    if cut:
        how = "stratified by label" if data.target == "single" else "shuffled"
        lines.append(f"held out of it, {how}, data.split_seed {data.split_seed}: {', '.join(cut)}")
    return tuple(lines)


def _describe(
    settings: TrainConfig,
    data: ClassificationData,
    raw: RawSplits,
    built: ClassificationSet,
    train: Tokenized,
    *,
    world_size: int,
) -> str:
    """What the data is, for the screen before training."""
    batch_size, lengths = settings.global_batch_size, built.train.lengths
    batches = epoch_batches(lengths, batch_size, settings.seed, 0, group_by_length=data.group_by_length)
    padding = padding_share(lengths, batches[:BATCHES_LOOKED_AT], world_size, settings.micro_batch_size)
    last = f", the last of {len(batches[-1])}" if len(batches[-1]) < batch_size else ""
    splits = {"train": built.train, "validation": built.validation, "test": built.test}
    rows = [
        ("data", raw.sources + tuple(line for report in raw.dropped for line in report.split("\n"))),
        (
            "",
            label_table({name: split.labels for name, split in splits.items() if split is not None}, raw.label_names),
        ),
        *([] if raw.class_weights is None else [("weights", (_describe_weights(raw),))]),
        ("batches", (f"{len(batches):,} global batches of {batch_size} per epoch{last}; {padding:.1%} padding",)),
        ("tokens", (f"{train.describe_lengths(data.max_length)} (data.max_length)",)),
        ("augment", describe_augmentation(data.augment)),
    ]
    return "\n".join(
        f"{title if number == 0 else '':<11}{line}" for title, lines in rows for number, line in enumerate(lines)
    )


def padding_share(
    lengths: np.ndarray, batches: Sequence[np.ndarray], world_size: int, micro_batch_size: int | None
) -> float:
    """Share of all tokens in these global batches that are padding, as the ranks will cut and pad them."""
    size = used = 0
    for batch in batches:
        for rank in range(world_size):
            for ids in micro_batches(batch, rank, world_size, micro_batch_size):
                if len(ids):
                    size += len(ids) * int(lengths[ids].max())
                    used += int(lengths[ids].sum())
    return 1 - used / size


def _describe_weights(raw: RawSplits) -> str:
    """The factor of each label's loss."""
    assert raw.class_weights is not None
    shown = [f"{name} {weight:.4g}" for name, weight in zip(raw.label_names, raw.class_weights, strict=True)][
        :MOST_CLASSES_SHOWN
    ]
    rest = len(raw.label_names) - len(shown)
    return f"of the loss, by label: {', '.join(shown)}" + (f" and {rest} more" if rest else "")
