"""The split of a source that brings no validation or test split of its own: stratified by class, or plain where there is no one class.

Pure. Invariant: the sizes are exact, every class of a stratified split is in every part, and the test split does not change
with the size of the validation split.
"""

import numpy as np

from trainer.data.batches import permutation
from trainer.errors import DataError


def stratified_split(
    labels: np.ndarray, sizes: tuple[int, int], label_names: tuple[str, ...], *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending positions of the training, validation and test samples; labels: (N,) class ids.

    sizes: samples of (validation, test), where 0 asks for none; every class gets its share of them by largest remainder.
    DataError where a class has fewer samples than there are splits, or a split fewer samples than there are classes.
    """
    counts = np.bincount(labels, minlength=len(label_names))
    present = np.flatnonzero(counts)  # a hub dataset may declare a class that it does not use
    _check_sizes(counts, present, sizes, label_names)
    shares = np.zeros((2, len(counts)), dtype=np.int64)
    num_after = 1 + (sizes[0] > 0)  # splits that still need a sample of each class: training, validation
    shares[1, present] = share_out(counts[present], sizes[1], counts[present] - num_after)
    left = counts[present] - shares[1, present]  # so that validation makes good what the test split rounded up
    shares[0, present] = share_out(left, sizes[0], left - 1)
    order = permutation(len(labels), seed)
    order = order[np.argsort(labels[order], kind="stable")]  # by class, in random order within each
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a sample within its class
    test_end, validation_end = (np.repeat(ends, counts) for ends in (shares[1], shares[0] + shares[1]))
    is_test, is_train = place < test_end, place >= validation_end
    return np.sort(order[is_train]), np.sort(order[~is_train & ~is_test]), np.sort(order[is_test])


def plain_split(count: int, sizes: tuple[int, int], *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending positions of the training, validation and test samples of `count`, drawn without a look at their labels.

    sizes: samples of (validation, test). The test split does not depend on the validation split's size. DataError where none is left.
    """
    if sum(sizes) >= count:
        raise DataError(
            f"the training split would hold {count - sum(sizes)} of {count:,} samples; lower data.validation_fraction and "
            "data.test_fraction, or name splits of your own"
        )
    test, validation, train = np.split(permutation(count, seed), [sizes[1], sizes[0] + sizes[1]])
    return np.sort(train), np.sort(validation), np.sort(test)


def share_out(counts: np.ndarray, size: int, room: np.ndarray) -> np.ndarray:
    """Split `size` over classes in proportion to `counts` by largest remainder, at least 1 and at most `room` to each.

    In integers, so that a tie is a tie on every machine; the first class wins it. A size of 0 gives zeros.
    """
    if size == 0:
        return np.zeros_like(counts)
    total = counts.sum()
    shares = np.clip(counts * size // total, 1, room)
    while shares.sum() != size:
        owed = counts * size - shares * total
        if shares.sum() < size:
            shares[np.argmax(np.where(shares < room, owed, np.iinfo(np.int64).min))] += 1
        else:
            shares[np.argmin(np.where(shares > 1, owed, np.iinfo(np.int64).max))] -= 1
    return shares


def _check_sizes(counts: np.ndarray, present: np.ndarray, sizes: tuple[int, int], label_names: tuple[str, ...]) -> None:
    fix = "add samples, change data.validation_fraction and data.test_fraction, or name splits of your own"
    splits = ["training", *(name for name, size in zip(("validation", "test"), sizes, strict=True) if size)]
    rare = [f"{label_names[label]!r} ({counts[label]})" for label in present if counts[label] < len(splits)]
    if rare:
        raise DataError(
            f"data.label: {', '.join(rare[:10])} has fewer samples than the {len(splits)} splits ({', '.join(splits)}) that "
            f"each need one; {fix}, or list the labels to keep in data.labels"
        )
    by_name = {"training": counts.sum() - sum(sizes), "validation": sizes[0], "test": sizes[1]}
    for name in splits:
        if by_name[name] < len(present):
            raise DataError(
                f"the {name} split would hold {by_name[name]} of {counts.sum():,} samples, fewer than the {len(present)} "
                f"classes; {fix}"
            )
