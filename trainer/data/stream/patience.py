"""Calls that may hang, as reads of a remote file system do, given up when they show no life. Local to the process."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
Alive = Callable[[], None]


def within(patience_s: float, act: Callable[[Alive], T]) -> T:
    """What act(alive) returns or raises. TimeoutError once it has neither ended nor called alive() for so long.

    A call that hangs cannot be interrupted. It is left to its thread, which keeps no process from ending and ends itself at the next
    alive().
    """
    events: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    given_up = threading.Event()

    def alive() -> None:
        if given_up.is_set():
            raise TimeoutError
        events.put(None)

    def body() -> None:
        try:
            events.put((act(alive),))
        except BaseException as error:  # raised again below, in the caller's thread
            events.put(error)

    threading.Thread(target=body, name="within", daemon=True).start()
    while True:
        try:
            event = events.get(timeout=patience_s)
        except queue.Empty:
            given_up.set()
            raise TimeoutError(f"nothing came for {patience_s:g} s") from None
        if isinstance(event, BaseException):
            raise event
        if event is not None:
            return event[0]
