"""What a run does when a rank fails: full disks, gradients that are not finite, hung and dead ranks, time that is up."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.resume_runs import make_config, metrics_of, start, train
from tests.rank_pool import free_port, rank_env, run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer import loop
from trainer.checkpoint.store import describe_damage, list_checkpoints
from trainer.config import RunConfig, TrainConfig
from trainer.divergence import SPIKE_WARM_UP, judge_step
from trainer.errors import DivergedError
from trainer.loss import classification_loss_sum
from trainer.progress import Progress
from trainer.task import targets
from trainer.watchdog import guilty_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


# A save that fails


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_a_full_disk_on_one_rank_is_known_to_all_and_the_older_checkpoint_is_whole(
    backend: str, root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run")
    seen = start(config, backend, 2, fault="save.weights@1:2:enospc")
    assert seen is not None
    for facts in seen:
        assert "step 4 was not saved: rank 1 could not write it: OSError" in facts["error"]
    (only,) = list_checkpoints(config.folder / "checkpoints")
    assert (only.name, describe_damage(only)) == ("step-00000002", None)
    assert not list((config.folder / "checkpoints").glob(".tmp*"))
    again = start(config, backend, 2)
    assert again is not None
    assert [facts["step"] for facts in again] == [9, 9]


def limited(config: RunConfig, num_bytes: int) -> dict[str, Any]:
    """Rank 1 may write files of so many bytes, as with a quota."""
    import resource
    import signal

    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return train(config)


def test_a_real_limit_on_one_ranks_files_ends_all_ranks_without_a_hang(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    for facts in run_ranks(limited, "ddp", 2, args=(config, 20_000)):
        assert re.search(r"step 2 was not saved: rank 1 could not write it: OSError.*File too large", facts["error"])
    assert list_checkpoints(config.folder / "checkpoints") == []


# Gradients that are not finite, or far too large


def spoilt(config: RunConfig, factor: float, steps: tuple[int, ...]) -> dict[str, Any]:
    """The loss of these 0-based steps times `factor`, on rank 1 only."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = classification_loss_sum(logits, labels)
        trainer = current["trainer"]
        return value * factor if trainer.rank == 1 and trainer.progress.step in steps else value

    current: dict[str, Any] = {}
    compute = loop.Trainer.compute_gradients

    def and_note(trainer: loop.Trainer) -> None:
        current["trainer"] = trainer
        compute(trainer)

    targets.classification_loss_sum = loss
    loop.Trainer.compute_gradients = and_note  # type: ignore[method-assign]
    return train(config)


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_a_rollback_leaves_the_bad_step_out_on_all_ranks(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="rollback", save_every=2, eval_every=9)
    for facts in run_ranks(spoilt, backend, 2, args=(config, float("nan"), (5,))):
        assert facts["error"] is None
        assert facts["step"] == 9
        assert facts["counters"]["num_rollbacks"] == 1
        assert facts["counters"]["left_out_steps"] == [5]
        assert all(np.isfinite(weight).all() for weight in facts["weights"].values())
    log = (config.folder / "log.txt").read_text(encoding="utf-8")
    assert re.search("step 6: gradient norm (nan|inf); rolled back to step 4", log)


def test_rollbacks_have_a_cap_that_survives_a_restart(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="rollback", max_rollbacks=2, save_every=2, eval_every=9)
    for facts in run_ranks(spoilt, "ddp", 2, args=(config, float("nan"), (3, 4, 5))):
        assert "DivergedError: step 6" in facts["error"]
        assert "2 rollbacks, as many as train.max_rollbacks allows" in facts["error"]
    for facts in run_ranks(spoilt, "ddp", 2, args=(config, float("nan"), (3, 4, 5))):
        assert "2 rollbacks, as many as train.max_rollbacks allows" in facts["error"]  # not counted from 0 again


def test_skipped_steps_are_counted_across_a_restart(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip", max_skipped_steps=2, eval_every=9)
    bad = (1, 4, 6)
    with pytest.raises(AssertionError, match="died or timed out"):
        run_ranks(spoilt, "ddp", 2, args=(config, float("nan"), bad), environ={"SAMESTEP_FAULT": "step@0:6"})
    for facts in run_ranks(spoilt, "ddp", 2, args=(config, float("nan"), bad)):
        assert "DivergedError: step 7" in facts["error"]
        assert "number 3, more than train.max_skipped_steps (2)" in facts["error"]


def test_a_spike_is_judged_by_the_usual_norm() -> None:
    train_config = TrainConfig(max_steps=1, on_spike="skip", spike_factor=5)
    progress = Progress()
    for _ in range(SPIKE_WARM_UP):
        assert judge_step(progress, 50.0 if progress.num_normal_steps == 3 else 1.0, train_config) == "take"
    assert judge_step(progress, 4.0, train_config) == "take"
    usual = progress.usual_grad_norm
    assert judge_step(progress, 1000.0, train_config) == "skip"
    assert progress.usual_grad_norm == usual  # a spike does not raise the bar for the next
    assert judge_step(Progress(), 1e9, train_config) == "take"
    with pytest.raises(DivergedError, match=r"train\.on_spike=skip"):
        judge_step(progress, 1000.0, train_config.model_copy(update={"on_spike": "stop"}))


# Ranks that hang or die, time that is up


def launch(config: RunConfig, tmp_path: Path, rank: int, port: int, fault: str) -> subprocess.Popen[str]:
    """One rank as a plain process, without a launcher that would end the others."""
    script = tmp_path / "one_rank.py"
    config_file = tmp_path / "config.json"
    config_file.write_text(config.model_dump_json())
    script.write_text(
        "import sys; from pathlib import Path; from trainer.config import RunConfig\n"
        "from tests.distributed.resume_runs import train\n"
        f"print(train(RunConfig.model_validate_json(Path({str(config_file)!r}).read_text()))['error'])\n"
    )
    environ = (
        os.environ
        | rank_env(rank, 2, port)
        | {"OMP_NUM_THREADS": "1", "SAMESTEP_FAULT": fault, "PYTHONPATH": str(ROOT)}
    )
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("point", "phase", "stack"),
    [
        ("data", "reading the data of step 3", "rank 1 is at"),
        ("save.weights", "waiting for a checkpoint to be written", "rank 1 writes a checkpoint at"),
    ],
)
def test_a_hung_rank_ends_the_job_and_is_named(point: str, phase: str, stack: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", hang_timeout_s=4)
    port = free_port()
    ranks = [launch(config, tmp_path, rank, port, f"{point}@1:3:hang") for rank in (0, 1)]
    began = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [4, 4], outputs
    assert time.monotonic() - began < 100
    for output in outputs:
        assert "watchdog: rank 1 has made no progress for" in output
        assert "watchdog: rank 0" not in output
        assert f"in: {phase}" in output
        assert "the same command goes on from the newest checkpoint" in output
    assert "fault_point" in outputs[1].partition(stack)[2]


def test_the_rank_that_others_wait_for_is_told_by_its_main_thread_and_then_by_its_writer() -> None:
    def report(beats: int, *, is_writing: bool) -> dict[str, Any]:
        return {"beats": beats, "is_writing": is_writing, "phase": ""}

    assert guilty_ranks({0: report(9, is_writing=True), 1: report(8, is_writing=False)}) == [1]
    assert guilty_ranks({0: report(9, is_writing=False), 1: report(9, is_writing=True)}) == [1]
    assert guilty_ranks({0: report(9, is_writing=False), 1: report(9, is_writing=False)}) == [0, 1]


def test_a_killed_rank_ends_the_others(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", hang_timeout_s=4)
    port = free_port()
    ranks = [launch(config, tmp_path, rank, port, "step@1:3") for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert ranks[1].returncode == -9
    assert ranks[0].returncode not in (0, None), outputs[0]


def test_time_that_is_up_stops_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    config = make_config(
        root, tmp_path / "run", max_steps=100_000, eval_every=100_000, save_every=100_000, time_limit_minutes=0.05
    )
    seen = start(config, "ddp", 2)
    assert seen is not None
    (stopped_at,) = {facts["step"] for facts in seen}
    assert 0 < stopped_at < 100_000
    assert json.loads((config.folder / "outcome.json").read_text()) == {"outcome": "stopped", "step": stopped_at}
    assert [path.name for path in list_checkpoints(config.folder / "checkpoints")] == [f"step-{stopped_at:08d}"]


def test_a_save_that_is_still_running_when_the_next_is_due_is_waited_for(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", save_every=1, keep_last=9, log_every=1)
    seen = start(config, "ddp", 2)
    assert seen is not None
    assert len(list_checkpoints(config.folder / "checkpoints")) == 9
    assert [describe_damage(folder) for folder in list_checkpoints(config.folder / "checkpoints")] == [None] * 9
    assert len(metrics_of(config.folder)) >= 9
