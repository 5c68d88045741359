"""The check of all nodes before a job's training, its nodes played by threads. No Slurm needed."""

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from launch.node_check import EXIT_CODE, Board, Node, Room, check_nodes, opened_port, problems_of, why_unreachable
from launch.starts import STARTS, note_start
from tests.rank_pool import free_ports
from trainer.run_folder import JOBS

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
    problems = problems_of([NODE, other], 2, gpus=8, room=Room(1e9, num_needed=1))
    assert (len(problems) == 0) if words is None else (len(problems) == 1 and words in problems[0])


def test_missing_nodes_and_a_full_disk_are_named() -> None:
    problems = problems_of([NODE], 3, gpus=0, room=Room(1e9, num_needed=2))
    assert len(problems) == 2
    assert "node(s) 1, 2 of 3 did not answer" in problems[0]
    assert "953.7 MiB are free, and 2 checkpoint(s) need 1,907.3" in problems[1]


def make_run(folder: Path) -> Path:
    """The run directory of a job that has begun."""
    (folder / "run" / JOBS).mkdir(parents=True)
    return folder / "run"


def check_on(
    run: Path,
    numbers: tuple[int, ...],
    *,
    count: int,
    limit_s: float,
    address: str = "127.0.0.1",
    port: int | None = None,
    gpus: int = 0,
    job: str = "",
) -> dict[int, int]:
    """The exit codes of the check on these nodes of a job on `count`, at once. port: None is one that is free."""
    codes: dict[int, int] = {}
    meeting = free_ports(1)[0] if port is None else port

    def check(number: int) -> None:
        environ = {"SLURM_NODEID": str(number), "SLURM_JOB_NUM_NODES": str(count), "SLURM_GPUS_ON_NODE": str(gpus)}
        environ |= {"SLURM_JOB_ID": job} if job else {}
        codes[number] = check_nodes(run, address, meeting, ranks_per_node=1, environ=environ, limit_s=limit_s)

    threads = [Thread(target=check, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return codes


@pytest.mark.parametrize("needed", [1.0, 1e18])
def test_nodes_find_each_other_through_the_run_directory(
    needed: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    note_start(run, needed, {})
    codes = check_on(run, (2, 0, 1), count=3, limit_s=50.0)
    fits = needed == 1.0
    assert codes == dict.fromkeys(range(3), 0 if fits else EXIT_CODE)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["node", "0", "1", "2"]
    assert ("all 3 node(s) are ready" in printed) == fits
    skews = [abs(float(line.split()[-2])) for line in printed.splitlines()[1:4]]
    assert max(skews) < 1.0  # one clock


def test_a_node_that_is_absent_is_named_by_the_others_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    note_start(run, 1.0, {})
    began = time.monotonic()
    codes = check_on(run, (0, 2), count=3, limit_s=4.0)
    assert time.monotonic() - began < 8.0
    assert codes == {0: EXIT_CODE, 2: EXIT_CODE}
    printed = capsys.readouterr().out
    assert "node(s) 1 of 3 did not answer" in printed
    assert [line.split()[0] for line in printed.splitlines()[:3]] == ["node", "0", "2"]


def test_a_node_is_there_before_it_has_counted_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes longer here than the first node waits for others to appear."""

    def slowly_available() -> bool:
        time.sleep(2.2)
        return True

    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    monkeypatch.setattr("torch.cuda.is_available", slowly_available)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    run = make_run(tmp_path)
    note_start(run, 1.0, {})
    assert check_on(run, (0, 1), count=2, limit_s=3.5, gpus=1) == {0: 0, 1: 0}


def test_what_is_there_is_seen_even_if_the_time_is_up(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", limit_s=0.0)
    board.write("ask", {})
    assert list(board.wait("ask", "more")) == ["ask"]


def test_a_port_that_another_program_holds_ends_the_check_on_all_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    note_start(run, 1.0, {})
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert check_on(run, (0, 1), count=2, limit_s=20.0, port=port) == {0: EXIT_CODE, 1: EXIT_CODE}
    assert f"the first node cannot open 127.0.0.1:{port}: Address already in use" in capsys.readouterr().out


def test_a_hundred_nodes_reach_the_first_one() -> None:
    (port,) = free_ports(1)
    with opened_port("127.0.0.1", port) as problem:
        assert problem == ""
        assert {why_unreachable("127.0.0.1", port) for _ in range(100)} == {""}
    assert "refused" in why_unreachable("127.0.0.1", port)


def test_a_run_that_keeps_two_checkpoints_needs_room_for_the_next_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    note_start(run, 2 * 2**20, {})
    assert check_on(run, (0,), count=1, limit_s=20.0) == {0: EXIT_CODE}
    assert "3.0 MiB are free, and 2 checkpoint(s) need 4.0" in capsys.readouterr().out
    for step in (1, 2):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert check_on(run, (0,), count=1, limit_s=20.0) == {0: 0}


def test_an_address_that_does_not_resolve_ends_the_check_on_all_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    note_start(run, 1.0, {})
    codes = check_on(run, (0, 1), count=2, limit_s=20.0, address="no.such.host.invalid")
    assert codes == {0: EXIT_CODE, 1: EXIT_CODE}
    printed = capsys.readouterr().out
    assert "the first node cannot open no.such.host.invalid" in printed
    assert "cannot reach the first node at no.such.host.invalid" in printed


def unshare(jobs: Path) -> None:
    """As where the run directory is another node's own."""
    shutil.rmtree(jobs)


def take(jobs: Path) -> None:
    """As where the job has got the folder of another one's run."""
    (jobs / STARTS).write_text((jobs / STARTS).read_text().replace('"7"', '"8"'))


def block(jobs: Path) -> None:
    """As where nothing can be made in it."""
    (jobs / "check-7-000").rmdir()
    (jobs / "check-7-000").touch()


@pytest.mark.parametrize("spoil", [unshare, take, block])
def test_a_node_that_cannot_use_the_run_directory_says_so_itself(
    spoil: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    run = make_run(tmp_path)
    note_start(run, 1.0, {"SLURM_JOB_ID": "7"})
    (run / JOBS / "check-7-000").mkdir()
    spoil(run / JOBS)
    assert check_on(run, (1,), count=2, limit_s=1.0, job="7") == {1: EXIT_CODE}
    printed = capsys.readouterr().out
    assert f"error: node 1 (n7) cannot use {run / JOBS}" in printed
    assert "set run_dir=PATH" in printed
