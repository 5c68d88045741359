"""Submitted runs that are interrupted, on a real two-node cluster: they finish, as if nothing had happened.

A run that was interrupted is compared with one that was not. Restarts are not waited for (121 s in Slurm) but asked for at once.
"""

import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from launch.queue import last_metrics
from launch.starts import newest_step, read_starts
from tests.slurm.cluster import Cluster
from tests.slurm.runs import (
    ENDLESS,
    ROOT,
    STEPS,
    log_of,
    losses,
    rank_of,
    same_weights,
    settings,
    submit,
    wait_for_step,
    wait_until,
)
from trainer.checkpoint.resume import OUTCOME, read_outcome
from trainer.run_folder import JOBS

pytestmark = pytest.mark.slow


def test_a_run_that_is_warned_and_then_loses_a_rank_ends_with_the_weights_of_one_that_was_not(
    cluster: Cluster, root: Path, whole: Path
) -> None:
    run = root / "interrupted"
    words = ["--nodes", "2", "--time", "60", *settings(root, run)]
    job = submit(cluster, *words)
    again = ["samestep", "submit", "recipes/lora_sst2.py", *words]
    refused = subprocess.run(again, cwd=ROOT, env=cluster.environ, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"job {job} of this run is in the queue" in refused.stderr
    wait_for_step(run, 50)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, until=("PENDING",))
    stopped_at = newest_step(run)
    assert 50 <= stopped_at < STEPS
    assert read_outcome(run) == "stopped"
    line = cluster.run("samestep", "status", str(run)).splitlines()[1]
    step, loss = f"{last_metrics(run)['step']}/{STEPS}", f"{losses(run)[-1]:.4f}"
    assert line.split()[:5] == ["interrupted", job, "PENDING", step, loss]
    cluster.wait(job, until=("RUNNING",))
    rank = rank_of(job, rank=1)
    end = datetime.fromisoformat(cluster.field(job, "EndTime")).timestamp()
    assert abs(int(rank.environ()["SAMESTEP_END_TIME"]) - end) <= 1
    wait_for_step(run, stopped_at + 50)
    rank.kill()
    cluster.wait(job, until=("PENDING",))
    cluster.wait(job)
    starts = read_starts(run)
    assert [start.number for start in starts] == [0, 1, 2]
    assert 0 < stopped_at == starts[1].step < starts[2].step
    assert "ended without a word" in log_of(run)
    assert read_outcome(run) == "finished"
    assert same_weights(run, whole)
    assert losses(run) == losses(whole)
    assert f"#SBATCH --output={run}/slurm/job-%j.out" in (run / JOBS / "train.sbatch").read_text()
    first = cluster.run("samestep", "logs", str(run), "--start", "0")
    assert "stopped on request after step" in first
    assert "the run is finished" not in first


def test_signals_before_the_first_step_and_to_one_rank_twice_during_a_save_and_the_cap_on_restarts(
    cluster: Cluster, root: Path, whole: Path
) -> None:
    run = root / "signalled"
    words = ["--nodes", "2", *settings(root, run)]
    faults = {"SAMESTEP_FAULT": "save.weights@1:2:usr1,save.state@1:2:usr1"}  # rank 1 in the second save of a start
    first = ["--max-restarts", "1", "train.resume=never"]  # heeded by the first start alone
    job = submit(cluster, *words, *first, environ=faults)
    wait_until(lambda: list((run / JOBS).glob("check-*")))
    cluster.run("scancel", "--signal=TERM", job)  # to what runs on the nodes, which is the check
    cluster.wait(job, until=("PENDING",))
    stopped_at = newest_step(run)
    assert read_outcome(run) == "stopped"
    assert 1 <= stopped_at < 20
    cluster.wait(job, until=("FAILED",))
    assert "restarted 1 times, which is the cap (--max-restarts 1)" in log_of(run)
    assert read_outcome(run) == "stopped"
    assert 40 <= newest_step(run) < STEPS
    assert not Path(f"{run}.1").exists()  # where an earlier run is moved to
    cluster.wait(submit(cluster, *words))
    assert [start.number for start in read_starts(run)] == [0, 1, 0]
    assert read_outcome(run) == "finished"
    assert same_weights(run, whole)
    assert losses(run) == losses(whole)


def test_fsdp_goes_on_on_the_node_that_is_left(cluster: Cluster, root: Path, whole: Path) -> None:
    run = root / "fsdp"
    job = submit(cluster, "--backend", "fsdp", "--nodes", "1-2", "--ranks-per-node", "2", *settings(root, run))
    wait_for_step(run, 50)
    try:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        cluster.wait(job)
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    starts = read_starts(run)
    assert [start.nodes for start in starts] == [2, 1]
    assert starts[1].step >= 40
    printed = log_of(run)
    assert "node 0     ranks 0, 1 of 4\nnode 1     ranks 2, 3 of 4\n" in printed
    assert "backend    fsdp, 2 processes" in printed
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_fsdp_over_two_nodes_is_warned_of_a_real_time_limit_goes_on_and_finishes(
    cluster: Cluster, root: Path, tmp_path: Path
) -> None:
    """A limit of a minute, with the signal by which Slurm warns of it. That training ends early stands in a file, written later."""
    run, given = root / "limit", tmp_path / "given.yaml"
    given.write_text("train: {eval_every: 1000000}\n")
    words = settings(root, Path(os.path.relpath(run, ROOT)), **ENDLESS)
    words.remove("train.eval_every=1000000")
    job = submit(cluster, "--backend", "fsdp", "--nodes", "2", "--time", "1", "--config", str(given), *words)
    given.unlink()  # the job has a copy
    cluster.wait(job, until=("RUNNING",))
    cluster.wait(job, until=("PENDING",), timeout_s=120)
    assert "samestep: USR1 asks to stop" in (run / JOBS / f"job-{job}.out").read_text()
    assert read_outcome(run) == "stopped"  # not killed
    (start,) = read_starts(run)
    assert (run / OUTCOME).stat().st_mtime - start.began < 60
    stopped_at = newest_step(run)
    assert stopped_at > 0
    copy = run / JOBS / "config-0-given.yaml"
    assert copy.read_text() == "train: {eval_every: 1000000}\n"
    copy.write_text("train: {eval_every: 10, patience: 1}\n")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # no warning in the second start
    cluster.wait(job)
    assert [(start.step, start.nodes, start.number) for start in read_starts(run)] == [(0, 2, 0), (stopped_at, 2, 1)]
    assert read_outcome(run) == "finished"
    assert newest_step(run) > stopped_at
    assert log_of(run).count("backend    fsdp, 2 processes") == 2
    assert log_of(run).count("node 0     ranks 0 of 2\nnode 1     ranks 1 of 2\n") == 2
    submitted = json.loads((run / JOBS / "submission.json").read_text())
    assert start.git and start.git == submitted["git"]
    assert submitted["options"]["backend"] == "fsdp"
    assert submitted["options"]["configs"] == [str(given)]
    shown = cluster.run("samestep", "status", str(run), cwd=tmp_path)
    assert shown.split("\n")[1].split()[:3] == ["limit", job, "finished"]
