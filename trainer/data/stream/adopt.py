"""Manifests for token files that other tools wrote, in place: nothing is copied; document ends and manifest.json appear beside them.

| ending | written by | layout |
|---|---|---|
| .ds | datatrove | raw tokens; .ds.index holds document ends, uint64; .ds.metadata names the token size |
| .bin + .idx | Megatron-LM | raw tokens; .idx: MMIDIDX, version, dtype, counts, lengths, pointers, documents |
| .bin, magic 20240520 | llm.c | header of 256 int32, then uint16 |
| .bin | nanoGPT | headerless uint16 |

Where a format keeps no document ends, a document ends with, or begins with, the end-of-text token. Reads each file once, to hash it.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.shards import (
    DatasetManifest,
    Shard,
    Tokenizer,
    block_hashes,
    hash_bytes,
    write_file,
    write_manifest,
)
from trainer.errors import DataError

LLM_C_MAGIC, LLM_C_HEADER = 20240520, 1024
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {4: "uint32", 8: "uint16"}  # int32 and uint16; a token id is never negative


@dataclass(frozen=True)
class Foreign:
    """One token file of another tool."""

    dtype: str
    data_offset: int
    ends: NDArray[np.int64]
    """(D,) in tokens."""


def adopt(folder: Path, tokenizer: Tokenizer, *, watch: Callable[[str], None] = lambda name: None) -> DatasetManifest:
    """Make a folder of another tool's token files a dataset. watch: called with each file's name. DataError names what does not fit."""
    files = sorted([*folder.glob("*.ds"), *folder.glob("*.bin")])
    if not files:
        raise DataError(
            f"{folder} has no .ds and no .bin file; give the folder of a datatrove, Megatron, llm.c or nanoGPT dataset"
        )
    shards, dtypes = [], set()
    for file in files:
        watch(file.name)
        found = read_foreign(file, tokenizer)
        dtypes.add(found.dtype)
        ends = found.ends.astype("<u8").tobytes()
        write_file(folder / f"{file.name}.ends", ends)
        shards.append(
            Shard(
                file=file.name,
                data_offset=found.data_offset,
                tokens=int(found.ends[-1]),
                documents=len(found.ends),
                ends=f"{file.name}.ends",
                blocks=block_hashes(file),
                ends_hash=hash_bytes(ends),
            )
        )
    if len(dtypes) > 1:
        raise DataError(f"{folder} mixes files of {' and '.join(sorted(dtypes))}; adopt them in folders of their own")
    manifest = DatasetManifest(format="samestep-tokens-1", dtype=dtypes.pop(), tokenizer=tokenizer, shards=shards)  # type: ignore[arg-type]
    write_manifest(folder, manifest)
    return manifest


def read_foreign(file: Path, tokenizer: Tokenizer) -> Foreign:
    """Layout and document ends of one file, checked against its size and the vocabulary."""
    try:
        if file.suffix == ".ds":
            found = read_datatrove(file)
        elif file.with_suffix(".idx").exists():
            found = read_megatron(file)
        else:
            found = read_bin(file, tokenizer)
    except (struct.error, ValueError, OSError) as error:
        raise DataError(f"{file} is not laid out as its kind is: {error}") from None
    tokens = tokens_of(file, found.dtype, found.data_offset)
    if len(found.ends) == 0 or int(found.ends[-1]) != len(tokens) or (np.diff(found.ends) < 0).any():
        raise DataError(
            f"{file} holds {len(tokens):,} tokens, but its documents end elsewhere: it is truncated or another file's"
        )
    for start in range(0, len(tokens), 2**24):
        largest = int(tokens[start : start + 2**24].max(initial=0))
        if largest >= tokenizer.vocabulary:
            raise DataError(
                f"{file} has token {largest}, outside the vocabulary of {tokenizer.vocabulary}; give the tokenizer that "
                "made it"
            )

    return found


def tokens_of(file: Path, dtype: str, data_offset: int) -> NDArray[np.generic]:
    """All tokens, mapped."""
    size = (file.stat().st_size - data_offset) // np.dtype(dtype).itemsize
    return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r", data_offset, (size,)) if size else np.zeros(0, dtype)


def read_datatrove(file: Path) -> Foreign:
    """A DocumentTokenizer's output; without .ds.metadata the token size follows from the index."""
    ends = np.fromfile(file.with_name(f"{file.name}.index"), "<u8").astype(np.int64)
    if len(ends) == 0:
        raise ValueError("its .index is empty")
    dtypes = {2 * int(ends[-1]): "uint16", 4 * int(ends[-1]): "uint32"}
    size = file.stat().st_size
    if size not in dtypes:
        raise ValueError(f"it has {size:,} bytes, and its .index speaks of {int(ends[-1]):,} tokens")
    return Foreign(dtypes[size], 0, ends)


def read_megatron(file: Path) -> Foreign:
    """An IndexedDataset: documents are runs of sequences."""
    content = file.with_suffix(".idx").read_bytes()
    if not content.startswith(MEGATRON_MAGIC):
        raise ValueError("its .idx does not begin with MMIDIDX")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", content, len(MEGATRON_MAGIC))
    if version != 1 or code not in MEGATRON_DTYPES:
        raise ValueError(
            f"its .idx has version {version} and dtype code {code}; version 1 with 4 (int32) or 8 (uint16) is read"
        )
    at = len(MEGATRON_MAGIC) + struct.calcsize("<QBQQ")
    lengths = np.frombuffer(content, "<i4", sequences, at)
    indices = np.frombuffer(content, "<i8", documents, at + 12 * sequences)
    sequence_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Foreign(MEGATRON_DTYPES[code], 0, sequence_ends[indices[1:]])


def read_bin(file: Path, tokenizer: Tokenizer) -> Foreign:
    """llm.c's header or none."""
    with file.open("rb") as opened:
        start = opened.read(12)
    head = np.frombuffer(start, "<i4") if len(start) == 12 else np.zeros(3, "<i4")
    if int(head[0]) == LLM_C_MAGIC:
        if int(head[1]) != 1:
            raise ValueError(f"its llm.c header has version {int(head[1])}; 1 is read")
        tokens = tokens_of(file, "uint16", LLM_C_HEADER)
        if int(head[2]) != len(tokens):
            raise ValueError(f"its llm.c header says {int(head[2]):,} tokens, but it has {len(tokens):,}")
        return Foreign("uint16", LLM_C_HEADER, ends_by_marker(tokens, tokenizer.eos, is_first=True))
    tokens = tokens_of(file, "uint16", 0)
    return Foreign("uint16", 0, ends_by_marker(tokens, tokenizer.eos, is_first=False))


def ends_by_marker(tokens: NDArray[np.generic], eos: int | None, *, is_first: bool) -> NDArray[np.int64]:
    """Document ends where eos ends, or begins, a document; the whole file is one where there is no eos."""
    marks = np.flatnonzero(tokens == eos) if eos is not None else np.zeros(0, np.int64)
    ends = marks[marks > 0] if is_first else marks + 1
    return np.unique(np.append(ends, len(tokens))).astype(np.int64)
