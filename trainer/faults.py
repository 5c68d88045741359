"""Faults on demand, for tests of what survives them: `SAMESTEP_FAULT=point[@rank]:n[:action]`, off unless set.

At the n-th passage of a point (on one rank, or on each) the process kills itself, or meets a full disk, or hangs. Several are
separated by commas. Named points beat racing timers: a test that kills "after the manifest" does so every time.
"""

import errno
import os
import signal
import time
from collections import Counter

VARIABLE = "SAMESTEP_FAULT"

_passages: Counter[str] = Counter()


def fault_point(name: str, rank: int) -> None:
    """Do what SAMESTEP_FAULT asks for at this point.

    kill: SIGKILL to this process; enospc: OSError; hang: sleep for an hour; usr1: the signal.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    _passages[name] += 1
    for fault in wanted.split(","):
        place, count, *action = fault.split(":")
        point, _, only_rank = place.partition("@")
        if point == name and int(count) == _passages[name] and only_rank in ("", str(rank)):
            _act(action[0] if action else "kill", name)


def _act(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, f"no space left on device (asked for by {VARIABLE} at {name})")
    elif action == "usr1":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif action == "hang":
        time.sleep(3600)
    else:
        raise AssertionError(f"{VARIABLE}: no action {action!r}")
