"""A hung rank ends its job even where the run directory is what hangs, or is full."""

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import watchdog
from trainer.backend import Heartbeat
from trainer.config import RunConfig, TrainConfig
from trainer.watchdog import EXIT_CODE, Watchdog


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the process would have ended; waits are short."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.05)
    return codes


def wait_for(codes: list[int], count: int) -> None:
    deadline = time.monotonic() + 20
    while len(codes) < count:
        assert time.monotonic() < deadline, codes
        time.sleep(0.01)


def watched(folder: Path, rank: int) -> Watchdog:
    config = RunConfig(name="t", run_dir=folder, train=TrainConfig(max_steps=1, hang_timeout_s=9))
    heartbeat = Heartbeat()
    heartbeat.beat("sum over ranks")
    return Watchdog(config, SimpleNamespace(heartbeat=heartbeat, rank=rank, world_size=2))  # type: ignore[arg-type]


def test_a_run_directory_that_does_not_answer_does_not_keep_the_job_from_ending(
    exits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(Watchdog, "_write_report", lambda self: answer.wait(20))
    thread = threading.Thread(target=watched(tmp_path, rank=1)._end_job, args=(12.0,))
    thread.start()
    wait_for(exits, 1)
    said = capfd.readouterr().err
    assert exits == [EXIT_CODE]
    assert (
        "watchdog: rank 1 has made no progress for 12 s in: sum over ranks (the run directory does not answer)" in said
    )
    assert "in wait_for" in said.partition("rank 1 is at:")[2]  # the main thread of this test
    assert "the job ends now" in said
    answer.set()
    thread.join()


def test_a_full_disk_does_not_keep_a_hung_rank_from_speaking(
    exits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Watchdog) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Watchdog, "_write_report", refuse)
    watched(tmp_path, rank=1)._end_job(12.0)
    wait_for(exits, 3)  # by itself, as it leaves, and by the timer, which only a real end stops
    said = capfd.readouterr().err
    assert set(exits) == {EXIT_CODE}
    assert "in: sum over ranks (its report cannot be written: No space left on device)" in said
    assert "_speak_alone" in said.partition("rank 1 is at:")[2]


def test_an_error_on_a_full_disk_is_not_hidden_by_the_report_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Watchdog) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Watchdog, "_write_report", refuse)
    with pytest.raises(RuntimeError, match="what went wrong"), watched(tmp_path, rank=0):
        raise RuntimeError("what went wrong")
