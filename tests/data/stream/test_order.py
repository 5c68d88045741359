"""The order of a source: one to one, the same for ever, and as cheap at sample 7 x 10^9 as at sample 0."""

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.stream.order import SourceOrder, key_of, mix64, permuted

ROWS = (5, 0, 7, 3, 9, 1, 4)


def test_the_generator_has_its_published_values() -> None:
    # SplitMix64 from seed 0, as in Vigna's reference implementation (prng.di.unimi.it/splitmix64.c)
    state, values = 0, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        values.append(mix64(state))
    assert values == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_golden_orders_never_change() -> None:
    order = SourceOrder(rows=ROWS, seed=7, window=3)
    assert [order.epoch(0).at(k) for k in range(6)] == GOLDEN_EPOCH_0
    assert [order.epoch(1).at(k) for k in range(6)] == GOLDEN_EPOCH_1
    assert [permuted(i, 10, key_of(1, 2)) for i in range(10)] == GOLDEN_PERMUTATION


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one_to_one(count: int, key: int) -> None:
    assert sorted(permuted(index, count, key) for index in range(count)) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_an_epoch_holds_every_row_once(rows: list[int], seed: int, window: int, epoch: int) -> None:
    order = SourceOrder(tuple(rows), seed, window).epoch(epoch)
    seen = [order.at(k) for k in range(sum(rows))]
    assert sorted(seen) == [(shard, row) for shard, count in enumerate(rows) for row in range(count)]


def test_epochs_and_seeds_differ_and_neighbours_come_from_one_window() -> None:
    first = [SourceOrder(ROWS, 1, 2).epoch(0).at(k) for k in range(29)]
    assert first != [SourceOrder(ROWS, 1, 2).epoch(1).at(k) for k in range(29)]
    assert first != [SourceOrder(ROWS, 2, 2).epoch(0).at(k) for k in range(29)]
    order = SourceOrder((100,) * 10, 1, window=2).epoch(0)
    for window in range(5):
        assert len({order.at(k)[0] for k in range(200 * window, 200 * window + 200)}) == 2


def test_a_random_order_is_not_the_plain_one() -> None:
    order = [permuted(index, 10_000, 3) for index in range(10_000)]
    assert sum(place == index for index, place in enumerate(order)) < 10
    assert abs(sum(order[:1000]) / 1000 - 5000) < 500


def seek_and_read() -> list[tuple[int, int]]:
    order = SourceOrder(rows=(10**6,) * 10**4, seed=1).epoch(0)
    return [order.at(7 * 10**9 + k) for k in range(1024)]


def test_a_seek_far_into_ten_billion_samples_takes_no_time_and_no_memory() -> None:
    began = time.process_time()
    assert len(set(seek_and_read())) == 1024
    assert time.process_time() - began < 0.5
    tracemalloc.start()
    seek_and_read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize("k", [-1, 29])
def test_a_sample_outside_the_epoch_is_a_mistake_of_ours(k: int) -> None:
    with pytest.raises((AssertionError, IndexError)):
        SourceOrder(ROWS, 1).epoch(0).at(k)


GOLDEN_EPOCH_0 = [(2, 3), (6, 2), (5, 0), (6, 3), (2, 5), (6, 1)]
GOLDEN_EPOCH_1 = [(3, 0), (5, 0), (3, 2), (3, 1), (4, 6), (2, 2)]
GOLDEN_PERMUTATION = [1, 0, 8, 2, 9, 4, 3, 6, 5, 7]
