"""Which pieces of which documents make up each row of a shard: a plan, so that row k can be asked for before any other is read.

`concat` cuts the shard's tokens into rows, across documents. `best_fit` is best-fit decreasing (Fewer Truncations Improve Language
Modeling, arXiv 2404.10830): a document that fits into a row is never cut. Pure: a plan depends on lengths and settings alone.

Invariant: every token of every document lies in exactly one row, but for the tail that `concat` leaves over.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Packing = Literal["concat", "best_fit"]
ALGORITHM_VERSION = 1
"""Part of a plan's identity: raise it when a change moves any piece."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Pieces of documents in the order of rows. Row r holds pieces row_starts[r] to row_starts[r + 1] - 1."""

    row_starts: Ints
    """(R + 1,) positions in the arrays below."""
    starts: Ints
    """(P,) first token of each piece, counted in the shard."""
    lengths: Ints
    """(P,) tokens of each piece."""
    sequence_length: int
    """Tokens of a row; what its pieces do not fill is padding."""

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return len(self.row_starts) - 1

    def pieces_of(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """(which of the rows, first token, tokens) of every piece of some rows, in their order."""
        firsts = self.row_starts[rows]
        counts = self.row_starts[rows + 1] - firsts
        before = np.cumsum(counts) - counts
        pieces = np.arange(counts.sum()) + np.repeat(firsts - before, counts)
        return np.repeat(np.arange(len(rows)), counts), self.starts[pieces], self.lengths[pieces]

    @property
    def num_bytes(self) -> int:
        """Memory of its arrays."""
        return self.row_starts.nbytes + self.starts.nbytes + self.lengths.nbytes


def padding_of(plans: Iterable[Plan]) -> float:
    """Share of their rows' positions without a token."""
    held, positions = 0, 0
    for plan in plans:
        held, positions = held + int(plan.lengths.sum()), positions + plan.num_rows * plan.sequence_length
    return 1 - held / max(positions, 1)


def make_plan(document_ends: Ints, sequence_length: int, packing: Packing) -> Plan:
    """The plan of one shard. document_ends: (D,) end of each document in tokens, counted in the shard, not falling."""
    ends = document_ends.astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    if packing == "concat":
        return cut_into_rows(ends, sequence_length)
    pieces, lengths = cut_long_documents(starts, ends - starts, sequence_length)
    rows = best_fit_rows(lengths, sequence_length)
    order = np.argsort(rows, kind="stable")
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    row_starts = np.searchsorted(rows[order], np.arange(num_rows + 1))
    return Plan(row_starts, pieces[order], lengths[order], sequence_length)


def cut_into_rows(ends: Ints, sequence_length: int) -> Plan:
    """Whole rows of the shard's tokens; a piece ends where a document or a row does. Less than a row is left over."""
    num_rows = (int(ends[-1]) if len(ends) else 0) // sequence_length
    edges = np.arange(num_rows + 1) * sequence_length
    cuts = np.union1d(edges, ends[ends < edges[-1]])
    return Plan(np.searchsorted(cuts, edges), cuts[:-1], np.diff(cuts), sequence_length)


def cut_long_documents(starts: Ints, lengths: Ints, sequence_length: int) -> tuple[Ints, Ints]:
    """(start, length) of pieces of at most a row; only documents longer than a row are cut, empty ones vanish."""
    counts = -(-lengths // sequence_length)
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * sequence_length
    return starts[owner] + begin, np.minimum(lengths[owner] - begin, sequence_length)


def best_fit_rows(lengths: Ints, sequence_length: int) -> Ints:
    """(P,) row of each piece: longest first, each into the fullest row that has room, a new row where none has.

    All pieces of one length are placed together: the fullest row with room r takes r // length of them, one after the other, before
    any other row is the fullest. A bit set of the rooms that exist finds it; so the work is per (length, room), not per piece.
    """
    rows = np.zeros(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    edges = (
        np.concatenate([[0], np.flatnonzero(np.diff(lengths[order])) + 1, [len(order)]])
        if len(order)
        else np.zeros(1, int)
    )
    room: dict[int, Ints] = {}
    rooms, num_rows = 0, 0
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        length = int(lengths[order[first]])
        while first < last:
            fitting = rooms >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                bins = room.pop(space)
                rooms &= ~(1 << space)
            else:
                space = sequence_length
                bins = np.arange(num_rows, num_rows - (-(last - first) // (space // length)))
                num_rows += len(bins)
            each = space // length
            used = bins[: -(-(last - first) // each)]
            targets = np.repeat(used, each)[: last - first]
            rows[order[first : first + len(targets)]] = targets
            first += len(targets)
            in_last = len(targets) - each * (len(used) - 1)
            for left, which in (
                (space - each * length, used[:-1]),
                (space - in_last * length, used[-1:]),
                (space, bins[len(used) :]),
            ):
                if left and len(which):
                    room[left] = np.concatenate([room[left], which]) if left in room else which
                    rooms |= 1 << left
    return rows
