"""A class for each word: named entities in BIO tags."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import Engine
from trainer.config import RunConfig, TagData
from trainer.data.batches import IGNORED, GlobalBatches, evaluation_batches, rank_share
from trainer.data.tagged import TaggedSet, tokenize_tagged
from trainer.data.tags import RawTags, read_tags
from trainer.data.tokens import check_max_length
from trainer.entities import entity_counts, scores
from trainer.loss import token_losses
from trainer.model.architecture import load_architecture, load_tokenizer
from trainer.screen import announce
from trainer.task.protocol import Batch, Evaluation, Forward, Outputs, SplitName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenClassificationTask:
    """Implements `Task`; see protocol.py."""

    config: RunConfig
    settings: TagData
    tokenizer: "PreTrainedTokenizerBase"
    raw: RawTags
    sets: Mapping[str, TaggedSet]
    """train, validation, and test where there is one."""

    vocab_size = None
    count_names = ("correct",)
    shown_metrics = ("loss", "precision", "recall", "f1")
    counted, speed = "words", "samples_per_s"

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.raw.tag_names

    @property
    def report_split(self) -> SplitName:
        return "test" if "test" in self.sets else "validation"

    @cached_property
    def batches(self) -> GlobalBatches:
        """The order of the training samples."""
        train, by_length = self.config.train, self.settings.group_by_length
        return GlobalBatches(self.sets["train"].lengths, train.global_batch_size, train.seed, group_by_length=by_length)

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.per_epoch

    @property
    def padding(self) -> int:
        """The token that fills short sentences; the attention mask hides it."""
        return int(self.tokenizer.pad_token_id or 0)

    def identity(self) -> dict[str, str]:
        digest, train = hashlib.sha256(), self.sets["train"]
        for array in (train.tokens, train.offsets, train.labels):
            digest.update(array.tobytes())
        return {"data": digest.hexdigest()}

    def model_info(self) -> dict[str, object]:
        return {"label_names": list(self.label_names), "max_length": self.settings.max_length}

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def usage(self, folder: Path) -> str:
        return f'samestep predict {quote(str(folder))} "your text"'

    def global_batch(self, step: int) -> np.ndarray:
        return self.batches.at(step)

    def training_batch(self, ids: np.ndarray) -> Batch:
        return self.sets["train"].batch(ids, self.padding)

    def rank_state(self, step: int) -> bytes:
        return b""

    def restore_rank_state(self, step: int, state: bytes) -> None:
        assert not state, "samples are a function of the step"

    def model_inputs(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        return token_losses(outputs.logits, batch["labels"]).sum()

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        return ((outputs.logits.argmax(dim=-1) == batch["labels"]).sum(),)

    def train_metrics(
        self, loss: float, num_targets: float, counts: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        return {"train/accuracy": counts["correct"] / max(num_targets, 1)}

    def evaluate(self, forward: Forward, engine: Engine, split: SplitName) -> Evaluation:
        held_out = self.sets[split]
        found = torch.zeros(
            len(held_out.word_labels) + 1, dtype=torch.float64
        )  # class of each word, and behind them the loss
        with torch.no_grad():
            for ids in evaluation_batches(held_out.lengths, self.config.train.eval_batch_size, engine.world_size):
                batch = engine.to_device(held_out.batch(rank_share(ids, engine.rank, engine.world_size), self.padding))
                logits = forward(self.model_inputs(batch)).logits
                found[-1] += float(token_losses(logits, batch["labels"]).double().sum())
                is_word = batch["labels"] != IGNORED
                found[batch["words"][is_word].cpu()] = logits.argmax(dim=-1)[is_word].double().cpu()
        summed = engine.sum_array_over_ranks(found)
        predicted = summed[:-1].long().numpy()
        counts = entity_counts(self.tags(held_out, held_out.word_labels), self.tags(held_out, predicted))
        num_targets = int((held_out.labels != IGNORED).sum())
        metrics = {"loss": float(summed[-1]) / max(num_targets, 1), **scores(*counts[""]), "count": len(predicted)}
        return Evaluation(metrics, {"types": np.array(list(counts)), "counts": np.array(list(counts.values()))})

    def tags(self, held_out: TaggedSet, classes: np.ndarray) -> list[list[str]]:
        """The tags of each sentence from the classes of all words."""
        parts = np.split(classes, held_out.sentence_ends[:-1])
        return [[self.label_names[number] for number in part] for part in parts]

    def generation_metrics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        return {}

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """entities.txt: precision, recall and F1 of every type."""
        lines = [f"{'type':<20}{'precision':>10}{'recall':>10}{'f1':>10}{'entities':>10}"]
        rows: Any = zip(evaluation.details["types"].tolist(), evaluation.details["counts"].tolist(), strict=True)
        for kind, (right, found, wanted) in rows:
            values = scores(right, found, wanted)
            cells = "".join(f"{values[name]:>10.4f}" for name in ("precision", "recall", "f1"))
            lines.append(f"{kind or 'all':<20}{cells}{wanted:>10,}")
        (folder / "entities.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(config: RunConfig, accelerator: Accelerator) -> TokenClassificationTask:
    """Read, check, split and tokenize the sentences; rank 0 says what they are."""
    data = config.data
    assert isinstance(data, TagData), data.kind
    raw = read_tags(data)
    tokenizer = load_tokenizer(config.model)
    positions = getattr(load_architecture(config.model, raw.tag_names), "max_position_embeddings", None)
    check_max_length(data.max_length, tokenizer, pair=False, source=config.model.source, positions=positions)
    parts = {"train": raw.train, "validation": raw.validation, "test": raw.test}
    sets = {
        name: tokenize_tagged(part, raw.tag_names, tokenizer, data.max_length)
        for name, part in parts.items()
        if part is not None
    }
    task = TokenClassificationTask(config, data, tokenizer, raw, sets)
    announce(describe(task), is_main=accelerator.is_main_process)
    return task


def describe(task: TokenClassificationTask) -> str:
    """What the data is, for the screen before training."""
    train, raw = task.sets["train"], task.raw
    entities = sum(tag.startswith("B-") for sentence in raw.train for tag in sentence.tags)
    lines = [
        *raw.sources,
        f"{len(raw.train):,} sentences for training, {len(train.word_labels):,} words, {entities:,} entities",
        f"tokens: mean {train.lengths.mean():.1f}, max {train.lengths.max():,} (data.max_length {task.settings.max_length})",
    ]
    if len(train) > len(raw.train):
        lines.append(f"longer sentences were cut between words: {len(train) - len(raw.train):,} pieces more")
    return "\n".join(f"{'data' if place == 0 else '':<11}{line}" for place, line in enumerate(lines))
