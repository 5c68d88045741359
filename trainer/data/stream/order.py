"""Which row of which shard is the k-th sample of a source in an epoch: a pure function with nothing stored per sample.

Shards are permuted, then rows are shuffled inside windows of `window` consecutive shards, so that a reader has only so many
shards open at a time. Both are keyed permutations (a Feistel network on the index), so a seek costs the same anywhere and an epoch of
10^10 samples takes no array. Our own generator: numpy's streams differ between its versions. Golden values are in the tests.

Invariant: for every (seed, epoch), k -> (shard, row) is one to one onto all rows.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
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


@dataclass(frozen=True)
class SourceOrder:
    """The order of one source's rows. Cheap to make, cheap to ask: memory O(number of shards)."""

    rows: tuple[int, ...]
    """Of each shard."""
    seed: int
    window: int = 8
    """Shards whose rows are shuffled together."""

    def __post_init__(self) -> None:
        assert self.rows and min(self.rows) >= 0 and self.window > 0

    @property
    def num_rows(self) -> int:
        """Of one epoch."""
        return sum(self.rows)

    def epoch(self, number: int) -> "EpochOrder":
        """The order of one pass over the source; each pass has another."""
        return EpochOrder(self, number)


class EpochOrder:
    """One pass: the order of shards, cut into windows."""

    def __init__(self, source: SourceOrder, epoch: int) -> None:
        count = len(source.rows)
        shard_key, self.row_key = key_of(source.seed, epoch, 0), key_of(source.seed, epoch, 1)
        self.rows, self.window = source.rows, source.window
        self.shards = [permuted(place, count, shard_key) for place in range(count)]
        self.starts = [0, *accumulate(source.rows[shard] for shard in self.shards)]
        """Of each shard, in the epoch's order, and the end."""

    def at(self, k: int) -> tuple[int, int]:
        """(shard, row) of the epoch's k-th sample."""
        place = bisect_right(self.starts, k) - 1
        first = place // self.window * self.window
        last = min(first + self.window, len(self.shards))
        start, end = self.starts[first], self.starts[last]
        position = start + permuted(k - start, end - start, key_of(self.row_key, first))
        inside = bisect_right(self.starts, position) - 1
        return self.shards[inside], position - self.starts[inside]

    def shards_from(self, k: int) -> Sequence[int]:
        """Shards that samples from k on still need, in the order in which their windows come."""
        place = bisect_right(self.starts, k) - 1
        return self.shards[place // self.window * self.window :]
