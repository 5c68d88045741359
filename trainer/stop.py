"""A request to stop: noticed by one rank, agreed by all of them at the next step boundary, acted on by the loop.

Nothing is saved inside a signal handler, and no rank acts on its own flag: rank-local flags deadlock (lightning#20806).
"""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

from trainer.config import RunConfig

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END_TIME = "SAMESTEP_END_TIME"
"""Set by slurm/train.sbatch: when the job is killed, in seconds since 1970."""
SPARE_S = 10.0
"""For the end of the processes, and for clocks that differ between nodes."""


class Deadline:
    """The end of the job that this process runs in, if it has one: is there time for another step, and a save after it?"""

    def __init__(self, environ: Mapping[str, str], save_s: Callable[[], float]) -> None:
        """save_s: what a save takes, in seconds."""
        text = environ.get(END_TIME, "")
        self.end = float(text) if text.isdecimal() else math.inf
        self.save_s = save_s
        self.last: float | None = None
        self.longest_gap = 0.0
        """Between two questions: the longest step so far, evaluations included."""

    def forget(self) -> None:
        """What follows now is no step: a restore is not to count as the longest."""
        self.last = None

    def is_near(self, now: float) -> bool:
        """Whether what is left is too short. now: seconds since 1970; asked before every step."""
        if self.last is not None:
            self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now
        return self.end < math.inf and now + 2 * self.longest_gap + 2 * self.save_s() + SPARE_S > self.end


class StopRequest:
    """True once this rank received TERM or USR1, its time or its job's is up, or the run directory has a file STOP (read by rank 0)."""

    def __init__(self, config: RunConfig, *, is_main: bool, save_s: Callable[[], float] = lambda: 0.0) -> None:
        """The time limit counts from here. save_s: what a save takes, in seconds."""
        self._job = Deadline(os.environ, save_s)
        self._deadline = time.monotonic() + 60 * (config.train.time_limit_minutes or math.inf)
        self._file = config.folder / STOP_FILE if is_main else None
        self._signalled = False
        self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def seen(self) -> bool:
        """Whether this rank has been asked to stop."""
        is_late = time.monotonic() > self._deadline or self._job.is_near(time.time())
        return self._signalled or is_late or (self._file is not None and os.path.exists(self._file))

    def forget(self) -> None:
        """Call after a restore, which is not to count as a step."""
        self._job.forget()

    def close(self) -> None:
        """Give the signals back, and consume the STOP file so that the next run is not stopped by it."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._file is not None:
            self._file.unlink(missing_ok=True)
