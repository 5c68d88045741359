"""Text into token shards: tokenized by several threads, written by one, the same to the byte whatever their number.

Threads, because tokenizers works outside of Python's lock: 2 are as fast as its own batch call, and processes were 12 % slower.

Documents are dealt out in units of about a million characters and come back in order. After every shard a line notes how many documents
are in all so far, so that a killed run goes on there. Invariant: the dataset depends on documents, tokenizer and shard size alone.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.stream.documents import Document, read_documents, stamps
from trainer.data.stream.shards import (
    SHARD_BYTES,
    DatasetManifest,
    DatasetWriter,
    Shard,
    Strict,
    Tokenizer,
    hash_bytes,
    write_file,
)
from trainer.errors import DataError

UNIT_CHARACTERS = 1_000_000
PROGRESS = ".progress.jsonl"
PARALLELISM = "TOKENIZERS_PARALLELISM"

Unit = list[Document]
Tokenized = list[tuple[str, np.ndarray[Any, Any]]]
"""Place and tokens of each document of a unit."""


class Noted(Strict):
    """A line of the progress file: a shard, and the documents of the input that are in shards with it."""

    documents: int
    shard: Shard


@dataclass(frozen=True)
class Tally:
    """How far a tokenization is, or what it did."""

    documents: int
    empty: int
    tokens: int


def tokenize(
    inputs: list[str],
    output: Path,
    tokenizer_file: Path,
    *,
    eos: str | None,
    column: str = "text",
    subset: str | None = None,
    split: str | None = None,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    watch: Callable[[Tally], None] = lambda tally: None,
) -> DatasetManifest:
    """Make a dataset. eos: token after every document; None: none. subset, split: of hub datasets. watch: called after every unit.

    Run again after a kill with the same arguments and unchanged files it goes on; with others it starts anew. DataError names file and
    place.
    """
    tokenizer = describe_tokenizer(tokenizer_file, eos)
    asked = [inputs, stamps(inputs), column, subset, split, tokenizer.model_dump(), shard_bytes]
    documents = read_documents(inputs, column, subset=subset, split=split)
    writer = DatasetWriter(output, tokenizer, shard_bytes=shard_bytes)
    done = take_up(writer, hash_bytes(json.dumps(asked).encode()))
    tally = Tally(done, 0, sum(shard.tokens for shard in writer.shards))
    for unit in tokenized(units(skipped(documents, done)), tokenizer_file, tokenizer.eos, workers):
        for number, (place, tokens) in enumerate(unit, start=tally.documents + 1):
            num_shards = len(writer.shards)
            writer.add(tokens, place)
            if len(writer.shards) > num_shards:
                note(output, Noted(documents=number, shard=writer.shards[-1]))
        lengths = [len(tokens) for _, tokens in unit]
        num_empty = sum(length <= (tokenizer.eos is not None) for length in lengths)
        tally = Tally(tally.documents + len(unit), tally.empty + num_empty, tally.tokens + sum(lengths))
        watch(tally)
    if tally.documents == 0:
        raise DataError(f"INPUT ({', '.join(inputs)}) holds no document")
    write_file(output / "tokenizer.json", tokenizer_file.read_bytes())
    manifest = writer.finish()
    (output / PROGRESS).unlink(missing_ok=True)
    return manifest


def describe_tokenizer(file: Path, eos: str | None) -> Tokenizer:
    """Hash, size and end-of-text id of a tokenizer.json. DataError where it is none or lacks `eos`."""
    import tokenizers

    try:
        content = file.read_bytes()
        loaded = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"--tokenizer ({file}) is no tokenizer.json: {str(error).splitlines()[0]}") from None
    eos_id = None if eos is None else loaded.token_to_id(eos)
    if eos is not None and eos_id is None:
        raise DataError(f"--eos ({eos}) is no token of {file}; give one of its special tokens")
    return Tokenizer(sha256=hashlib.sha256(content).hexdigest(), vocabulary=loaded.get_vocab_size(), eos=eos_id)


def units(documents: Iterable[Document]) -> Iterator[Unit]:
    """Documents in groups of about a million characters."""
    unit: Unit = []
    size = 0
    for document in documents:
        unit.append(document)
        size += len(document.text)
        if size >= UNIT_CHARACTERS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def tokenized(units: Iterator[Unit], tokenizer_file: Path, eos: int | None, workers: int) -> Iterator[Tokenized]:
    """The tokens of every unit's documents, in order, by so many threads, never more than two units a thread ahead."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()  # sentence encoders store both in tokenizer.json: 128 tokens of every document
    tokenizer.no_padding()
    end = [] if eos is None else [eos]

    def tokenize_unit(unit: Unit) -> Tokenized:
        encoded = tokenizer.encode_batch_fast([document.text for document in unit], add_special_tokens=False)
        return [
            (document.place, np.array(one.ids + end, np.uint32)) for document, one in zip(unit, encoded, strict=True)
        ]

    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"  # of the library's own threads; ours are the workers
    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[Tokenized]] = deque()
            for unit in units:
                waiting.append(pool.submit(tokenize_unit, unit))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        os.environ.pop(PARALLELISM)
        if before is not None:
            os.environ[PARALLELISM] = before


def skipped(documents: Iterator[Document], count: int) -> Iterator[Document]:
    """Without the first `count`."""
    for _ in range(count):
        next(documents, None)
    return documents


def note(output: Path, noted: Noted) -> None:
    """Remember a shard, after it was written."""
    path = output / PROGRESS
    try:
        with path.open("ab") as file:
            file.write(noted.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; free space there") from None


def take_up(writer: DatasetWriter, settings: str) -> int:
    """Put the shards of a killed run with these settings into the writer; how many documents they hold of the input."""
    path, first = writer.folder / PROGRESS, json.dumps({"settings": settings}).encode() + b"\n"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, documents = [first], 0
    if lines[:1] == [first]:
        for line in lines[1:]:
            try:
                noted = Noted.model_validate_json(line)
            except ValueError:  # torn by the kill
                break
            writer.shards.append(noted.shard)
            kept.append(noted.model_dump_json().encode() + b"\n")
            documents = noted.documents
    write_file(path, b"".join(kept))  # before a shard is written: nothing may speak of those of another run
    return documents
