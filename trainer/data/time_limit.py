"""A limit on the time that somebody else's Python may take, in any thread: a chat template can loop for hours without doing wrong.

Used where trainer/data/rendering.py renders a model's own template. Code that does not come back from C is not interrupted.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooSlowError(Exception):
    """Raised inside what took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TooSlowError inside the block, in the thread that entered it, once it has taken so long."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not is_over.is_set():
                _raise_in(thread, TooSlowError)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over.set()
        timer.cancel()
        _raise_in(thread, None)  # takes back what has not been raised yet


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Have a thread raise `error` before its next step; None takes such a request back."""
    wanted = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), wanted)
