"""A limit on the time that somebody else's Python may take, in any thread: a chat template can loop for hours without doing wrong.

Used where trainer/data/rendering.py renders a model's own template. Code that does not come back from C is not interrupted.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class TooSlowError(Exception):
    """Raised inside what took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TooSlowError inside the block, in the thread that entered it, once it has taken so long."""
    thread, lock, is_over, is_asked = threading.get_ident(), threading.Lock(), threading.Event(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not is_over.is_set():
                is_asked.set()
                _raise_in(thread, TooSlowError)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    is_raised = False
    try:
        yield
    except TooSlowError:
        is_raised = True
        raise
    finally:
        with lock:
            is_over.set()
        timer.cancel()
        if is_asked.is_set() and not is_raised:
            _let_come()


def _raise_in(thread: int, error: type[Exception]) -> None:
    """Have a thread raise `error` before its next step."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _let_come() -> None:
    """Take an error here that was asked for as the block ended. Taking it back would leave Python 3.11 looking for one at every step, and
    for ever under a debugger or profiler."""
    with suppress(TooSlowError):
        for _ in range(10_000):
            pass
