"""Consecutive samples of a stream, worked out together: where each lies, and the pieces of documents that it is made of.

One sample at a time Python would cost more than the tokens do: where each piece begins and ends is worked out once for a segment. A batch
joins its pieces as bytes and widens the whole, in half the time of np.concatenate, which casts piece by piece. No views are kept:
thousands of them set off the garbage collector, whose walk over a process with torch takes 30 ms. Local to the process.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.shards import ShardReader
from trainer.data.stream.source import Source

Ints = NDArray[np.int64]
NOTHING: Ints = np.zeros(0, np.int64)
PADDING = -1
"""In the place of a shard: zeros, the last of `files`."""
CLOSED = memoryview(b"")
CLOSED.release()  # so that a slice of it is an error, not a row without tokens


class Cut(NamedTuple):
    """What some rows are made of, laid end to end; padding is a piece of zeros."""

    tokens: list[memoryview]
    """Of each piece, in the segment's type."""
    sizes: list[int]
    """Of each piece, in tokens."""
    lasts: Ints
    """Place of each piece's last token, counted from the first row on; none where documents see each other."""
    held: Ints
    """(B,) tokens of each row that are no padding."""
    is_padded: bool
    """Whether a row holds less than it could."""

    def after(self, before: "Cut", place: int) -> "Cut":
        """Both; these rows begin at `place`."""
        return Cut(
            before.tokens + self.tokens,
            before.sizes + self.sizes,
            np.concatenate([before.lasts, self.lasts + place]),
            np.concatenate([before.held, self.held]),
            before.is_padded or self.is_padded,
        )

    def document_ids(self, shape: tuple[int, int]) -> Ints:
        """(B, T) the piece that each token belongs to, counted in its row; -1 in padding."""
        numbers = np.repeat(np.arange(len(self.sizes)), self.sizes).reshape(shape)
        numbers -= numbers[:, :1]
        numbers[np.arange(shape[1]) >= self.held[:, None]] = -1
        return numbers


EMPTY = Cut([], [], NOTHING, NOTHING, is_padded=False)


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
        groups, begins, ends, sizes = self.pieces[:, start:end].tolist()
        if not self.pending.isdisjoint(groups):
            self.prepare(first, groups, begins, ends)
        files, narrow = self.files, self.narrow
        tokens = [files[group][begin:stop] for group, begin, stop in zip(groups, begins, ends, strict=True)]
        if narrow:  # widened to the type of the others
            tokens = [
                widened(piece, self.dtype) if group in narrow else piece
                for piece, group in zip(tokens, groups, strict=True)
            ]
        lasts = self.lasts[start:end] - first * self.length if self.isolate else NOTHING
        return Cut(tokens, sizes, lasts, self.held[first:last].copy(), is_padded=PADDING in groups)

    def prepare(self, first: int, groups: list[int], begins: list[int], ends: list[int]) -> None:
        """Let the shards that these pieces of samples from `first` on lie in be there and open, and their blocks verified."""
        for group, begin, end in zip(groups, begins, ends, strict=True):
            if group in self.pending:
                reader = self.readers.get(group) or self.open(group, first)
                reader.verify(begin, end)
                if not reader.num_unverified:
                    self.pending.remove(group)

    def open(self, group: int, first: int) -> ShardReader:
        """Only when needed, and until its last sample: a segment may be more shards than a process may open, or a disk may hold."""
        self.close([other for other in self.readers if self.shards[other][0][-1] < first])
        _, source, shard, epoch = self.shards[group]
        self.readers[group] = reader = source.reader(shard, epoch)
        self.files[group] = reader.bytes.data
        return reader

    def close(self, groups: Iterable[int]) -> None:
        """Let go of these shards; they are opened again where they are needed."""
        for group in groups:
            del self.readers[group]
            self.files[group] = CLOSED
            self.pending.add(group)

    @cached_property
    def shards(self) -> list[tuple[Ints, Source, int, int]]:
        """(samples, source, shard, epoch) of every shard that is needed."""
        numbers, epochs, shards = self.places[:3]
        _, firsts, members = np.unique(shards * len(self.sources) + numbers, return_index=True, return_inverse=True)
        found = []
        for group, first in enumerate(firsts.tolist()):
            source = self.sources[numbers[first]]
            found.append((np.flatnonzero(members == group), source, int(shards[first]), int(epochs[first])))
        return found

    @cached_property
    def readers(self) -> dict[int, ShardReader]:
        """Of the shards that are open."""
        return {}

    @cached_property
    def pending(self) -> set[int]:
        """Shards that are not open, or have blocks that nobody has looked at."""
        return set(range(len(self.shards)))

    @cached_property
    def files(self) -> list[memoryview]:
        """Bytes of every shard, while it is open; the last are zeros."""
        return [*[CLOSED] * len(self.shards), memoryview(bytes(self.length * self.dtype.itemsize))]

    @cached_property
    def widths(self) -> list[int]:
        """Bytes of a token in every shard."""
        return [np.dtype(source.catalog.dtype).itemsize for _, source, _, _ in self.shards]

    @cached_property
    def pieces(self) -> Ints:
        """(4, P) of every piece in the order of samples: its shard, first byte, end in bytes, and tokens."""
        group, start, size = self._pieces[:3]
        widths = np.array([*self.widths, self.dtype.itemsize])[group]
        offsets = [source.catalog.shard(shard).data_offset for _, source, shard, _ in self.shards]
        begins = np.array([*offsets, 0])[group] + start * widths
        return np.stack([group, begins, begins + size * widths, size])

    @cached_property
    def _pieces(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """(shard, start, size) of every piece in the order of samples, counted in tokens; of each sample: its pieces and its padding."""
        parts: list[tuple[Ints, ...]] = []
        for number, (mine, source, shard, _) in enumerate(self.shards):
            samples, starts, sizes = source.pieces(shard, self.places[3, mine])
            parts.append((mine[samples], np.full(len(starts), number), starts, sizes))
        sample, group, start, size = (np.concatenate(column) for column in zip(*parts, strict=True))
        padding = self.length - np.bincount(sample, size, self.num_samples).astype(np.int64)
        padded = np.flatnonzero(padding)
        sample = np.concatenate([sample, padded])
        group = np.concatenate([group, np.full_like(padded, PADDING)])
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
    def narrow(self) -> frozenset[int]:
        """Shards whose tokens take less than `dtype`."""
        return frozenset(number for number, width in enumerate(self.widths) if width < self.dtype.itemsize)

    @cached_property
    def lasts(self) -> Ints:
        """Place of every piece's last token, counted from the segment's first row on."""
        return np.cumsum(self._pieces[2]) - 1

    @cached_property
    def held(self) -> Ints:
        """Tokens of every sample that are no padding."""
        return self.length - self._pieces[4]


def widened(piece: memoryview, dtype: np.dtype[Any]) -> memoryview:
    """uint16 tokens as `dtype`."""
    return np.frombuffer(piece, "<u2").astype(dtype).view(np.uint8).data
