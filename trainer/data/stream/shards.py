"""Token datasets on disk: headerless little-endian token files, document ends beside them, and a manifest that hashes every MiB.

    DATASET/manifest.json                      what it is; its hash, not a path, is the dataset's identity
    DATASET/shard-00000.bin                    tokens, uint16 or uint32
    DATASET/shard-00000.ends                   uint64, the end of each document in tokens, counted in the shard

Written as temporary file, sync, rename, the manifest last: a killed writer leaves no readable dataset. `data_offset` lets a manifest
describe other tools' files in place. Invariant: no token is read before the block it lies in has been verified.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from trainer.errors import DataError

MANIFEST = "manifest.json"
BLOCK = 2**20
SHARD_BYTES = 64 * 10**6
LARGEST_TOKENS = 2**31 - 1
"""Of one document: positions are int32 in attention kernels."""
FILE_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
"""Of a dataset's files: in its own folder."""

Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
FileName = Annotated[str, Field(pattern=FILE_NAME)]
Tokens = NDArray[Any]


class Strict(BaseModel):
    """Nothing is converted, nothing unknown is accepted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Tokenizer(Strict):
    """What made the tokens."""

    sha256: str
    """Of tokenizer.json."""
    vocabulary: PositiveInt
    """Token ids lie below it."""
    eos: int | None
    """Id that ends every document; None where documents end without one."""


class Shard(Strict):
    """One token file."""

    file: FileName
    data_offset: NonNegativeInt = 0
    """Bytes before the first token: another tool's header."""
    tokens: NonNegativeInt
    documents: NonNegativeInt
    ends: FileName
    """File of document ends."""
    blocks: list[Hash]
    """Hash of each MiB of the token file, header included."""
    ends_hash: Hash


class DatasetManifest(Strict):
    """manifest.json."""

    format: Literal["samestep-tokens-1"]
    dtype: Literal["uint16", "uint32"]
    tokenizer: Tokenizer
    shards: list[Shard]

    @cached_property
    def dataset_id(self) -> str:
        """Of content alone: moving or renaming the folder does not change it."""
        return hash_bytes(json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode())

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)


def hash_bytes(content: bytes | memoryview) -> str:
    """BLAKE2b, 128 bits: as fast as the disk, and in Python's standard library."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def dtype_for(vocabulary: int) -> Literal["uint16", "uint32"]:
    """The smaller type that holds every token id."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


class DatasetWriter:
    """Writes documents into shards, in order. One process; `finish` makes the dataset readable."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_bytes: int = SHARD_BYTES) -> None:
        """folder: made here; DataError where it holds a dataset already."""
        if (folder / MANIFEST).exists():
            raise DataError(f"{folder} holds a dataset already; give another folder, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.shard_bytes = folder, tokenizer, shard_bytes
        self.dtype = dtype_for(tokenizer.vocabulary)
        self.shards: list[Shard] = []
        self.parts: list[Tokens] = []
        self.lengths: list[int] = []
        self.pending_bytes = 0

    def add(self, document: Tokens, origin: str | None = None) -> None:
        """One document's tokens, (n,) of any integer type; closes the shard when it is full. origin: its file, for messages."""
        if len(document) > LARGEST_TOKENS:
            raise self._refusal(origin, 0, f"{len(document):,} tokens, more than {LARGEST_TOKENS:,}; cut it first")
        vocabulary = self.tokenizer.vocabulary
        if len(document) and not 0 <= int(document.min()) <= int(document.max()) < vocabulary:
            first = int(np.argmax((document < 0) | (document >= vocabulary)))
            words = f"token {int(document[first])}, outside the vocabulary of {vocabulary}; use the tokenizer that made the tokens"
            raise self._refusal(origin, first, words)
        self.parts.append(document.astype(self.dtype))
        self.lengths.append(len(document))
        self.pending_bytes += self.parts[-1].nbytes
        if self.pending_bytes >= self.shard_bytes:
            self.close_shard()

    def _refusal(self, origin: str | None, token: int, words: str) -> DataError:
        """For a document that has `words` at one of its tokens."""
        number = sum(shard.documents for shard in self.shards) + len(self.lengths)
        file = self.folder / f"shard-{len(self.shards):05d}.bin"
        byte = self.pending_bytes + token * np.dtype(self.dtype).itemsize
        return DataError(f"{origin or f'document {number}'} (byte {byte:,} of {file}) has {words}")

    def close_shard(self) -> None:
        """Write what was added since the last shard."""
        if not self.lengths:
            return
        name = f"shard-{len(self.shards):05d}"
        tokens = np.concatenate(self.parts).astype(f"<{'u2' if self.dtype == 'uint16' else 'u4'}")
        ends = np.cumsum(self.lengths, dtype=np.int64).astype("<u8")
        write_file(self.folder / f"{name}.bin", tokens.tobytes())
        write_file(self.folder / f"{name}.ends", ends.tobytes())
        self.shards.append(
            Shard(
                file=f"{name}.bin",
                tokens=len(tokens),
                documents=len(ends),
                ends=f"{name}.ends",
                blocks=block_hashes(self.folder / f"{name}.bin"),
                ends_hash=hash_bytes(ends.tobytes()),
            )
        )
        self.parts, self.lengths, self.pending_bytes = [], [], 0

    def finish(self) -> DatasetManifest:
        """Write the last shard and the manifest."""
        self.close_shard()
        manifest = DatasetManifest(
            format="samestep-tokens-1", dtype=self.dtype, tokenizer=self.tokenizer, shards=self.shards
        )
        write_manifest(self.folder, manifest)
        return manifest


def write_manifest(folder: Path, manifest: DatasetManifest) -> None:
    """Make a folder of shards a dataset."""
    content = manifest.model_dump(mode="json") | {"dataset_id": manifest.dataset_id}
    write_file(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Temporary file, sync, rename."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # other containers have a process of the same number
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; free space there or give another folder"
        ) from None


def block_hashes(path: Path) -> list[str]:
    """Of each MiB of a file."""
    with path.open("rb") as file:
        return [hash_bytes(block) for block in iter(lambda: file.read(BLOCK), b"")]


def read_manifest(folder: Path) -> DatasetManifest:
    """The manifest of a dataset's folder; DataError says what is wrong with it."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no token dataset: it has no {MANIFEST}; make one with `samestep data tokenize`"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def parse_manifest(content: bytes, place: str) -> DatasetManifest:
    """A manifest that is what was written; DataError where not. place: of it, for messages."""
    try:
        fields = json.loads(content)
        stated = fields.pop("dataset_id", None)
        manifest = DatasetManifest.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{place} cannot be read: {error}") from None
    if stated != manifest.dataset_id:
        raise DataError(f"{place} was edited: its dataset_id does not match its content")
    return manifest


class ShardReader:
    """Reads token ranges of one shard; each MiB is verified the first time it is touched. Safe for several threads."""

    def __init__(self, folder: Path, shard: Shard, dtype: str) -> None:
        """DataError where the file is missing or of another size."""
        self.path, self.shard = folder / shard.file, shard
        self.dtype = np.dtype(dtype).newbyteorder("<")
        wanted = shard.data_offset + shard.tokens * self.dtype.itemsize
        try:
            size = self.path.stat().st_size
            self.bytes = np.asarray(np.memmap(self.path, np.uint8, mode="r")) if size else np.zeros(0, np.uint8)
        except OSError as error:
            raise DataError(f"{self.path}: {(error.strerror or str(error)).lower()}") from None
        if size < wanted or len(shard.blocks) != -(-size // BLOCK):
            raise DataError(
                f"{self.path} has {size:,} bytes, but its manifest says {wanted:,}: it is truncated or another file"
            )
        self.array: Tokens = self.bytes[shard.data_offset : wanted].view(self.dtype)
        self.verified = bytearray(len(shard.blocks))
        self.num_unverified = len(shard.blocks)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(D,) end of each document in tokens; verified whole."""
        return read_ends(self.path.parent, self.shard)

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens start to start + length - 1, a read-only view. DataError names the block that was changed."""
        self.verify_tokens(start, length)
        return self.array[start : start + length]

    def verify_tokens(self, start: int, length: int) -> None:
        """Let every token of a range be of a verified block."""
        if self.num_unverified:
            first = self.shard.data_offset + start * self.dtype.itemsize
            self.verify(first, first + length * self.dtype.itemsize)

    def verify(self, first: int, last: int) -> None:
        """Hash the blocks of bytes first to last - 1 that have not been yet."""
        for block in range(first // BLOCK, -(-last // BLOCK)):
            if not self.verified[block]:
                self._verify_block(block)

    def _verify_block(self, block: int) -> None:
        content = self.bytes[block * BLOCK : (block + 1) * BLOCK]
        if hash_bytes(content.data) != self.shard.blocks[block]:
            place = f"{self.path}: bytes from {block * BLOCK:,} on"
            raise DataError(f"{place} were changed after they were written: their hash differs")
        self.verified[block] = 1
        self.num_unverified = self.verified.count(0)


def read_ends(folder: Path, shard: Shard) -> NDArray[np.int64]:
    """(D,) end of each document of a shard, in tokens; the tokens need not be there. DataError where the file was changed."""
    path = folder / shard.ends
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if hash_bytes(content) != shard.ends_hash:
        raise DataError(f"{path} was changed after it was written: its hash differs")
    return np.frombuffer(content, "<u8").astype(np.int64)


def verify_dataset(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(file, what is wrong with it or None) of every shard, whole."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        try:
            reader = ShardReader(folder, shard, manifest.dtype)
            reader.verify(0, len(reader.bytes))
            damage = None if int(reader.ends[-1]) == shard.tokens else "document ends do not match its tokens"
        except DataError as error:
            damage = str(error)
        yield shard.file, damage
