"""What the labels of the splits are, in columns for the screen. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np

MOST_CLASSES_SHOWN = 6


def label_table(labels: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple[str, ...]:
    """Samples of each split and label, in columns; of many labels only the rarest and the commonest. Of numbers their spread.

    labels: by split, as trainer/data/samples.py has them.
    """
    if len(names) == 1:
        return _number_table(labels)
    counts = {
        split: np.bincount(ids, minlength=len(names)) if ids.ndim == 1 else ids.sum(axis=0).astype(np.int64)
        for split, ids in labels.items()
    }
    if len(names) > MOST_CLASSES_SHOWN:
        by_count = np.argsort(counts["train"], kind="stable")
        shown, titles = by_count[[0, -1]], ["rarest: ", "commonest: "]
        heading = [f"samples of {len(names)} labels"]
    else:
        shown, titles, heading = np.arange(len(names)), [""] * len(names), ["samples"]
    table = [["", *heading, *(title + names[label] for title, label in zip(titles, shown, strict=True))]]
    for split, count in counts.items():
        size = len(labels[split])
        table.append([split, f"{size:,}", *(f"{count[label]:,} ({count[label] / size:.1%})" for label in shown)])
    return _in_columns(table)


def _number_table(labels: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Mean, standard deviation and range of each split's numbers."""
    table = [["", "samples", "mean", "std", "lowest", "highest"]]
    for split, values in labels.items():
        facts = (values.mean(), values.std(), values.min(), values.max())
        table.append([split, f"{len(values):,}", *(f"{fact:.4g}" for fact in facts)])
    return _in_columns(table)


def _in_columns(table: Sequence[Sequence[str]]) -> tuple[str, ...]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return tuple(
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
