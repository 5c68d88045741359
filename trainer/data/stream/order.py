"""Which row of which shard is the k-th sample of a source in an epoch: a pure function with nothing stored per sample.

Shards are permuted, then rows are shuffled inside windows of `window` consecutive shards, so that a reader has only so many
shards open at a time. Both are keyed permutations (a Feistel network on the index), so a seek costs the same anywhere and an epoch of
10^10 samples takes no array. Our own generator: numpy's streams differ between its versions. Golden values are in the tests.

Invariant: for every (seed, epoch), k -> (shard, row) is one to one onto all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import mix_words

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
PART = 2**16  # numbers that are permuted at once: a million shards need no more memory meanwhile than these
ROUNDS = 4  # of the Feistel network: four make it a strong pseudorandom permutation (Luby and Rackoff, 1988)


def mix64(word: int) -> int:
    """SplitMix64's finalizer (Steele et al., OOPSLA 2014) on one 64-bit word."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def key_of(*parts: int) -> int:
    """One 64-bit key from several numbers; any change of any of them changes it."""
    state = 0
    for part in parts:
        state = mix64((state + part % 2**64 + GOLDEN_GAMMA) & MASK)
    return state


def permuted(index: int, count: int, key: int) -> int:
    """Where a keyed random permutation of 0..count-1 sends `index`: O(1), nothing stored.

    A Feistel network on the next even power of two, walked until it lands inside (fewer than four steps on average).
    """
    assert 0 <= index < count, (index, count)
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix64((right + key + turn * GOLDEN_GAMMA) & MASK) & mask)
        index = left << half | right
        if index < count:
            return index


def permuted_many(indices: NDArray[np.int64], count: int, key: int) -> NDArray[np.int64]:
    """`permuted` of many indices at once: the same numbers, a hundred times faster."""
    half = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64((key + turn * GOLDEN_GAMMA) & MASK) for turn in range(ROUNDS)]
    found = np.empty(len(indices), np.uint64)
    pending, values = np.arange(len(indices)), indices.astype(np.uint64)
    while len(pending):
        left, right = values >> half, values & mask
        for turn_key in keys:
            left, right = right, left ^ (mix_words(right + turn_key) & mask)
        values = left << half | right
        found[pending] = values
        outside = values >= np.uint64(count)
        pending, values = pending[outside], values[outside]
    return found.astype(np.int64)


@dataclass(frozen=True)
class SourceOrder:
    """The order of one source's rows. Cheap to make, cheap to ask: memory O(number of shards)."""

    rows: Sequence[int] | NDArray[np.int64]
    """Of each shard."""
    seed: int
    window: int = 8
    """Shards whose rows are shuffled together."""

    def __post_init__(self) -> None:
        assert len(self.rows) and np.min(self.rows) >= 0 and self.window > 0

    @property
    def num_rows(self) -> int:
        """Of one epoch."""
        return int(np.sum(self.rows))

    def epoch(self, number: int) -> "EpochOrder":
        """The order of one pass over the source; each pass has another."""
        return EpochOrder(self, number)


class EpochOrder:
    """One pass: the order of shards, cut into windows."""

    def __init__(self, source: SourceOrder, epoch: int) -> None:
        count = len(source.rows)
        shard_key, self.row_key = key_of(source.seed, epoch, 0), key_of(source.seed, epoch, 1)
        self.window = source.window
        parts = [np.arange(first, min(first + PART, count)) for first in range(0, count, PART)]
        self.shards = np.concatenate([permuted_many(part, count, shard_key) for part in parts])
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(source.rows, np.int64)[self.shards])])
        """Of each shard, in the epoch's order, and the end."""

    def at(self, k: int) -> tuple[int, int]:
        """(shard, row) of the epoch's k-th sample."""
        assert 0 <= k < self.starts[-1], k
        shards, rows = self.at_many(np.array([k]))
        return int(shards[0]), int(rows[0])

    def at_many(self, ks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of each of some samples; in time and memory of their number."""
        shards, rows = np.empty_like(ks), np.empty_like(ks)
        windows = (np.searchsorted(self.starts, ks, side="right") - 1) // self.window * self.window
        for first in np.unique(windows).tolist():
            mine = windows == first
            start, end = self.starts[first], self.starts[min(first + self.window, len(self.shards))]
            inside = permuted_many(ks[mine] - start, int(end - start), key_of(self.row_key, first))
            places = np.searchsorted(self.starts, start + inside, side="right") - 1
            shards[mine], rows[mine] = self.shards[places], start + inside - self.starts[places]
        return shards, rows

    def shards_from(self, shard: int) -> list[int]:
        """Shards from the window of `shard` on, in the order in which they are needed."""
        place = int(np.flatnonzero(self.shards == shard)[0])
        found: list[int] = self.shards[place // self.window * self.window :].tolist()
        return found
