"""Reading ahead changes when a step is read, never what it is."""

import threading
import time

import pytest

from trainer.data.prefetch import Prefetch


def test_any_order_of_steps_gives_each_steps_own() -> None:
    reader = Prefetch(lambda step: step * 10)
    assert [reader.at(step) for step in (0, 1, 2, 7, 8, 3, 3, 4)] == [0, 10, 20, 70, 80, 30, 30, 40]
    reader.close()


def test_the_next_step_is_read_meanwhile_and_by_one_thread() -> None:
    threads: set[int] = set()
    done = threading.Event()

    def make(step: int) -> int:
        threads.add(threading.get_ident())
        if step == 1:
            done.set()
        return step

    reader = Prefetch(make)
    assert reader.at(0) == 0
    assert done.wait(5)  # nobody asked for step 1 yet
    assert [reader.at(1), reader.at(5)] == [1, 5]
    reader.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_errors_come_where_their_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("step 2 is bad")
        return step

    reader = Prefetch(make)
    assert [reader.at(0), reader.at(1)] == [0, 1]
    time.sleep(0.05)
    with pytest.raises(ValueError, match="step 2"):
        reader.at(2)
    assert reader.at(3) == 3
    reader.close()
