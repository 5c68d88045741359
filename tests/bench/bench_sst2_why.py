"""Where the speed of LoRA on SST sentences comes from, and where that of two ranks goes: the recipe with one thing changed at a time.

    python tests/bench/bench_sst2_why.py                 # about 12 minutes on 2 cores
    python tests/bench/bench_sst2_why.py --samples 256 --rounds 1 --only parts

parts: one process, two threads; each contestant lacks one thing. torch.compile pays its compilation before the clock starts, and says how
long that took. ranks: one thread each; two processes that share nothing stand for what the machine gives, ranks that reduce nothing for
what waiting and reducing costs. The last line is one JSON object: contestant -> speed over the recipe's (parts), over one process (ranks).
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

import torch
from torch import nn

from tests.bench.timing import (
    LORA_SST2,
    Job,
    build_trainer,
    in_turn,
    median_ratio,
    print_ratios,
    samestep_seconds,
    samples_per_s,
    say,
    show,
    start_ranks_quietly,
    time_trainer,
)
from trainer.loop import Trainer
from trainer.model import dropout
from trainer.model.dropout import FastDropout

RECIPE, ONE = "the recipe", "1 process"


def main() -> None:
    """Measure, print tables, print ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000, help="training samples (default 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turn (default 3)")
    parser.add_argument("--only", nargs="+", choices=("parts", "ranks"), default=("parts", "ranks"))
    asked = parser.parse_args()
    start_ranks_quietly()
    ratios: dict[str, float | None] = {}
    for part, base, contestants in (("parts", RECIPE, parts), ("ranks", ONE, ranks)):
        if part in asked.only:
            values = in_turn(contestants(Job(LORA_SST2, asked.samples, 2 if part == "parts" else 1)), asked.rounds)
            show(f"{part}, {asked.samples:,} samples", values, "samples/s")
            ratios |= {name: median_ratio(values, name, base) for name in values if name != base}
    print_ratios(ratios)


def parts(job: Job) -> dict[str, Callable[[], float]]:
    """The recipe, and the recipe without one of the things that make it quick, or with one that might."""
    data = job.config.data.model_copy(update={"group_by_length": False})
    model = job.config.model.model_copy(update={"attention": "eager"})
    changes: dict[str, Callable[[Trainer], None]] = {
        "torch's dropout": use_torch_dropout,
        "AdamW not fused": use_plain_adamw,
        "torch.compile": use_compile,
    }
    return {
        RECIPE: samples_per_s(samestep_seconds, job),
        "batches of any length": samples_per_s(
            samestep_seconds, replace(job, config=job.config.model_copy(update={"data": data}))
        ),
        "attention=eager": samples_per_s(
            samestep_seconds, replace(job, config=job.config.model_copy(update={"model": model}))
        ),
        **{name: samples_per_s(changed_seconds, job, change) for name, change in changes.items()},
    }


def ranks(job: Job) -> dict[str, Callable[[], float]]:
    """One process, two ranks, two that reduce nothing, and two processes that know nothing of each other."""
    assert job.num_samples is not None
    half = replace(job, num_samples=job.num_samples // 2)

    def apart() -> float:
        one = samples_per_s(samestep_seconds, half)
        with ThreadPoolExecutor(2) as pool:
            return 2 * min(future.result() for future in [pool.submit(one), pool.submit(one)])

    return {
        ONE: samples_per_s(samestep_seconds, job),
        "2 ranks, ddp": samples_per_s(samestep_seconds, job, backend="ddp"),
        "2 ranks that do not reduce": samples_per_s(changed_seconds, job, reduce_nothing, backend="ddp"),
        "2 processes apart": apart,
    }


# On every rank


def changed_seconds(job: Job, change: Callable[[Trainer], None]) -> float:
    """Seconds for one epoch of a trainer in which something was changed."""
    trainer = build_trainer(job)
    change(trainer)
    return time_trainer(trainer)


def use_torch_dropout(trainer: Trainer) -> None:
    """Masks drawn by torch, in the layers and in attention."""
    for module in list(trainer.engine.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, FastDropout):
                setattr(module, name, nn.Dropout(child.p))
    trainer.engine.model.config._attn_implementation = "sdpa"


def use_plain_adamw(trainer: Trainer) -> None:
    """torch's default AdamW."""
    for group in trainer.engine.optimizer.param_groups:
        group["fused"] = False


def use_compile(trainer: Trainer) -> None:
    """Compiled for any shape; an epoch goes before the clock starts. Without our draws: dynamo (torch 2.13) traces numpy's wrongly."""
    dropout.draw_levels = torch.compiler.disable(dropout.draw_levels)
    trainer.engine.model = torch.compile(trainer.engine.model, dynamic=True)
    began = time.perf_counter()
    time_trainer(trainer)
    say(f"compiling, and an epoch: {time.perf_counter() - began:.0f} s")


def reduce_nothing(trainer: Trainer) -> None:
    """Every micro-batch as if it were not the step's last; ranks then move apart, which the time does not depend on."""
    ddp = trainer.engine.model
    trainer.engine.micro_batch = lambda *, last: ddp.no_sync()  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
