"""Consecutive samples of a stream, worked out together: where each lies, and the pieces of documents that it is made of.

One sample at a time Python would cost more than the tokens do. Views into the shards are made once for a segment, and a batch takes its
slice of them. Local to the process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.shards import ShardReader
from trainer.data.stream.source import Source

Ints = NDArray[np.int64]
NOTHING: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Cut:
    """What some rows are made of, laid end to end; padding is a piece of zeros."""

    tokens: list[NDArray[Any]]
    """Of each piece."""
    positions: list[Ints]
    """Of each piece: from 0 on; none where documents see each other."""
    lasts: Ints
    """Place of each piece's last token, counted from the first row on; none where documents see each other."""
    held: list[int]
    """Tokens of each row that are no padding."""

    def after(self, before: "Cut", place: int) -> "Cut":
        """Both; these rows begin at `place`."""
        if not before.tokens:
            return self
        lasts = np.concatenate([before.lasts, self.lasts + place])
        return Cut(before.tokens + self.tokens, before.positions + self.positions, lasts, before.held + self.held)

    def document_ids(self, shape: tuple[int, int]) -> Ints:
        """(B, T) the piece that each token belongs to, counted in its row; -1 in padding."""
        numbers = np.repeat(np.arange(len(self.tokens)), [len(piece) for piece in self.tokens]).reshape(shape)
        numbers -= numbers[:, :1]
        numbers[np.arange(shape[1]) >= np.array(self.held)[:, None]] = -1
        return numbers


class Segment:
    """Some consecutive samples of all sources."""

    def __init__(self, places: Ints, sources: Sequence[Source], ramps: list[Ints], *, isolate: bool) -> None:
        """places: (4, N) source, epoch, shard and row of each. ramps: 0 to n - 1 for every n up to a row's length."""
        self.places, self.sources, self.ramps, self.isolate = places, sources, ramps, isolate
        self.num_samples = places.shape[1]
        self.length = len(ramps) - 1

    def cut(self, first: int, last: int) -> Cut:
        """Samples first to last - 1, verified. DataError for tokens that were changed."""
        start, end = self.bounds[first], self.bounds[last]
        if self.unverified:
            self.verify(start, end)
        if not self.isolate:
            return Cut(self.tokens[start:end], [], NOTHING, self.held[first:last])
        lasts = self.lasts[start:end] - first * self.length
        return Cut(self.tokens[start:end], self.positions[start:end], lasts, self.held[first:last])

    def verify(self, start: int, end: int) -> None:
        """Let the blocks that pieces start to end - 1 lie in be verified."""
        for piece in range(start, end):
            reader = self.readers[piece]
            if reader is not None:
                reader.verify_tokens(self.starts[piece], len(self.tokens[piece]))
        self.unverified = [reader for reader in self.unverified if reader.num_unverified]

    @cached_property
    def opened(self) -> list[tuple[Ints, ShardReader, Source, int]]:
        """(samples, reader, source, shard) of every shard that is needed."""
        numbers, epochs, shards = self.places[:3]
        _, firsts, members = np.unique(shards * len(self.sources) + numbers, return_index=True, return_inverse=True)
        found = []
        for group, first in enumerate(firsts.tolist()):
            source, shard = self.sources[numbers[first]], int(shards[first])
            found.append((np.flatnonzero(members == group), source.reader(shard, int(epochs[first])), source, shard))
        return found

    @cached_property
    def unverified(self) -> list[ShardReader]:
        """Readers with blocks that nobody has looked at; shrinks."""
        return [reader for _, reader, _, _ in self.opened if reader.num_unverified]

    @cached_property
    def _pieces(self) -> tuple[Ints, Ints, Ints, Ints]:
        """(shard, start, size) of every piece in the order of samples, shard -1 for padding; and how many pieces each sample has."""
        parts: list[tuple[Ints, ...]] = []
        for number, (mine, _, source, shard) in enumerate(self.opened):
            samples, starts, sizes = source.pieces(shard, self.places[3, mine])
            parts.append((mine[samples], np.full(len(starts), number), starts, sizes))
        sample, group, start, size = (np.concatenate(column) for column in zip(*parts, strict=True))
        padding = self.length - np.bincount(sample, size, self.num_samples).astype(np.int64)
        padded = np.flatnonzero(padding)
        sample = np.concatenate([sample, padded])
        group = np.concatenate([group, np.full_like(padded, -1)])
        start = np.concatenate([start, np.zeros_like(padded)])
        size = np.concatenate([size, padding[padded]])
        order = np.argsort(sample, kind="stable")
        counts = np.bincount(sample, minlength=self.num_samples)
        return group[order], start[order], size[order], counts

    @cached_property
    def bounds(self) -> list[int]:
        """The first piece of every sample, and the end."""
        return [0, *np.cumsum(self._pieces[3]).tolist()]

    @cached_property
    def starts(self) -> list[int]:
        """First token of every piece in its shard."""
        found: list[int] = self._pieces[1].tolist()
        return found

    @cached_property
    def readers(self) -> list[ShardReader | None]:
        """Of every piece; None for padding."""
        opened = [reader for _, reader, _, _ in self.opened]
        return [opened[group] if group >= 0 else None for group in self._pieces[0].tolist()]

    @cached_property
    def tokens(self) -> list[NDArray[Any]]:
        """Views of every piece's tokens."""
        arrays = [*(reader.array for _, reader, _, _ in self.opened), np.zeros(self.length, np.uint16)]
        group, start, size, _ = self._pieces
        pieces = zip(group.tolist(), start.tolist(), (start + size).tolist(), strict=True)
        return [arrays[which][begin:end] for which, begin, end in pieces]

    @cached_property
    def positions(self) -> list[Ints]:
        """0 to n - 1 for every piece of n tokens."""
        return [self.ramps[size] for size in self._pieces[2].tolist()]

    @cached_property
    def lasts(self) -> Ints:
        """Place of every piece's last token, counted from the segment's first row on."""
        return np.cumsum(self._pieces[2]) - 1

    @cached_property
    def held(self) -> list[int]:
        """Tokens of every sample that are no padding."""
        group, _, size, counts = self._pieces
        sample = np.repeat(np.arange(self.num_samples), counts)
        found: list[int] = (
            np.bincount(sample, np.where(group >= 0, size, 0), self.num_samples).astype(np.int64).tolist()
        )
        return found
