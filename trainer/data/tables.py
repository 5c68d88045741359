"""Columns of a CSV, TSV, JSONL or Parquet file, each row with its place in the file.

First stop of the data flow; trainer/data/sources.py decides what a source is. Knows nothing of labels or tokens.
Invariant: no row is skipped or guessed at in silence: what cannot be read is an error, or a malformed row that the
caller counts.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainer.errors import DataError

MOST_LISTED = 20
"""Columns named in a message; a wide table has hundreds."""
SHOWN = 100
"""Characters of a line that is wrong."""
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of pairs: JSON can hold one alone, text can not."""


@dataclass(frozen=True)
class Malformed:
    """A row that could not be read."""

    line: int
    reason: str


@dataclass(frozen=True)
class Table:
    """The columns asked for, as the format has them: str from CSV and TSV, anything from the others; None is missing."""

    name: str
    """What messages call it: a path, or a hub dataset and its split."""
    kind: str
    """asset, file or hub dataset."""
    columns: Mapping[str, Sequence[object]]
    """Values by column name; all of the same length."""
    lines: Sequence[int]
    """Of each row: the line on which it starts, from 1; without lines (Parquet, hub), its number, from 1."""
    malformed: Sequence[Malformed] = ()
    """Rows that are in no column."""
    has_lines: bool = True
    """Whether `lines` are lines of a text file."""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For columns of class ids (a hub dataset's ClassLabel): the name of each id."""

    def __len__(self) -> int:
        return len(self.lines) + len(self.malformed)

    def place(self, line: int) -> str:
        """Where a row is: `reviews.csv:17`, or `reviews.parquet row 17`."""
        return f"{self.name}:{line}" if self.has_lines else f"{self.name} row {line}"


def read_file(path: Path, columns: Mapping[str, str], *, kind: str = "file") -> Table:
    """Read columns of a file that exists, by its suffix. columns: setting -> column, such as {"data.text": "sentence"}.

    DataError: another suffix, a folder, unreadable, not UTF-8, empty, broken quoting, a column that is missing or double.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise DataError(_not_a_table(path))
    try:
        table = reader(path, columns, kind)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} cannot be read: {reason}; check the file and its permissions") from None
    if not len(table):
        raise DataError(f"{path} holds no rows; it must hold one for each sample")
    return table


def columns_of(path: Path) -> list[str]:
    """Names of a file's columns, in their order. DataError as `read_file`."""
    if path.suffix.lower() not in READERS or path.is_dir():
        raise DataError(_not_a_table(path))
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import ArrowException, parquet

            try:
                return list(parquet.read_schema(path).names)
            except ArrowException as error:
                raise DataError(_bad_parquet(path, error)) from None
        if path.suffix.lower() == ".jsonl":
            records = [_parse_object(text) for text in _read_text(path).split("\n") if text.strip()]
            return list({key: None for record in records if isinstance(record, dict) for key in record})
        return _parse_records(path, csv.excel_tab if path.suffix.lower() == ".tsv" else csv.excel)[0][0]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the file and its permissions"
        ) from None


def check_columns(name: str, present: Sequence[str], columns: Mapping[str, str], hint: str = "") -> None:
    """DataError for every column asked for that `present` lacks, with the nearest name, and for one that is there twice.

    hint: what it may mean when all of them are missing.
    """
    problems = []
    for setting, column in columns.items():
        if present.count(column) > 1:
            problems.append(
                f"{setting} ({column}): {name} has {present.count(column)} columns of that name; rename one"
            )
        elif column not in present:
            near = get_close_matches(column, present, n=1) or get_close_matches(column.lower(), present, n=1)
            fix = f"did you mean {setting}={near[0]}?" if near else f"set {setting} to one of them"
            problems.append(f"{setting} ({column}): {name} has no such column; {fix}")
    if problems:
        listed = ", ".join(_quoted(column[:60]) for column in present[:MOST_LISTED])
        more = f" and {len(present) - MOST_LISTED} more" if len(present) > MOST_LISTED else ""
        hint = hint if not set(columns.values()) & set(present) else ""
        raise DataError("; ".join([*problems, f"its columns are {listed}{more}{hint}"]))


def surrogate_problem(text: str) -> str:
    """What is wrong with a text that no tokenizer takes; "" if nothing is. The caller names the text and its place."""
    found = None if text.isascii() else SURROGATES.search(text)
    if found is None:
        return ""
    shown = text[max(found.start() - 20, 0) : found.end() + 20]
    return f"holds half of a surrogate pair, which is no character: {shown!r}"


def _quoted(column: str) -> str:
    """A column's name, in quotes where it would be misread without."""
    return column if column.strip() == column and column.isprintable() and "," not in column else repr(column)


def _read_csv(path: Path, columns: Mapping[str, str], kind: str) -> Table:
    return _read_separated(path, columns, kind, csv.excel)


def _read_tsv(path: Path, columns: Mapping[str, str], kind: str) -> Table:
    return _read_separated(path, columns, kind, csv.excel_tab)


def _read_separated(path: Path, columns: Mapping[str, str], kind: str, dialect: type[csv.Dialect]) -> Table:
    """A header line, then rows of the csv module's dialect, where a quoted field may hold line breaks."""
    records, lines = _parse_records(path, dialect)
    header = records[0]
    check_columns(str(path), header, columns, _separator_hint(header))
    malformed = [
        Malformed(line, f"{len(record)} fields where the header has {len(header)}")
        for record, line in zip(records, lines, strict=True)
        if len(record) != len(header)
    ]
    good = [index for index in range(1, len(records)) if len(records[index]) == len(header)]
    places = {column: header.index(column) for column in columns.values()}
    values = {column: [records[index][place] for index in good] for column, place in places.items()}
    return Table(str(path), kind, values, [lines[index] for index in good], malformed)


def _parse_records(path: Path, dialect: type[csv.Dialect]) -> tuple[list[list[str]], list[int]]:
    """All records but blank lines, the header first, and the line on which each starts."""
    records, lines = [], []
    # Strict: without it a quote that is never closed takes in the rest of the file as one field.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), dialect, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 131,072 characters
    start = 1
    try:
        for record in reader:
            if record:
                records.append(record)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: broken quoting in the row that starts here ({error}); a field that holds a separator, a "
            'quote or a line break stands in "quotes", and a quote inside it is doubled ("")'
        ) from None
    finally:
        csv.field_size_limit(limit)
    return records, lines


def _separator_hint(header: Sequence[str]) -> str:
    """What it means when columns are missing: another separator, if the header is one column, or no header."""
    if len(header) == 1:
        for mark, hint in (
            ("\t", "the file is separated by tabs: name it .tsv"),
            (";", "the file is separated by semicolons: write it with commas"),
            (",", "the file is separated by commas: name it .csv"),
        ):
            if mark in header[0]:
                return f"; {hint}"
    return "; the first line must name the columns"


def _read_jsonl(path: Path, columns: Mapping[str, str], kind: str) -> Table:
    """One JSON object a line; blank lines are skipped. A column is there if any line has it."""
    values: dict[str, list[object]] = {column: [] for column in columns.values()}
    seen: dict[str, None] = {}
    lines, malformed = [], []
    for line, text in enumerate(_read_text(path).split("\n"), start=1):  # not splitlines, which also cuts at U+2028
        if not text.strip():
            continue
        record = _parse_object(text)
        if isinstance(record, str):
            malformed.append(Malformed(line, f"{record} (it holds {text[:SHOWN]!r})"))
            continue
        seen.update(dict.fromkeys(record))
        lines.append(line)
        for column, cells in values.items():
            cells.append(record.get(column))
    if seen or not malformed:
        check_columns(str(path), list(seen), columns)
    return Table(str(path), kind, values, lines, malformed)


def _parse_object(text: str) -> dict[str, Any] | str:
    """The object of one line, or what is wrong with it."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (RecursionError, ValueError):  # also integers of more than 4,300 digits
        return "not JSON that can be read"
    return record if isinstance(record, dict) else f"a JSON {type(record).__name__} where an object must be"


def _read_parquet(path: Path, columns: Mapping[str, str], kind: str) -> Table:
    from pyarrow import ArrowException, parquet  # a fifth of a second that other formats do not pay

    try:
        file = parquet.ParquetFile(path)
        check_columns(str(path), file.schema_arrow.names, columns)
        table = file.read(columns=list(dict.fromkeys(columns.values())))
        values = {name: table.column(name).to_pylist() for name in table.column_names}
    except ArrowException as error:
        raise DataError(_bad_parquet(path, error)) from None
    return Table(str(path), kind, values, range(1, table.num_rows + 1), has_lines=False)


def _bad_parquet(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0][:200]
    return f"{path} is no Parquet file that can be read ({reason}); check that it was copied whole"


def _read_text(path: Path) -> str:
    """The whole file as UTF-8, with or without a byte order mark. DataError for an empty file or other bytes."""
    content = path.read_bytes()
    if not content.strip():
        raise DataError(f"{path} is empty; it must hold a row for each sample")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        encoding = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"{path}:{line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; convert the file, for example "
            f"with `iconv -f {encoding} -t UTF-8`"
        ) from None


def _not_a_table(path: Path) -> str:
    formats = " ".join(READERS)
    if not path.is_dir():
        return f"{path} must be one of {formats}; convert it, or rename it if it is one"
    inside = sorted(child.name for child in path.iterdir() if child.suffix.lower() in READERS)
    return f"{path} is a folder; give one file ({formats})" + (f"; in it are {', '.join(inside[:5])}" if inside else "")


READERS: Mapping[str, Callable[[Path, Mapping[str, str], str], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""How each suffix is read; another format is one entry and its function."""
