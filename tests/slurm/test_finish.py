"""Submitted runs that nothing happens to, on a real two-node cluster: over two nodes, as arrays, and what is noted of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.starts import read_starts
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, settings, submit, wait_for_step
from trainer.checkpoint.resume import read_outcome

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("cluster")
def test_sbatch_of_the_template_trains_over_two_nodes_as_it_stands(whole: Path) -> None:
    assert read_outcome(whole) == "finished"
    printed = (whole.parent / "whole.out").read_text()
    assert "all 2 node(s) are ready" in printed
    assert "backend    ddp, 2 processes" in printed
    assert "node 0     ranks 0 of 2\nnode 1     ranks 1 of 2\n" in printed
    assert "the run is finished at step 240" in printed
    assert len(read_starts(whole)) == 1


def test_each_task_of_an_array_trains_in_its_own_folder_and_is_requeued_alone(cluster: Cluster, root: Path) -> None:
    run = root / "array"
    job = submit(cluster, "--array", "optim.peak_lr=1e-3,5e-4,1e-4", *settings(root, run))
    wait_for_step(Path(f"{run}-2"), 10)
    assert (
        cluster.field(f"{job}_2", "JobId") == job
    )  # this task's SLURM_JOB_ID is the array's: commands with it mean all tasks
    cluster.run("scancel", "--signal=TERM", f"{job}_2")  # to its rank
    cluster.wait(f"{job}_2", until=("PENDING",))
    for task in range(3):
        cluster.wait(f"{job}_{task}")
    starts = [read_starts(Path(f"{run}-{task}")) for task in range(3)]
    assert [[start.job for start in its] for its in starts] == [[f"{job}_0"], [f"{job}_1"], [f"{job}_2"] * 2]
    assert len({int(its[0].log.split("-")[1]) % 20000 for its in starts}) == 3  # their ports
    rows = [line.split() for line in cluster.run("samestep", "status", f"{run}-1").splitlines()[1:]]
    assert [row[0] for row in rows] == ["array-0", "array-1", "array-2"]
    finals = [weights_of_export(Path(f"{run}-{task}")) for task in range(3)]
    assert not any(torch.equal(finals[one], finals[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def weights_of_export(run: Path) -> torch.Tensor:
    tensors = load_file(run / "model" / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def test_sbatch_accepts_the_generated_scripts(cluster: Cluster) -> None:
    paths = sorted((ROOT / "tests" / "slurm" / "golden").glob("*.sbatch"))
    assert len(paths) == 3
    for path in paths:
        cluster.run("sbatch", "--test-only", str(path), cwd=ROOT)
