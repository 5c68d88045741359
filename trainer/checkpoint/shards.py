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
from torch import Tensor

from trainer.backend import Piece
from trainer.checkpoint.direct import ALIGNMENT, read_chunks, write_direct
from trainer.checkpoint.manifest import FileEntry
from trainer.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

Layout = Sequence[tuple[str, torch.dtype, int]]
"""(entry key, dtype, elements) of each entry of a file, in its order. 8-byte types come before smaller ones."""


def shard_name(kind: str, rank: int, world_size: int) -> str:
    """weights-00001-of-00002.safetensors: counted from 1, as Hugging Face does."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def is_tensor_file(name: str) -> bool:
    """Whether a checkpoint's file holds weights or moments."""
    return name.startswith(("weights-", "optimizer-"))


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
    """Where consecutive elements of a tensor lie."""

    start: int
    length: int
    dtype: torch.dtype
    path: Path
    offset: int
    """Byte in the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class Copy:
    """Bytes of a file that are wanted."""

    offset: int
    dtype: torch.dtype
    target: Tensor
    """Flat, contiguous, of any device."""

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.target.numel() * self.dtype.itemsize


def read_header(path: Path) -> Iterator[tuple[str, Range]]:
    """(tensor, range) of every entry. CheckpointError for a file that is no shard; its content is not looked at."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            tensor, _, start = key.rpartition("@")
            (count,), (begin, end) = entry["shape"], entry["data_offsets"]
            dtype, offset = TORCH_DTYPES[entry["dtype"]], 8 + length + begin
            is_inside = 0 <= begin <= end and 8 + length + end <= size
            if not is_inside or end - begin != count * dtype.itemsize or offset % dtype.itemsize:
                raise ValueError(f"{key} lies outside of it")
            yield tensor, Range(int(start), count, dtype, path, offset)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no shard of a checkpoint: {error}") from None


class ShardReader:
    """Reads tensors, and ranges of them, from the shard files of one checkpoint. Local to the rank."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """files: names in `folder`. Raises CheckpointError for a file that is no shard."""
        self.paths = [folder / name for name in files]
        self.ranges: dict[str, list[Range]] = {}
        for path in self.paths:
            for tensor, part in read_header(path):
                self.ranges.setdefault(tensor, []).append(part)
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

    def whole(self, key: str) -> Tensor:
        """All stored elements of a tensor, flat."""
        parts = self.ranges.get(key, [])
        self.check_tiling(key, [sum(part.length for part in parts)])
        if not parts:
            raise CheckpointError(f"the checkpoint lacks {key}")
        return torch.cat([read_range(part) for part in parts])

    def fill(self, pieces: Iterable[Piece], hashes: Mapping[str, str], *, shared: bool) -> None:
        """Fill live views, reading each file at most once, and check the files of `hashes` (name -> BLAKE3) on the way, these first.

        shared: all ranks read the same files. CheckpointError for a file that was changed; then the views hold anything.
        """
        copies: dict[Path, list[Copy]] = {}
        strided: list[tuple[Tensor, Tensor]] = []
        for piece in pieces:
            flat = flat_of(piece.values)
            if flat is None:
                flat = torch.empty(piece.values.numel(), dtype=piece.values.dtype)
                strided.append((piece.values, flat))
            for part in self.ranges.get(piece.key, ()):
                first, last = max(piece.start, part.start), min(piece.start + flat.numel(), part.start + part.length)
                if first < last:
                    offset = part.offset + (first - part.start) * part.dtype.itemsize
                    target = flat[first - piece.start : last - piece.start]
                    copies.setdefault(part.path, []).append(Copy(offset, part.dtype, target))
        for path in sorted(self.paths, key=lambda path: path.name not in hashes):  # ranks begin with different files
            stated = hashes.get(path.name)
            if stated is not None or path in copies:
                stream_file(path, copies.get(path, []), stated, shared=shared)
        for values, flat in strided:
            values.copy_(flat.view(values.shape))


def flat_of(values: Tensor) -> Tensor | None:
    """The same storage as one dimension; None where it has gaps."""
    return values.view(-1) if values.is_contiguous() else None


def read_range(part: Range) -> Tensor:
    """Its elements, as a fresh CPU tensor."""
    values = torch.empty(part.length, dtype=part.dtype)
    if part.length:
        with part.path.open("rb") as file:
            file.seek(part.offset)
            file.readinto(cast(Any, values.view(torch.uint8).numpy()))
    return values


def stream_file(path: Path, copies: Iterable[Copy], stated: str | None, *, shared: bool) -> None:
    """Read a file once, from begin to end: copy what is wanted, and hash it where its hash is stated."""
    waiting = sorted(copies, key=lambda copy: copy.offset)
    digest, begin = blake3(), 0
    for chunk in read_chunks(path, shared=shared):
        end = begin + len(chunk)
        content = torch.frombuffer(chunk, dtype=torch.uint8)
        for copy in waiting:
            if copy.offset >= end:
                break
            first, last = max(copy.offset, begin), min(copy.end, end)
            start = (first - copy.offset) // copy.dtype.itemsize
            values = content[first - begin : last - begin].view(copy.dtype)
            copy.target[start : start + values.numel()].copy_(values)
        waiting = [copy for copy in waiting if copy.end > end]
        begin = end
        if stated is not None:
            digest.update(chunk)
    if stated is not None and digest.hexdigest() != stated:
        raise CheckpointError(f"{path} was changed after it was written: its BLAKE3 differs")
