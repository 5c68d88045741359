"""Documents of text files, JSON lines, Parquet and Hugging Face datasets, one after the other, each with where it comes from.

Order: as the inputs are named, files of a pattern or folder sorted by path. Local to the process; nothing is held but one document (a
row group for Parquet).
"""

import glob
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.assets import stdlib_files
from trainer.errors import DataError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson")
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    place: str
    """File, and line or row, for messages."""


def read_documents(inputs: list[str], column: str) -> Iterator[Document]:
    """All documents of files, patterns, folders, `asset:stdlib` and hub datasets. column: of JSON lines, Parquet and datasets."""
    for name in inputs:
        found = list_files(name)
        if found is None:
            yield from read_dataset(name, column)
            continue
        for path in found:
            yield from read_file(path, column)


def list_files(name: str) -> list[Path] | None:
    """The files that an input names; None where it names none, and so a hub dataset. DataError for a path that is missing."""
    if name == "asset:stdlib":
        return stdlib_files()
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return require(files, name)
    if glob.has_magic(name):
        return require(sorted(Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()), name)
    if path.is_dir() or (name.count("/") <= 1 and not path.suffix and not name.startswith((".", "/", "~"))):
        return None
    raise DataError(
        f"INPUT ({name}): there is no such file; give files, a folder, a pattern in quotes, or a hub dataset"
    )


def require(files: list[Path], name: str) -> list[Path]:
    """The files, if there are any."""
    if not files:
        raise DataError(f"INPUT ({name}) holds no file; give files, a folder, a pattern in quotes, or a hub dataset")
    return files


def read_file(path: Path, column: str) -> Iterator[Document]:
    """Documents of one file by its name's ending; a file of any other kind is one document."""
    try:
        if path.name.endswith(LINES):
            yield from read_lines(path, column)
        elif path.suffix == ".parquet":
            yield from read_parquet(path, column)
        else:
            yield Document(decode(path.read_bytes(), path, 0), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_lines(path: Path, column: str) -> Iterator[Document]:
    """A JSON object a line, plain or compressed."""
    import pyarrow as pa

    position = 0
    with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                yield Document(text_of(parse(line, path, position, place), column, place), place)
            position += len(line)


def read_parquet(path: Path, column: str) -> Iterator[Document]:
    """A row each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise DataError(
                f"{path} has no column {column}; it has {', '.join(file.schema_arrow.names)}: give --column"
            )
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
            for text in batch.column(0).to_pylist():
                place = f"{path}, row {row}"
                yield Document(text_of({column: text}, column, place), place)
                row += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None


def read_dataset(name: str, column: str) -> Iterator[Document]:
    """A hub dataset's training split, streamed, or a dataset saved to disk."""
    import datasets

    try:
        rows: Any = (
            datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, streaming=True)
        )
    except Exception as error:  # datasets raises many kinds; each means that the input cannot be opened
        raise DataError(
            f"INPUT ({name}) is neither a file nor a dataset that opens: {str(error).splitlines()[0]}"
        ) from None
    rows = rows["train"] if hasattr(rows, "keys") else rows
    for number, row in enumerate(rows):
        place = f"{name}, row {number}"
        yield Document(text_of(row, column, place), place)


def decode(content: bytes, path: Path, position: int) -> str:
    """UTF-8, or a DataError with the first byte that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {position + error.start:,} is not UTF-8; convert the file, or leave it out"
        ) from None


def parse(line: bytes, path: Path, position: int, place: str) -> dict[str, Any]:
    """One JSON object."""
    try:
        row = json.loads(decode(line, path, position))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object")
    return row


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    """The document in a row; no text is an empty one."""
    if column not in row:
        raise DataError(f"{place}: no column {column}; it has {', '.join(map(str, row))}: give --column")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: {column} is {type(text).__name__}, not text")
    return text or ""
