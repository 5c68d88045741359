"""Submitted runs that must not start again, on a real two-node cluster: broken, refused, out of disk, cancelled."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.starts import newest_step, read_starts
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ENDLESS, ROOT, STEPS, log_of, same_weights, settings, submit, wait_for_step
from trainer.run_folder import JOBS

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("whole_job")  # which has the time to train beside it
def test_a_run_that_fails_at_once_stops_and_says_why(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "broken.py"
    text = (ROOT / "recipes" / "lora_sst2.py").read_text()
    broken = text.replace("    accelerator = ", '    raise RuntimeError("broken on purpose")\n    accelerator = ')
    recipe.write_text('print("imported")\n' + broken)
    run = root / "broken"
    printed = cluster.run("samestep", "submit", str(recipe), *settings(root, run), cwd=ROOT)
    job = printed.splitlines()[-2].split()[1].rstrip(":")
    cluster.wait(job, until=("FAILED",))
    assert len(read_starts(run)) == 2
    said = log_of(run)
    assert "broken on purpose" in said
    assert "no progress since the last restart: the newest checkpoint is still that of step 0" in said
    line = cluster.run("samestep", "status", str(run)).splitlines()[1]
    assert line.split() == ["broken", job, *"not in the queue".split(), "0", "1"]  # step, restarts


def test_a_mistake_in_the_settings_ends_the_job_at_once(cluster: Cluster, root: Path) -> None:
    output = root / "mistake.out"
    words = ["--parsable", f"--output={output}", "slurm/train.sbatch", "recipes/lora_sst2.py", "optim.peek_lr=1"]
    job = cluster.run("sbatch", *words, cwd=ROOT).strip()
    cluster.wait(job, until=("FAILED",))
    assert cluster.field(job, "ExitCode") == "2:0"
    assert "did you mean `optim.peak_lr`" in output.read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and os.environ.get("SAMESTEP_NEEDS_SLURM"):  # set by .ci/run
        pytest.fail(f"cannot mount a small disk here: {done.stderr}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_costs_the_last_steps_and_nothing_else(
    cluster: Cluster, root: Path, whole: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    job = submit(cluster, "--nodes", "2", *settings(root, run))
    wait_for_step(run, 50)
    filler = small_disk / "filler"
    fill(filler)
    cluster.wait(job, until=("PENDING",))
    assert 40 <= newest_step(run) < STEPS
    printed = cluster.run("samestep", "logs", str(run)) + (run / JOBS / f"job-{job}.out").read_text()
    assert "o space left on device" in printed
    os.truncate(filler, filler.stat().st_size - 128 * 2**10)  # for the logs, not for a checkpoint
    cluster.wait(job, until=("FAILED",))  # it is still full: the check before training says so
    assert cluster.field(job, "ExitCode") == "3:0"
    assert "MiB are free, and 1 checkpoint(s) need" in (run / JOBS / f"job-{job}.out").read_text()
    filler.unlink()
    cluster.wait(cluster.run("sbatch", "--parsable", str(run / JOBS / "train.sbatch"), cwd=ROOT).strip())
    assert same_weights(run, whole)


def test_a_cancelled_run_saves_and_is_not_started_again(cluster: Cluster, root: Path) -> None:
    """Of two tasks of an array, which take all cores, the one whose SLURM_JOB_ID is the array's; the other by scancel alone."""
    runs, waiting = [root / "cancelled-0", root / "cancelled-1"], root / "waiting"
    words = ["--ranks-per-node", "2", "--array", "optim.peak_lr=1e-3,5e-4"]
    job = submit(cluster, *words, *settings(root, root / "cancelled", **ENDLESS))
    other = submit(cluster, "--nodes", "2", "--ranks-per-node", "2", *settings(root, waiting))
    for run in runs:
        wait_for_step(run, 40)
    line = cluster.run("samestep", "status", str(waiting)).splitlines()[1]
    assert line.split() == ["waiting", other, "PENDING", "0", "0", "Resources"]
    assert "is cancelled" in cluster.run("samestep", "cancel", str(waiting))
    assert cluster.field(f"{job}_1", "JobId") == job
    assert "saves and ends" in cluster.run("samestep", "cancel", str(runs[1]))
    cluster.wait(f"{job}_1")
    assert cluster.state(other) == "CANCELLED"
    assert "cancelled after step" in log_of(runs[1])
    assert "is not in the queue" in cluster.run("samestep", "cancel", str(runs[1]))
    assert cluster.state(f"{job}_0") == "RUNNING"
    cluster.run("scancel", f"{job}_0")  # without `samestep cancel`
    cluster.wait(f"{job}_0", until=("CANCELLED",))
    time.sleep(3)
    assert cluster.state(f"{job}_0") == "CANCELLED"
    for run in runs:
        assert newest_step(run) >= 40
        assert len(read_starts(run)) == 1
