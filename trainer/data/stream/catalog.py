"""The shards of a dataset, described one at a time: a manifest hashes every MiB, and no start can afford to read all of a large one.

10^9 rows of 2,048 tokens are 64,000 shards and 150 MB of manifest, which take a minute and gigabytes to read. It is read and checked
whole once; what it says is then kept beside the plans, named by the dataset's id. Later starts look whether the manifest is still the file
that it was, by its size and time, and read the descriptions of the shards they need. Local to the process.

Invariant: a description is what the manifest of that dataset id said; its hash is checked when it is read.
"""

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.plans import HEADER, count_words, digest_of, write_words
from trainer.data.stream.shards import MANIFEST, DatasetManifest, Shard, Strict, Tokenizer, read_manifest
from trainer.errors import DataError

Ints = NDArray[np.int64]
Stamp = tuple[str, int, int]
"""The dataset id that a manifest states, its bytes, and when it was written (ns)."""

STATED_ID = re.compile(rb'"dataset_id": "([0-9a-f]{32})"\s*}\s*$')
"""What a manifest ends with."""


class Facts(Strict):
    """A manifest without its shards."""

    dataset_id: str
    dtype: str
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Catalog:
    """What a reader needs of a manifest."""

    dataset_id: str
    dtype: str
    tokenizer: Tokenizer
    tokens: Ints
    """Of each shard."""
    shard: Callable[[int], Shard]
    """One shard by its number. DataError where its description was damaged."""

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return int(self.tokens.sum())


def open_catalog(folder: Path, kept: Path | None) -> Catalog:
    """Of the dataset in a folder. DataError as of `read_manifest`.

    kept: where earlier starts have left what they read; None: the manifest is read.
    """
    stamp = None if kept is None else stamp_of(folder / MANIFEST)
    if kept is None or stamp is None:
        return catalog_of(read_manifest(folder))
    path = kept / f"{stamp[0]}.shards"
    found = read_catalog(path, stamp)
    if found is None:
        manifest = read_manifest(folder)
        write_catalog(path, manifest, stamp)
        found = read_catalog(path, stamp) or catalog_of(manifest)
    return found


def catalog_of(manifest: DatasetManifest) -> Catalog:
    """Of a manifest that was read whole."""
    tokens = np.array([shard.tokens for shard in manifest.shards], np.int64)
    return Catalog(
        manifest.dataset_id, manifest.dtype, manifest.tokenizer, tokens, lambda number: manifest.shards[number]
    )


def stamp_of(path: Path) -> Stamp | None:
    """Of a manifest, without reading more than its end; None where there is none that states an id."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            file.seek(max(facts.st_size - 100, 0))
            end = STATED_ID.search(file.read())
    except OSError:
        return None
    return None if end is None else (end[1].decode(), facts.st_size, facts.st_mtime_ns)


def write_catalog(path: Path, manifest: DatasetManifest, stamp: Stamp) -> None:
    """Keep what a manifest says."""
    facts = Facts(dataset_id=manifest.dataset_id, dtype=manifest.dtype, tokenizer=manifest.tokenizer)
    records = [model.model_dump_json().encode() for model in (facts, *manifest.shards)]
    sizes = np.array([len(record) for record in records])
    columns = [np.cumsum(sizes) - sizes, sizes, np.array([digest_of(record) for record in records])]
    tokens = np.array([shard.tokens for shard in manifest.shards], np.int64)
    write_words(path, catalog_words(stamp, tokens, columns), b"".join(records))


def catalog_words(stamp: Stamp, tokens: Ints, columns: list[Ints]) -> Ints:
    """The numbers of a kept catalog: stamp, tokens of each shard, and of each description its first byte, bytes and hash.

    columns: these three; the first description is the dataset's own.
    """
    return np.concatenate([stamp[1:], tokens, np.column_stack(columns).ravel()])


def read_catalog(path: Path, stamp: Stamp) -> Catalog | None:
    """What was kept of the manifest of this stamp; None where there is nothing whole, or it is of another file. Holds the tokens alone."""
    count = count_words(path)
    if count is None:
        return None
    words = np.fromfile(path, "<i8", HEADER + 2 + (count - 5) // 4)[HEADER:]
    if tuple(words[:2].tolist()) != stamp[1:]:
        return None
    tokens = words[2:]

    def record(number: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(8 * (HEADER + len(words) + 3 * number))
                begin, size, digest = struct.unpack("<3q", file.read(24))
                file.seek(8 * (HEADER + count) + begin)
                found = file.read(size)
        except (OSError, struct.error, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; start again, it is made anew") from None
        if digest_of(found) != digest:
            raise DataError(f"{path} was damaged: the hash of a description differs; delete it, it is made anew")
        return found

    try:
        facts = Facts.model_validate_json(record(0))
    except DataError:
        return None
    return Catalog(
        facts.dataset_id,
        facts.dtype,
        facts.tokenizer,
        tokens,
        lambda number: Shard.model_validate_json(record(number + 1)),
    )
