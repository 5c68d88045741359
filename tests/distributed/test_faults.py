"""What a run does when a rank fails: full disks, hung and dead ranks, time that is up."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from tests.distributed import loop_runs
from tests.distributed.resume_runs import make_config, metrics_of, start, train
from tests.rank_pool import free_ports, rank_env, run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer import output as run_output
from trainer.backend import Heartbeat
from trainer.backend.heartbeat import PATIENCE
from trainer.checkpoint.saver import Save, Saver
from trainer.checkpoint.store import describe_damage, list_checkpoints
from trainer.config import RunConfig
from trainer.loop import Trainer
from trainer.watchdog import Watchdog, guilty_ranks

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


def test_a_save_that_failed_is_known_with_the_sums_of_a_step_and_not_with_the_next_save(
    root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run", max_steps=300, save_every=100, eval_every=300, log_every=100)
    seen = start(config, "ddp", 2, fault="save.weights@1:1:enospc")
    assert seen is not None
    for facts in seen:
        assert "step 100 was not saved: rank 1 could not write it: OSError" in facts["error"]
        assert 99 <= max(facts["losses"]) < 199


def limited(config: RunConfig, num_bytes: int) -> dict[str, Any]:
    """From its second save on rank 1 may write files of so many bytes, as with a quota."""
    run, saves = Saver._run, list[int]()

    def and_limit(self: Saver, save: Save) -> str | None:
        if saves and os.environ["RANK"] == "1":
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (num_bytes, num_bytes)
            )  # write() fails with EFBIG: Python ignores SIGXFSZ
        saves.append(save.header.step)
        return run(self, save)

    Saver._run = and_limit  # type: ignore[method-assign]
    return train(config)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_real_limit_on_one_ranks_files_ends_all_ranks_and_the_older_checkpoint_is_whole(
    backend: str, root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run")
    for facts in run_ranks(limited, backend, 2, args=(config, 5_000)):
        assert re.search(r"step 4 was not saved: rank 1 could not write it: OSError.*File too large", facts["error"])
    (only,) = list_checkpoints(config.folder / "checkpoints")
    assert (only.name, describe_damage(only)) == ("step-00000002", None)


def on_own_disk(config: RunConfig) -> dict[str, Any]:
    """From its second save on every rank has a run directory that no other rank sees, as on the disk of its node."""
    run, saves = Saver._run, list[int]()

    def and_move(self: Saver, save: Save) -> str | None:
        if saves:
            self.root = config.folder / f"node-{os.environ['RANK']}" / "checkpoints"
        saves.append(save.header.step)
        return run(self, save)

    Saver._run = and_move  # type: ignore[method-assign]
    return train(config)


def test_shards_on_a_disk_that_rank_0_does_not_see_make_no_checkpoint(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run")
    for facts in run_ranks(on_own_disk, "ddp", 2, args=(config,)):
        assert "step 4 was not saved: optimizer-00002-of-00002.safetensors was written with" in facts["error"]
        assert re.search(
            r"run directory \(.*node-0\) must be on a file system that all nodes share; set run_dir=PATH",
            facts["error"],
        )
    assert not list(config.folder.glob("node-*/checkpoints/step-*"))


def no_oserror(error: Exception, trainer: Trainer) -> None:
    """Writing the model fails as libraries in Rust fail."""

    def refuse(*_: Any) -> None:
        raise error

    run_output.export_model = refuse


def test_an_export_on_a_full_disk_that_raises_no_oserror_ends_all_ranks(root: Path, tmp_path: Path) -> None:
    errors = [
        SafetensorError("No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ]
    runs = [
        (loop_runs.make_config(root, tmp_path / str(number)), partial(no_oserror, error))
        for number, error in enumerate(errors)
    ]
    main, other = run_ranks(loop_runs.train, "ddp", 2, args=(runs,))
    for number in range(len(errors)):
        assert f"{number} cannot be written: No space left on device" in main[number]["error"]
        assert "rank 0 could not write to the run directory" in other[number]["error"]


def note_patience(trainer: Trainer) -> None:
    """Note how long the watchdog would let a wait for a checkpoint be."""
    wait = trainer.checkpoints.saver.wait
    trainer.noted = {"patience": []}  # type: ignore[attr-defined]

    def and_note() -> None:
        trainer.noted["patience"].append(trainer.engine.heartbeat.patience)  # type: ignore[attr-defined]
        wait()

    trainer.checkpoints.saver.wait = and_note  # type: ignore[method-assign]


def test_a_wait_for_a_checkpoint_may_take_as_long_as_its_writing(root: Path, tmp_path: Path) -> None:
    config = loop_runs.make_config(root, tmp_path / "run", max_steps=3)
    (facts,) = loop_runs.fit_one(config, note_patience, backend="single", ranks=1)
    assert facts["patience"] and set(facts["patience"]) == {PATIENCE}


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "phase", "stack"),
    [
        ("data", "reading the data of step 3", "rank 1 is at"),
        ("save.weights", "waiting for a checkpoint to be written", "rank 1 writes a checkpoint at"),
        ("read", "reading the data of step 3", "rank 1 reads data at"),
    ],
)
def test_a_hung_rank_ends_the_job_and_is_named(point: str, phase: str, stack: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", hang_timeout_s=4)
    (port,) = free_ports(1)
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


def test_reports_of_an_earlier_start_accuse_nobody(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", hang_timeout_s=300)
    engine = SimpleNamespace(heartbeat=Heartbeat(), rank=0, world_size=2)
    Watchdog(config, engine)._write_report()  # type: ignore[arg-type]
    report = tmp_path / "run" / "watchdog" / "stuck-0.json"
    facts = json.loads(report.read_text())
    (report.parent / "stuck-1.json").write_text(json.dumps(facts | {"written": time.time() - 20}))
    later = Watchdog(config, engine)  # type: ignore[arg-type]
    assert list(later._read_reports()) == [0]


def test_a_killed_rank_ends_the_others_and_is_named(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", hang_timeout_s=4)
    (port,) = free_ports(1)
    ranks = [launch(config, tmp_path, rank, port, "step@1:3") for rank in (0, 1)]
    began = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert time.monotonic() - began < 60  # of which starting takes most
    assert ranks[1].returncode == -9
    assert ranks[0].returncode not in (0, None), outputs[0]
    assert "watchdog: no sign of rank(s) 1: dead, or on a machine that is gone, or waiting for this one" in outputs[0]
    assert "rank 0 failed in: sum over ranks" in outputs[0]


def test_a_reader_thread_that_dies_on_one_rank_ends_the_job_and_the_rank_is_named(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", hang_timeout_s=4)
    (port,) = free_ports(1)
    ranks = [launch(config, tmp_path, rank, port, "read@1:3:enospc") for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert "no space left on device" in outputs[1]
    named = r"watchdog: rank 1 (failed|has made no progress for \d+ s) in: reading the data of step 3|watchdog: no sign of rank.s. 1"
    assert re.search(named, outputs[0]), outputs[0]
    assert all(process.returncode not in (0, None) for process in ranks), outputs
    assert not (config.folder / "summary.md").exists()


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
