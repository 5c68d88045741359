"""Signs of life of one rank: a count that grows with everything it does, and what it is doing. Read by trainer/watchdog.py."""

from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 10.0
"""How many times the usual time a long phase may take."""


class Heartbeat:
    """Written by the main thread and the one that writes checkpoints, read by a third."""

    def __init__(self) -> None:
        self.num_main = 0
        """Of the main thread alone, which does the same on every rank."""
        self._background = 0
        self.phase = "start"
        self.is_writing = False
        """Whether the other thread writes this rank's files, rather than waiting for the other ranks'."""
        self.patience = 1.0
        """How many times the usual time the present phase may take."""

    def beat(self, phase: str) -> None:
        """Say what comes next. Main thread only."""
        self.phase = phase
        self.num_main += 1

    def beat_in_background(self) -> None:
        """A sign of life of the thread that writes checkpoints, for whose end the main thread may wait."""
        self._background += 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While this rank's files are written. That thread only."""
        self.is_writing = True
        try:
            yield
        finally:
            self.is_writing = False

    @property
    def count(self) -> int:
        """Signs of life so far, of both threads."""
        return self.num_main + self._background

    @contextmanager
    def long(self, phase: str) -> Iterator[None]:
        """Something that may take ten times as long, such as writing a large model."""
        self.beat(phase)
        self.patience = PATIENCE
        try:
            yield
        finally:
            self.patience = 1.0
            self.beat(f"after {phase}")
