"""One label, several labels or a number for a sentence or a pair of sentences."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import Engine
from trainer.config import ClassificationData, RunConfig
from trainer.data.batches import GlobalBatches
from trainer.data.classify import TARGETS, ClassificationSet, Split, build_data
from trainer.evaluate import evaluate_logits
from trainer.task.protocol import Batch, Evaluation, Forward, Outputs, SplitName
from trainer.task.targets import TargetKind, target_kind
from trainer.task.varied import VariedBatches, vary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ClassificationTask:
    """Implements `Task`; see protocol.py."""

    config: RunConfig
    data: ClassificationSet

    vocab_size = None
    counted, speed = "examples", "samples_per_s"

    @cached_property
    def kind(self) -> TargetKind:
        """Loss, metrics and pictures of what is predicted."""
        assert isinstance(self.config.data, ClassificationData)
        return target_kind(self.config.data, self.data.class_weights)

    @property
    def count_names(self) -> tuple[str, ...]:
        return self.kind.count_names

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        return self.kind.shown_metrics

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.data.tokenizer

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.data.label_names

    @property
    def report_split(self) -> SplitName:
        return "validation" if self.data.test is None else "test"

    @cached_property
    def batches(self) -> GlobalBatches:
        """The order of the training samples."""
        data, train = self.config.data, self.config.train
        assert isinstance(data, ClassificationData)
        return GlobalBatches(
            self.data.train.lengths, train.global_batch_size, train.seed, group_by_length=data.group_by_length
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.per_epoch

    def identity(self) -> dict[str, str]:
        digest, train = hashlib.sha256(), self.data.train
        for array in (train.tokens, train.offsets, train.labels):
            digest.update(array.tobytes())
        if self.data.augmenter is not None:
            digest.update(self.data.augmenter.digest())
        return {"data": digest.hexdigest()}

    def model_info(self) -> dict[str, object]:
        assert isinstance(self.config.data, ClassificationData)
        data, model = self.config.data, self.config.model
        return {
            "label_names": list(self.data.label_names),
            "max_length": data.max_length,
            "target": data.target,
            "pairs": data.text_pair is not None,
            "pooling": model.pooling,
            "head_layers": model.head_layers,
        }

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def usage(self, folder: Path) -> str:
        assert isinstance(self.config.data, ClassificationData)
        text = "your text" if self.config.data.text_pair is None else '{"text": "one text", "text_pair": "its other"}'
        return f"samestep predict {quote(str(folder))} {quote(text)}"

    @cached_property
    def varied(self) -> VariedBatches | None:
        """Batches of training samples in other forms; None where they are read as they are."""
        assert isinstance(self.config.data, ClassificationData)
        return vary(self.data, self.config.data.max_length)

    def global_batch(self, step: int) -> np.ndarray:
        batch = self.batches.at(step)
        return batch if self.varied is None else self.varied.numbers(batch, step, epoch=step // self.steps_per_epoch)

    def training_batch(self, ids: np.ndarray) -> Batch:
        return self.data.collate(self.data.train, ids) if self.varied is None else self.varied.batch(ids)

    def rank_state(self, step: int) -> bytes:
        return b""

    def restore_rank_state(self, step: int, state: bytes) -> None:
        assert not state, "samples are a function of the step"

    def model_inputs(self, batch: Batch) -> Batch:
        return {name: tensor for name, tensor in batch.items() if name not in TARGETS}

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.kind.loss_sum(outputs.logits, batch)

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        return (self.kind.count(outputs.logits, batch),)

    def train_metrics(
        self, loss: float, num_targets: float, counts: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        return {self.kind.train_metric: sum(counts.values()) / max(num_targets, 1)}

    def evaluate(self, forward: Forward, engine: Engine, split: SplitName) -> Evaluation:
        examples = self.split(split)
        batch_size = self.config.train.eval_batch_size
        logits = evaluate_logits(forward, self.data, examples, engine, batch_size=batch_size)
        return Evaluation(self.kind.metrics(logits, examples.labels), {"logits": logits, "labels": examples.labels})

    def split(self, name: SplitName) -> Split:
        """The examples of a split."""
        if name == "validation":
            return self.data.validation
        assert self.data.test is not None, "there is no test split"
        return self.data.test

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        return {}

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        self.kind.draw(folder, evaluation.details["logits"], evaluation.details["labels"], self.label_names)


def build(config: RunConfig, accelerator: Accelerator) -> ClassificationTask:
    """Read, check, split and tokenize the sentences; rank 0 says what they are."""
    return ClassificationTask(config, build_data(config, accelerator))
