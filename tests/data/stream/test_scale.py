"""The scale that cannot be run: 10^9 and 10^10 samples, 1,024 ranks, three sources; a real start on datasets that take no room."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.stream.virtual import started, virtual_datasets
from trainer.data.batches import rank_share
from trainer.data.stream.mix import Mixture, Stage
from trainer.data.stream.order import SourceOrder

SHARES = (0.7, 0.2, 0.1)
START, BATCH, RANKS = 7 * 10**9, 4096, 1024
SOURCES = [SourceOrder((10**6,) * shards, seed, 8) for seed, shards in enumerate((7_001, 2_001, 1_001))]


@pytest.mark.slow  # which run alone
@pytest.mark.parametrize(
    ("shards", "samples"), [((45_500, 13_000, 6_500), 10**9), ((455_000, 130_000, 65_000), 10**10)]
)
def test_the_first_batch_after_a_seek_takes_half_a_second_and_64_mib_at_most(
    shards: tuple[int, ...], samples: int, tmp_path: Path
) -> None:
    """From opening the manifests, through the state's check, to the tokens of one rank's share; page cache warm, as plans were made."""
    virtual_datasets(tmp_path, shards)
    first = started(tmp_path, 0, batch=BATCH, rank=511, ranks=RANKS)
    assert sum(first["rows"]) > samples
    for tenth in (3, 7, 9):
        found = [started(tmp_path, samples * tenth // 10, batch=BATCH, rank=511, ranks=RANKS)]
        while found[-1]["seconds"] >= 0.5 and len(found) < 3:  # others use this machine
            found.append(started(tmp_path, samples * tenth // 10, batch=BATCH, rank=511, ranks=RANKS))
        assert found[-1]["identity"] == first["identity"]
        assert found[-1]["mib"] < 64, found
        assert found[-1]["seconds"] < 0.5, found


def test_no_two_ranks_share_a_sample_over_100_steps() -> None:
    """Ranks hold every sample of a global batch once; and over 100 steps no sample is another's place."""
    for step in range(100):
        batch = np.arange(START + step * BATCH, START + (step + 1) * BATCH)
        shares = [rank_share(batch, rank, RANKS) for rank in range(RANKS)]
        assert np.array_equal(np.concatenate(shares), batch)
    mixture = Mixture([Stage(0, SHARES)], seed=5)
    sources, ks = mixture.span(START, 100 * BATCH)
    for number, source in enumerate(SOURCES):
        epochs, inside = np.divmod(ks[sources == number], source.num_rows)
        for epoch in np.unique(epochs):
            shards, rows = source.epoch(int(epoch)).at_many(inside[epochs == epoch])
            places = shards * 10**6 + rows
            assert len(np.unique(places)) == len(places) > 0
