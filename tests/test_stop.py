"""StopRequest on one rank: what sets it, who reads the STOP file, and what it leaves behind."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config import RunConfig
from trainer.stop import SIGNALS, STOP_FILE, StopRequest


def config(folder: Path) -> RunConfig:
    return RunConfig(name="stop", run_dir=folder)


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[list[StopRequest]]:
    """Requests put into the list are closed after the test, whatever it found."""
    made: list[StopRequest] = []
    before = [signal.getsignal(number) for number in SIGNALS]
    yield made
    for request in reversed(made):
        request.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("is_main", [True, False])
def test_a_signal_asks_any_rank_to_stop(
    number: signal.Signals, is_main: bool, tmp_path: Path, requests: list[StopRequest]
) -> None:
    request = StopRequest(config(tmp_path), is_main=is_main)
    requests.append(request)
    assert not request.seen()
    os.kill(os.getpid(), number)
    assert request.seen()
    assert request.seen()  # it stays asked for


def test_signals_are_the_ones_that_schedulers_and_people_send() -> None:
    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGUSR1}


def test_only_the_main_rank_looks_for_the_stop_file(tmp_path: Path, requests: list[StopRequest]) -> None:
    main, other = StopRequest(config(tmp_path), is_main=True), StopRequest(config(tmp_path), is_main=False)
    requests += [main, other]
    assert not main.seen()
    (tmp_path / STOP_FILE).touch()
    assert main.seen()
    assert not other.seen()  # or ranks would see it at different steps


def test_a_folder_that_is_gone_asks_for_nothing(tmp_path: Path, requests: list[StopRequest]) -> None:
    request = StopRequest(config(tmp_path / "gone"), is_main=True)
    requests.append(request)
    assert not request.seen()


def test_close_gives_the_signals_back_and_consumes_the_file(tmp_path: Path) -> None:
    def mine(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in SIGNALS}
    try:
        request = StopRequest(config(tmp_path), is_main=True)
        assert all(signal.getsignal(number) != mine for number in SIGNALS)
        (tmp_path / STOP_FILE).touch()
        request.close()
        assert all(signal.getsignal(number) == mine for number in SIGNALS)
        assert not (tmp_path / STOP_FILE).exists()
        request.close()  # a second time changes nothing
        assert all(signal.getsignal(number) == mine for number in SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_rank_leaves_the_file_to_the_main_one(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    StopRequest(config(tmp_path), is_main=False).close()
    assert (tmp_path / STOP_FILE).exists()
