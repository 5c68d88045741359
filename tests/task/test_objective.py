"""Which other row a pair is made with."""

import numpy as np

from trainer.task.objective import earlier


def test_the_other_row_is_an_earlier_one_that_depends_on_the_sample_alone() -> None:
    samples = np.array([0, 1, 2, 17, 10**12])
    found = earlier(samples, 3)
    assert found[:2].tolist() == [1, 0]
    assert (found[1:] < samples[1:]).all()
    assert earlier(samples[3:4], 3).tolist() == found[3:4].tolist()
    early = np.arange(1, 257)
    assert abs((earlier(early, 3) / early).mean() - 0.5) < 0.05  # anywhere before


def test_the_other_row_is_near_so_that_its_shard_is_open() -> None:
    samples = np.arange(10**9, 10**9 + 20_000)
    back = samples - earlier(samples, 3)
    assert sorted(set(back.tolist())) == list(range(1, 257))
    assert abs(back.mean() - 128.5) < 2
