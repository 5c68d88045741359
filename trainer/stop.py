"""A request to stop: noticed by one rank, agreed by all of them at the next step boundary, acted on by the loop.

Nothing is saved inside a signal handler, and no rank acts on its own flag: rank-local flags deadlock (lightning#20806).
"""

import math
import signal
import time
from types import FrameType

from trainer.config import RunConfig

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once this rank received TERM or USR1, its time is up, or a file named STOP lies in the run directory (read by rank 0)."""

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        """The time limit counts from here."""
        self._deadline = time.monotonic() + 60 * (config.train.time_limit_minutes or math.inf)
        self._file = config.folder / STOP_FILE if is_main else None
        self._signalled = False
        self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def seen(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._signalled or time.monotonic() > self._deadline or (self._file is not None and self._file.exists())

    def close(self) -> None:
        """Give the signals back, and consume the STOP file so that the next run is not stopped by it."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._file is not None:
            self._file.unlink(missing_ok=True)
