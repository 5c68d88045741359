"""Batches of training samples in other forms (trainer/data/augment.py), and the loss of blended ones.

A batch is a function of the samples' numbers, which hold epoch and partner: a rank tokenizes the partners of its own samples, whichever
rank owns them. Called in the thread that reads ahead.
"""

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.data.augment import Augmenter, number_batch
from trainer.data.classify import ClassificationSet, Split
from trainer.data.tokens import tokenize
from trainer.model.mixup import MIX_IDS, MIX_SHARE
from trainer.task.protocol import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class VariedBatches:
    """The training samples in the form that an epoch sees them."""

    data: ClassificationSet
    augmenter: Augmenter
    tokenizer: "PreTrainedTokenizerBase"
    """Our own: another thread may save or use the task's."""
    max_length: int

    def numbers(self, batch: np.ndarray, step: int, *, epoch: int) -> np.ndarray:
        """The numbers of a whole global batch's samples."""
        return number_batch(self.augmenter, batch, step, epoch=epoch)

    def batch(self, numbers: np.ndarray) -> Batch:
        """As `ClassificationSet.collate`; where samples are blended, also the partners' tokens and the samples' shares, and `values` are
        blended: numbers, labels, or for classes (B, C) fp32 shares."""
        batch = self.collate(numbers)
        if not self.augmenter.settings.mixes:
            return batch
        partners = self.collate(self.augmenter.partners_of(numbers))
        share = self.augmenter.shares(numbers) if len(numbers) else np.ones(1)
        shares = torch.from_numpy(share).float()
        values = blended_values(batch, partners, shares, len(self.data.label_names))
        return blend(batch, partners, shares, pad_token_id=self.data.pad_token_id) | {"values": values}

    def collate(self, numbers: np.ndarray) -> Batch:
        """The samples of these numbers, padded; without numbers the dummy sample."""
        if not len(numbers):
            return self.data.collate(self.data.train, numbers)
        return self.data.collate(self.split(numbers), np.arange(len(numbers)))

    def split(self, numbers: np.ndarray) -> Split:
        """The samples of these numbers in tokens."""
        taken = self.augmenter.taken(numbers)
        if self.tokenizer.num_special_tokens_to_add(False) == 0:
            _, _, samples = self.augmenter.places(numbers)
            texts = [
                text if self.tokenizer(text)["input_ids"] else self.augmenter.samples.texts[sample]
                for text, sample in zip(taken.texts, samples, strict=True)
            ]
            taken = replace(taken, texts=texts)
        return tokenize(taken, self.tokenizer, self.max_length).split


def vary(data: ClassificationSet, max_length: int) -> VariedBatches | None:
    """None where training samples are read as they are."""
    if data.augmenter is None:
        return None
    return VariedBatches(data, data.augmenter, copy.deepcopy(data.tokenizer), max_length)


def blend(batch: Batch, partners: Batch, share: Tensor, *, pad_token_id: int) -> Batch:
    """Tokens of both in one batch: as wide as the wider, attended where either has a token. share: (B,) of the first."""
    width = max(side["input_ids"].shape[1] for side in (batch, partners))
    fillers = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    first, second = (
        {name: widened(side[name], width, filler) for name, filler in fillers.items() if name in side}
        for side in (batch, partners)
    )
    mixed = {MIX_IDS: second["input_ids"], MIX_SHARE: share}
    mask = torch.maximum(first["attention_mask"], second["attention_mask"])
    return batch | first | mixed | {"attention_mask": mask}


def widened(tensor: Tensor, width: int, filler: int) -> Tensor:
    """(B, T) -> (B, width), filled on the right."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=filler)


def blended_values(batch: Batch, partners: Batch, share: Tensor, num_classes: int) -> Tensor:
    """(B, C) fp32: share x the samples' values + (1 - share) x the partners'; of classes their one-hot vectors."""
    own, others = (
        side["values"]
        if "values" in side
        else torch.nn.functional.one_hot(side["labels"].clamp(min=0), num_classes).float()
        for side in (batch, partners)
    )
    return share[:, None] * own + (1 - share[:, None]) * others
