"""From a table to samples with class ids: which rows can be used, and a report of those that cannot.

Between trainer/data/tables.py and the splits. Invariant: every row of a table ends as a sample or in the report.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config import ClassificationData
from trainer.data.labels import label_name, label_problem, label_values, names_in
from trainer.data.tables import Table, surrogate_problem
from trainer.errors import DataError

__all__ = [
    "BadRow",
    "Samples",
    "bad_rows_report",
    "check_labels",
    "is_unlabelled",
    "label_name",
    "label_set",
    "read_samples",
]

MOST_SHOWN = 5
"""Bad rows shown with their place; the others are counted."""


@dataclass(frozen=True)
class Samples:
    """Usable rows in the order of their source."""

    texts: list[str]
    pairs: list[str] | None
    """Second texts, for sentence pairs."""
    labels: np.ndarray
    """(N,) int64 class ids; for multi (N, C) float64 of 0 and 1, for regression (N, 1) float64."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples at these positions."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        return Samples([self.texts[row] for row in rows], pairs, self.labels[rows])


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    kind: str
    detail: str = ""


def label_set(table: Table, data: ClassificationData) -> tuple[str, ...]:
    """`data.labels`; or a hub dataset's own class names; or the sorted labels of the table, by value where all are integers.

    For regression the one output is called like the column.
    """
    if data.target == "regression":
        return (data.label,)
    if data.labels is not None:
        return data.labels
    names = table.class_names.get(data.label)
    if names is None:
        found = {name for cell in table.columns[data.label] for name in names_in(cell, data) if name}
        in_order = sorted(found)  # first by name: a set's own order differs between processes
        names = tuple(sorted(in_order, key=int) if all(map(_is_integer, found)) else in_order)
    return names


def check_labels(table: Table, data: ClassificationData, names: Sequence[str]) -> None:
    """DataError where there is nothing to tell apart."""
    if len(names) < 2 and data.target != "regression":
        raise DataError(
            f"data.label ({data.label}): the only label in {table.name} is {(names or ('none',))[0]!r}, and two or more are needed; name "
            "the column of the labels, or add samples of another class"
        )


def read_samples(
    table: Table, data: ClassificationData, names: Sequence[str], *, setting: str
) -> tuple[Samples, list[BadRow], str | None]:
    """The usable rows of a table, the others in the order of the file, and what is wrong where these are too many.

    names: the label set, in the order of class ids. setting: the field that named the table.
    """
    if is_unlabelled(table, data, names):
        named = "" if setting == "data.source" else f", or set {setting}=none to hold samples out of data.source"
        problem = (
            f"{setting} ({table.name}): no row has a label in column {data.label}, as in the test splits of many hub "
            f"datasets; name another column or other data{named}"
        )
        return Samples([], None, np.zeros(0, np.int64)), [], problem
    texts = [table.columns[column] for column in (data.text, data.text_pair) if column is not None]
    labels = _label_column(table, data.label)
    class_ids = {name: index for index, name in enumerate(names)}
    good, bad = [], [BadRow(row.line, "malformed row", row.reason) for row in table.malformed]
    for row, line in enumerate(table.lines):
        kind, detail = _text_problem([column[row] for column in texts])
        if not kind:
            kind, detail = label_problem(labels[row], data, class_ids)
        if kind:
            bad.append(BadRow(line, kind, detail))
        else:
            good.append(row)
    ids = label_values([labels[row] for row in good], data, class_ids)
    first, *second = [[str(column[row]) for row in good] for column in texts]
    bad.sort(key=lambda row: row.line)
    return Samples(first, second[0] if second else None, ids), bad, _too_many_bad(table, data, bad, names)


def is_unlabelled(table: Table, data: ClassificationData, names: Sequence[str]) -> bool:
    """Whether no row has a label, as in a hub's test split, which has -1 everywhere."""
    hidden = {None} if "-1" in names or data.target != "single" else {None, "-1"}
    cells = table.columns[data.label]
    return bool(table.lines) and all(not isinstance(value, list) and label_name(value) in hidden for value in cells)


def bad_rows_report(table: Table, bad: Sequence[BadRow]) -> str:
    """Bad rows by kind with their count, and the first of them with their place."""
    kinds: dict[str, list[BadRow]] = {}
    for row in bad:
        kinds.setdefault(row.kind, []).append(row)
    lines = []
    for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {kind}: {len(rows):,}")
        shown = rows[: max(1, MOST_SHOWN // len(kinds))]
        lines += [f"    {table.place(row.line)}{': ' + row.detail if row.detail else ''}" for row in shown]
    return "\n".join(lines)


def _too_many_bad(table: Table, data: ClassificationData, bad: Sequence[BadRow], names: Sequence[str]) -> str | None:
    """The error of a table with more bad rows than `data.max_bad_fraction`; None if it has not."""
    total = len(table)
    if len(bad) / total <= data.max_bad_fraction and len(bad) < total:
        return None
    share = math.ceil(len(bad) / total * 1000) / 1000
    fix = "correct them" if share >= 1 else f"correct them, or set data.max_bad_fraction={share:g} to leave them out"
    if any(row.kind == "unknown label" for row in bad):
        fix += f"; the labels are {', '.join(names[:20])}: data.labels sets them"
    return (
        f"{table.name}: {len(bad):,} of {total:,} rows cannot be used, more than data.max_bad_fraction "
        f"({data.max_bad_fraction:g}):\n{bad_rows_report(table, bad)}\n  {fix}"
    )


def _label_column(table: Table, column: str) -> Sequence[object]:
    """Labels, with class ids replaced by their names; an id without a name (-1) is a missing label."""
    names = table.class_names.get(column)
    if names is None:
        return table.columns[column]
    by_id: Mapping[object, str] = dict(enumerate(names))
    return [
        [by_id.get(part) for part in value] if isinstance(value, list) else by_id.get(value)
        for value in table.columns[column]
    ]


def _text_problem(texts: Sequence[object]) -> tuple[str, str]:
    """Kind and detail of what is wrong with a row's texts; ("", "") if nothing is."""
    for value in texts:
        if value is None or (isinstance(value, str) and not value.strip()):
            return "empty text", ""
        if not isinstance(value, str):
            return "wrong type", f"the text is a {type(value).__name__}: {value!r:.60}"
        if problem := surrogate_problem(value):
            return "broken text", f"the text {problem}"
    return "", ""


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
