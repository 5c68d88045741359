"""Which samples make up which global batch, and which rank gets which of them. Pure: numpy in, numpy out.

The order is a function of (lengths, batch size, seed, epoch) and of nothing else: any number of ranks and any micro-batch size see
the same global batches. Invariant: an epoch holds every sample exactly once.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

IGNORED = -100
"""Label of what is no target: padding samples, and whatever else must not count in loss or metrics."""

POOL_BATCHES = 50  # at most, sorted by length together: similar lengths inside a batch, and other company every epoch
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class GlobalBatches:
    """The global batches of a whole run, by step; the epoch at hand is kept."""

    def __init__(self, lengths: Ids, batch_size: int, seed: int, *, group_by_length: bool) -> None:
        """lengths: (N,) tokens per sample."""
        self.lengths, self.batch_size, self.seed, self.group_by_length = lengths, batch_size, seed, group_by_length
        self.per_epoch = math.ceil(len(lengths) / batch_size)
        self._kept = (-1, list[Ids]())  # epoch and its batches, replaced at once: a thread may read ahead

    def at(self, step: int) -> Ids:
        """Sample ids of 0-based `step`."""
        epoch, position = divmod(step, self.per_epoch)
        kept, batches = self._kept
        if epoch != kept:
            batches = epoch_batches(
                self.lengths, self.batch_size, self.seed, epoch, group_by_length=self.group_by_length
            )
            self._kept = (epoch, batches)
        return batches[position]


def epoch_batches(lengths: Ids, batch_size: int, seed: int, epoch: int, *, group_by_length: bool) -> list[Ids]:
    """The global batches of one epoch; the last, smaller one comes last. Inside a batch samples are sorted by length.

    lengths: (N,) tokens per sample. group_by_length puts samples of similar length together: shuffle, sort pools of
    POOL_BATCHES batches by length, cut, and shuffle the batches.
    """
    order = permutation(len(lengths), seed, epoch, 0)
    num_full = len(order) // batch_size
    # The smaller batch is drawn before sorting, or the longest samples would end every epoch.
    full, rest = order[: num_full * batch_size], order[num_full * batch_size :]
    if group_by_length and num_full:
        # At least four pools, or a small training set would meet in the same batches every epoch.
        pool = max(1, min(POOL_BATCHES, num_full // 4)) * batch_size
        full = np.concatenate([by_length(full[start : start + pool], lengths) for start in range(0, len(full), pool)])
    batches = list(full.reshape(num_full, batch_size)[permutation(num_full, seed, epoch, 1)])
    return [by_length(ids, lengths) for ids in (*batches, *([rest] if len(rest) else []))]


def by_length(ids: Ids, lengths: Ids) -> Ids:
    """The same ids, shortest first; ties keep their order."""
    return ids[np.argsort(lengths[ids], kind="stable")]


def rank_share(batch: Ids, rank: int, world_size: int) -> Ids:
    """What `rank` holds of a global batch: sample i of b belongs to rank floor(i * world_size / b)."""
    start, end = (-(-edge * len(batch) // world_size) for edge in (rank, rank + 1))  # rounded up
    return batch[start:end]


def micro_batches(batch: Ids, rank: int, world_size: int, micro_batch_size: int | None) -> list[Ids]:
    """A rank's share cut into micro-batches, as many on every rank; where a rank runs out, they are empty."""
    share, largest = rank_share(batch, rank, world_size), math.ceil(len(batch) / world_size)
    size = micro_batch_size or max(largest, 1)
    return [share[start : start + size] for start in range(0, max(largest, 1), size)]


def evaluation_batches(lengths: Ids, batch_size: int, world_size: int) -> list[Ids]:
    """All samples once, shortest first, in global batches of at most batch_size per rank."""
    order, size = np.argsort(lengths, kind="stable"), batch_size * world_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def permutation(count: int, *key: int) -> Ids:
    """A random order of 0..count-1, from our own counter-based generator: numpy's streams differ between its versions."""
    return np.argsort(random_words(count, *key), kind="stable")


def random_words(count: int, *key: int) -> NDArray[np.uint64]:
    """`count` 64-bit words that depend on `key` alone: SplitMix64 (Steele et al., OOPSLA 2014) at consecutive counters."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix_words(state + np.array([part % 2**64], np.uint64) + GOLDEN_GAMMA)
    counters = np.arange(1, count + 1, dtype=np.uint64)
    return mix_words(state + counters * GOLDEN_GAMMA)


def mix_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer on every word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
