"""Reading, packing, resuming and making token datasets, against what else there is.

    python tests/bench/bench_stream.py               # about 4 minutes; `bash launch/setup.sh --bench` installs the peers
    python tests/bench/bench_stream.py --rounds 1 --seconds 1

All read the same tokens, warm, into int64 batches of one shape, in turn, in one process with one thread (workers where a peer needs
them). Baseline: np.memmap rows cast to int64, the faster of torch's DataLoader with 0 and 1 workers. samestep reads with verification on
(the first pass hashes; warm passes have done so). cpu_per_token counts the CPU time of all processes. A peer that is not installed, or
cannot write, is left out, and why is said. The last line is one JSON object; ratios are medians over rounds of throughputs, so more than 1
is faster.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tests.bench.stream_readers import BATCH, LENGTH, MEAN, Batches, document_lengths, make_tokens, readers
from tests.bench.timing import in_turn, median_ratio, print_ratios, say
from tests.data.stream.virtual import started, virtual_datasets
from trainer.data.assets import stdlib_files
from trainer.data.stream.packing import make_plan, padding_of
from trainer.data.stream.shards import SHARD_BYTES
from trainer.data.stream.stdlib import END_OF_TEXT, stdlib_dataset
from trainer.data.stream.tokenize import tokenize

RESUME_SHARDS = (45_500, 13_000, 6_500)
"""Of three sources: 10^9 rows of 2,048 tokens, in shards of 64 MB."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument(
        "--only", choices=("read", "pack", "resume", "tokenize"), help="one part; the others are left out"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, float | None]]] = {
            "read": lambda: reading_figures(folder, asked.rounds, asked.seconds),
            "pack": packing_figures,
            "resume": lambda: resume_figures(folder, asked.rounds),
            "tokenize": lambda: {"tokenize_vs_tokenizer": tokenize_figure(folder, asked.rounds)},
        }
        chosen = parts if asked.only is None else {asked.only: parts[asked.only]}
        print_ratios({name: figure for measure in chosen.values() for name, figure in measure().items()})


def reading_figures(folder: Path, rounds: int, seconds: float) -> dict[str, float | None]:
    """Throughput and CPU time of all who read the same tokens."""
    make_tokens(folder)
    contestants = readers(folder)
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    speeds = in_turn({name: timed(name, make, seconds, cpu) for name, make in contestants.items()}, rounds)
    base = max(("memmap, 0 workers", "memmap, 1 worker"), key=lambda name: statistics.median(speeds[name]))
    show(speeds, cpu, base)
    return {
        "plain_vs_memmap": median_ratio(speeds, "samestep, plain", base),
        "packed_vs_memmap": median_ratio(speeds, "samestep, packed", base),
        "cpu_per_token_vs_memmap": median_ratio(cpu, "samestep, packed", base),
        "vs_litdata": median_ratio(speeds, "samestep, plain", "litdata"),
    }


def timed(name: str, make: Callable[[], Batches], seconds: float, cpu: dict[str, list[float]]) -> Callable[[], float]:
    """A contestant: million tokens per second after a warm-up; CPU nanoseconds per token are noted."""

    def run() -> float:
        batches = make()
        for _ in range(10):
            next(batches)
        began, cpu_began, tokens = time.perf_counter(), cpu_seconds(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            tokens += BATCH * LENGTH
        elapsed = time.perf_counter() - began
        del batches  # ends workers, whose CPU time then counts
        cpu[name].append((cpu_seconds() - cpu_began) / tokens * 1e9)
        return tokens / elapsed / 1e6

    return run


def cpu_seconds() -> float:
    """Of this process and those that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def packing_figures() -> dict[str, float | None]:
    """Documents packed per second on one core at the sizes of the specification, and the padding of a shard of 64 MB."""
    count = SHARD_BYTES // 2 // MEAN
    lengths = document_lengths(6 * count)
    shards = [np.cumsum(part) for part in np.split(lengths, 6)]
    speeds, plans = [], []
    for _ in range(3):
        began = time.perf_counter()
        plans = [make_plan(ends, LENGTH, "best_fit") for ends in shards]
        speeds.append(len(lengths) / (time.perf_counter() - began))
    assert sum(len(plan.lengths) for plan in plans) == len(lengths), "a document that fits was cut"
    together = padding_of([make_plan(np.cumsum(lengths), LENGTH, "best_fit")])
    say(
        f"packing: documents of mean {lengths.mean():.0f}; padding {padding_of(plans):.3%} in shards of {count:,} documents, "
        f"{together:.3%} of {len(lengths):,} at once"
    )
    return {"packing_docs_per_s": round(statistics.median(speeds)), "padding": round(padding_of(plans), 6)}


def resume_figures(folder: Path, rounds: int) -> dict[str, float | None]:
    """From nothing to the first batch at sample 7 x 10^8 of 10^9, in fresh processes: 4 rows, one of 1,024 ranks' share.

    All that a recipe does for its data: open three sources of 65,000 shards, whose catalogs, row counts and plans an earlier start has
    left, check the length of the run, digest the state, read and verify the rows. Not in it: the first start, which reads every manifest.
    """
    virtual_datasets(folder / "virtual", RESUME_SHARDS)
    place = {"batch": 4096, "rank": 511, "ranks": 1024}
    starts = [started(folder / "virtual", 7 * 10**8, **place) for _ in range(max(rounds, 3))]
    seconds, mib = (statistics.median(found[name] for found in starts) for name in ("seconds", "mib"))
    say(f"resume at sample 7 x 10^8 of {sum(starts[0]['rows']):,}: {seconds:.3f} s, {mib:.1f} MiB more at most")
    return {"resume_s": round(seconds, 4), "resume_mib": round(mib, 2)}


def tokenize_figure(folder: Path, rounds: int) -> float:
    """`samestep data tokenize` on all cores over the tokenizer's own batch call on all cores, on the standard library."""
    file = stdlib_dataset("asset:stdlib").parent / "tokenizer.json"
    names = [str(path) for path in stdlib_files()]
    cores = len(os.sched_getaffinity(0))
    texts = [Path(name).read_text(encoding="utf-8") for name in names]
    code = (
        "import json, sys, time, tokenizers\n"
        f"tokenizer = tokenizers.Tokenizer.from_file({str(file)!r})\n"
        f"texts = json.load(open({str(folder / 'texts.json')!r}))\n"
        "began = time.perf_counter(); tokenizer.encode_batch_fast(texts, add_special_tokens=False)\n"
        "print(time.perf_counter() - began)\n"
    )
    (folder / "texts.json").write_text(json.dumps(texts))
    ratios = []
    for number in range(max(rounds // 2, 1)):
        environ = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
        plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
        began = time.perf_counter()
        tokenize(names, folder / f"made-{number}", file, eos=END_OF_TEXT, workers=cores)
        own_s, plain_s = time.perf_counter() - began, float(plain.stdout)
        say(f"tokenize: {own_s:.1f} s with reading and writing, the tokenizer alone {plain_s:.1f} s")
        ratios.append(plain_s / own_s)
    return round(statistics.median(ratios), 4)


def show(speeds: dict[str, list[float]], cpu: dict[str, list[float]], base: str) -> None:
    """A line per contestant."""
    table = Table(title=f"rows of {LENGTH}, batches of {BATCH}, int64; baseline: {base}", title_justify="left")
    for heading in ("", "million tokens/s", "x baseline", "ns of CPU a token", "x baseline"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in speeds.items():
        ratios = [f"{median_ratio(found, name, base):.2f}" for found in (speeds, cpu)]
        table.add_row(
            name, f"{statistics.median(values):,.1f}", ratios[0], f"{statistics.median(cpu[name]):.2f}", ratios[1]
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
