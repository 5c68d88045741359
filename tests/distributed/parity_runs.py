"""Probes of a tiny model on real ranks, sound ones and with planted faults, for test_parity.py."""

import copy
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.parity import Record, read_record
from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator
from trainer.config import (
    ClassificationData,
    FullConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.probe import count_hidden
from trainer.task import build_task

BATCH = 24


def measure(
    root: Path,
    backend: str,
    world_size: int,
    *,
    faults: Sequence[str | None] = (None,),
    micros: Sequence[int | None] = (None,),
    precision: str = "no",
    **settings: Any,
) -> list[Record]:
    """What the probes of all micro-batch sizes and faults recorded, those of each size together."""
    folder = Path(tempfile.mkdtemp(dir=root))
    runs = list(enumerate(itertools.product(micros, faults)))
    configs = [make_config(root, folder / str(number), micro=micro, **settings) for number, (micro, _) in runs]
    run_ranks(record, backend, world_size, args=(configs, [fault for _, (_, fault) in runs]), precision=precision)
    return [read_record(f"{backend} x{world_size}", folder / str(number)) for number, _ in runs]


def make_config(
    root: Path,
    folder: Path,
    *,
    steps: int = 5,
    batch: int = BATCH,
    micro: int | None = None,
    method: MethodConfig | None = None,
) -> RunConfig:
    """The tiny model on the tiny sentences of `root`, probed into `folder`."""
    return RunConfig(
        name="parity",
        model=ModelConfig(source=str(root / "model")),
        method=method or FullConfig(),
        data=ClassificationData(source=str(root / "data.csv"), validation_fraction=0.1, test_fraction=0),
        optim=OptimConfig(peak_lr=1e-3, max_grad_norm=0.5),
        train=TrainConfig(max_steps=max(steps, 20), global_batch_size=batch, micro_batch_size=micro),
        probe=ProbeConfig(folder=folder, steps=steps),
    )


def record(configs: list[RunConfig], faults: list[str | None]) -> None:
    """One probe per config in the same process group; runs on every rank."""
    accelerator = build_accelerator(configs[0])
    task = build_task(configs[0], accelerator)
    for config, fault in zip(configs, faults, strict=True):
        torch.manual_seed(0)
        model = build_model(config, task.label_names, accelerator)
        plain = copy.deepcopy(model)
        accelerator.free_memory()
        trainer = Trainer(config, accelerator, model, task)
        if fault is not None:
            FAULTS[fault](trainer, plain)
        trainer.fit()


# The planted faults. Each changes a live trainer the way a real mistake would.


def wrong_scale_on_one_rank(trainer: Trainer, plain: torch.nn.Module) -> None:
    if trainer.rank == trainer.world_size - 1:
        trainer.engine.divides_by *= 1.01


def doubled_learning_rate(trainer: Trainer, plain: torch.nn.Module) -> None:
    set_rate = trainer.engine.set_learning_rate
    trainer.engine.set_learning_rate = lambda lr: set_rate(2 * lr)


def swapped_batch(trainer: Trainer, plain: torch.nn.Module) -> None:
    batch_of = trainer.micro_batches_of_step
    trainer.micro_batches_of_step = lambda step: batch_of({1: 2, 2: 1}.get(step, step))


def accumulation_not_divided(trainer: Trainer, plain: torch.nn.Module) -> None:
    loss_sum = trainer.loss_sum
    count = len(trainer.micro_batches_of_step(0))
    trainer.progress.window = type(trainer.progress.window)()
    trainer.loss_sum = lambda batch: loss_sum(batch) * count
    assert count > 1


def dropped_last_micro_batch(trainer: Trainer, plain: torch.nn.Module) -> None:
    batches_of = trainer.micro_batches_of_step
    trainer.micro_batches_of_step = lambda step: batches_of(step)[:-1]


def mean_of_means(trainer: Trainer, plain: torch.nn.Module) -> None:
    """Each micro-batch divides by its own targets, and the means are averaged: what `outputs.loss` and DDP do by themselves."""
    loss_sum = trainer.loss_sum
    shares = len(trainer.micro_batches_of_step(0)) * trainer.world_size
    trainer.progress.window = type(trainer.progress.window)()

    def local_mean(batch: dict[str, Any]) -> torch.Tensor:
        own = max(int((batch["labels"] != -100).sum()), 1)
        size = len(trainer.global_batch(trainer.progress.step))
        of_all = size - count_hidden(size)  # undoes the loop's own division
        return loss_sum(batch) / own * of_all / shares

    trainer.loss_sum = local_mean


def clipping_before_reduction(trainer: Trainer, plain: torch.nn.Module) -> None:
    """Each rank clips its own gradient to the maximum norm before the ranks are summed."""
    loss_sum, limit = trainer.loss_sum, 0.05

    def clipped(batch: dict[str, Any]) -> torch.Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        plain.zero_grad()
        torch.nn.functional.cross_entropy(plain.eval()(**inputs).logits, batch["labels"], reduction="sum").backward()
        gradients = [p.grad for p in plain.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / BATCH
        return loss_sum(batch) * min(1.0, limit / max(norm, 1e-12))

    trainer.loss_sum = clipped


FAULTS = {
    "wrong_scale_on_one_rank": wrong_scale_on_one_rank,
    "doubled_learning_rate": doubled_learning_rate,
    "swapped_batch": swapped_batch,
    "accumulation_not_divided": accumulation_not_divided,
    "dropped_last_micro_batch": dropped_last_micro_batch,
    "mean_of_means": mean_of_means,
    "clipping_before_reduction": clipping_before_reduction,
}
