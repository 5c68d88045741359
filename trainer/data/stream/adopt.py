"""Manifests for token files that other tools wrote, in place: nothing is copied; document ends and manifest.json appear beside them.

| ending | written by | layout |
|---|---|---|
| .ds | datatrove | raw tokens; .ds.index holds document ends, uint64; .ds.metadata names the token size |
| .bin + .idx | Megatron-LM | raw tokens; .idx: MMIDIDX, version, dtype, counts, lengths, pointers, documents |
| .bin, magic 20240520 | llm.c, GPT-2 | header of 256 int32, then uint16 |
| .bin, magic 20240801 | llm.c, Llama 3 | header of 256 int32, then uint32 |
| .bin | nanoGPT | headerless uint16 |

Where a format keeps no document ends, a document ends with, or begins with, the end-of-text token. Reads each file once, to hash it.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.shards import (
    FILE_NAME,
    LARGEST_TOKENS,
    MANIFEST,
    DatasetManifest,
    Shard,
    Tokenizer,
    Tokens,
    block_hashes,
    hash_bytes,
    write_file,
    write_manifest,
)
from trainer.errors import DataError

LLM_C_HEADER = 1024
LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Magic -> version and type of llm.c's HEADERS_INFO, for GPT-2 and Llama 3."""
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
    shards, dtypes = [], set()
    for file in foreign_files(folder):
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


def foreign_files(folder: Path) -> list[Path]:
    """The token files of a folder that is no dataset yet, by name. DataError for a name that a manifest cannot hold."""
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} is a token dataset already; to adopt its files anew, delete its {MANIFEST}")
    files = sorted([*folder.glob("*.ds"), *folder.glob("*.bin")])
    if not files:
        raise DataError(
            f"{folder} has no .ds and no .bin file; give the folder of a datatrove, Megatron, llm.c or nanoGPT dataset"
        )
    for file in files:
        if not re.fullmatch(FILE_NAME, file.name):
            raise DataError(
                f"{file}: a token file's name is letters, digits, '.', '_' and '-', and begins with no '.'; rename it"
            )
    return files


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
    longest = int(np.diff(found.ends, prepend=0).max())
    if longest > LARGEST_TOKENS:
        raise DataError(
            f"{file} has a document of {longest:,} tokens, longer than {LARGEST_TOKENS:,}; give --eos, or cut it"
        )
    check_vocabulary(file, tokens, found.data_offset, tokenizer.vocabulary)
    return found


def check_vocabulary(file: Path, tokens: Tokens, data_offset: int, vocabulary: int) -> None:
    """DataError with the place of the first token outside the vocabulary."""
    for start in range(0, len(tokens), 2**24):
        part = tokens[start : start + 2**24]
        if int(part.max(initial=0)) >= vocabulary:
            first = int(np.argmax(part >= vocabulary))
            raise DataError(
                f"{file} has token {int(part[first])} at byte {data_offset + (start + first) * part.itemsize:,}, outside the "
                f"vocabulary of {vocabulary}; give the tokenizer that made it"
            )


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
    magic, version, count = np.frombuffer(start, "<i4").tolist() if len(start) == 12 else (0, 0, 0)
    if magic in LLM_C:
        return read_llm_c(file, tokenizer, magic, (version, count))
    if tokenizer.vocabulary > 2**16:
        raise DataError(
            f"{file} has no header, so its tokens are uint16, which cannot hold a vocabulary of {tokenizer.vocabulary:,}; give the "
            "tokenizer that made it, or write it as uint32 in a format that says so"
        )
    tokens = tokens_of(file, "uint16", 0)
    return Foreign("uint16", 0, ends_by_marker(tokens, tokenizer.eos, is_first=False))


def read_llm_c(file: Path, tokenizer: Tokenizer, magic: int, stated: tuple[int, int]) -> Foreign:
    """llm.c's file; each document begins with the marker. stated: version and number of tokens, of the header."""
    version, dtype = LLM_C[magic]
    if stated[0] != version:
        raise ValueError(f"its llm.c header of magic {magic} has version {stated[0]}; {version} is read")
    tokens = tokens_of(file, dtype, LLM_C_HEADER)
    if stated[1] != len(tokens):
        raise ValueError(f"its llm.c header says {stated[1]:,} tokens, but it has {len(tokens):,}")
    if tokenizer.eos is not None and not (tokens == tokenizer.eos).any():
        raise DataError(
            f"--eos (id {tokenizer.eos}) is nowhere in {file}; give the token that each document begins with, as "
            "'<|endoftext|>' of GPT-2 and '<|begin_of_text|>' of Llama 3, or no --eos"
        )
    return Foreign(dtype, LLM_C_HEADER, ends_by_marker(tokens, tokenizer.eos, is_first=True))


def ends_by_marker(tokens: NDArray[np.generic], eos: int | None, *, is_first: bool) -> NDArray[np.int64]:
    """Document ends where eos ends, or begins, a document; the whole file is one where there is no eos."""
    marks = np.flatnonzero(tokens == eos) if eos is not None else np.zeros(0, np.int64)
    ends = marks[marks > 0] if is_first else marks + 1
    return np.unique(np.append(ends, len(tokens))).astype(np.int64)
