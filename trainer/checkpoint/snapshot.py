"""This rank's share of the training state, copied to CPU memory while training waits.

The copies live in buffers that are kept between saves: the first save pays for fresh memory, later ones for the copy alone. On a GPU the
buffers are pinned and all copies are in flight together. Memory: the rank's share of weights and moments, once.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from trainer.backend import Piece
from trainer.checkpoint.shards import entry_key

Shard = list[tuple[str, Tensor]]
"""(entry key, flat CPU tensor) of each range in one file."""


class Snapshots:
    """Makes copies of pieces; a new snapshot overwrites the one before, so the writer must be done with that."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, pieces: Iterable[Piece]) -> tuple[Shard, Shard]:
        """Copies of this rank's weights and of its moments. Local to the rank."""
        weights: Shard = []
        moments: Shard = []
        on_gpu = False
        for piece in pieces:
            on_gpu = on_gpu or piece.values.device.type != "cpu"
            copy = (entry_key(piece.key, piece.start), self._copy(piece))
            (weights if piece.kind == "weight" else moments).append(copy)
        if on_gpu:
            torch.accelerator.synchronize()
        return weights, moments

    def _copy(self, piece: Piece) -> Tensor:
        key = entry_key(piece.key, piece.start)
        buffer = self.buffers.get(key)
        if buffer is None:
            pinned = piece.values.device.type == "cuda"
            buffer = torch.empty(piece.values.numel(), dtype=piece.values.dtype, pin_memory=pinned)
            self.buffers[key] = buffer
        return buffer.copy_(piece.values.reshape(-1), non_blocking=True)


def owned_pieces(pieces: list[Piece], rank: int, world_size: int) -> Iterator[Piece]:
    """The part of a replicated state that `rank` writes: an equal share of all elements, cut anywhere."""
    total = sum(piece.values.numel() for piece in pieces)
    first, last = (total * edge // world_size for edge in (rank, rank + 1))
    position = 0
    for piece in pieces:
        length = piece.values.numel()
        start, end = max(first - position, 0), min(last - position, length)
        if start < end:
            values = piece.values.reshape(-1)[start:end]
            yield Piece(piece.kind, piece.name, piece.shape, piece.start + start, values)
        position += length
