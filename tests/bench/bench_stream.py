"""Reading, packing, resuming and making token datasets, against what else there is.

    python tests/bench/bench_stream.py               # about 4 minutes; `bash launch/setup.sh --bench` installs the peers
    python tests/bench/bench_stream.py --rounds 1 --seconds 1

All read the same tokens, warm, into int64 batches of one shape, in turn, in one process with one thread (workers where a peer needs
them). Baseline: np.memmap rows cast to int64, the faster of torch's DataLoader with 0 and 1 workers. samestep reads with verification on
(the first pass hashes; warm passes have done so). cpu_per_token counts the CPU time of all processes. A peer that is not installed is left
out, and said so. The last line is one JSON object; ratios are medians over rounds of throughputs, so more than 1 is faster.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import BatchSampler, RandomSampler

from tests.bench.timing import in_turn, median_ratio, print_ratios, say
from trainer.data.assets import stdlib_files
from trainer.data.stream.packing import make_plan
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.shards import DatasetWriter, Tokenizer
from trainer.data.stream.stdlib import END_OF_TEXT, stdlib_dataset
from trainer.data.stream.tokenize import tokenize

LENGTH, BATCH, VOCABULARY = 2048, 8, 32_000
TOKENS = 40_000_000
Batches = Iterator[Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = make_tokens(folder)
        contestants = {name: reader for name, reader in readers(folder).items() if reader is not None}
        cpu: dict[str, list[float]] = {name: [] for name in contestants}
        speeds = in_turn(
            {name: timed(name, make, asked.seconds, cpu) for name, make in contestants.items()}, asked.rounds
        )
        base = max(("memmap, 0 workers", "memmap, 1 worker"), key=lambda name: statistics.median(speeds[name]))
        show(speeds, cpu, base)
        packing = packing_figures(lengths)
        resumed = resume_figures()
        print_ratios(
            {
                "plain_vs_memmap": median_ratio(speeds, "samestep, plain", base),
                "packed_vs_memmap": median_ratio(speeds, "samestep, packed", base),
                "cpu_per_token_vs_memmap": median_ratio(cpu, "samestep, packed", base),
                "vs_litdata": median_ratio(speeds, "samestep, plain", "litdata"),
                **packing,
                **resumed,
                "tokenize_vs_tokenizer": tokenize_figure(folder, asked.rounds),
            }
        )


def make_tokens(folder: Path) -> np.ndarray:
    """The tokens as samestep's dataset, one raw file, datatrove's, Parquet, Arrow and litdata's. Returns the documents' lengths."""
    rng = np.random.default_rng(0)
    lengths = document_lengths(TOKENS // 700)
    writer = DatasetWriter(folder / "tokens", Tokenizer(sha256="0" * 64, vocabulary=VOCABULARY, eos=0))
    for length in lengths:
        writer.add(rng.integers(1, VOCABULARY, length, dtype=np.uint16))
    manifest = writer.finish()
    parts = [np.fromfile(folder / "tokens" / shard.file, "<u2") for shard in manifest.shards]
    tokens = np.concatenate(parts)
    rows = tokens[: len(tokens) // LENGTH * LENGTH]
    rows.tofile(folder / "rows.bin")
    (folder / "datatrove").mkdir()
    rows.tofile(folder / "datatrove" / "000_tokens.ds")
    np.cumsum(lengths).astype("<u8").tofile(folder / "datatrove" / "000_tokens.ds.index")
    write_parquet(folder, rows.reshape(-1, LENGTH))
    if importlib.util.find_spec("litdata"):
        write_litdata(folder, rows.reshape(-1, LENGTH))
    return lengths


def document_lengths(count: int) -> np.ndarray:
    """Lognormal, mean about 720, at most 2048."""
    lengths = np.random.default_rng(1).lognormal(6.2, 0.9, count).astype(np.int64)
    return np.clip(lengths, 1, 2048)


def write_parquet(folder: Path, rows: np.ndarray) -> None:
    """One list of uint16 a row, and the same as an Arrow dataset."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(rows.reshape(-1), pa.uint16())
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(flat, LENGTH)})
    pq.write_table(table, folder / "rows.parquet", row_group_size=1024)
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(folder / "arrow")


def write_litdata(folder: Path, rows: np.ndarray) -> None:
    """Chunks of litdata's TokensLoader, in a process of its own: it forks and prints."""
    np.save(folder / "rows.npy", rows)
    code = (
        "import sys, numpy as np, torch\n"
        "from litdata.streaming.writer import BinaryWriter\n"
        f"rows = np.load({str(folder / 'rows.npy')!r}, mmap_mode='r')\n"
        f"from litdata.streaming import TokensLoader\n"
        f"writer = BinaryWriter({str(folder / 'litdata')!r}, chunk_size={LENGTH * 2048}, item_loader=TokensLoader())\n"
        "for number, row in enumerate(rows):\n"
        "    writer.add_item(number, torch.from_numpy(row.astype('int32')))\n"
        "writer.done()\n"
        "writer.merge()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        say(f"litdata could not write its chunks, and is left out: {done.stderr.strip().splitlines()[-1]}")


def readers(folder: Path) -> dict[str, Callable[[], Batches] | None]:
    """Contestants: each starts an iterator over int64 batches of (BATCH, LENGTH)."""
    found: dict[str, Callable[[], Batches] | None] = {
        "memmap, 0 workers": lambda: memmap_batches(folder, 0),
        "memmap, 1 worker": lambda: memmap_batches(folder, 1),
        "samestep, plain": lambda: own_batches(folder, isolate=False, packing="concat"),
        "samestep, packed": lambda: own_batches(folder, isolate=True, packing="best_fit"),
        "HF Parquet, streaming": lambda: parquet_batches(folder),
        "HF Arrow": lambda: arrow_batches(folder),
    }
    peers = {"litdata": litdata_batches, "datatrove": datatrove_batches}
    for name, make in peers.items():
        is_ready = importlib.util.find_spec(name) and (name != "litdata" or (folder / "litdata/index.json").exists())
        if is_ready:
            found[name] = lambda make=make: make(folder)
        else:
            say(f"{name} is not installed, and is left out: bash launch/setup.sh --bench")
    return found


class MemmapRows(torch.utils.data.Dataset):
    """Rows of a raw file."""

    def __init__(self, path: Path) -> None:
        self.rows = np.memmap(path, "<u2", mode="r").reshape(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, ids: list[int]) -> torch.Tensor:
        """A batch by fancy index."""
        return torch.from_numpy(self.rows[ids].astype(np.int64))


def memmap_batches(folder: Path, workers: int) -> Batches:
    """The baseline."""
    rows = MemmapRows(folder / "rows.bin")
    sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=True)
    loader = torch.utils.data.DataLoader(rows, sampler=sampler, batch_size=None, num_workers=workers)
    while True:
        yield from loader


_streams: dict[tuple[bool, str], Stream] = {}


def own_batches(folder: Path, *, isolate: bool, packing: Any) -> Batches:
    """samestep's reader; verified blocks stay so from round to round, as in a run."""
    key = (isolate, packing)
    if key not in _streams:
        settings = StreamSettings(LENGTH, packing, isolate=isolate, max_epochs=10**6)
        _streams[key] = Stream([folder / "tokens"], settings, plan_folder=folder / "plans")
        for start in range(0, sum(_streams[key].rows), BATCH):  # a pass that verifies every block
            _streams[key].batch(range(start, start + BATCH))
    step = 0
    while True:
        yield {name: torch.from_numpy(array) for name, array in _streams[key].batch(range(step, step + BATCH)).items()}
        step += BATCH


def parquet_batches(folder: Path) -> Batches:
    """datasets' streaming of a Parquet file."""
    import datasets

    while True:
        stream = datasets.load_dataset(
            "parquet",
            data_files=str(folder / "rows.parquet"),
            split="train",
            streaming=True,
            cache_dir=str(folder / "hf"),
        )
        for batch in stream.with_format("numpy").iter(BATCH):
            yield torch.from_numpy(np.asarray(batch["input_ids"]).astype(np.int64))


def arrow_batches(folder: Path) -> Batches:
    """datasets' memory-mapped Arrow file, rows at random."""
    import datasets

    rows = datasets.load_from_disk(str(folder / "arrow")).with_format("numpy")
    rng = np.random.default_rng(0)
    while True:
        ids = rng.integers(0, len(rows), BATCH)
        yield torch.from_numpy(np.asarray(rows[ids.tolist()]["input_ids"]).astype(np.int64))


def litdata_batches(folder: Path) -> Batches:
    """litdata's StreamingDataset over token chunks, with its own loader."""
    from litdata import StreamingDataset
    from litdata.streaming import TokensLoader

    while True:
        dataset = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=LENGTH), shuffle=True)
        for rows in torch.utils.data.DataLoader(dataset, batch_size=BATCH):
            yield rows.to(torch.int64)


def datatrove_batches(folder: Path) -> Batches:
    """datatrove's token files."""
    from datatrove.utils.dataset import DatatroveFolderDataset

    dataset = DatatroveFolderDataset(str(folder / "datatrove"), seq_len=LENGTH - 1, token_size=2, shuffle=True)
    while True:
        yield from (batch["input_ids"] for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH))


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


def packing_figures(lengths: np.ndarray) -> dict[str, float]:
    """Documents packed per second on one core, and the padding, at the sizes of the specification."""
    lengths = document_lengths(300_000)
    ends = np.cumsum(lengths)
    speeds = []
    for _ in range(3):
        began = time.perf_counter()
        plan = make_plan(ends, 2048, "best_fit")
        speeds.append(len(lengths) / (time.perf_counter() - began))
    assert (plan.lengths <= 2048).all() and len(plan.lengths) == len(lengths), "a document that fits was cut"
    padding = 1 - int(plan.lengths.sum()) / (plan.num_rows * 2048)
    return {"packing_docs_per_s": round(statistics.median(speeds)), "padding": round(padding, 6)}


RESUME = """
import json, resource, time
from trainer.data.stream.mix import Mixture, Stage
from trainer.data.stream.order import SourceOrder
rows = [[31_000 + number % 97 for number in range(count)] for count in (20_000, 9_000, 4_000)]  # 10^9 rows of 64 MB shards
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
mixture = Mixture([Stage(0, (0.7, 0.2, 0.1))], seed=1)
sources = [SourceOrder(tuple(found), number, 8) for number, found in enumerate(rows)]
start = 700_000_000
for sample in range(start, start + 1024):
    source, k = mixture.at(sample)
    epoch, inside = divmod(k, sources[source].num_rows)
    sources[source].epoch(epoch).at(inside) if sample == start else None
    orders = globals().setdefault("orders", {})
    if (source, epoch) not in orders:
        orders[source, epoch] = sources[source].epoch(epoch)
    orders[source, epoch].at(inside)
seconds = time.perf_counter() - began
print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def resume_figures() -> dict[str, float]:
    """Seconds and MiB from nothing to the places of a global batch of 1,024 at sample 7 x 10^8 of 10^9, in a fresh process."""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", RESUME], capture_output=True, text=True, check=True, cwd=root)
    seconds, mib = json.loads(done.stdout)
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
    for heading in ("", "million tokens/s", "x baseline", "ns of CPU a token"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in speeds.items():
        ratio = median_ratio(speeds, name, base)
        table.add_row(name, f"{statistics.median(values):,.1f}", f"{ratio:.2f}", f"{statistics.median(cpu[name]):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
