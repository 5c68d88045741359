"""What the benchmarks share: contestants in turn, steps timed alike, ratios of one run.

Every measurement is a function that runs on fresh ranks (tests/rank_pool.py), so that no contestant inherits another's memory,
thread pools or library state. Invariant: a ratio is the median over rounds of the ratios within one round.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from recipes.lora_sst2 import DEFAULTS
from tests.rank_pool import PRELOAD, run_ranks
from trainer.backend import build_accelerator
from trainer.config import RunConfig
from trainer.data.classify import ClassificationSet, Split, build_data
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.task.classification import ClassificationTask

LORA_SST2: RunConfig = DEFAULTS.model_copy(update={"train": DEFAULTS.train.model_copy(update={"resume": "never"})})
"""The recipe as the benchmarks measure it: a run of its name that is finished, such as the demo's, does not stop them."""

WARM_UP = 5
"""Steps that every contestant takes before the clock starts."""

Values = dict[str, list[float]]
"""What was measured, by contestant, one value a round."""


@dataclass(frozen=True)
class Job:
    """One measurement: what every rank needs to know."""

    config: RunConfig
    num_samples: int | None
    """Training samples, the first of the split. None: all."""
    num_threads: int
    """Of each rank."""


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Values:
    """Measure every contestant once a round; every other round in reverse order, so that a drift of the machine cancels."""
    values: Values = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names if number % 2 == 0 else names[::-1]:
            values[name].append(contestants[name]())
            say(f"round {number + 1}/{rounds}  {name}: {values[name][-1]:,.1f}")
    return values


def median_ratio(values: Values, of: str, over: str) -> float | None:
    """`of` divided by `over` within each round, the median of that; None where one was not measured."""
    if of not in values or over not in values:
        return None
    pairs = zip(values[of], values[over], strict=True)
    return round(statistics.median(one / other for one, other in pairs), 4)


def samples_per_s(measure: Callable[..., float], job: Job, *args: Any, backend: str = "single") -> Callable[[], float]:
    """A contestant: `measure` on fresh ranks, the slowest rank's seconds turned into samples per second."""
    world_size = 1 if backend == "single" else 2

    def run() -> float:
        assert job.num_samples is not None
        return job.num_samples / max(run_ranks(measure, backend, world_size, args=(job, *args), timeout_s=3600))

    return run


def time_steps(step: Callable[[int], object], num_steps: int, device: torch.device) -> float:
    """Seconds that steps 0 to num_steps - 1 take after WARM_UP steps. Collective where there are ranks."""
    for number in range(WARM_UP):
        step(number % num_steps)
    synchronize(device)
    started = time.perf_counter()
    for number in range(num_steps):
        step(number)
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for this rank's device and for the other ranks."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def show(title: str, values: Values, unit: str) -> None:
    """A table: one line a contestant, one column a round."""
    table = Table(title=f"{title} ({unit})", title_justify="left")
    table.add_column("")
    rounds = max(map(len, values.values()), default=0)
    for heading in (*(f"round {number + 1}" for number in range(rounds)), "median"):
        table.add_column(heading, justify="right")
    for name, row in values.items():
        table.add_row(name, *(f"{value:,.1f}" for value in (*row, statistics.median(row))))
    Console(width=120).print(table)


def print_ratios(ratios: Mapping[str, float | None]) -> None:
    """The last line of every benchmark."""
    print(json.dumps(dict(ratios)), flush=True)


def say(message: str) -> None:
    """A line of progress on standard output."""
    print(message, flush=True)


def start_ranks_quietly() -> None:
    """Start the forkserver of tests/rank_pool.py with its standard output on standard error: DeepSpeed prints when imported."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    screen = os.dup(1)
    os.dup2(2, 1)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.dup2(screen, 1)
        os.close(screen)


# On every rank


def set_up(job: Job) -> tuple[Accelerator, ClassificationSet]:
    """The accelerator, and the data cut to the job's samples."""
    torch.set_num_threads(job.num_threads)
    accelerator = build_accelerator(job.config)
    data = build_data(job.config, accelerator)
    return accelerator, replace(data, train=first_samples(data.train, job.num_samples or len(data.train)))


def first_samples(split: Split, count: int) -> Split:
    """The first `count` samples of a split."""
    assert count <= len(split), (count, len(split))
    end = split.offsets[count]
    types = None if split.token_types is None else split.token_types[:end]
    return Split(split.tokens[:end], split.offsets[: count + 1], types, split.labels[:count])


def samestep_seconds(job: Job) -> float:
    """Seconds for one epoch of trainer.loop.Trainer."""
    return time_trainer(build_trainer(job))


def build_trainer(job: Job) -> Trainer:
    """Everything as the recipe does it, before `fit`."""
    accelerator, data = set_up(job)
    return Trainer(
        job.config,
        accelerator,
        build_model(job.config, data.label_names, accelerator),
        ClassificationTask(job.config, data),
    )


def time_trainer(trainer: Trainer) -> float:
    """Seconds for the steps of one epoch, in training mode."""
    trainer.engine.model.train()

    def step(number: int) -> None:
        trainer.progress.step = number
        trainer.train_step()

    return time_steps(step, trainer.task.steps_per_epoch, trainer.accelerator.device)
