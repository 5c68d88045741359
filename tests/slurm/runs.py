"""Submitting runs on the tests' cluster, and looking at what they leave."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from launch.queue import last_metrics
from launch.starts import read_starts
from tests.slurm.cluster import Cluster
from trainer.run_folder import JOBS

ROOT = Path(__file__).resolve().parents[2]
STEPS = 240
ENDLESS = {"train.max_steps": 10**6, "train.save_every": 1000, "train.eval_every": 10**6}


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


def submit(cluster: Cluster, *words: str, environ: Mapping[str, str] | None = None) -> str:
    """The job's id."""
    printed = cluster.run("samestep", "submit", "recipes/lora_sst2.py", *words, cwd=ROOT, environ=environ)
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
    """Until a job has noted that many starts, which is before it checks the nodes."""
    wait_until(lambda: (run / JOBS / "starts.jsonl").exists() and len(read_starts(run)) >= count, timeout_s=120)


def log_of(run: Path) -> str:
    """Of all starts."""
    return "".join((run / JOBS / start.log).read_text() for start in read_starts(run))


def rank_of(job: str, *, rank: int) -> psutil.Process:
    """The process of a rank of a job on this machine, once it is there. Looking for it may take longer than the training."""
    wait_until(lambda: processes_of(job, rank))
    (found,) = processes_of(job, rank)
    return found


def processes_of(job: str, rank: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            environ, words = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        if environ.get("SLURM_JOB_ID") == job and environ.get("RANK") == str(rank) and "recipes/lora_sst2.py" in words:
            found.append(process)
    return found
