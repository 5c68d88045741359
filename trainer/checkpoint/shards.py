"""Tensor files of a checkpoint: each rank writes its pieces, any rank reads any range of any tensor.

A file is plain safetensors. Each entry is a flat range named `kind/parameter@start`, so a reader with other shards, or with none, copies
the overlaps. Invariant: the entries of a tensor tile it, without gap or overlap; a reader refuses otherwise.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint.manifest import CHUNK, FileEntry, sync
from trainer.errors import CheckpointError

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


def shard_name(kind: str, rank: int, world_size: int) -> str:
    """weights-00001-of-00002.safetensors: counted from 1, as Hugging Face does."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def entry_key(key: str, start: int) -> str:
    """The name of a range in its file."""
    return f"{key}@{start}"


def write_shard(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> FileEntry:
    """Write flat CPU tensors to a new safetensors file, hashed on the way, on disk when this returns.

    safetensors' own writer copies every tensor once more and holds the interpreter lock meanwhile, which training would feel.
    """
    header: dict[str, Any] = {}
    position = 0
    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        blocks: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for block in chain(blocks, blocks_of(tensor for _, tensor in tensors)):
            file.write(block)
            digest.update(block)
            size += len(block)
        sync(file)
    return FileEntry(size=size, sha256=digest.hexdigest())


def blocks_of(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of the tensors, a few MB at a time: hashed while they are in the cache, and written without the interpreter lock."""
    for tensor in tensors:
        view = memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


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
                break
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
