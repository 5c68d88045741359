"""The scale that cannot be run, computed without arrays: 10^10 samples, 1,024 ranks, three sources."""

import json
import subprocess
import sys
from pathlib import Path

from trainer.data.batches import rank_share
from trainer.data.stream.mix import Mixture, Stage
from trainer.data.stream.order import EpochOrder, SourceOrder

ROOT = Path(__file__).resolve().parents[3]
SHARES = (0.7, 0.2, 0.1)
START, BATCH, RANKS = 7 * 10**9, 4096, 1024
SOURCES = [SourceOrder((10**6,) * shards, seed, 8) for seed, shards in enumerate((7_001, 2_001, 1_001))]

PLACE = """
import json, resource, time
from tests.data.stream.test_scale import BATCH, RANKS, START, Places
from trainer.data.batches import micro_batches
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
places = Places()
(own,) = micro_batches(np.arange(START, START + BATCH), 511, RANKS, None)
found = [places.at(int(sample)) for sample in own]
seconds = time.perf_counter() - began
print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, found]))
"""


class Places:
    """(source, epoch, shard, row) of any sample, from nothing."""

    def __init__(self) -> None:
        self.mixture = Mixture([Stage(0, SHARES)], seed=5)
        self.orders: dict[tuple[int, int], EpochOrder] = {}

    def at(self, sample: int) -> tuple[int, int, int, int]:
        source, k = self.mixture.at(sample)
        epoch, inside = divmod(k, SOURCES[source].num_rows)
        if (source, epoch) not in self.orders:
            self.orders[source, epoch] = SOURCES[source].epoch(epoch)
        return (source, epoch, *self.orders[source, epoch].at(inside))


def test_the_first_batch_after_a_seek_takes_half_a_second_and_64_mib_at_most() -> None:
    done = subprocess.run([sys.executable, "-c", PLACE], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, mib, found = json.loads(done.stdout)
    assert len(found) == BATCH // RANKS
    assert seconds < 0.5, seconds
    assert mib < 64, mib


def test_no_two_ranks_share_a_sample_over_100_steps() -> None:
    """Ranks hold every sample of a global batch once; and over 100 steps no sample is another's place."""
    import numpy as np

    for step in range(100):
        batch = np.arange(START + step * BATCH, START + (step + 1) * BATCH)
        shares = [rank_share(batch, rank, RANKS) for rank in range(RANKS)]
        assert np.array_equal(np.concatenate(shares), batch)
    places = Places()
    samples = [START + step * BATCH + part for step in range(100) for part in range(0, BATCH, 16)]
    assert len({places.at(sample) for sample in samples}) == len(samples)
