"""What a label cell says: one class, several, or a number, by `data.target`; and how much each class weighs.

Below trainer/data/samples.py. Pure: neither files nor torch. Invariant: a cell that passes `label_problem` has a value.
"""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np

from trainer.config import ClassificationData, check_weights
from trainer.errors import ConfigError, DataError

LARGEST_NUMBER = float(np.finfo(np.float32).max)
"""The loss is computed in fp32."""


def label_name(value: object) -> str | None:
    """A label as text: 3, 3.0 and "3" are one label, and true is "true". None where there is no label; "" where it can be no class name."""
    if value is None or value != value:  # a missing number is NaN in many files
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else ""


def names_in(value: object, data: ClassificationData) -> list[str | None]:
    """The labels in a cell, as `label_name` says them: one, or for target=multi those of a list or of a separated text."""
    if data.target != "multi":
        return [label_name(value)]
    if isinstance(value, str) and value.strip():
        return [label_name(part) for part in value.split(data.label_separator) if part.strip()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [label_name(part) for part in value]
    return [label_name(value)]


def number_of(value: object) -> float | None:
    """A label as a number; None where there is no label. NaN for what is no finite number of fp32's range, a bool too."""
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= LARGEST_NUMBER else math.nan


def label_problem(value: object, data: ClassificationData, class_ids: Mapping[str, int]) -> tuple[str, str]:
    """Kind and detail of what is wrong with a label cell; ("", "") if nothing is."""
    if data.target == "regression":
        number = number_of(value)
        if number is None:
            return "missing label", ""
        return ("wrong type", f"a label must be a finite number, not {value!r:.60}") if math.isnan(number) else ("", "")
    for name in names_in(value, data):
        if name is None:
            return "missing label", ""
        if not name:
            return "wrong type", f"a label must be a word or an integer, not {value!r:.60}"
        if name not in class_ids:
            near = get_close_matches(name, class_ids, n=1)
            return "unknown label", repr(name[:60]) + (f", did you mean {near[0]!r}?" if near else "")
    return "", ""


def label_values(cells: Sequence[object], data: ClassificationData, class_ids: Mapping[str, int]) -> np.ndarray:
    """Labels of good cells: (N,) int64 class ids; for multi (N, C) float64 of 0 and 1, for regression (N, 1) float64."""
    if data.target == "single":
        return np.array([class_ids[str(label_name(cell))] for cell in cells], dtype=np.int64)
    if data.target == "regression":
        return np.array([number_of(cell) for cell in cells], dtype=np.float64).reshape(-1, 1)
    values = np.zeros((len(cells), len(class_ids)))
    for row, cell in enumerate(cells):
        values[row, [class_ids[str(name)] for name in names_in(cell, data)]] = 1.0
    return values


def check_numbers(labels: Mapping[str, np.ndarray], data: ClassificationData) -> None:
    """DataError for a split whose numbers are all the same, as in the test splits of many hub datasets. labels: (N, 1) by split."""
    problems = [
        f"data.label ({data.label}): all {len(values):,} samples of the {name} split have the value {values[0, 0]:g}, so that there is "
        "nothing to predict; name another column or other data"
        for name, values in labels.items()
        if values.min() == values.max()
    ]
    if problems:
        raise DataError("\n".join(problems))


def class_weights(labels: np.ndarray, names: Sequence[str], data: ClassificationData) -> np.ndarray | None:
    """(C,) float64 of `data.class_weights`; None without any. labels: of the training split, as `label_values` gives them.

    ConfigError for another number of weights than labels, DataError where `balanced` has no example to count.
    """
    if data.class_weights is None:
        return None
    if isinstance(data.class_weights, tuple):
        try:
            check_weights(data.class_weights, tuple(names))
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
        return np.array(data.class_weights)
    is_multi = labels.ndim > 1
    counts = labels.sum(axis=0) if is_multi else np.bincount(labels, minlength=len(names))
    others = len(labels) - counts
    _check_counts(counts, others if is_multi else counts, names)
    return np.asarray(others / counts if is_multi else len(labels) / (len(names) * counts))


def _check_counts(counts: np.ndarray, others: np.ndarray, names: Sequence[str]) -> None:
    never = [name for name, count in zip(names, counts, strict=True) if not count]
    always = [name for name, other in zip(names, others, strict=True) if not other and name not in never]
    if never or always:
        wrong = f"{never[0]!r} is a label of none" if never else f"{always[0]!r} is a label of all"
        raise DataError(
            f"data.class_weights (balanced): {wrong} of the training samples, so that it has no weight; list the labels to keep in "
            "data.labels, or give the weights as numbers"
        )
