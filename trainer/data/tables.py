"""Rows of a CSV, TSV, JSONL or Parquet file, of an asset, or of a hub dataset, each with the place it came from.

First stop of the data flow; knows nothing of labels or tokens. A line that cannot be read is kept as a Row with a problem, so that
one broken line is counted and reported with its place, and a broken file is a DataError.
"""

import csv
import difflib
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".parquet")
ASSET_FILES = {"sst": "sst.tsv"}


@dataclass(frozen=True)
class Row:
    """One example as read. `problem` says why there are no values."""

    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows in file order. `class_names`: names of integer labels, by column, where the source knows them."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    class_names: dict[str, list[str]] = field(default_factory=dict)
    line_word: str = "line"

    def place(self, row: Row) -> str:
        """Where a row stands, such as `reviews.csv:12`."""
        return f"{self.name}:{row.line}" if self.line_word == "line" else f"{self.name} {self.line_word} {row.line}"


def read_table(source: str, *, subset: str | None = None, split: str | None = None) -> Table:
    """The table that `source` names: `asset:NAME`, a file, or a hub dataset's `split`. DataError where it cannot be read."""
    if source.startswith("asset:"):
        return read_file(asset_file(source.removeprefix("asset:")))
    if is_file_source(source):
        return read_file(Path(source).expanduser())
    return read_hub(source, subset, split or "train")


def describe_source(source: str) -> str:
    """`asset`, `file` or `hub dataset`, as it will be read."""
    if source.startswith("asset:"):
        return "asset"
    return "file" if is_file_source(source) else "hub dataset"


def is_file_source(source: str) -> bool:
    """Whether a source is meant as a path: it has a known suffix, looks like a path, or exists."""
    looks = (
        source.startswith((".", "/", "~"))
        or source.lower().endswith(SUFFIXES)
        or Path(source).suffix in (".txt", ".json")
    )
    return looks or Path(source).exists()


def asset_file(name: str) -> Path:
    """The table inside an asset. DataError for an asset that is no table."""
    from trainer.data.assets import asset_path

    if name not in ASSET_FILES:
        raise DataError(
            f"data.source (asset:{name}) is not a data set; those are {', '.join(f'asset:{n}' for n in ASSET_FILES)}"
        )
    return asset_path(name) / ASSET_FILES[name]


def read_file(path: Path) -> Table:
    """Read one file by its suffix."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise DataError(f"{path}: the format must be one of {', '.join(SUFFIXES)}; rename or convert the file")
    if not path.is_file():
        raise DataError(missing_file(path))
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; it must hold a text and a label column")
    try:
        return read_parquet(path) if suffix == ".parquet" else read_text_table(path, suffix)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from None


def missing_file(path: Path) -> str:
    """The message for a path that is not a file, with a near name where there is one."""
    if path.is_dir():
        return f"{path}: is a folder; name one file in it, such as {path / 'train.csv'}"
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "; check data.source")


def read_text_table(path: Path, suffix: str) -> Table:
    """CSV and TSV (a header line; the csv module's quoting) or JSON Lines, in UTF-8."""
    text = decode(path, gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes())
    rows = (
        list(json_rows(text))
        if suffix.startswith(".jsonl")
        else list(csv_rows(path, text, "\t" if suffix == ".tsv" else ","))
    )
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row.values))
    if not rows:
        raise DataError(f"{path}: there are no rows below the header")
    return Table(path.name, tuple(columns), rows)


def decode(path: Path, data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark; DataError with the line of the first byte that is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, "
            "for example with `iconv -f latin1 -t utf-8`"
        ) from None


def csv_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Rows with the line each starts on; quoted cells may span lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = next(reader)
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                wrong = None if len(cells) == len(header) else f"{len(cells)} cells where the header has {len(header)}"
                yield Row(start, dict(zip(header, cells, strict=False)), wrong)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a table ({error}); check quotes and the delimiter") from None


def json_rows(text: str) -> Iterator[Row]:
    """One object per line; blank lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield Row(number, {}, f"not JSON ({error})")
            continue
        yield Row(number, values) if isinstance(values, dict) else Row(number, {}, "not a JSON object")


def read_parquet(path: Path) -> Table:
    """Rows are numbered from 1."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path}: not a Parquet file ({str(error).splitlines()[0]}); check that it was copied whole"
        ) from None
    rows = [Row(number, values) for number, values in enumerate(table.to_pylist(), 1)]
    return Table(path.name, tuple(table.column_names), rows, line_word="row")


def read_hub(source: str, subset: str | None, split: str) -> Table:
    """One split of a hub dataset. DataError with the fix where the hub or the dataset cannot be reached."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        loaded = datasets.load_dataset(source, subset, split=split)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.source ({source}) is no local file, and as a hub dataset (split {split}) it cannot be loaded: {reason}; "
            "check the name and the network, or give a local .csv, .tsv, .jsonl or .parquet file"
        ) from None
    class_names = {n: f.names for n, f in loaded.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = [Row(number, values) for number, values in enumerate(loaded, 1)]
    return Table(f"{source}[{split}]", tuple(loaded.column_names), rows, class_names, line_word="row")
