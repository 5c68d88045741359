"""The stratified split is exact, complete, and stable where it promises to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.split import share_out, stratified_split
from trainer.errors import DataError


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def test_sst_is_split_into_exact_shares() -> None:
    labels = np.repeat([0, 1], [5076, 4996])
    parts = stratified_split(labels, (1511, 1511), names(2), seed=0)
    assert [len(part) for part in parts] == [7050, 1511, 1511]
    assert [int(labels[part].sum()) for part in parts] == [3497, 750, 749]


@given(
    st.lists(st.integers(3, 60), min_size=1, max_size=6), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.integers(0, 9)
)
def test_every_sample_is_in_one_split_and_every_class_in_all(
    counts: list[int], validation: float, test: float, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    sizes = tuple(max(round(len(labels) * fraction), len(counts)) for fraction in (validation, test))
    if len(labels) - sum(sizes) < len(counts):
        return
    parts = stratified_split(labels, (sizes[0], sizes[1]), names(len(counts)), seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert (len(parts[1]), len(parts[2])) == sizes
    for part in parts:
        assert (np.diff(part) > 0).all()
        assert set(labels[part].tolist()) == set(range(len(counts)))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_shares_are_within_one_of_proportion_where_no_bound_is_met(counts: list[int], fraction: float) -> None:
    size = int(sum(counts) * fraction)
    by_class = np.array(counts)
    if size < len(counts):
        return
    shares = share_out(by_class, size, by_class)
    assert shares.sum() == size and (shares >= 1).all() and (shares <= by_class).all()
    quotas = by_class * size / by_class.sum()
    if (quotas >= 1).all():
        assert (np.abs(shares - quotas) < 1).all()


def test_a_tie_goes_to_the_first_class() -> None:
    assert share_out(np.array([10, 10, 10, 10]), 6, np.array([8, 8, 8, 8])).tolist() == [2, 2, 1, 1]


def test_the_test_split_does_not_change_with_the_validation_split() -> None:
    labels = np.arange(100) % 2
    tests = [stratified_split(labels, (size, 15), names(2), seed=0)[2].tolist() for size in (0, 10, 30)]
    assert tests[0] == tests[1] == tests[2]


def test_the_split_is_a_function_of_its_seed() -> None:
    labels = np.arange(100) % 2
    one, same, other = (stratified_split(labels, (15, 15), names(2), seed=seed)[2].tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_the_split_has_not_changed() -> None:
    # golden: another choice of samples would make published test numbers incomparable
    parts = stratified_split(np.arange(20) % 2, (4, 4), names(2), seed=0)
    assert [part.tolist() for part in parts[1:]] == [[2, 5, 7, 10], [8, 11, 12, 19]]


def test_a_class_that_does_not_occur_needs_no_samples() -> None:
    parts = stratified_split(np.repeat([0, 2], 10), (4, 4), names(3), seed=0)
    assert [len(part) for part in parts] == [12, 4, 4]


@pytest.mark.parametrize(
    ("counts", "sizes", "message"),
    [
        ([20, 2], (4, 4), r"'class 1' \(2\) has fewer samples than the 3 splits \(training, validation, test\)"),
        ([20, 1], (4, 0), r"'class 1' \(1\) has fewer samples than the 2 splits \(training, validation\)"),
        ([5, 5, 5], (2, 4), "the validation split would hold 2 of 15 samples, fewer than the 3 classes"),
        ([5, 5, 5], (4, 2), "the test split would hold 2 of 15 samples"),
        ([5, 5, 5], (7, 6), "the training split would hold 2 of 15 samples"),
    ],
)
def test_too_few_samples_name_class_rule_and_fix(counts: list[int], sizes: tuple[int, int], message: str) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    with pytest.raises(DataError, match=f"{message}.*add samples, change data.validation_fraction"):
        stratified_split(labels, sizes, names(len(counts)), seed=0)
