"""A mixture: weights met to one sample at every block's end, every sample of every source in order, no replay to seek."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.stream.mix import Mixture, Stage
from trainer.errors import ConfigError

# A share may not be below 1e-4, which 0.002 of five never is.
WEIGHTS = st.lists(st.sampled_from([0.0, 0.002, 0.1, 0.3, 1.0, 2.5]), min_size=1, max_size=5).filter(
    lambda w: sum(w) > 0
)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(0, 2**32))
def test_every_source_is_read_in_order_without_gaps(weights: list[float], seed: int) -> None:
    mixture = Mixture([Stage(0, tuple(weights))], seed)
    seen: Counter[int] = Counter()
    for sample in range(3000):
        source, number = mixture.at(sample)
        assert number == seen[source]
        seen[source] += 1
    assert mixture.counts(3000) == tuple(seen[source] for source in range(len(weights)))


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(1, 10**7))
def test_weights_are_met_to_one_sample_at_every_blocks_end(weights: list[float], number: int) -> None:
    mixture = Mixture([Stage(0, tuple(weights))], seed=1)
    samples = number * mixture.block
    for count, weight in zip(mixture.counts(samples), weights, strict=True):
        assert abs(count - weight / sum(weights) * samples) <= 1 + samples * 1e-12  # of floats
    assert sum(mixture.counts(samples)) == samples


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=2, max_size=4).filter(any))
def test_weights_that_add_up_to_the_period_are_met_at_its_end_and_not_passed_before(rows: list[int]) -> None:
    period = sum(rows)
    mixture = Mixture([Stage(0, tuple(map(float, rows)))], 7, period=period)
    sources, numbers = mixture.span(0, 2 * period)
    for source, held in enumerate(rows):
        assert numbers[sources == source].tolist() == list(range(2 * held))
        assert (np.flatnonzero(sources == source)[:held] < period).all()
    for sample in range(0, 2 * period, 97):
        assert mixture.at(sample) == (sources[sample], numbers[sample])
        assert mixture.counts(sample) == tuple(np.bincount(sources[:sample], minlength=len(rows)).tolist())


def test_stages_change_the_weights_from_a_sample_on() -> None:
    mixture = Mixture([Stage(0, (1, 0)), Stage(1000, (0, 1)), Stage(2500, (1, 1))], seed=3)
    seen: Counter[int] = Counter()
    for sample in range(6000):
        source, number = mixture.at(sample)
        assert number == seen[source]
        assert source == (0 if sample < 1000 else 1) or sample >= 2500
        seen[source] += 1
    assert mixture.counts(2500) == (1000, 1500)


@pytest.mark.parametrize(("weights", "shares"), [((3e-7, 3e-7), (500, 500)), ((4e-7, 6e-7), (400, 600))])
def test_small_weights_count_by_their_ratio(weights: tuple[float, float], shares: tuple[int, int]) -> None:
    assert Mixture([Stage(0, weights)], seed=1).counts(1024 * 1000) == tuple(1024 * share for share in shares)


def test_a_seek_needs_no_history() -> None:
    fresh, walked = (Mixture([Stage(0, (0.6, 0.3, 0.1))], seed=5) for _ in range(2))
    for sample in range(5000):
        walked.at(sample)
    assert fresh.at(4999) == walked.at(4999)
    assert sum(fresh.counts(10**12)) == 10**12


@pytest.mark.parametrize(
    "stages",
    [
        [],
        [Stage(5, (1,))],
        [Stage(0, (0, 0))],
        [Stage(0, (-1, 2))],
        [Stage(0, (1,)), Stage(9, (1, 1))],
        [Stage(0, (1, 1e-9))],
        [Stage(0, (1, 1)), Stage(9, (float("nan"), 1))],
        [Stage(0, (1, float("inf")))],
    ],
)
def test_stages_that_cannot_be_followed_are_refused(stages: list[Stage]) -> None:
    with pytest.raises(ConfigError, match=r"data\.(stages|weights)"):
        Mixture(stages, seed=0)
