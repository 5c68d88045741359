"""The run directory's log: lines on the screen and in log.txt, numbers in metrics.jsonl and TensorBoard.

Place in the flow: `start_run_folder` makes the folder, every rank makes a RunLog, the loop feeds it. Only rank 0 prints
or writes. Invariant: what stands on the screen or was kept off it stands in log.txt, and every line of metrics.jsonl is
strict JSON.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout
from rich.text import Text

from trainer.errors import ConfigError, SamestepError
from trainer.quiet import chatter
from trainer.run_folder import JOBS, is_run
from trainer.screen import Screen, eta_s, progress_words
from trainer.stop import STOP_FILE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_FILES = {"log.txt", "tensorboard"}
"""What a run leaves that stopped before its first metrics."""

STAYS = (JOBS, STOP_FILE)
"""What is of the start at hand, and not of the run before it."""

ETA_WINDOW = 20
"""Progress calls over which the speed for the remaining time is measured; evaluations in between count."""

Value = float | int | str


class RunLog:
    """Screen, log.txt, metrics.jsonl and TensorBoard of one run. Every rank makes one; only the main one acts."""

    def __init__(self, folder: Path, *, is_main: bool, total_steps: int, start_step: int = 0) -> None:
        """folder: exists; files that are there are continued. start_step: optimizer steps done before this process."""
        self.folder, self.is_main, self.total_steps, self.start_step = folder, is_main, total_steps, start_step
        self.history = deque([(time.monotonic(), start_step)], maxlen=ETA_WINDOW)
        if is_main:
            self.screen = Screen(total_steps, start_step)
            self.text = _Lines(folder, "log.txt")
            self.metrics = _Lines(folder, "metrics.jsonl")
            self.events: SummaryWriter | None = None
            chatter().start(self._note)

    def say(self, message: str) -> None:
        """Show a message of one or more lines and keep it in log.txt, there without colours."""
        if self.is_main:
            self.screen.show(message)
            self._note(message)

    def record(self, values: Mapping[str, Value], step: int) -> None:
        """Append one flat line to metrics.jsonl, where NaN and infinity are null, and its numbers to TensorBoard."""
        if self.is_main:
            self.metrics.write(json_line({"step": step, **values}))
            self._add_events({name: value for name, value in values.items() if _is_number(value)}, step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar on a terminal, or print a line; log.txt gets the line in both cases."""
        if not self.is_main:
            return
        self.history.append((time.monotonic(), step))
        words = progress_words(values, eta_s(self.history, self.total_steps))
        self.screen.move(step, words)
        self._note(f"step {step}/{self.total_steps}  {words}")

    def rewind(self, step: int) -> None:
        """Continue after `step`: metrics of later steps, which come again, are dropped."""
        self.start_step = step
        self.history.clear()
        self.history.append((time.monotonic(), step))
        if self.is_main:
            self.screen.start_step = step
            self._close_events()
            self.events = None  # a new writer hides what comes after `step`
            self.metrics.keep(lambda line: step_of_line(line) <= step)

    def close(self) -> None:
        """Flush and close everything, even where some of it fails; a second call does nothing."""
        if not self.is_main or self.text.closed:
            return
        with ExitStack() as last:
            last.callback(self.text.close)
            last.callback(self.metrics.close)
            last.callback(self._close_events)
            last.callback(self.screen.close)
            last.callback(chatter().stop)

    def _note(self, message: str) -> None:
        """Into log.txt only."""
        self.text.write(Text.from_ansi(message).plain)

    def _close_events(self) -> None:
        if self.events is not None:
            with _reported(self.folder, "tensorboard"):
                self.events.close()

    def _add_events(self, numbers: Mapping[str, Value], step: int) -> None:
        with _reported(self.folder, "tensorboard"):
            if self.events is None:
                from torch.utils.tensorboard import SummaryWriter  # a second that runs without metrics do not pay

                purge_step = self.start_step + 1 if self.start_step else None
                self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)
            for name, number in numbers.items():
                self.events.add_scalar(name, number, step)


def lock_run_folder(folder: Path) -> FileLock | None:
    """Hold the run directory for this process, until it ends or lets go. Rank 0 only. None on file systems without locks.

    Raises ConfigError where another process trains there: it would lose its folder, or its unfinished checkpoint.
    """
    # A file for a lock instead, as filelock would take on such a file system, outlives its process when that is killed.
    lock = FileLock(folder.parent / f".{folder.name}.lock", fallback_to_soft=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"run_dir ({folder}) is in use: another process trains there; wait for it, or set name=NEW"
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock


def start_run_folder(folder: Path) -> Path | None:
    """Make an empty, writable run directory. Rank 0 only, before it makes its RunLog.

    An earlier run of that name is moved to FOLDER.1, .2, ... and its new place is printed and returned. Raises
    ConfigError for a path that cannot become a run directory; a folder that holds anything but a run is never touched.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"run_dir ({folder}) is a file, and must be a folder or not exist yet; set run_dir=PATH to another path"
        )
    try:
        moved_to = _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"run_dir ({folder}) cannot be written: {reason}; set run_dir=PATH to a folder that can be"
        ) from None
    if moved_to is not None:
        print(f"an earlier run in {folder} was moved to {moved_to}", flush=True)
    return moved_to


def write_summary(path: Path, facts: Mapping[str, object]) -> None:
    """Write summary.md: `name` as title, `use it` as a command, other facts as rows of one table. Rank 0 only."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if name not in ("name", "use it")]
    lines = [f"# {facts.get('name', 'run')}", "", "| | |", "|---|---|", *rows]
    if "use it" in facts:
        lines += ["", "Use it:", "", "```bash", str(facts["use it"]), "```"]
    with _reported(path.parent, path.name):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def json_line(values: Mapping[str, object]) -> str:
    """One line of strict JSON; what JSON cannot say (NaN, infinity) is null."""
    return json.dumps({name: _jsonable(value) for name, value in values.items()}, ensure_ascii=False, allow_nan=False)


def step_of_line(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class _Lines:
    """A text file that grows by whole lines, each on disk as soon as it is written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        with _reported(folder, name):
            self.file = (folder / name).open("a", encoding="utf-8", errors="backslashreplace")

    @property
    def closed(self) -> bool:
        return self.file.closed

    def write(self, line: str) -> None:
        with _reported(self.folder, self.name):
            self.file.write(line + "\n")
            self.file.flush()

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drop the lines that are not wanted, by one replacement of the file."""
        with _reported(self.folder, self.name):
            self.file.close()
            path = self.folder / self.name
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            fresh = path.with_name(f".{self.name}")
            fresh.write_text("".join(line for line in lines if wanted(line)), encoding="utf-8")
            fresh.replace(path)
            self.file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def close(self) -> None:
        with _reported(self.folder, self.name):
            self.file.close()


@contextmanager
def _reported(folder: Path, name: str) -> Iterator[None]:
    """A full disk and the like as a message. Raised on rank 0 alone, which ends; the launcher then ends the others."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SamestepError(
            f"{folder / name} cannot be written: {reason}; free space there, or set run_dir=PATH to another disk"
        ) from error


def _move_aside(folder: Path) -> Path | None:
    """Rename a folder that holds a run; None where there is nothing to keep. What its jobs left, and a request to stop, stay."""
    names = {path.name for path in folder.iterdir()} - set(STAYS) if folder.exists() else set()
    if not names:
        return None
    if not is_run(folder) and not names <= LOG_FILES:
        raise ConfigError(
            f"run_dir ({folder}) holds other things than a run, such as {min(names)}, and must be empty, a run or not "
            "exist yet; set run_dir=PATH to another path"
        )
    number = 1
    while (free := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    moved = folder.rename(free)
    folder.mkdir()
    for name in STAYS:
        if (moved / name).exists():
            (moved / name).rename(folder / name)
    return moved


def _cell(value: object) -> str:
    """A value in a table: fractions with four digits, and nothing that ends the cell."""
    words = f"{value:.4f}" if isinstance(value, float | np.floating) else str(value)
    return words.replace("|", "\\|").replace("\n", " ")


def _jsonable(value: object) -> object:
    """A number or text as JSON has it; numpy's numbers become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} is not a flat value"
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number)
