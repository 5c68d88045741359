"""Parity's measurement: a few steps of the recipe, recorded as numbers that must not depend on the backend.

`samestep parity` starts the recipe once per variant with `probe.folder` set; `Trainer.fit` then comes here instead of training.
Dropout is off (the model stays in eval mode; blocks that training would recompute are recomputed all the same), and part of the
labels is hidden so that ranks hold unequal numbers of targets.
Rank 0 writes record.json (per-step numbers) and tensors.safetensors (gradient of step 1, whole update), both fp32.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.data.batches import GOLDEN_GAMMA, IGNORED, mix_words
from trainer.task import Task

if TYPE_CHECKING:
    from trainer.loop import Trainer

HIDDEN_EVERY = 4  # one sample of this many loses its labels


@dataclass(frozen=True)
class PartlyUnlabelled:
    """A task whose ranks hold unequal numbers of targets: those of `is_hidden` have none."""

    inner: Task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def training_batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        """The inner batch with labels hidden."""
        batch = self.inner.training_batch(ids)
        if len(ids):
            batch["labels"][torch.from_numpy(is_hidden(ids))] = IGNORED
        return batch


def is_hidden(ids: np.ndarray) -> np.ndarray:
    """Which samples lose their labels, bool, by a hash of their ids: of ids that follow each other no two shares need be alike."""
    return mix_words(ids.astype(np.uint64) + GOLDEN_GAMMA) % np.uint64(HIDDEN_EVERY) == 0


def record_probe(trainer: "Trainer") -> None:
    """Run `probe.steps` steps and write what they did. Collective."""
    probe, engine = trainer.config.probe, trainer.engine
    assert probe is not None
    trainer.task = PartlyUnlabelled(trainer.task)
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
        steps.append(describe_step(trainer, step))
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


def describe_step(trainer: "Trainer", step: int) -> dict[str, Any]:
    """The numbers of the step just taken, the same on every rank. Collective."""
    window, engine = trainer.progress.window, trainer.engine
    loss_sum, num_targets = engine.sum_over_ranks([float(window.loss_sum), float(window.num_targets)])
    targets_per_rank = [0.0] * trainer.world_size
    targets_per_rank[trainer.rank] = float(window.num_targets)
    trainer.progress.window = type(window)()
    return {
        "loss": loss_sum / num_targets,
        "grad_norm": trainer.progress.grad_norm,
        "lr": trainer.progress.lr,
        "targets_per_rank": engine.sum_over_ranks(targets_per_rank),
        "sample_ids": hashlib.sha256(trainer.global_batch(step).astype("<i8").tobytes()).hexdigest(),
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
