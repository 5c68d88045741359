"""Consecutive samples of a stream, worked out together: where each lies, and the pieces of documents that it is made of.

One sample at a time Python would cost more than the tokens do: where each piece begins and ends is worked out once for a segment. A batch
joins its pieces as bytes and widens the whole, in half the time of np.concatenate, which casts piece by piece. No views are kept:
thousands of them set off the garbage collector, whose walk over a process with torch takes 30 ms. Local to the process.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.shards import ShardReader
from trainer.data.stream.source import Source

Ints = NDArray[np.int64]
NOTHING: Ints = np.zeros(0, np.int64)


class Cut(NamedTuple):
    """What some rows are made of, laid end to end; padding is a piece of zeros."""

    tokens: list[memoryview]
    """Of each piece, in the segment's type."""
    sizes: list[int]
    """Of each piece, in tokens."""
    lasts: Ints
    """Place of each piece's last token, counted from the first row on; none where documents see each other."""
    held: list[int]
    """Tokens of each row that are no padding."""

    def after(self, before: "Cut", place: int) -> "Cut":
        """Both; these rows begin at `place`."""
        if not before.tokens:
            return self
        lasts = np.concatenate([before.lasts, self.lasts + place])
        return Cut(before.tokens + self.tokens, before.sizes + self.sizes, lasts, before.held + self.held)

    def document_ids(self, shape: tuple[int, int]) -> Ints:
        """(B, T) the piece that each token belongs to, counted in its row; -1 in padding."""
        numbers = np.repeat(np.arange(len(self.sizes)), self.sizes).reshape(shape)
        numbers -= numbers[:, :1]
        numbers[np.arange(shape[1]) >= np.array(self.held)[:, None]] = -1
        return numbers


class Segment:
    """Some consecutive samples of all sources."""

    def __init__(
        self, places: Ints, sources: Sequence[Source], length: int, dtype: np.dtype[Any], *, isolate: bool
    ) -> None:
        """places: (4, N) source, epoch, shard and row of each. length: tokens of a row. dtype: of tokens."""
        self.places, self.sources, self.length, self.dtype, self.isolate = places, sources, length, dtype, isolate
        self.num_samples = places.shape[1]

    def cut(self, first: int, last: int) -> Cut:
        """Samples first to last - 1, verified. DataError for tokens that were changed."""
        start, end = self.bounds[first], self.bounds[last]
        if self.unverified:
            self.verify(start, end)
        lasts = self.lasts[start:end] - first * self.length if self.isolate else NOTHING
        return Cut(self.tokens(start, end), self.sizes[start:end], lasts, self.held[first:last])

    def tokens(self, start: int, end: int) -> list[memoryview]:
        """Of pieces start to end - 1, in `dtype`, to which a shard of a narrower type is widened."""
        ranges = zip(self.memories[start:end], self.begins[start:end], self.ends[start:end], strict=True)
        pieces = [memory[begin:last] for memory, begin, last in ranges]
        if not self.is_narrow:
            return pieces
        flags = self.is_narrow[start:end]
        return [widened(piece, self.dtype) if flag else piece for piece, flag in zip(pieces, flags, strict=True)]

    def verify(self, start: int, end: int) -> None:
        """Let the blocks that pieces start to end - 1 lie in be verified."""
        opened = [reader for _, reader, _, _ in self.opened]
        for piece, group in enumerate(self._pieces[0][start:end].tolist(), start):
            if group >= 0:
                opened[group].verify(self.begins[piece], self.ends[piece])
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
    def _pieces(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """(shard, start, size) of every piece in the order of samples, shard -1 for padding; of each sample: its pieces and its padding."""
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
        return group[order], start[order], size[order], counts, padding

    @cached_property
    def bounds(self) -> list[int]:
        """The first piece of every sample, and the end."""
        return [0, *np.cumsum(self._pieces[3]).tolist()]

    @cached_property
    def _widths(self) -> Ints:
        """Bytes of a token in every piece."""
        widths = [*(reader.dtype.itemsize for _, reader, _, _ in self.opened), self.dtype.itemsize]
        return np.array(widths)[self._pieces[0]]

    @cached_property
    def memories(self) -> list[memoryview]:
        """The file that every piece lies in, or zeros."""
        files = [
            *(reader.bytes.data for _, reader, _, _ in self.opened),
            memoryview(bytes(self.length * self.dtype.itemsize)),
        ]
        of_group = np.empty(len(files), object)
        of_group[:] = files
        found: list[memoryview] = of_group[self._pieces[0]].tolist()
        return found

    @cached_property
    def _begins(self) -> Ints:
        offsets = np.array([*(reader.shard.data_offset for _, reader, _, _ in self.opened), 0])
        begins: Ints = offsets[self._pieces[0]] + self._pieces[1] * self._widths
        return begins

    @cached_property
    def begins(self) -> list[int]:
        """First byte of every piece in its file."""
        found: list[int] = self._begins.tolist()
        return found

    @cached_property
    def ends(self) -> list[int]:
        """End of every piece in its file, in bytes."""
        found: list[int] = (self._begins + self._pieces[2] * self._widths).tolist()
        return found

    @cached_property
    def is_narrow(self) -> list[bool]:
        """Of every piece, whether its tokens take less than `dtype`; nothing where none does."""
        narrow = self._widths < self.dtype.itemsize
        return narrow.tolist() if narrow.any() else []

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of every piece."""
        found: list[int] = self._pieces[2].tolist()
        return found

    @cached_property
    def lasts(self) -> Ints:
        """Place of every piece's last token, counted from the segment's first row on."""
        return np.cumsum(self._pieces[2]) - 1

    @cached_property
    def held(self) -> list[int]:
        """Tokens of every sample that are no padding."""
        found: list[int] = (self.length - self._pieces[4]).tolist()
        return found


def widened(piece: memoryview, dtype: np.dtype[Any]) -> memoryview:
    """uint16 tokens as `dtype`."""
    return np.frombuffer(piece, "<u2").astype(dtype).view(np.uint8).data
