"""What is decided around a start: whether there is another one, whether nodes fit together, when time runs out. No Slurm needed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from launch.job import decide
from launch.node_check import EXIT_CODE, Node, check_nodes, problems_of
from launch.queue import last_metrics, time_left, total_steps
from launch.starts import CANCELLED, JobStart, newest_step, note_start, read_starts
from tests.slurm.cluster import free_ports
from trainer.checkpoint.resume import OUTCOME
from trainer.checkpoint.store import CHECKPOINTS, step_name
from trainer.errors import ConfigError
from trainer.log import start_run_folder
from trainer.run_folder import JOBS
from trainer.stop import SPARE_S, STOP_FILE, Deadline

START = JobStart(job="7", number=0, step=0, nodes=2, began=0.0, checkpoint_bytes=0.0, log="x.log")


def make_run(folder: Path, *, outcome: str | None, step: int) -> Path:
    """A run directory as training leaves it."""
    (folder / JOBS).mkdir(parents=True)
    if outcome:
        (folder / OUTCOME).write_text(json.dumps({"outcome": outcome, "step": step}))
    if step:
        checkpoint = folder / CHECKPOINTS / step_name(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("outcome", "step", "number", "before", "state", "verdict"),
    [
        ("finished", 10, 0, 0, "RUNNING", "finished"),
        ("finished", 10, 30, 10, "CANCELLED", "finished"),
        ("stopped", 5, 0, 0, "RUNNING", "requeue"),
        ("stopped", 5, 3, 4, "TIMEOUT", "requeue"),
        ("stopped", 5, 3, 4, "CANCELLED", "cancelled"),  # scancel
        ("failed", 5, 0, 0, "RUNNING", "failed"),  # diverged
        (None, 0, 0, 0, "RUNNING", "requeue"),  # killed before its first checkpoint: perhaps the node's fault
        (None, 0, 1, 0, "RUNNING", "stuck"),
        (None, 6, 2, 6, "NODE_FAIL", "stuck"),
        (None, 6, 2, 4, "NODE_FAIL", "requeue"),
        (None, 6, 20, 4, "RUNNING", "stuck"),  # the cap
    ],
)
def test_what_training_left_decides_whether_there_is_another_start(
    outcome: str | None, step: int, number: int, before: int, state: str, verdict: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", outcome=outcome, step=step)
    assert newest_step(run) == step
    starts = [replace(START, number=number, step=before)]
    found, why = decide(run, starts, max_restarts=20, job_state=state)
    assert found == verdict, why
    (run / JOBS / CANCELLED).touch()
    found, why = decide(run, starts, max_restarts=20, job_state=state)
    assert found == ("finished" if outcome == "finished" else "cancelled"), why


def test_a_start_is_noted_and_read_back(tmp_path: Path) -> None:
    environ = {"SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NUM_NODES": "4"}
    run = make_run(tmp_path / "run", outcome=None, step=9)
    assert read_starts_or_none(run) is None
    first = note_start(run, 100.0, {"SLURM_JOB_ID": "30"})
    second = note_start(run, 100.0, environ)
    assert (first.job, first.number, first.nodes) == ("30", 0, 1)
    assert (second.job, second.number, second.step, second.nodes) == ("31", 2, 9, 4)
    assert read_starts(run) == [first, second]


def read_starts_or_none(run: Path) -> list[JobStart] | None:
    try:
        return read_starts(run)
    except ConfigError:
        return None


def test_what_jobs_left_stays_where_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outcome="finished", step=0)
    note_start(run, 0.0, {})
    assert start_run_folder(run / "other") is None
    (run / "config.yaml").touch()
    (run / STOP_FILE).touch()  # asked for before the run began
    moved = start_run_folder(run)
    assert moved is not None
    assert not (moved / JOBS).exists()
    assert (run / STOP_FILE).exists()
    assert (moved / "config.yaml").exists()
    assert len(read_starts(run)) == 1
    assert start_run_folder(tmp_path / "run") == tmp_path / "run.2"  # it holds a log by now
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / STOP_FILE).touch()
    assert start_run_folder(tmp_path / "new") is None
    assert (tmp_path / "new" / STOP_FILE).exists()


NODE = Node(number=0, name="n1", versions={"torch": "2.13"}, num_gpus=8, free_bytes=10**9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"versions": {"torch": "2.12"}}, "torch 2.12 (first node: 2.13)"),
        ({"num_gpus": 7}, "sees 7 GPUs, and 8 were asked for"),
        ({"reached": "10.0.0.1:20000: timed out"}, "cannot reach the first node at 10.0.0.1:20000"),
        ({"skew_s": -70.0}, "the clock of n2 is -70 s"),
        ({"lag_s": 30.0}, "files take 30 s"),
    ],
)
def test_a_node_that_does_not_fit_is_named(change: dict[str, Any], words: str | None) -> None:
    other = replace(NODE, number=1, name="n2", **change)
    problems = problems_of([NODE, other], 2, gpus=8, needed=1e9)
    assert (len(problems) == 0) if words is None else (len(problems) == 1 and words in problems[0])


def test_missing_nodes_and_a_full_disk_are_named() -> None:
    problems = problems_of([NODE], 3, gpus=0, needed=2e9)
    assert len(problems) == 2
    assert "node(s) 1, 2 of 3 did not answer" in problems[0]
    assert "954 MiB are free for checkpoints, and two need 1,907" in problems[1]


@pytest.mark.parametrize("needed", [1.0, 1e18])
def test_nodes_find_each_other_through_the_run_directory(
    needed: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", outcome=None, step=0)
    note_start(run, needed, {})
    codes: dict[int, int] = {}
    (port,) = free_ports(1)

    def check(number: int) -> None:
        environ = {"SLURM_NODEID": str(number), "SLURM_JOB_NUM_NODES": "3"}
        codes[number] = check_nodes(run, "127.0.0.1", port, ranks_per_node=1, environ=environ)

    threads = [Thread(target=check, args=(number,)) for number in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    fits = needed == 1.0
    assert codes == dict.fromkeys(range(3), 0 if fits else EXIT_CODE)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["node", "0", "1", "2"]
    assert ("all 3 node(s) are ready" in printed) == fits
    skews = [abs(float(line.split()[-2])) for line in printed.splitlines()[1:4]]
    assert max(skews) < 1.0  # one clock


def test_a_run_stops_while_there_is_time_for_a_step_and_a_save() -> None:
    deadline = Deadline({"SAMESTEP_END_TIME": "1000"}, save_s=lambda: 20.0)
    needed = SPARE_S + 2 * 20.0 + 2 * 5.0
    assert not deadline.is_near(900.0)
    assert not deadline.is_near(905.0)  # a step takes 5 s
    assert not deadline.is_near(909.0)
    assert not deadline.is_near(914.0)
    for now in range(919, 1000):
        assert deadline.is_near(float(now)) == (now + needed > 1000)
    assert not Deadline({}, save_s=lambda: 1.0).is_near(math.inf)
    assert not Deadline({"SAMESTEP_END_TIME": "soon"}, save_s=lambda: 1.0).is_near(1e12)


def test_status_knows_steps_and_time_left_from_the_run_directory(tmp_path: Path) -> None:
    lines = [{"step": 10, "epoch": 0.5, "train/loss": 0.7, "samples_per_s": 40.0}, {"step": 10, "eval/loss": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("train: {num_epochs: 3, max_steps: null, global_batch_size: 8}\n")
    line = last_metrics(tmp_path)
    assert line == lines[0]
    assert total_steps(tmp_path) == 60
    assert time_left(tmp_path, line, 10, 60) == "0:00:10"
