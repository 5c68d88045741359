"""One cluster for all tests of this folder that need it, and one run that nothing happened to."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running_cluster, why_not_here
from tests.slurm.runs import ROOT, settings
from tests.tiny import tiny_bert, tiny_sentences

LIMIT_S = float(os.environ.get("SAMESTEP_SLURM_LIMIT_S", "600"))
"""For all tests on the cluster together; .ci/run sets more, since its machine may be busy with others' work."""


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not_here()
    if reason and os.environ.get("SAMESTEP_NEEDS_SLURM"):  # set by .ci/run
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started
    took = started.last_used - started.began
    assert took < LIMIT_S, f"the tests on the cluster took {took:.0f} s, and have {LIMIT_S}"


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    yield started_cluster
    started_cluster.last_used = time.monotonic()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=96)
    return folder


@pytest.fixture(scope="session")
def whole_job(started_cluster: Cluster, root: Path) -> str:
    """The id of a job that nothing will happen to, by `sbatch slurm/train.sbatch` as it stands, ddp over two nodes."""
    output = root / "whole.out"
    words = ["--parsable", "--nodes=2", f"--output={output}", "slurm/train.sbatch", "recipes/lora_sst2.py"]
    return started_cluster.run("sbatch", *words, *settings(root, root / "whole"), cwd=ROOT).strip()


@pytest.fixture(scope="session")
def whole(started_cluster: Cluster, root: Path, whole_job: str) -> Path:
    """Its run, finished."""
    started_cluster.wait(whole_job)
    return root / "whole"
