"""Which source the g-th sample of a mixture comes from, and its how-manieth it is: a pure function of the weights.

The sequence is cut into blocks. At every block's end the realised number of a source is its cumulative target, weight x position rounded
to whole samples and so within one of it; inside a block the labels are permuted. Nothing is replayed to seek: the count of a source
before a block is its cumulative target. Cumulative shares are rounded, not remainders ranked: ranking, done for every end alone, could
give a source less at one end than at the end before.

A period's last block ends with it, where the counts are exact if the weights are numbers that add up to it: the rows of each source, read
once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.order import key_of, permuted_many
from trainer.errors import ConfigError

BLOCK = 1024
"""Samples of a block, at least; weights are met to one sample at its end. Twice 1 / the smallest share, so that no target falls."""
SMALLEST_SHARE = 1e-4
ENDLESS = 2**62
"""Samples of a period that no run ends."""


@dataclass(frozen=True)
class Stage:
    """Weights that hold from one global sample on."""

    start: int
    """First sample."""
    weights: tuple[float, ...]
    """Of each source; they need not sum to 1."""


class Mixture:
    """Stages of weights over some sources. Local to the process; equal on all ranks."""

    def __init__(self, stages: Sequence[Stage], seed: int, *, period: int = ENDLESS) -> None:
        """stages: the first starts at 0. period: samples. ConfigError for weights that are negative, all zero or of another number."""
        check_stages(stages)
        self.stages, self.seed = tuple(stages), seed
        self.shares = tuple(normalised(stage.weights) for stage in stages)
        self.block = max(BLOCK, *(math.ceil(2 / share) for shares in self.shares for share in shares if share))
        self.period, self.blocks_of_period = period, -(-period // self.block)
        self.taken_before = self._taken_before_stages()

    def at(self, sample: int) -> tuple[int, int]:
        """(source, its running number from 0) of a global sample."""
        if len(self.shares[0]) == 1:
            return 0, sample
        stage = max(i for i, found in enumerate(self.stages) if found.start <= sample)
        inside = sample - self.stages[stage].start
        number, position = self._block_at(inside)
        labels, ranks = self._block(stage, number)
        source = int(labels[position])
        before = self.taken_before[stage][source] + targets(self.shares[stage], self._start(number))[source]
        return source, before + int(ranks[position])

    def span(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`at` of `count` consecutive global samples: (sources, their running numbers)."""
        if len(self.shares[0]) == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count)
        sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            sample = first + done
            stage = max(i for i, found in enumerate(self.stages) if found.start <= sample)
            next_start = self.stages[stage + 1].start if stage + 1 < len(self.stages) else first + count
            block, position = self._block_at(sample - self.stages[stage].start)
            size = self._start(block + 1) - self._start(block)
            length = min(count - done, size - position, next_start - sample)
            labels, ranks = (part[position : position + length] for part in self._block(stage, block))
            before = np.add(self.taken_before[stage], targets(self.shares[stage], self._start(block)))
            sources[done : done + length], numbers[done : done + length] = labels, before[labels] + ranks
            done += length
        return sources, numbers

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` global samples each source gives; by counting inside the last block only."""
        if samples == 0:
            return (0,) * len(self.shares[0])
        stage = max(i for i, found in enumerate(self.stages) if found.start < samples)
        number, position = self._block_at(samples - self.stages[stage].start)
        base = targets(self.shares[stage], self._start(number))
        inside = np.bincount(self._block(stage, number)[0][:position], minlength=len(base)).tolist()
        return tuple(self.taken_before[stage][source] + base[source] + inside[source] for source in range(len(base)))

    def _block_at(self, inside: int) -> tuple[int, int]:
        """(number of the block, place in it) of a stage's sample."""
        period, rest = divmod(inside, self.period)
        block, position = divmod(rest, self.block)
        return period * self.blocks_of_period + block, position

    def _start(self, number: int) -> int:
        """First sample of a stage's block."""
        period, block = divmod(number, self.blocks_of_period)
        return period * self.period + block * self.block

    def _taken_before_stages(self) -> tuple[tuple[int, ...], ...]:
        taken: list[tuple[int, ...]] = [(0,) * len(self.shares[0])]
        self.taken_before = tuple(taken)
        for following in self.stages[1:]:
            self.taken_before = (*taken, (0,) * len(self.shares[0]))
            taken.append(self.counts(following.start))
        return tuple(taken)

    @lru_cache(maxsize=8)  # noqa: B019  (a mixture lives as long as its run)
    def _block(self, stage: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each position of a block, and the position's rank among those of its source."""
        first, last = (targets(self.shares[stage], self._start(edge)) for edge in (number, number + 1))
        taken = np.subtract(last, first)
        size = int(taken.sum())
        order = permuted_many(np.arange(size), size, key_of(self.seed, stage, number))
        labels = np.repeat(np.arange(len(taken)), taken)[order]
        ranks = np.empty(size, np.int64)
        for source, count in enumerate(taken.tolist()):
            ranks[labels == source] = np.arange(count)
        return labels, ranks


def targets(shares: Sequence[Fraction], samples: int) -> tuple[int, ...]:
    """Whole samples of each source among the first `samples`: cumulative rounding of the cumulative shares.

    Source i gets round(S_i n) - round(S_(i-1) n), where S are cumulative shares: each within one of its share, and their sum exact.
    """
    edges = [0]
    total = Fraction(0)
    for share in shares:
        total += share
        edges.append(int(total * samples + Fraction(1, 2)))
    edges[-1] = samples
    return tuple(last - first for first, last in pairwise(edges))


def normalised(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Weights as exact shares of 1."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, and 4e-7 beside 6e-7 is not rounded away
    return tuple(weight / sum(exact) for weight in exact)


def check_stages(stages: Sequence[Stage]) -> None:
    """ConfigError for stages that cannot be followed."""
    if not stages or stages[0].start != 0 or list(stages) != sorted(stages, key=lambda stage: stage.start):
        raise ConfigError("data.stages: the first must start at sample 0, and each later than the one before")
    for stage in stages:
        is_finite = all(map(math.isfinite, stage.weights))
        if (
            len(stage.weights) != len(stages[0].weights)
            or not is_finite
            or min(stage.weights) < 0
            or sum(stage.weights) <= 0
        ):
            raise ConfigError(f"data.weights ({stage.weights}): one weight of 0 or more for each source, and not all 0")
        if any(0 < weight < SMALLEST_SHARE * sum(stage.weights) for weight in stage.weights):
            raise ConfigError(
                f"data.weights ({stage.weights}): none but 0 may be below {SMALLEST_SHARE:g} of their sum"
            )
