"""Ends a job in which a rank hangs, and says which rank, in what, since when. One thread per rank, whatever the process group does.

The engine's verbs beat; a rank that beats no more for `timeout_s` ends itself. The rank with the fewest beats of its main thread is the
one that all others wait for, or, where all wait for a checkpoint, the one that still writes its files: each stuck rank leaves a file,
rank 0 reads them and names it. Invariant: nothing here is collective.
"""

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from typing import Any

from trainer.backend import Engine
from trainer.config import RunConfig
from trainer.errors import SamestepError

EXIT_CODE = 4
GRACE_S = 3.0
"""For the other ranks' files to appear."""
BACKGROUND = {"checkpoint": "writes a checkpoint", "prefetch": "reads data"}
"""How the names of threads begin whose stacks are shown too, and what they do."""
LAST_WORDS = "the job ends now; the same command goes on from the newest checkpoint"
IDLE = "_worker"
"""The function in which a thread of concurrent.futures waits for work."""


class Watchdog:
    """Watches the thread that enters it, until it leaves; not at all where train.hang_timeout_s is None."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        """Starts nothing yet. RUN/watchdog, which all ranks share, is made when first needed."""
        self.folder, self.timeout_s = config.folder / "watchdog", config.train.hang_timeout_s or math.inf
        self.heartbeat, self.rank, self.world_size = engine.heartbeat, engine.rank, engine.world_size
        self.main_thread = threading.get_ident()
        self.ended = threading.Event()
        self.began = time.time()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.timeout_s < math.inf:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
            is_error = kind is not None and issubclass(kind, Exception) and not issubclass(kind, SamestepError)
            if is_error and self.world_size > 1:
                self._name_who_failed()

    def _name_who_failed(self) -> None:
        """An error that only this rank may know, or that another rank's end caused: say which rank it began on, as reports tell."""
        try:
            self._write_report()
        except OSError:  # the disk is full, as the error under way says
            return
        time.sleep(GRACE_S)
        reports = self._read_reports()
        silent = sorted(set(range(self.world_size)) - set(reports))
        failed = [] if silent else guilty_ranks(reports)
        if silent:
            print(f"{no_sign_of(silent)}, or waiting for this one", file=sys.stderr, flush=True)
        if len(failed) < self.world_size:
            for rank in failed or [self.rank]:
                print(f"watchdog: rank {rank} failed in: {reports[rank]['phase']}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while not self.ended.wait(min(1.0, self.timeout_s / 10)):
            if self.heartbeat.count != seen:
                seen, since = self.heartbeat.count, time.monotonic()
            elif time.monotonic() - since > self.timeout_s * self.heartbeat.patience:
                self._end_job(time.monotonic() - since)

    def _end_job(self, silence_s: float) -> None:
        """Write this rank's report, wait for the others', say what is known, and end the process.

        A file system that hangs itself must not keep it from ending: then, as on a full disk, this rank speaks for itself alone.
        """
        last_resort = threading.Timer(3 * GRACE_S, self._end_alone, (silence_s, "the run directory does not answer"))
        last_resort.daemon = True
        last_resort.start()
        try:
            self._write_report()
            time.sleep(GRACE_S)
            reports = self._read_reports()
            guilty = guilty_ranks(reports)
            if self.rank in guilty or self.rank == 0:
                print(self._words(reports, guilty, silence_s), file=sys.stderr, flush=True)
            if self.rank not in guilty:
                time.sleep(GRACE_S)  # the first to end makes the launcher end the others: let the guilty speak
        except (OSError, ValueError) as error:  # or not even its own report can be read back
            self._end_alone(silence_s, f"its report cannot be written: {getattr(error, 'strerror', None) or error}")
        finally:
            os._exit(EXIT_CODE)

    def _end_alone(self, silence_s: float, why: str) -> None:
        """Say where this rank is, guilty or not, since no rank can tell, and end the process, even where stderr does not answer."""
        phase = no_progress(self.rank, silence_s, f"{self.heartbeat.phase} ({why})")
        speaker = threading.Thread(target=self._speak_alone, args=(f"{phase}\n{LAST_WORDS}",), daemon=True)
        speaker.start()
        speaker.join(GRACE_S)
        os._exit(EXIT_CODE)

    def _speak_alone(self, words: str) -> None:
        """Opens no file, as a stack with its lines of code would."""
        print(words, f"rank {self.rank} is at:", sep="\n", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)

    def _write_report(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        heartbeat = self.heartbeat
        report = {"beats": heartbeat.num_main, "phase": heartbeat.phase, "is_writing": heartbeat.is_writing}
        report["written"] = time.time()
        fresh = self.folder / f".stuck-{self.rank}"
        fresh.write_text(json.dumps(report))
        fresh.replace(self.folder / f"stuck-{self.rank}.json")

    def _read_reports(self) -> dict[int, dict[str, Any]]:
        """What stuck ranks wrote in this hang; files of an earlier start, or of a hang that ended, are too old."""
        reports = {}
        for rank in range(self.world_size):
            try:
                report = json.loads((self.folder / f"stuck-{rank}.json").read_text())
                written = float(report["written"])
                if written > self.began - GRACE_S and time.time() - written < self.timeout_s + 10 * GRACE_S:
                    reports[rank] = report
            except (OSError, ValueError, KeyError):
                continue
        return reports

    def _words(self, reports: dict[int, dict[str, Any]], guilty: list[int], silence_s: float) -> str:
        silent = sorted(set(range(self.world_size)) - set(reports))
        lines = []
        if silent:
            lines.append(no_sign_of(silent))
        lines += [no_progress(rank, silence_s, reports[rank]["phase"]) for rank in (guilty if not silent else [])]
        if self.rank in guilty:
            frames = sys._current_frames()
            for does, thread in (("is", self.main_thread), *background_threads()):
                frame = frames.get(thread or 0)
                if frame is not None and frame.f_code.co_name != IDLE:
                    stack = "".join(traceback.format_stack(frame)[-12:])
                    lines.append(f"rank {self.rank} {does} at (most recent call last):\n{stack.rstrip()}")
        return "\n".join([*lines, LAST_WORDS])


def background_threads() -> list[tuple[str, int | None]]:
    """What the threads beside the main one do, and their numbers."""
    return [
        (does, thread.ident)
        for thread in threading.enumerate()
        for prefix, does in BACKGROUND.items()
        if thread.name.startswith(prefix)
    ]


def no_progress(rank: int, silence_s: float, phase: str) -> str:
    """A line about a rank that hangs."""
    return f"watchdog: rank {rank} has made no progress for {silence_s:.0f} s in: {phase}"


def no_sign_of(ranks: list[int]) -> str:
    """A line about ranks that left no report."""
    return f"watchdog: no sign of rank(s) {', '.join(map(str, ranks))}: dead, or on a machine that is gone"


def guilty_ranks(reports: dict[int, dict[str, Any]]) -> list[int]:
    """Those that the others wait for. Background beats do not count: a rank with a smaller shard writes fewer chunks of it."""
    fewest = min(report["beats"] for report in reports.values())
    last = [rank for rank, report in sorted(reports.items()) if report["beats"] == fewest]
    return [rank for rank in last if reports[rank]["is_writing"]] or last
