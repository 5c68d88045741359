"""This rank's share of the training state, copied to CPU memory while training waits.

The copies are made where they will be written from: images of the shard files, kept between saves, so that only the first save pays for
fresh memory. On a GPU the images are pinned and all copies are in flight together. Memory: the rank's share of the state, once.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from trainer.backend import WEIGHT, Piece
from trainer.checkpoint.shards import Layout, ShardImage, entry_key
from trainer.model.stored import saved_buffers

BUFFER = "buffer"
"""The kind of a tensor that belongs to the model and is not trained, such as BART's bias of the logits; whole on every rank."""


def buffer_pieces(model: nn.Module) -> Iterator[Piece]:
    """The buffers that belong to the model's files."""
    return (Piece(BUFFER, name, tuple(buffer.shape), 0, buffer) for name, buffer in saved_buffers(model).items())


class Snapshots:
    """Makes copies of pieces; a new snapshot overwrites the one before, so the writer must be done with that."""

    def __init__(self) -> None:
        self.images: dict[str, ShardImage] = {}

    def take(self, pieces: Sequence[Piece]) -> dict[str, ShardImage]:
        """Images of this rank's `weights` and `optimizer` files. Local to the rank."""
        by_file = {
            "weights": [piece for piece in pieces if piece.kind in (WEIGHT, BUFFER)],
            "optimizer": [piece for piece in pieces if piece.kind not in (WEIGHT, BUFFER)],
        }
        devices = {piece.values.device for piece in pieces if piece.values.device.type != "cpu"}
        for kind, members in by_file.items():
            members.sort(key=lambda piece: -piece.values.dtype.itemsize)  # so that every entry is aligned
            layout = [(entry_key(p.key, p.start), p.values.dtype, p.values.numel()) for p in members]
            views = self._image(kind, layout, pinned=bool(devices) and torch.cuda.is_available()).views
            for piece in members:
                views[entry_key(piece.key, piece.start)].copy_(piece.values.reshape(-1), non_blocking=True)
        for device in devices:
            torch.accelerator.synchronize(device)
        return dict(self.images)

    def _image(self, kind: str, layout: Layout, *, pinned: bool) -> ShardImage:
        """The image of the save before, if nothing but the values changed."""
        image = self.images.get(kind)
        if image is None or image.layout != tuple(layout):
            self.images[kind] = image = ShardImage(layout, pinned=pinned)
        return image


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
