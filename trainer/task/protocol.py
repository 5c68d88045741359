"""The interface that the loop, the probe and the run directory use, and the table of tasks."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import Engine
from trainer.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
Outputs = Any
"""What the model returns: transformers' output object, most often with `.logits`."""
Forward = Callable[[Mapping[str, Tensor]], Outputs]
"""A model call, such as `engine.forward`."""
SplitName = Literal["validation", "test"]


@dataclass(frozen=True)
class Evaluation:
    """What a whole split gave, the same on every rank."""

    metrics: dict[str, float]
    details: dict[str, np.ndarray] = field(default_factory=dict)
    """For the report, such as the logits of every example."""


class Task(Protocol):
    """Samples, loss and metrics of one run. Every rank makes one; only `evaluate` is collective."""

    tokenizer: "PreTrainedTokenizerBase"
    label_names: tuple[str, ...]
    """Names of the classes; empty where the model predicts tokens."""
    vocab_size: int | None
    """Of a model that is trained from scratch; None keeps that of its configuration."""
    special_ids: Mapping[str, int]
    """Special tokens that the configuration of a model from scratch is told of, by its own names; only tasks on rows have it."""
    steps_per_epoch: int
    count_names: tuple[str, ...]
    """What `counts` counts, beside the targets."""
    shown_metrics: tuple[str, ...]
    """Of an evaluation, on the screen."""
    counted: str
    """What an evaluation counts: examples, targets."""
    speed: str
    """The metric that says how fast training is: samples_per_s, tokens_per_s."""
    report_split: SplitName
    """What the exported model is tested on at the end."""

    def identity(self) -> dict[str, str]:
        """What a checkpoint belongs to: under `data` a digest of the training data, under names of settings those of what they name."""

    def model_info(self) -> dict[str, object]:
        """What prediction needs to know, for model/samestep.json."""

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, where it comes with the data and not with the model; a checkpoint keeps them."""

    def usage(self, folder: Path) -> str:
        """A command that uses the exported model of a run directory."""

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids of 0-based `step`, int64, the same on every rank and for any number of them."""

    def training_batch(self, ids: np.ndarray) -> Batch:
        """CPU tensors of these samples, `labels` among them; without ids a dummy sample whose labels are all -100."""

    def rank_state(self, step: int) -> bytes:
        """What this rank needs to read on from 0-based `step`; empty for data that is a function of the step.

        Not while another thread reads.
        """

    def restore_rank_state(self, step: int, state: bytes) -> None:
        """The reverse, on the rank that made it. CheckpointError for a state of another number of ranks."""

    def model_inputs(self, batch: Batch) -> Batch:
        """What of a batch the model is called with."""

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss summed over the targets of a micro-batch: a scalar, fp32."""

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        """A scalar for each of `count_names`, summed over the micro-batch; called without gradients."""

    def train_metrics(
        self, loss: float, num_targets: float, counts: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        """Metrics of the steps since the last log line, from sums over all ranks. loss: mean over targets."""

    def evaluate(self, forward: Forward, engine: Engine, split: SplitName) -> Evaluation:
        """A whole split, each example counted once whatever the number of ranks. Collective; no gradients."""

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        """What the exported model, whole on every rank, generates for held-out prompts; nothing where it is not asked. Collective."""

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """Rank 0: pictures or samples beside the metrics, from the exported model and its evaluation."""


TASKS = {
    "classification": "trainer.task.classification:build",
    "stream": "trainer.task.objective:build",
    "live": "trainer.task.live:build",
    "instruct": "trainer.task.instruct:build",
    "pairs": "trainer.task.seq2seq:build",
    "tags": "trainer.task.token_classification:build",
    "questions": "trainer.task.question_answering:build",
}
"""data.kind -> the builder of its task, imported at need."""


def build_task(config: RunConfig, accelerator: Accelerator) -> Task:
    """Read the data of `config` and say what it is. Every rank calls it; DataError or ConfigError for mistakes."""
    module, _, name = TASKS[config.data.kind].partition(":")
    return cast(Task, getattr(importlib.import_module(module), name)(config, accelerator))
