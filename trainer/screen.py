"""What a person watching the run sees: lines, and below them one bar, on standard output.

Place in the flow: RunLog on rank 0 uses it; `announce` is for what comes before there is one. Invariant: where standard
output is not a terminal there are plain lines without colours or carriage returns; and no failure of the screen (a
closed pipe, a lost connection) stops the training.
"""

import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from trainer.quiet import chatter


class Screen:
    """Standard output: a Rich bar below the lines on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        """Opens nothing; the bar appears with the first `move`. Steps are optimizer steps."""
        self.total_steps, self.start_step = total_steps, start_step
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        # Rich alone would also call a pipe a terminal where FORCE_COLOR is set, as in many CI systems.
        self.is_terminal = sys.stdout.isatty() and self.console.is_terminal and not self.console.is_dumb_terminal
        self.is_lost = False
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def show(self, message: str) -> None:
        """Print a message above the bar."""
        text = Text.from_ansi(message)
        if self.is_terminal:
            self._try(lambda: self.console.print(text))
        else:
            self._try(lambda: print_plain(sys.stdout, text.plain))

    def move(self, step: int, words: str) -> None:
        """Progress to `step`, with `words` beside the bar or after the step."""
        if not self.is_terminal:
            self.show(f"step {step}/{self.total_steps}  {words}")
            return
        self._try(lambda: self._move_bar(step, words))
        if step >= self.total_steps:
            self.close()  # what is said from here on stands below the full bar

    def close(self) -> None:
        """Leave the bar as it is and give the cursor back; a second call does nothing."""
        if self.bar is not None:
            self._try(self.bar.stop)
            self.bar = None

    def _move_bar(self, step: int, words: str) -> None:
        if self.bar is None:
            counter = TextColumn("step {task.completed:.0f}/{task.total:.0f}")
            # No refreshing thread: the cores are for training.
            bar = Progress(
                counter, BarColumn(), TextColumn("{task.fields[words]}"), console=self.console, auto_refresh=False
            )
            self.task = bar.add_task("", total=self.total_steps, completed=self.start_step, words=words)
            bar.start()
            self.bar = bar
        self.bar.update(self.task, completed=step, words=words, refresh=True)

    def _try(self, write: Callable[[], None]) -> None:
        """Write to the screen; once that has failed, nothing more is shown. log.txt has it all."""
        if self.is_lost:
            return
        try:
            write()
        except OSError:
            self.is_lost = True


def announce(message: str, *, is_main: bool) -> None:
    """Say something before there is a RunLog: on rank 0's screen now, and in log.txt once the run directory is open."""
    if is_main:
        print_plain(sys.stdout, message)
        chatter().note(message)


def progress_words(values: Mapping[str, float], remaining_s: float | None) -> str:
    """Loss, learning rate, speed, tokens and remaining time in words; other values are for metrics.jsonl."""
    words = []
    if "train/loss" in values:
        words.append(f"loss {values['train/loss']:.4f}" + (" nats" if "train/bits_per_byte" in values else ""))
    if "train/bits_per_byte" in values:
        words.append(f"{values['train/bits_per_byte']:.4f} bits/byte")
    if "train/lr" in values:
        words.append(f"lr {values['train/lr']:.1e}")
    unit = "tokens" if "tokens_per_s" in values else "samples"
    if f"{unit}_per_s" in values:
        speed = values[f"{unit}_per_s"]
        words.append(f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s")
    if "tokens_seen" in values:
        words.append(f"{values['tokens_seen']:,} tokens seen")
    if "train/padding" in values:
        words.append(f"padding {values['train/padding']:.2%}")
    if remaining_s is not None:
        words.append(f"eta {clock(remaining_s)}")
    return "  ".join(words)


def eta_s(history: "deque[tuple[float, int]]", total_steps: int) -> float | None:
    """Seconds to the last step at the speed of the window; None where nothing moved. history: (time in s, step)."""
    (first_s, first), (last_s, last) = history[0], history[-1]
    return (total_steps - last) * (last_s - first_s) / (last - first) if last > first else None


def clock(seconds: float) -> str:
    """Like 1:02:03; days are counted as hours."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def print_plain(stream: TextIO, line: str) -> None:
    """Write one line at once; a character that the stream's encoding lacks is escaped, not the end of the run."""
    encoding = stream.encoding or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()
