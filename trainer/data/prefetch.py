"""Reads the next step's data in a thread while the present step is computed: in-process, a message between processes costs more."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """`make(step)` for steps that are mostly asked for in order; any other is made at once."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        """make: a pure function of the step, safe in one other thread at a time."""
        self.make = make
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.step = -1
        self.pending: Future[Made] | None = None

    def at(self, step: int) -> Made:
        """What `make` gives for this step; raises what it raises."""
        pending, self.pending = self.pending, None
        if pending is not None and self.step != step:
            pending.cancel()  # or wait for it below: one thread does all the work
            pending = None
        if pending is None:
            pending = self.reader.submit(self.make, step)
        made = pending.result()
        self.step, self.pending = step + 1, self.reader.submit(self.make, step + 1)
        return made

    def settle(self) -> None:
        """Wait until nothing is being read; what was read ahead is kept, an error too."""
        if self.pending is not None:
            self.pending.exception()

    def drop(self) -> None:
        """Forget what was read ahead, and wait until nothing is being read."""
        pending, self.pending = self.pending, None
        if pending is not None and not pending.cancel():
            pending.exception()

    def close(self) -> None:
        """End the thread; what it was reading is dropped."""
        self.reader.shutdown(wait=False, cancel_futures=True)
