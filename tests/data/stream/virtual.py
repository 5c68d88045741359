"""Datasets of any number of shards that take no room, to start a run on for real: what a start reads of them is there, and nothing else.

A shard is one of a few sparse files of 64 MB with document ends of its own. The catalog and the row counts are the files that a first
start would have left, written by its own functions; the plans are made by a first start. Measured in a process of its own.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.stream.catalog import catalog_words, stamp_of
from trainer.data.stream.plans import digest_of, write_words
from trainer.data.stream.shards import BLOCK, SHARD_BYTES, DatasetWriter, Shard, Tokenizer, hash_bytes
from trainer.data.stream.source import Source, StreamSettings

ROOT = Path(__file__).resolve().parents[3]
VARIANTS, LENGTH = 4, 2048
CONTENT = '{"model": "none"}'
TOKENIZER = Tokenizer(sha256="", vocabulary=32_000, eos=0)

START = """
import json, sys, time
from pathlib import Path
import numpy as np
from trainer.config import ModelConfig, RunConfig, StreamData, TrainConfig
from trainer.data.batches import micro_batches
from trainer.data.stream.open import open_streams

folder, sample, batch, rank, ranks, steps = sys.argv[1], *map(int, sys.argv[2:])
sources = sorted(str(found) for found in Path(folder).glob("source-*"))
data = StreamData(sources=sources, weights=(7, 2, 1)[: len(sources)], validation=f"{folder}/validation", sequence_length=2048,
                  cache=folder)
config = RunConfig(name="virtual", model=ModelConfig(source="none", task="clm", init="random"), data=data,
                   train=TrainConfig(max_steps=steps, global_batch_size=batch, metric="loss"))

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here, not with what the parent process had
before, began = memory("VmRSS"), time.perf_counter()
streams = open_streams(config)
identity = streams.train.identity
(own,) = micro_batches(np.arange(sample, sample + batch), rank, ranks, None)
rows = streams.train.batch(own.tolist())
seconds = time.perf_counter() - began
assert rows["input_ids"].shape == (len(own), 2048)
print(json.dumps({"seconds": seconds, "mib": (memory("VmHWM") - before) / 1024, "identity": identity, "rows": streams.train.rows}))
"""


def virtual_datasets(folder: Path, shards: tuple[int, ...]) -> None:
    """Sources of so many shards each, 15,600 rows of 2,048 tokens a shard, and a small validation set."""
    for number, count in enumerate(shards):
        virtual_dataset(folder / f"source-{number}", folder / "plans", count)
    tokenizer = TOKENIZER.model_copy(update={"sha256": sha256_of(CONTENT)})
    writer = DatasetWriter(folder / "validation", tokenizer)
    writer.add(np.ones(4 * LENGTH, np.uint16))
    writer.finish()


def virtual_dataset(folder: Path, plans: Path, count: int) -> None:
    """One source, as a first start leaves it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(CONTENT)
    shards = [sparse_shard(folder, number) for number in range(VARIANTS)]
    which = np.arange(count) % VARIANTS
    dataset_id = hash_bytes(f"{folder.name} {count}".encode())
    (folder / "manifest.json").write_text(json.dumps({"shards": "not read", "dataset_id": dataset_id}))
    stamp = stamp_of(folder / "manifest.json")
    assert stamp is not None
    facts = {
        "dataset_id": dataset_id,
        "dtype": "uint16",
        "tokenizer": TOKENIZER.model_dump() | {"sha256": sha256_of(CONTENT)},
    }
    records = [json.dumps(facts).encode(), *(shard.model_dump_json().encode() for shard in shards)]
    sizes = np.array([len(record) for record in records])
    places = np.concatenate([[0], which + 1])
    columns = [(np.cumsum(sizes) - sizes)[places], sizes[places], np.array([digest_of(one) for one in records])[places]]
    tokens = np.array([shard.tokens for shard in shards])[which]
    write_words(plans / f"{dataset_id}.shards", catalog_words(stamp, tokens, columns), b"".join(records))
    source = Source(folder, StreamSettings(LENGTH, "best_fit"), 0, plans)
    rows = np.array([source.plan(number).num_rows for number in range(VARIANTS)])
    write_words(plans / f"{dataset_id}-best_fit-{LENGTH}-1.rows", rows[which])


def sparse_shard(folder: Path, number: int) -> Shard:
    """64 MB of zeros that take no room, with documents of lognormal lengths, mean about 720."""
    name, tokens = f"shard-{number}", SHARD_BYTES // 2
    with (folder / f"{name}.bin").open("wb") as file:
        file.truncate(SHARD_BYTES)
    lengths = np.random.default_rng([number, *folder.name.encode()]).lognormal(6.287, 0.9, tokens // 500)
    ends = np.cumsum(np.clip(lengths.astype(np.int64), 1, LENGTH))
    ends = np.append(ends[ends < tokens], tokens).astype("<u8")
    (folder / f"{name}.ends").write_bytes(ends.tobytes())
    full, rest = divmod(SHARD_BYTES, BLOCK)
    blocks = [hash_bytes(bytes(BLOCK))] * full + ([hash_bytes(bytes(rest))] if rest else [])
    ends_hash = hash_bytes(ends.tobytes())
    return Shard(
        file=f"{name}.bin", tokens=tokens, documents=len(ends), ends=f"{name}.ends", blocks=blocks, ends_hash=ends_hash
    )


def sha256_of(text: str) -> str:
    """Of a text, as a manifest states a tokenizer's."""
    return hashlib.sha256(text.encode()).hexdigest()


def started(folder: Path, sample: int, *, batch: int, rank: int, ranks: int) -> dict[str, Any]:
    """A start in a fresh process that goes on at a sample: seconds and MiB until this rank's first batch is there."""
    arguments = [str(number) for number in (sample, batch, rank, ranks, sample // batch + 1000)]
    done = subprocess.run(
        [sys.executable, "-c", START, str(folder), *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
