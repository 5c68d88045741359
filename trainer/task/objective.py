"""Objectives beside the next token, on rows of token datasets: masked tokens, pairs, spans, permuted order (trainer/data/objectives)."""

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.config import RunConfig, StreamData
from trainer.data.batches import IGNORED
from trainer.data.objectives import OBJECTIVES, Rows, build_objective, is_paired
from trainer.data.objectives.rows import random_rows
from trainer.data.stream.open import Streams, open_streams
from trainer.data.stream.reader import Stream
from trainer.loss import token_losses
from trainer.model.vocabulary import objective_vocabulary, tokenizer_files
from trainer.screen import announce
from trainer.task import clm
from trainer.task.protocol import Batch, Evaluation, Outputs

VALIDATION_SEED = 2**40
"""Held-out rows are masked the same way whatever train.seed is."""
OTHERS = 31  # key of the random words
NEAREST = 256
"""Samples before one, of which the other row of its pair is drawn."""
SHOWN = 3
"""Held-out rows in samples.txt."""


class ObjectiveTask(clm.ClmTask):
    """Implements `Task`; see protocol.py."""

    count_names = ("correct", "tokens", "filled", "positions")
    shown_metrics: tuple[str, ...] = ("loss", "perplexity", "accuracy")

    def __init__(self, config: RunConfig, streams: Streams) -> None:
        super().__init__(config, streams)
        data = self.settings
        self.tokenizer, self.added, self.vocabulary = objective_vocabulary(
            config.model, data, streams.tokenizer_file, streams.train.tokenizer.eos
        )
        self.is_paired = is_paired(data)
        self.vocab_size = self.vocabulary.size
        self.objective = build_objective(data, self.vocabulary, config.train.seed)
        self.held_out = build_objective(data, self.vocabulary, VALIDATION_SEED)
        if self.is_paired:
            self.shown_metrics = (*self.shown_metrics, "pair_accuracy")

    @property
    def settings(self) -> StreamData:
        """Section data."""
        assert isinstance(self.config.data, StreamData)
        return self.config.data

    @property
    def special_ids(self) -> Mapping[str, int]:
        """What the configuration of a model from scratch must say of the tokenizer."""
        vocabulary = self.vocabulary
        start = vocabulary.pad if self.settings.objective == "span_corruption" else vocabulary.end
        return {
            "pad_token_id": vocabulary.pad,
            "bos_token_id": vocabulary.start if vocabulary.start >= 0 else vocabulary.pad,
            "eos_token_id": vocabulary.end,
            "decoder_start_token_id": start,
            "forced_eos_token_id": vocabulary.end,
        }

    def model_info(self) -> dict[str, object]:
        return {**super().model_info(), "objective": self.settings.objective}

    def tokenizer_files(self) -> dict[str, bytes]:
        if self.config.model.init == "pretrained":
            return {}
        return tokenizer_files(self.tokenizer)

    def usage(self, folder: Path) -> str:
        if self.settings.objective == "plm":  # finds tokens in any order, which `samestep predict` has no question for
            call = f"XLNetLMHeadModel.from_pretrained({json.dumps(str(folder / 'model'), ensure_ascii=False)})"
            return f"python -c {quote(f'from transformers import XLNetLMHeadModel; print({call})')}"
        text = f"The {self.tokenizer.mask_token} of a function." if self.vocabulary.mask >= 0 else "your text"
        return f'samestep predict {quote(str(folder))} "{text}"'

    # Batches

    def training_batch(self, ids: np.ndarray) -> Batch:
        return self.made(self.objective, self.streams.train, ids)

    def validation_batch(self, ids: np.ndarray) -> Batch:
        return self.made(self.held_out, self.streams.validation, self.streams.validation_samples(ids))

    def made(self, objective: Any, stream: Stream, ids: np.ndarray) -> Batch:
        """CPU tensors of these samples. Without ids: the first sample, without targets."""
        samples = ids if len(ids) else np.zeros(1, np.int64)
        rows = self.rows(stream, samples, scattered=stream is self.streams.validation)
        if self.settings.objective == "mlm_nsp":
            others = self.rows(stream, earlier(samples, objective.seed), scattered=True)
            rows = Rows(rows.ids, rows.held, rows.samples, rows.documents, others)
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in objective.batch(rows).items()}
        if not len(ids):
            batch |= {
                name: torch.full_like(batch[name], IGNORED) for name in ("labels", "pair_labels") if name in batch
            }
        return batch | {"num_tokens": torch.from_numpy(rows.held[: len(ids)])}

    def rows(self, stream: Stream, samples: np.ndarray, *, scattered: bool) -> Rows:
        """Rows of a stream, as an objective takes them."""
        read = stream.batch(samples.tolist(), document_ids=self.is_paired, scattered=scattered)
        return Rows(read["input_ids"], read["num_tokens"], samples, read.get("document_ids"))

    def model_inputs(self, batch: Batch) -> Batch:
        if "order" in batch:
            return permutation_inputs(batch)
        return {name: tensor for name, tensor in batch.items() if name not in ("labels", "pair_labels", "num_tokens")}

    # Losses

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        loss = token_losses(logits_of(outputs), batch["labels"]).sum()
        if not self.is_paired:
            return loss
        return loss + cast(Any, self.objective).pair_weight * pair_losses(outputs, batch["pair_labels"]).sum()

    def counts(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        found = logits_of(outputs).argmax(dim=-1) == batch["labels"]
        positions = torch.tensor(float(batch["input_ids"].numel() if len(batch["num_tokens"]) else 0))
        filled = batch["attention_mask"].sum() if "attention_mask" in batch and positions else positions
        return found.sum(), batch["num_tokens"].sum(), filled, positions

    def train_metrics(
        self, loss: float, num_targets: float, counts: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        return {
            "train/accuracy": counts["correct"] / max(num_targets, 1),
            "train/padding": 1 - counts["filled"] / max(counts["positions"], 1),
            "tokens_per_s": counts["tokens"] / seconds,
        }

    def row_sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels = logits_of(outputs), batch["labels"]
        columns = [token_losses(logits, labels), labels != IGNORED, logits.argmax(dim=-1) == labels]
        sums = [column.double().sum(dim=1) for column in columns]
        pairs = batch.get("pair_labels")
        if pairs is None:
            return torch.stack([*sums, *[torch.zeros_like(sums[0])] * 2], dim=1)
        is_right = pair_logits(outputs).argmax(dim=-1) == pairs
        return torch.stack([*sums, pair_losses(outputs, pairs).double(), is_right.double()], dim=1)

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        loss_sum, targets, correct, pair_loss, pairs_right = sums.sum(dim=0).tolist()
        found = clm.language_metrics(loss_sum, targets, num_bytes=1.0)
        del found["bits_per_byte"]
        found["accuracy"] = correct / max(targets, 1)
        if self.is_paired:
            found["loss"] += pair_loss / len(sums)
            found["pair_accuracy"] = pairs_right / len(sums)
        return found

    def write_report(self, folder: Path, model: nn.Module, evaluation: Evaluation) -> None:
        """samples.txt: held-out rows as the model is given them, what was wanted, and what it finds."""
        batch = self.validation_batch(np.arange(min(SHOWN, self.num_validation_rows)))
        device = next(model.parameters()).device
        with torch.no_grad():
            found = (
                logits_of(model(**{name: part.to(device) for name, part in self.model_inputs(batch).items()}))
                .argmax(-1)
                .cpu()
            )
        texts = []
        for given, labels, ids in zip(batch["input_ids"], batch["labels"], found, strict=True):
            wanted = labels != IGNORED
            words = {"given": given, "wanted": labels[wanted], "found": ids[wanted]}
            texts.append("\n".join(f"{name}: {self.tokenizer.decode(part)}" for name, part in words.items()))
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def earlier(samples: np.ndarray, seed: int) -> np.ndarray:
    """For each sample one of the NEAREST before it, which a run can always read whatever its sources' weights; of the first the second.

    Of the nearest, for their shards are open: any earlier one would have a batch open a shard a row, and fetch it where it is remote.
    """
    words = random_rows(samples, 1, seed, OTHERS)[:, 0]
    back = 1 + (words % np.clip(samples, 1, NEAREST).astype(np.uint64)).astype(np.int64)
    return np.where(samples > 0, samples - back, 1)


def logits_of(outputs: Outputs) -> Tensor:
    """Of tokens, (B, T, V) or of the predicted ones."""
    return cast(Tensor, outputs.logits if "logits" in outputs else outputs.prediction_logits)


def pair_logits(outputs: Outputs) -> Tensor:
    """(B, 2) of BERT's next sentences or ALBERT's order."""
    return cast(Tensor, outputs.sop_logits if "sop_logits" in outputs else outputs.seq_relationship_logits)


def pair_losses(outputs: Outputs, labels: Tensor) -> Tensor:
    """(B,) cross-entropy of each pair, in fp32."""
    return torch.nn.functional.cross_entropy(
        pair_logits(outputs).float(), labels, ignore_index=IGNORED, reduction="none"
    )


def permutation_inputs(batch: Batch) -> Batch:
    """What XLNet is given: perm_mask (B, T, T) bool, where a token does not see another; target_mapping (B, P, T); on the batch's device.

    A row with fewer targets than P maps the rest nowhere: XLNet adds the queries of all targets that are mapped to one place.
    token_type_ids are zeros, so that all of XLNet's parameters take part, as DDP asks.
    """
    ids, targets = batch["input_ids"], batch["targets"]
    rows, length = ids.shape
    order = batch["order"].to(torch.int16 if length < 2**15 else torch.int32)  # a quarter of the time of int64
    hides = order[:, None, :] <= order.gather(1, targets.clamp(min=0))[:, :, None]  # (B, P, T): a target from whom
    places = torch.where(targets < 0, length, targets)  # a target that is not there: one place more, cut off again
    hidden = torch.zeros(rows, length + 1, length, dtype=torch.bool, device=ids.device)
    hidden[torch.arange(rows, device=ids.device)[:, None], places] = hides  # only predicted tokens are hidden from any
    mapping = torch.zeros(*targets.shape, length + 1, device=ids.device).scatter_(2, places[:, :, None], 1.0)
    inputs = {
        "input_ids": ids,
        "perm_mask": hidden[:, :length].transpose(1, 2),
        "target_mapping": mapping[..., :length],
        "token_type_ids": torch.zeros_like(ids),
    }
    return inputs | ({"attention_mask": batch["attention_mask"].float()} if "attention_mask" in batch else {})


def build(config: RunConfig, accelerator: Accelerator) -> clm.ClmTask:
    """The task of rows of token datasets: what data.objective says."""
    assert isinstance(config.data, StreamData)
    if config.data.objective == "clm":
        return clm.build(config, accelerator)
    task = ObjectiveTask(config, open_streams(config))
    clm.check_positions(config, task.sequence_length)
    words = f"{clm.describe(config, task.streams)}\nobjective  {config.data.objective}: {OBJECTIVES[config.data.objective].words}"
    if task.added:
        shown = task.added if len(task.added) <= 4 else [*task.added[:3], f"... {task.added[-1]}"]
        words += f"\n           special tokens added to the tokenizer: {', '.join(shown)}"
    announce(words, is_main=accelerator.is_main_process)
    return task
