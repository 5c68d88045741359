"""Parity's measurement: a few steps of the recipe, recorded as numbers that must not depend on the backend.

`samestep parity` starts the recipe once per variant with `probe.folder` set; `Trainer.fit` then comes here instead of training.
Dropout is off (the model stays in eval mode; blocks that training would recompute are recomputed all the same), and part of the
labels is hidden so that in every step ranks hold unequal numbers of targets.
Rank 0 writes record.json (per-step numbers) and tensors.safetensors (gradient of step 1, whole update), both fp32.
"""

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.data.batches import GOLDEN_GAMMA, IGNORED, micro_batches, mix_words
from trainer.data.prefetch import Prefetch
from trainer.task.protocol import Batch

if TYPE_CHECKING:
    from trainer.loop import Trainer


class WatchedData(Prefetch[list[Batch]]):
    """The trainer's data as parity reads it: at once instead of ahead, with labels hidden, and noted."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer.read_step)
        self.trainer = trainer
        self.digest = 0
        """Of the samples of this rank since it was last set to 0: a sum, so that neither order nor split matters."""

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        trainer, batches = self.trainer, self.make(step)
        size = len(trainer.global_batch(step))
        shares = micro_batches(np.arange(size), trainer.rank, trainer.world_size, trainer.config.train.micro_batch_size)
        for batch, positions in zip(batches, shares, strict=True):
            if len(positions):  # else it is a dummy sample
                self.digest = (self.digest + digest_of_samples(batch)) % 2**64
                labels = batch["labels"].clone()  # they may be a view of the numbers that input_ids is one of
                labels[torch.from_numpy(positions < count_hidden(size))] = IGNORED
                batch["labels"] = labels
        return batches


def count_hidden(batch_size: int) -> int:
    """How many samples at the beginning of a global batch lose their labels: about a quarter.

    At least 2 where it can be, since rank 0 may hold one sample more than the last rank: with equally many targets in each sample it then
    has fewer, whatever the number of ranks. Where tokens are the targets, the beginning of a batch has the shorter samples too.
    """
    return min(max(2, math.ceil(batch_size / 4)), batch_size - 1)


def digest_of_samples(batch: Batch) -> int:
    """64 bits from the tokens of every sample, their order inside it, and nothing else: padding does not count."""
    ids = batch["input_ids"].numpy()
    held = np.ones(ids.shape, bool)
    if "attention_mask" in batch:
        held = batch["attention_mask"].numpy() != 0
    elif "num_tokens" in batch:  # rows of conversations or documents, padded at the end
        held = np.arange(ids.shape[1]) < batch["num_tokens"].numpy()[:, None]
    places = np.arange(1, ids.shape[1] + 1, dtype=np.uint64) * GOLDEN_GAMMA
    words = np.where(held, mix_words(ids.astype(np.uint64) + places), np.uint64(0))
    return int(mix_words(words.sum(axis=1, dtype=np.uint64)).sum(dtype=np.uint64))


def record_probe(trainer: "Trainer") -> None:
    """Run `probe.steps` steps and write what they did. Collective."""
    probe, engine = trainer.config.probe, trainer.engine
    assert probe is not None
    data = trainer.prefetch = WatchedData(trainer)
    engine.model.eval()
    recompute_in_evaluation(engine.model)
    before = snapshot(engine.weights(trainable_only=True))
    gradients: dict[str, Tensor] = {}
    steps = []
    for step in range(probe.steps):
        trainer.compute_gradients()
        if step == 0:
            gradients = snapshot(engine.gradients())
        trainer.apply_gradients()
        steps.append(describe_step(trainer, data))
    after = snapshot(engine.weights(trainable_only=True))
    if engine.rank == 0:
        write_record(probe.folder, describe(trainer, steps, before), gradients, before, after)
    engine.sum_over_ranks([0.0])  # nobody leaves before the record is written


def recompute_in_evaluation(model: nn.Module) -> None:
    """Recompute what model.gradient_checkpointing asks for in evaluation mode too, so that parity measures it. In place.

    transformers recomputes a block only where the block trains, which would turn on its dropout: so the block says that it trains
    (its parts do not), and does not while it computes.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        if block.gradient_checkpointing:
            block.training = True
            block._gradient_checkpointing_func = partial(_evaluate_block, block, block._gradient_checkpointing_func)


def _evaluate_block(block: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    def evaluate(*inputs: Any) -> Any:
        block.training = False
        try:
            return forward(*inputs)
        finally:
            block.training = True

    return checkpoint(evaluate, *inputs)


def describe_step(trainer: "Trainer", data: WatchedData) -> dict[str, Any]:
    """The numbers of the step just taken, the same on every rank. Collective."""
    window, engine = trainer.progress.window, trainer.engine
    halves = divmod(data.digest, 2**32)  # so that float64 adds them exactly
    loss_sum, num_targets, high, low = engine.sum_over_ranks(
        [float(number) for number in (window.loss_sum, window.num_targets, *halves)]
    )
    targets_per_rank = [0.0] * trainer.world_size
    targets_per_rank[trainer.rank] = float(window.num_targets)
    trainer.progress.window, data.digest = type(window)(), 0
    return {
        "loss": loss_sum / num_targets,
        "grad_norm": trainer.progress.grad_norm,
        "lr": trainer.progress.lr,
        "targets_per_rank": engine.sum_over_ranks(targets_per_rank),
        "samples": f"{(int(high) * 2**32 + int(low)) % 2**64:016x}",
    }


def snapshot(tensors: Any) -> dict[str, Tensor]:
    """Copies on the CPU in fp32."""
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors}


def describe(trainer: "Trainer", steps: list[dict[str, Any]], before: dict[str, Tensor]) -> dict[str, Any]:
    """The record without its tensors."""
    engine = trainer.engine
    return {
        "backend": engine.backend,
        "world_size": engine.world_size,
        "precision": engine.precision,
        "method": trainer.config.method.name,
        "weights_before": digest_of(before),
        "steps": steps,
    }


def digest_of(tensors: dict[str, Tensor]) -> str:
    """sha256 of the names and values; -0.0 counts as 0.0, as ZeRO gathers weights by a sum, which makes it so."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + (tensors[name] + 0.0).numpy().tobytes())
    return digest.hexdigest()


def write_record(
    folder: Path,
    record: dict[str, Any],
    gradients: dict[str, Tensor],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
) -> None:
    """record.json last: where it is, the tensors are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    tensors |= {f"update.{name}": after[name] - before[name] for name in before}
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
