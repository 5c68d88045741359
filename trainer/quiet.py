"""Keeps what libraries say off the screen and in log.txt.

Place in the flow: `quiet_libraries` first thing in a process, before the libraries are imported; what they say until
the run directory is open is held, and RunLog then writes it down. Invariant: a record below ERROR that is kept off the
screen is in log.txt; errors, and warnings of code that is not a library, stay on the screen too.
"""

import io
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "DeepSpeed",
    "dill",
    "httpx",
    "huggingface_hub",
    "peft",
    "py.warnings",  # Python's warnings, once captured
    "tensorboard",
    "torch",
    "transformers",
)
"""Loggers, with all below them, whose warnings do not belong on the screen."""

QUIET_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # where TensorFlow is installed, TensorBoard imports it
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bar while weights load follows it
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Set where the user has not set them: HF_HUB_DISABLE_PROGRESS_BARS=0 brings the download bars back."""

MOST_HELD = 1000
"""Lines held before a run directory is open; older ones are dropped."""


class Chatter(logging.Handler):
    """Takes warnings and errors of the whole process: holds them as text, then gives each to `write`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.held: deque[str] = deque(maxlen=MOST_HELD)
        self.write: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write or hold one record."""
        self.note(self.format(record).rstrip())

    def note(self, message: str) -> None:
        """Write or hold something that was said in another way."""
        if self.write is None:
            self.held.append(message)
        else:
            self.write(message)

    def start(self, write: Callable[[str], None]) -> None:
        """Write what was held, and from now on everything at once."""
        self.write = write
        while self.held:
            write(self.held.popleft())

    def stop(self) -> None:
        """Hold again."""
        self.write = None


def quiet_libraries() -> None:
    """Take libraries' warnings off this process's screen, whether they are imported already or later. Every rank."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chatter()
    _keep_screen_for_errors()
    logging.captureWarnings(True)
    _quiet_later_imports()
    _quiet_earlier_imports()
    _hide_progress_bars()


def chatter() -> Chatter:
    """The process's one handler of this kind, on the root logger."""
    for handler in logging.root.handlers:
        if isinstance(handler, Chatter):
            return handler
    handler = Chatter()
    logging.root.addHandler(handler)
    return handler


@contextmanager
def quiet_prints(source: str) -> Iterator[None]:
    """Around a library call that prints: its lines go to log.txt with `source` before them. Every rank.

    Only Python's own prints are caught. They are kept when the call fails, too.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in filter(None, map(str.rstrip, printed.getvalue().splitlines())):
            chatter().note(f"{source}: {line}")


class _Screen(logging.StreamHandler):
    """Errors of everybody, and warnings of what is not a library, to stderr."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.addFilter(lambda record: record.levelno >= logging.ERROR or not _is_library(record.name))


class _QuietLogger(logging.Logger):
    """A library's top logger that cannot be given a console handler of its own; its records go to the root logger."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802 (logging's name)
        """Take files and the like; leave the console to the root logger."""
        if not _is_console(hdlr):
            super().addHandler(hdlr)


def _keep_screen_for_errors() -> None:
    if not any(isinstance(handler, _Screen) for handler in logging.root.handlers):
        logging.root.addHandler(_Screen())


def _quiet_later_imports() -> None:
    """Make the loggers that libraries will find: DeepSpeed (0.19) adds its handler and warns in one import."""
    usual = logging.getLoggerClass()
    logging.setLoggerClass(_QuietLogger)
    try:
        for library in LIBRARIES:
            if not _is_asked_for(library):
                logging.getLogger(library)  # one that exists already stays as it is
    finally:
        logging.setLoggerClass(usual)


def _quiet_earlier_imports() -> None:
    """Take away the console handlers that libraries gave their loggers; the root logger sees the records instead."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and _is_library(name) and not _is_asked_for(name):
            for handler in filter(_is_console, list(logger.handlers)):
                logger.removeHandler(handler)
                logger.propagate = True


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _is_library(name: str) -> bool:
    return any(name == library or name.startswith(library + ".") for library in LIBRARIES)


def _is_asked_for(name: str) -> bool:
    """Torch's own logging switch is for people who debug torch and want to see it."""
    return name.split(".")[0] == "torch" and "TORCH_LOGS" in os.environ


def _hide_progress_bars() -> None:
    """For libraries that were imported before the environment was set."""
    if "transformers" in sys.modules and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        from datasets.utils.logging import disable_progress_bar as disable_datasets_bar

        disable_datasets_bar()
