"""Who reads the same tokens in bench_stream.py: a numpy memmap, samestep, litdata, datatrove, HF Parquet and Arrow.

Each starts an iterator over int64 batches of (BATCH, LENGTH). Tokens are uint16 wherever a format has it. A peer that is not installed, or
cannot write or read, is left out, and why is said.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler

from tests.bench.timing import say
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.shards import DatasetWriter, Tokenizer

LENGTH, BATCH, VOCABULARY = 2048, 8, 32_000
TOKENS = 40_000_000
MEAN = 720
"""Tokens of a document."""
Batches = Iterator[Any]


def make_tokens(folder: Path) -> None:
    """The tokens as samestep's dataset, one raw file, datatrove's, Parquet, Arrow and litdata's."""
    rng = np.random.default_rng(0)
    lengths = document_lengths(TOKENS // MEAN)
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


def document_lengths(count: int) -> np.ndarray:
    """Lognormal, at most 2048, of mean MEAN then."""
    lengths = np.random.default_rng(1).lognormal(6.287, 0.9, count).astype(np.int64)
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
        "    writer.add_item(number, torch.from_numpy(np.array(row)))\n"
        "writer.done()\n"
        "writer.merge()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        say(f"litdata could not write its chunks, and is left out: {done.stderr.strip().splitlines()[-1]}")


def readers(folder: Path) -> dict[str, Callable[[], Batches]]:
    """Contestants: each starts an iterator over int64 batches of (BATCH, LENGTH)."""
    found: dict[str, Callable[[], Batches]] = {
        "memmap, 0 workers": lambda: memmap_batches(folder, 0),
        "memmap, 1 worker": lambda: memmap_batches(folder, 1),
        "samestep, plain": lambda: own_batches(folder, isolate=False, packing="concat"),
        "samestep, packed": lambda: own_batches(folder, isolate=True, packing="best_fit"),
        "HF Parquet, streaming": lambda: parquet_batches(folder),
        "HF Arrow": lambda: arrow_batches(folder),
    }
    peers = {"litdata": litdata_batches, "datatrove": datatrove_batches}
    for name, make in peers.items():
        if importlib.util.find_spec(name) is None:
            say(f"{name} is not installed, and is left out: bash launch/setup.sh --bench")
        elif name != "litdata" or (folder / "litdata/index.json").exists():  # else its writer has said why not
            found[name] = lambda make=make: make(folder)
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
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import TokensLoader

    while True:
        dataset = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=LENGTH), shuffle=True)
        for rows in StreamingDataLoader(dataset, batch_size=BATCH):
            yield rows.to(torch.int64)


def datatrove_batches(folder: Path) -> Batches:
    """datatrove's token files."""
    from datatrove.utils.dataset import DatatroveFolderDataset

    dataset = DatatroveFolderDataset(str(folder / "datatrove"), seq_len=LENGTH - 1, token_size=2, shuffle=True)
    while True:
        yield from (batch["input_ids"] for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH))
