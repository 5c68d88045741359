"""From rows to examples: which column is the text, which label is which class, which rows are bad, and the stratified split."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import ClassificationData
from trainer.data.batches import Ids, permutation
from trainer.data.tables import Row, Table
from trainer.errors import DataError
from trainer.resolve.suggest import nearest_word

MOST_SHOWN = 5


@dataclass(frozen=True)
class Examples:
    """texts and pairs (or None): one string each; labels: (N,) int64 class ids."""

    texts: list[str]
    pairs: list[str] | None
    labels: Ids

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, ids: Ids) -> "Examples":
        """The examples with these positions, in this order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in ids]
        return Examples([self.texts[i] for i in ids], pairs, self.labels[ids])


class BadRowError(Exception):
    """Why a row is no example; caught here and counted."""


def read_examples(
    table: Table, config: ClassificationData, names: tuple[str, ...] | None, notes: list[str]
) -> tuple[Examples, tuple[str, ...]]:
    """The good rows of a table and the label set; bad rows are noted, or a DataError where they are too many.

    names: the label set, or None to take the sorted labels of this table.
    """
    check_columns(table, config)
    good: list[tuple[str, str | None, str]] = []
    bad: list[tuple[str, str]] = []
    for row in table.rows:
        try:
            good.append(read_row(table, row, config, names))
        except BadRowError as problem:
            bad.append((table.place(row), str(problem)))
    report_bad_rows(table, bad, config, notes)
    found = names or tuple(sorted({label for _, _, label in good}))
    if len(found) < 2:
        raise DataError(
            f"{table.name}: column {config.label} holds {len(found)} label(s) ({', '.join(found)}); at least two are needed"
        )
    class_of = {name: number for number, name in enumerate(found)}
    pairs = [str(pair) for _, pair, _ in good] if config.text_pair else None
    labels = np.array([class_of[label] for _, _, label in good], dtype=np.int64)
    return Examples([text for text, _, _ in good], pairs, labels), found


def check_columns(table: Table, config: ClassificationData) -> None:
    """DataError where a named column is missing."""
    problems = []
    for field in ("text", "text_pair", "label"):
        column = getattr(config, field)
        if column is not None and column not in table.columns:
            near = nearest_word(column, table.columns)
            hint = f"did you mean data.{field}={near}?" if near else f"set data.{field} to one of them"
            problems.append(
                f"{table.name}: no column {column!r} (data.{field}); it has {', '.join(table.columns) or 'none'}; {hint}"
            )
    if problems:
        raise DataError("\n".join(problems))


def read_row(
    table: Table, row: Row, config: ClassificationData, names: tuple[str, ...] | None
) -> tuple[str, str | None, str]:
    """(text, second text, label name) of one row, or BadRowError."""
    if row.problem:
        raise BadRowError(row.problem)
    text = read_text(row.values.get(config.text), config.text)
    pair = read_text(row.values.get(config.text_pair), config.text_pair) if config.text_pair else None
    label = read_label(row.values.get(config.label), table.class_names.get(config.label))
    if names is not None and label not in names:
        raise BadRowError(f"label {label!r} is not in the label set ({', '.join(names)})")
    return text, pair, label


def read_text(value: Any, column: str) -> str:
    """A text that is not empty."""
    if value is not None and not isinstance(value, str):
        raise BadRowError(f"{column} is {type(value).__name__}, not text")
    if value is None or not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def read_label(value: Any, class_names: list[str] | None) -> str:
    """The label's name; integers get their class name where the source has one. -1 is the hub's word for "none"."""
    if value is None or value == "" or (class_names and value == -1):
        raise BadRowError("no label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise BadRowError(f"the label is {type(value).__name__}, not text or a whole number")
    if class_names and isinstance(value, int):
        return class_names[value]
    return str(value).strip()


def report_bad_rows(table: Table, bad: list[tuple[str, str]], config: ClassificationData, notes: list[str]) -> None:
    """Note the dropped rows; DataError where their share is more than `data.max_bad_fraction`."""
    if not bad:
        return
    share = len(bad) / len(table.rows)
    shown = "; ".join(f"{place}: {problem}" for place, problem in bad[:MOST_SHOWN])
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(problem for _, problem in bad).most_common(3))
    counted = f"{len(bad)} of {len(table.rows)} rows are bad ({kinds}): {shown}" + (
        "; ..." if len(bad) > MOST_SHOWN else ""
    )
    if len(bad) == len(table.rows) and kinds.endswith("no label"):
        raise DataError(
            f"{table.name}: no row has a label; a hub's test split often has none: set data.test=none, data.test_fraction=0"
        )
    if share > config.max_bad_fraction:
        fix = f"mend them, or drop them with data.max_bad_fraction={np.ceil(share * 1000) / 1000:g}"
        raise DataError(
            f"{table.name}: {counted}; more than data.max_bad_fraction ({config.max_bad_fraction:g}); {fix}"
        )
    notes.append(f"dropped: {counted}")


def stratified_split(
    examples: Examples, names: tuple[str, ...], fractions: list[float], seed: int, source: str
) -> tuple[Examples, Examples, Examples]:
    """(train, validation, test): validation and test get round(N * fraction) examples, each label its share (largest remainder).

    A function of the examples' order and the seed. DataError where a label has too few examples to be in every part.
    """
    counts = np.bincount(examples.labels, minlength=len(names))
    needed = 1 + sum(fraction > 0 for fraction in fractions)
    for name, count in zip(names, counts, strict=True):
        if count < needed:
            raise DataError(
                f"{source}: label {name!r} has {count} example(s), but at least {needed} are needed to split; add some or drop the label"
            )
    takes = [largest_remainder(counts, round(len(examples) * fraction)) for fraction in fractions]
    parts: list[list[Ids]] = [[], [], []]
    for label in range(len(names)):
        ids = np.flatnonzero(examples.labels == label)
        shuffled = ids[permutation(len(ids), seed, label)]
        ends = np.cumsum([takes[0][label], takes[1][label]])
        for part, chosen in zip((1, 2, 0), np.split(shuffled, ends), strict=True):
            parts[part].append(chosen)
    train, validation, test = (examples.take(np.sort(np.concatenate(chosen))) for chosen in parts)
    return train, validation, test


def largest_remainder(counts: Ids, total: int) -> Ids:
    """`total` shared over the classes in proportion to their counts; the largest remainders round up."""
    exact = counts * total / counts.sum()
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return shares
