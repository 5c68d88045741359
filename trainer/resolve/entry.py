"""The bottom line of every recipe: read the arguments, run, and leave quietly.

A user's mistake ends every rank with exit code 2 and is printed once. Rank 0 prints first, with what else it finds, and the launcher
then ends the others. Another rank waits before it prints: if it is still alive after that, rank 0 did not fail, so the mistake is
this rank's alone (a file that is missing on one machine) and must not be lost.
"""

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from trainer.config import RunConfig
from trainer.errors import AlreadyFinished, ConfigError, DataError, SamestepError
from trainer.resolve.build import Attempt, read_arguments, resolve
from trainer.resolve.inputs import input_problems
from trainer.resolve.layers import split_arguments
from trainer.resolve.show import config_with_sources, help_text

WAIT_FOR_RANK_0_S = 10.0
"""More than the starts of two ranks differ on a loaded machine. The launcher cuts it short when rank 0 has printed."""
LET_GO_S = 0.5
"""A thread needs microseconds for it, once it is its turn."""


def run_recipe(main: Callable[[RunConfig], None], defaults: RunConfig, argv: Sequence[str] | None = None) -> None:
    """Resolve the arguments and call `main` with the config; all ranks.

    Exit code 2 without a traceback for a SamestepError, 130 for Ctrl-C; any other exception keeps its traceback.
    """
    end_quickly()
    try:
        _run(main, defaults, sys.argv[1:] if argv is None else argv)
    except AlreadyFinished as news:
        _say(str(news))
    except SamestepError as error:
        _report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    _leave_process_group()


def end_quickly() -> None:
    """Spare this process Python's last search for garbage among all that torch and transformers made: about two seconds of each rank."""
    atexit.register(gc.freeze)


def error_text(error: SamestepError) -> str:
    """An error as users see it: one line, or a line for each problem."""
    problems = _problems(error)
    if len(problems) == 1:
        return f"error: {problems[0]}"
    return "\n".join([f"error: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])


def _run(main: Callable[[RunConfig], None], defaults: RunConfig, argv: Sequence[str]) -> None:
    flags = split_arguments(argv).flags
    if "--help" in flags:
        _say(help_text(main, defaults))
        return
    if "--print-config" in flags:
        _say(config_with_sources(resolve(type(defaults), defaults, argv)))
        return
    config = _checked_settings(read_arguments(type(defaults), defaults, argv))
    if "--check" in flags:
        problems = input_problems(config)
        if problems:
            raise ConfigError(*problems)
        _say(f"{config.name}: settings, data and model names are fine")
        return
    try:
        main(config)
    except (ConfigError, DataError) as error:
        # Builders stop at the first mistake; the others are looked for now, so that a sound run does not read its data twice.
        with _said_if_terminated(error):
            problems = input_problems(config)
        raise ConfigError(*dict.fromkeys([*_problems(error), *problems])) from error


def _checked_settings(attempt: Attempt) -> RunConfig:
    """The config, if the settings are sound; otherwise their problems with those of what they name."""
    problems = [*attempt.problems]
    if attempt.resolved is not None and not problems:
        return attempt.resolved.config
    if attempt.resolved is not None:
        problems += input_problems(attempt.resolved.config, problems)
    raise ConfigError(*problems)


@contextmanager
def _said_if_terminated(error: SamestepError) -> Iterator[None]:
    """Rank 0's error is said even where looking for others takes longer than the launcher waits, after another rank has ended."""

    def say(*_: object) -> None:
        print(error_text(error), file=sys.stderr, flush=True)
        os._exit(2)

    if _rank() != 0 or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, say)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _problems(error: SamestepError) -> tuple[str, ...]:
    return error.problems if isinstance(error, ConfigError) else (str(error),)


def _say(text: str) -> None:
    if _rank() == 0:
        print(text)


def _report(error: SamestepError) -> None:
    """Print an error on rank 0, or on this rank if rank 0 does not fail too."""
    rank = _rank()
    if rank == 0:
        print(error_text(error), file=sys.stderr, flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler for clean stops would survive the launcher's signal
    time.sleep(WAIT_FOR_RANK_0_S)
    print(f"rank {rank}: {error_text(error)}", file=sys.stderr, flush=True)


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _leave_process_group() -> None:
    """Without this torch complains at exit.

    gloo's threads still hold the tensors of their last collectives. One that lets go of them while Python ends has no Python left to ask
    and ends the process with SIGABRT (pytorch#190489; seen under FSDP2, 3 of about 25 starts), so they get the time to do it before.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(LET_GO_S)
