"""Tensor files of a checkpoint: each rank writes its pieces, any rank reads any range of any tensor.

A file is plain safetensors. Each entry is a flat range named `kind/parameter@start`, so a reader with other shards, or with none, copies
the overlaps. Invariant: the entries of a tensor tile it, without gap or overlap; a reader refuses otherwise.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint.direct import ALIGNMENT, write_direct
from trainer.checkpoint.manifest import FileEntry
from trainer.errors import CheckpointError

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


Layout = Sequence[tuple[str, torch.dtype, int]]
"""(entry key, dtype, elements) of each entry of a file, in its order. 8-byte types come before smaller ones."""


def shard_name(kind: str, rank: int, world_size: int) -> str:
    """weights-00001-of-00002.safetensors: counted from 1, as Hugging Face does."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def entry_key(key: str, start: int) -> str:
    """The name of a range in its file."""
    return f"{key}@{start}"


class ShardImage:
    """A safetensors file in memory, as it will lie on disk: aligned, so that it is written past the page cache (direct.py).

    safetensors' own writer copies every tensor twice more and holds the interpreter lock meanwhile, which training would feel.
    """

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        """pinned: for copies from a GPU. Memory: the file's size, once."""
        self.layout, self.pinned = tuple(layout), pinned
        header: dict[str, Any] = {}
        position = 0
        for key, dtype, length in layout:
            size = length * dtype.itemsize
            header[key] = {"dtype": DTYPES[dtype], "shape": [length], "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self.size = 8 + len(text) + position
        room = torch.empty(self.size + 2 * ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
        start = -room.data_ptr() % ALIGNMENT
        self.bytes = room[start : start + -(-self.size // ALIGNMENT) * ALIGNMENT]
        self.bytes[: 8 + len(text)] = torch.frombuffer(
            bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8
        )
        self.views: dict[str, Tensor] = {}
        """Entry key -> flat tensor inside the image; copy the values there."""
        place = 8 + len(text)
        for key, dtype, length in layout:
            end = place + length * dtype.itemsize
            self.views[key] = self.bytes[place:end].view(dtype)
            place = end

    def write(self, path: Path, watch: Callable[[], None] = lambda: None) -> FileEntry:
        """Write to a new file, hashed on the way, on disk when this returns. watch: called after every chunk."""
        digest = blake3()
        for chunk in write_direct(path, memoryview(cast(Any, self.bytes.numpy())), self.size):
            digest.update(chunk)
            watch()
        return FileEntry(size=self.size, blake3=digest.hexdigest())


def image_of(tensors: Mapping[str, Tensor]) -> ShardImage:
    """Whole CPU tensors as a file."""
    image = ShardImage(
        [(entry_key(key, 0), tensor.dtype, tensor.numel()) for key, tensor in tensors.items()], pinned=False
    )
    for key, tensor in tensors.items():
        image.views[entry_key(key, 0)].copy_(tensor.reshape(-1))
    return image


@dataclass(frozen=True)
class Range:
    """Where a part of a tensor lies."""

    start: int
    length: int
    file: Any
    key: str


class ShardReader:
    """Reads ranges of tensors from the shard files of one verified checkpoint. Local to the rank."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """files: names in `folder`. Raises CheckpointError for a file that is no safetensors."""
        self.ranges: dict[str, list[Range]] = {}
        for name in files:
            try:
                file = safe_open(folder / name, framework="pt")
                for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
                    tensor, _, start = key.rpartition("@")
                    length = file.get_slice(key).get_shape()
                    self.ranges.setdefault(tensor, []).append(Range(int(start), length[0], file, key))
            except (SafetensorError, OSError, ValueError, IndexError) as error:
                raise CheckpointError(f"{folder / name} is no shard of a checkpoint: {error}") from None
        for ranges in self.ranges.values():
            ranges.sort(key=lambda part: part.start)

    def check_tiling(self, key: str, shape: Sequence[int]) -> None:
        """CheckpointError unless the parts cover every element of a tensor of this shape once."""
        num_elements, end = math.prod(shape), 0
        for part in self.ranges.get(key, ()):
            if part.start != end:
                raise CheckpointError(f"{key} is incomplete: elements from {end} on are missing or there twice")
            end += part.length
        if end != num_elements:
            raise CheckpointError(f"{key} is incomplete: elements from {end} on are missing or there twice")

    def read(self, key: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """(position within the wanted range, flat tensor) of each stored part of elements start to start + length - 1."""
        for part in self.ranges.get(key, ()):
            first, last = max(start, part.start), min(start + length, part.start + part.length)
            if first < last:
                yield first - start, part.file.get_slice(part.key)[first - part.start : last - part.start]

    def whole(self, key: str) -> Tensor:
        """All stored elements of a tensor, flat."""
        parts = self.ranges.get(key, [])
        self.check_tiling(key, [sum(part.length for part in parts)])
        if not parts:
            raise CheckpointError(f"the checkpoint lacks {key}")
        return torch.cat([part.file.get_tensor(part.key) for part in self.ranges[key]])

    def copy_into(self, key: str, start: int, values: Tensor) -> None:
        """Fill `values`, a live view of any shape and device, with the elements from `start` on."""
        flat = values.view(-1) if values.is_contiguous() else torch.empty(values.numel(), dtype=values.dtype)
        for position, part in self.read(key, start, flat.numel()):
            flat[position : position + part.numel()].copy_(part)
        if not values.is_contiguous():
            values.copy_(flat.view(values.shape))
