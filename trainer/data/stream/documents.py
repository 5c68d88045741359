"""Documents of text files, JSON lines, Parquet and Hugging Face datasets, one after the other, each with where it comes from.

Order: as the inputs are named, files of a pattern or folder sorted by path. Local to the process; nothing is held but one document (a
row group for Parquet).
"""

import glob
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.assets import stdlib_files
from trainer.data.sources import HUB_ID
from trainer.data.tables import surrogate_problem
from trainer.errors import DataError

FORMATS = {f"{kind}{packed}": "json" for kind in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst")} | {
    ".parquet": "parquet"
}
"""How a file's name ends -> the `datasets` builder of its kind; any other file is text, a document each."""
TEXT = (".txt", ".md", ".rst", ".py", ".csv", ".tsv", ".html", ".xml", ".gz", ".zst")
"""Endings of other files, which no hub dataset's name has: `mlfoundations/dclm-baseline-1.0` is one."""
ROWS_AT_ONCE = 1024
SPLIT = "train"
"""Of a hub dataset, where none is named."""


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    place: str
    """File, and line or row, for messages."""


def read_documents(
    inputs: list[str], column: str, *, subset: str | None = None, split: str | None = None
) -> Iterator[Document]:
    """All documents of files, patterns, folders, `asset:stdlib` and hub datasets. Missing files and datasets are found before the first.

    column: of JSON lines, Parquet and datasets. subset, split: of datasets.
    """
    parts: list[Iterator[Document]] = []
    any_dataset = False
    for name in inputs:
        files = list_files(name)
        if files is None:
            any_dataset = True
            parts.append(read_rows(name, open_dataset(name, subset, split), column))
        else:
            parts += [read_file(path, column) for path in files]
    if not any_dataset and (subset, split) != (None, None):
        raise DataError(
            f"--subset ({subset}) and --split ({split}) choose from a hub dataset, and no INPUT is one; leave them out"
        )
    return itertools.chain.from_iterable(parts)


def stamps(inputs: list[str]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of all files that inputs name, by which a change shows. A hub dataset has none."""
    found = []
    for name in inputs:
        for path in list_files(name) or sorted(path for path in Path(name).rglob("*") if path.is_file()):
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


def list_files(name: str) -> list[Path] | None:
    """The files that an input names; None where it names none, and so a hub dataset. DataError for a path that is missing."""
    if name == "asset:stdlib":
        return stdlib_files()
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        if is_saved_dataset(path):
            return None
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return require(files, name)
    if glob.has_magic(name):
        return require(sorted(Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()), name)
    if HUB_ID.fullmatch(name) and not name.lower().endswith((*FORMATS, *TEXT)):
        return None
    raise DataError(
        f"INPUT ({name}): there is no such file; give files, a folder, a pattern in quotes, or a hub dataset"
    )


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of datasets wrote a folder."""
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def require(files: list[Path], name: str) -> list[Path]:
    """The files, if there are any."""
    if not files:
        raise DataError(f"INPUT ({name}) holds no file; give files, a folder, a pattern in quotes, or a hub dataset")
    return files


def format_of(path: Path) -> str:
    """json, parquet or text, by the file's name."""
    return next((kind for ending, kind in FORMATS.items() if path.name.lower().endswith(ending)), "text")


def read_file(path: Path, column: str) -> Iterator[Document]:
    """Documents of one file by its name's ending; a file of any other kind is one document."""
    kind = format_of(path)
    try:
        if kind == "json":
            yield from read_lines(path, column)
        elif kind == "parquet":
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


def open_dataset(name: str, subset: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    """The rows of a hub dataset, streamed, or of one saved to disk. DataError where it does not open or has no such split."""
    import datasets

    is_saved = is_saved_dataset(Path(name))
    try:
        found: Any = (
            datasets.load_from_disk(name)
            if is_saved
            else datasets.load_dataset(name, subset, split=split or SPLIT, streaming=True)
        )
    except Exception as error:  # datasets raises many kinds; each means that the input cannot be opened
        asked = "" if is_saved else f", --subset {subset or 'none'} and --split {split or SPLIT}"
        raise DataError(f"INPUT ({name}{asked}) is neither a file nor a dataset that opens: {reason(error)}") from None
    return choose_split(name, found, subset, split) if is_saved else found


def choose_split(name: str, found: Any, subset: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    """One split of what was saved to disk."""
    if subset is not None:
        raise DataError(f"--subset ({subset}): {name} was saved to disk, which keeps no subsets; leave it out")
    if not hasattr(found, "keys"):
        if split is not None:
            raise DataError(f"--split ({split}): {name} was saved to disk as a single split; leave it out")
        return found
    if (split or SPLIT) not in found:
        raise DataError(f"--split ({split or SPLIT}) is none of {name}, which has {', '.join(found)}; name one")
    return found[split or SPLIT]


def read_rows(name: str, rows: Iterable[dict[str, Any]], column: str) -> Iterator[Document]:
    """A document a row. DataError with the row where the network or a file fails."""
    remaining = iter(rows)
    for number in itertools.count():
        place = f"{name}, row {number}"
        try:
            row = next(remaining, None)
        except Exception as error:  # of any builder or network library behind datasets
            raise DataError(f"{place} cannot be read: {reason(error)}; run it again") from None
        if row is None:
            return
        yield Document(text_of(row, column, place), place)


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
        raise DataError(f"{place}: not JSON ({error}); each line must be an object") from None
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
    if text and (problem := surrogate_problem(text)):
        raise DataError(f"{place}: {column} {problem}; correct it, or leave the document out")
    return text or ""
