"""Signs of life of one rank: a count that grows with everything it does, and what it is doing. Read by trainer/watchdog.py."""

from collections.abc import Iterator
from contextlib import contextmanager


class Heartbeat:
    """Written by the main thread, read by another."""

    def __init__(self) -> None:
        self.count = 0
        self.phase = "start"
        self.patience = 1.0
        """How many times the usual time the present phase may take."""

    def beat(self, phase: str) -> None:
        """Say what comes next."""
        self.phase = phase
        self.count += 1

    @contextmanager
    def long(self, phase: str) -> Iterator[None]:
        """Something that may take ten times as long, such as writing a large model."""
        self.beat(phase)
        self.patience = 10.0
        try:
            yield
        finally:
            self.patience = 1.0
            self.beat(f"after {phase}")
