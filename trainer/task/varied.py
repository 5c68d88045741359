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
from trainer.data.batches import IGNORED
from trainer.data.classify import ClassificationSet, Split
from trainer.data.tokens import tokenize
from trainer.model.mixup import MIX_IDS, MIX_SHARE
from trainer.task.protocol import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIX_LABELS = "mix_labels"
"""(B,) int64: class ids of the partners."""


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
        """As `ClassificationSet.collate`; where samples are blended, also the partners' tokens and labels and the samples' shares."""
        batch = self.collate(numbers)
        if not self.augmenter.settings.mixes:
            return batch
        partners = self.collate(self.augmenter.partners_of(numbers))
        share = self.augmenter.shares(numbers) if len(numbers) else np.ones(1)
        return blend(batch, partners, torch.from_numpy(share), pad_token_id=self.data.pad_token_id)

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
    """One batch of both: as wide as the wider, attended where either has a token. share: (B,) of the first."""
    width = max(side["input_ids"].shape[1] for side in (batch, partners))
    fillers = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    first, second = (
        {name: widened(side[name], width, filler) for name, filler in fillers.items() if name in side}
        for side in (batch, partners)
    )
    mixed = {MIX_IDS: second["input_ids"], MIX_SHARE: share.float(), MIX_LABELS: partners["labels"]}
    mask = torch.maximum(first["attention_mask"], second["attention_mask"])
    return batch | first | mixed | {"attention_mask": mask}


def widened(tensor: Tensor, width: int, filler: int) -> Tensor:
    """(B, T) -> (B, width), filled on the right."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=filler)


def mixed_loss_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with soft labels summed over targets, in fp32: share x that of the label + (1 - share) x that of the partner's.

    logits: (B, C); `labels`, `mix_labels`: (B,), a sample whose label is -100 is no target; `mix_share`: (B,). Local to the rank.
    """
    share, labels = batch[MIX_SHARE], batch["labels"]
    others = torch.where(labels == IGNORED, IGNORED, batch[MIX_LABELS])
    losses = [
        torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
        for targets in (labels, others)
    ]
    return (share * losses[0] + (1 - share) * losses[1]).sum()
