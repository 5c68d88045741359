"""Submitted runs on a real two-node cluster: they finish, whatever happens on the way.

A run that was interrupted is compared with one that was not. Restarts are not waited for (121 s in Slurm) but asked for at once.
"""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from launch.queue import last_metrics
from launch.starts import newest_step, read_starts
from tests.slurm.cluster import Cluster, running_cluster, why_not_here
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.resume import read_outcome
from trainer.run_folder import JOBS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS = 240
ENDLESS = {"train.max_steps": 10**6, "train.save_every": 1000, "train.eval_every": 10**6}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not_here()
    if reason and os.environ.get("SAMESTEP_NEEDS_SLURM"):  # set by .ci/run
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=96)
    return folder


def settings(root: Path, run: Path, **more: object) -> list[str]:
    """No dropout, which differs between numbers of ranks; a checkpoint every 20 steps."""
    chosen = {
        "run_dir": run,
        "model.source": root / "model",
        "data.source": root / "data.csv",
        "train.num_epochs": "none",
        "train.max_steps": STEPS,
        "train.global_batch_size": 8,
        "train.save_every": 20,
        "train.eval_every": STEPS,
        "train.log_every": 5,
        **dict.fromkeys(("model.dropout", "model.attention_dropout", "model.head_dropout"), 0),
        **more,
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def submit(cluster: Cluster, *words: str) -> str:
    """The job's id."""
    printed = cluster.run("samestep", "submit", "recipes/lora_sst2.py", *words, cwd=ROOT)
    found = re.match(r"job (\d+): ", printed)
    assert found, printed
    return found.group(1)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, as the files of its ranks hold them."""
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    files = sorted(folder.glob("weights*.safetensors"))
    assert files, sorted(run.rglob("*"))
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def same_weights(one: Path, other: Path) -> bool:
    """Equal to the last bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def wait_until(is_so: Callable[[], object], timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def wait_for_step(run: Path, step: int) -> None:
    """Until training has logged it."""
    wait_until(lambda: last_metrics(run).get("step", 0) >= step)


def wait_for_start(run: Path, count: int) -> None:
    wait_until(lambda: (run / JOBS / "starts.jsonl").exists() and len(read_starts(run)) >= count, timeout_s=120)


def log_of(run: Path) -> str:
    """Of all starts."""
    return "".join((run / JOBS / start.log).read_text() for start in read_starts(run))


@pytest.fixture(scope="module")
def whole(cluster: Cluster, root: Path) -> Path:
    """A run that nothing happened to, by `sbatch slurm/train.sbatch` as it stands, ddp over two nodes."""
    run = root / "whole"
    options = ["--parsable", "--nodes=2", f"--output={root / 'whole.out'}"]
    job = cluster.run(
        "sbatch", *options, "slurm/train.sbatch", "recipes/lora_sst2.py", *settings(root, run), cwd=ROOT
    ).strip()
    cluster.wait(job)
    return run


def test_sbatch_of_the_template_trains_over_two_nodes_as_it_stands(whole: Path) -> None:
    assert read_outcome(whole) == "finished"
    printed = (whole.parent / "whole.out").read_text()
    assert "all 2 node(s) are ready" in printed
    assert "backend    ddp, 2 processes" in printed
    assert "node 0     ranks 0 of 2\nnode 1     ranks 1 of 2\n" in printed
    assert "the run is finished at step 240" in printed
    assert len(read_starts(whole)) == 1


def test_a_run_that_is_warned_and_then_loses_a_rank_ends_with_the_weights_of_one_that_was_not(
    cluster: Cluster, root: Path, whole: Path
) -> None:
    run = root / "interrupted"
    job = submit(cluster, "--nodes", "2", *settings(root, run))
    wait_for_step(run, 50)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, until=("PENDING",))
    stopped_at = newest_step(run)
    assert 50 <= stopped_at < STEPS
    assert read_outcome(run) == "stopped"
    line = cluster.run("samestep", "status", str(run)).splitlines()[1]
    assert line.split()[:5] == [
        "interrupted",
        job,
        "PENDING",
        f"{last_metrics(run)['step']}/{STEPS}",
        f"{losses(run)[-1]:.4f}",
    ]
    cluster.wait(job, until=("RUNNING",))
    wait_for_step(run, stopped_at + 50)
    (victim,) = ranks_of(job, rank=1)
    victim.kill()
    cluster.wait(job, until=("PENDING",))
    cluster.wait(job)
    starts = read_starts(run)
    assert [start.number for start in starts] == [0, 1, 2]
    assert 0 < stopped_at == starts[1].step < starts[2].step
    assert "ended without a word" in log_of(run)
    assert read_outcome(run) == "finished"
    assert same_weights(run, whole)
    assert losses(run) == losses(whole)
    submitted = json.loads((run / JOBS / "submission.json").read_text())
    assert submitted["git"]
    assert f"#SBATCH --output={run}/slurm/job-%j.out" in (run / JOBS / "train.sbatch").read_text()
    first = cluster.run("samestep", "logs", str(run), "--start", "0")
    assert "stopped on request after step" in first
    assert "the run is finished" not in first


def ranks_of(job: str, *, rank: int) -> list[psutil.Process]:
    """The process of a rank of a job on this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except psutil.Error:
            continue
        if (
            environ.get("SLURM_JOB_ID") == job
            and environ.get("RANK") == str(rank)
            and "recipes/lora_sst2.py" in process.cmdline()
        ):
            found.append(process)
    return found


def test_fsdp_goes_on_after_term_and_on_the_node_that_is_left(cluster: Cluster, root: Path, whole: Path) -> None:
    run = root / "fsdp"
    job = submit(cluster, "--backend", "fsdp", "--nodes", "1-2", "--ranks-per-node", "2", *settings(root, run))
    wait_for_step(run, 30)
    cluster.run("scancel", "--signal=TERM", job)  # to all ranks at once
    cluster.wait(job, until=("PENDING",))
    assert read_outcome(run) == "stopped"
    cluster.wait(job, until=("RUNNING",))
    wait_for_step(run, newest_step(run) + 30)
    try:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        cluster.wait(job)
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert [start.nodes for start in read_starts(run)] == [2, 2, 1]
    printed = log_of(run)
    assert printed.count("node 0     ranks 0, 1 of 4\nnode 1     ranks 2, 3 of 4\n") == 2
    assert "backend    fsdp, 2 processes" in printed
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_an_array_trains_each_configuration_in_its_own_folder(cluster: Cluster, root: Path) -> None:
    run = root / "array"
    words = ["--array", "optim.peak_lr=1e-3,5e-4,1e-4", *settings(root, run, **{"train.max_steps": 20})]
    job = submit(cluster, *words)
    for task in range(3):
        cluster.wait(f"{job}_{task}")
    rows = [line.split() for line in cluster.run("samestep", "status", f"{run}-1").splitlines()[1:]]
    assert [row[0] for row in rows] == ["array-0", "array-1", "array-2"]
    starts = [read_starts(Path(f"{run}-{task}"))[0] for task in range(3)]
    assert len({int(start.job) % 20000 for start in starts}) == 3  # their ports
    finals = [weights_of_export(Path(f"{run}-{task}")) for task in range(3)]
    assert not any(torch.equal(finals[one], finals[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def weights_of_export(run: Path) -> torch.Tensor:
    tensors = load_file(run / "model" / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def test_a_run_that_fails_at_once_stops_and_says_why(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "broken.py"
    text = (ROOT / "recipes" / "lora_sst2.py").read_text()
    recipe.write_text(
        text.replace("    accelerator = ", '    raise RuntimeError("broken on purpose")\n    accelerator = ')
    )
    run = root / "broken"
    printed = cluster.run("samestep", "submit", str(recipe), *settings(root, run), cwd=ROOT)
    job = printed.split()[1].rstrip(":")
    cluster.wait(job, until=("FAILED",))
    assert len(read_starts(run)) == 2
    said = log_of(run)
    assert "broken on purpose" in said
    assert "no progress since the last restart: the newest checkpoint is still that of step 0" in said
    assert "0" in cluster.run("samestep", "status", str(run))


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
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
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
    os.truncate(filler, filler.stat().st_size - 256 * 2**10)  # for the logs, not for a checkpoint
    cluster.wait(job, until=("FAILED",))  # it is still full: the check before training says so
    assert cluster.field(job, "ExitCode") == "3:0"
    assert "are free for checkpoints, and two need" in (run / JOBS / f"job-{job}.out").read_text()
    filler.unlink()
    cluster.wait(submit(cluster, "--nodes", "2", *settings(root, run)))
    assert same_weights(run, whole)


def test_a_cancelled_run_saves_and_is_not_started_again(cluster: Cluster, root: Path) -> None:
    run, waiting = root / "cancelled", root / "waiting"
    job = submit(cluster, "--ranks-per-node", "2", *settings(root, run, **ENDLESS))  # all cores of a node
    other = submit(cluster, "--nodes", "2", "--ranks-per-node", "2", *settings(root, waiting))
    wait_for_step(run, 40)
    assert cluster.run("samestep", "status", str(waiting)).splitlines()[1].split() == [
        "waiting",
        other,
        "PENDING",
        "0",
        "0",
        "Resources",
    ]
    assert "is cancelled" in cluster.run("samestep", "cancel", str(waiting))
    assert "saves and ends" in cluster.run("samestep", "cancel", str(run))
    cluster.wait(job)
    assert cluster.state(other) == "CANCELLED"
    assert newest_step(run) >= 40
    assert len(read_starts(run)) == 1
    assert "cancelled after step" in log_of(run)
    assert "is not in the queue" in cluster.run("samestep", "cancel", str(run))


def test_a_run_stops_before_its_time_limit_and_goes_on_until_somebody_cancels_it(
    cluster: Cluster, root: Path, tmp_path: Path
) -> None:
    """A real limit of a minute, without the signal that warns of it: the run knows when its job ends."""
    run = root / "limit"
    words = ["samestep", "submit", "recipes/lora_sst2.py", "--time", "1", *settings(root, run, **ENDLESS), "--dry-run"]
    script = tmp_path / "script.sh"
    script.write_text(cluster.run(*words, cwd=ROOT).replace("#SBATCH --signal=B:USR1@20\n", ""))
    assert "--signal" not in script.read_text()
    (run / JOBS).mkdir(parents=True)
    job = cluster.run("sbatch", "--parsable", str(script), cwd=ROOT).strip()
    wait_for_start(run, 1)
    cluster.wait(job, until=("PENDING",), timeout_s=90)
    assert read_outcome(run) == "stopped"  # not killed
    stopped_at = newest_step(run)
    assert stopped_at > 0
    cluster.wait(job, until=("RUNNING",))
    wait_for_step(run, stopped_at + 100)
    cluster.run("scancel", job)  # without `samestep cancel`
    cluster.wait(job, until=("CANCELLED",))
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    assert newest_step(run) > stopped_at  # it saved on the way


def test_sbatch_accepts_the_generated_scripts(cluster: Cluster) -> None:
    for path in sorted((ROOT / "tests" / "slurm" / "golden").glob("*.sbatch")):
        if path.stem != "gpus":  # this cluster has none
            cluster.run("sbatch", "--test-only", str(path), cwd=ROOT)
