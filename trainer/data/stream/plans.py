"""What is worked out of a dataset once and kept between starts: packing plans, rows of every shard. Any process may make it.

Files are named by what decides them, safe to delete, and complete or absent: each begins with its hash, and one that is not whole is
made again. So none is synced, and a full or read-only folder costs only time.
"""

import hashlib
import secrets
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.packing import Plan
from trainer.data.stream.shards import BLOCK, hash_bytes

Ints = NDArray[np.int64]
HEADER = 2
"""Words before the others: their hash, their number."""


def load_or_make_plan(folder: Path | None, key: str, sequence_length: int, make: Callable[[], Plan]) -> Plan:
    """The plan of this key from `folder`, or made and kept there."""
    words = load_or_make_words(folder, f"{key}.plan", lambda: words_of(make()))
    rows, pieces = words[:2].tolist()
    row_starts, starts, lengths = np.split(words[2:], [rows + 1, rows + 1 + pieces])
    return Plan(row_starts, starts, lengths, sequence_length)


def words_of(plan: Plan) -> Ints:
    """A plan as numbers: how many rows, how many pieces, its three arrays."""
    return np.concatenate([[plan.num_rows, len(plan.starts)], plan.row_starts, plan.starts, plan.lengths])


def load_or_make_words(folder: Path | None, name: str, make: Callable[[], Ints]) -> Ints:
    """The numbers in a file of `folder`, or made and kept there. folder: None keeps nothing."""
    if folder is None:
        return make()
    found = read_words(folder / name)
    if found is None:
        found = make()
        write_words(folder / name, found)
    return found


def write_words(path: Path, words: Ints, more: bytes = b"") -> None:
    """One file of int64 and what else is to lie behind them: temporary, renamed. What cannot be written is left out."""
    body = words.astype("<i8")
    head = np.array([digest_of(body.data), len(body)], "<i8")
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # process numbers are not unique on a shared disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.writelines([head.tobytes(), body.tobytes(), more])
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)


def read_words(path: Path) -> Ints | None:
    """The numbers of a file; None where it is missing or they are damaged."""
    try:
        head = np.fromfile(path, "<i8", HEADER)
        if len(head) < HEADER or head[1] < 0:
            return None
        words = np.fromfile(path, "<i8", int(head[1]), offset=head.nbytes)
    except (OSError, MemoryError):
        return None
    return words if len(words) == head[1] and digest_of(words.data) == head[0] else None


def count_words(path: Path) -> int | None:
    """How many numbers a file holds, of which none is kept in memory; None where it is missing or they are damaged."""
    found = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            digest, count = struct.unpack("<2q", file.read(8 * HEADER))
            left = 8 * count
            while left > 0 and (block := file.read(min(left, BLOCK))):
                found.update(block)
                left -= len(block)
    except (OSError, struct.error):
        return None
    return count if left == 0 and int(found.hexdigest()[:15], 16) == digest else None


def digest_of(content: bytes | memoryview) -> int:
    """60 bits of a hash, which fit a word."""
    return int(hash_bytes(content)[:15], 16)
