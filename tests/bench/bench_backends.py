"""Speed and memory of all six backends side by side: full fine-tuning of MiniLM on SST sentences.

    python tests/bench/bench_backends.py                 # 2 processes, one thread each; single: 1 process, 1 thread
    python tests/bench/bench_backends.py --samples 256 --rounds 1

The global batches are the same for all. Memory is the largest of all ranks, during the timed steps: resident memory on a CPU (what
was freed before is given back first), allocated device memory on a GPU. The last line is one JSON object of ratios; speeds are
medians over rounds.
"""

import argparse
import ctypes
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.timing import (
    LORA_SST2,
    Job,
    Values,
    build_trainer,
    in_turn,
    median_ratio,
    print_ratios,
    start_ranks_quietly,
    time_trainer,
)
from tests.rank_pool import BACKENDS, run_ranks
from trainer.config import FullConfig, OptimConfig, RunConfig

MIB = 2**20


def main() -> None:
    """Measure, print the table, print ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024, help="training samples (default 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turn (default 3)")
    asked = parser.parse_args()
    start_ranks_quietly()
    memory: Values = {backend: [] for backend in BACKENDS}
    speed = measure(Job(config(), asked.samples, 1), asked.rounds, memory)
    show_backends(speed, memory)
    pairs = [("ddp", "single"), *((backend, "ddp") for backend in BACKENDS[2:])]
    ratios = {f"{of}_vs_{over}": median_ratio(speed, of, over) for of, over in pairs}
    print_ratios(ratios | {f"{of}_memory_vs_{over}": median_ratio(memory, of, over) for of, over in pairs})


def config() -> RunConfig:
    """The recipe's model and data, every weight trained."""
    return LORA_SST2.model_copy(update={"method": FullConfig(), "optim": OptimConfig(peak_lr=2e-5)})


def measure(job: Job, rounds: int, memory: Values) -> Values:
    """Samples per second of each backend; peak MiB per rank are added to `memory`."""

    def run(backend: str) -> float:
        world_size = 1 if backend == "single" else 2
        ranks = run_ranks(seconds_and_mib, backend, world_size, args=(job,), timeout_s=1800)
        memory[backend].append(max(mib for _, mib in ranks))
        assert job.num_samples is not None
        return job.num_samples / max(seconds for seconds, _ in ranks)

    return in_turn({backend: partial(run, backend) for backend in BACKENDS}, rounds)


def show_backends(speed: Values, memory: Values) -> None:
    """One line a backend: medians over rounds."""
    table = Table(title="Full fine-tuning, one thread a rank", title_justify="left")
    for heading in ("backend", "ranks", "samples/s", "peak memory per rank"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for backend in speed:
        mib = statistics.median(memory[backend])
        ranks = "1" if backend == "single" else "2"
        table.add_row(backend, ranks, f"{statistics.median(speed[backend]):.1f}", f"{mib:,.0f} MiB")
    Console(width=120).print(table)


# On every rank


def seconds_and_mib(job: Job) -> tuple[float, float]:
    """Time of one epoch, and this rank's peak memory during it and its warm-up."""
    trainer = build_trainer(job)
    device = trainer.accelerator.device
    reset_peak(device)
    seconds = time_trainer(trainer)
    return seconds, peak_bytes(device) / MIB


def reset_peak(device: torch.device) -> None:
    """Start measuring. On a CPU: glibc gives back what is free, and Linux forgets the peak so far (proc(5), clear_refs)."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
