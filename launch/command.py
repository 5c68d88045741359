"""Run options -> the argv of `accelerate launch` and its environment. Pure: starts nothing, imports no torch.

The printed line is the one that runs, so a user can copy it and do without samestep.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "accelerate_configs"


@dataclass(frozen=True)
class RunOptions:
    """What `samestep run` was asked for."""

    recipe: Path
    backend: str | None = None
    """Name of a file in accelerate_configs/. None: single for one process, ddp for more."""
    processes: int | None = None
    """Ranks on this machine. None: what the backend's file says."""
    precision: str = "no"
    configs: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()

    def complete(self) -> "RunOptions":
        """The same with backend and processes decided. An unknown backend counts as one process."""
        backend = self.backend or ("ddp" if (self.processes or 1) > 1 else "single")
        processes = self.processes
        if processes is None:
            processes = processes_of(backend) if backend in backend_names() else 1
        return replace(self, backend=backend, processes=processes)


@cache
def backend_names() -> tuple[str, ...]:
    """The backends that have a file in accelerate_configs/."""
    return tuple(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))


@cache
def processes_of(backend: str) -> int:
    """`num_processes` of a backend's file."""
    found = re.search(r"^num_processes: *(\d+)", backend_file(backend).read_text(), re.MULTILINE)
    return int(found.group(1)) if found else 1


def backend_file(backend: str) -> Path:
    """The accelerate configuration of a backend, relative to the working directory where that is shorter."""
    path = CONFIG_FOLDER / f"{backend}.yaml"
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def launch_command(options: RunOptions) -> list[str]:
    """The argv that starts a run with this Python's accelerate.

    Port 0 lets accelerate pick a free one, so that two runs share a machine. Never `--cpu`: it starts one process,
    whatever --num_processes says; the backends' files serve CPUs as they are.
    """
    done = options.complete()
    assert done.backend is not None
    several = ["--main_process_port", "0"] if done.backend != "single" else ["--quiet"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(backend_file(done.backend))),
        *("--num_processes", str(done.processes)),
        *("--mixed_precision", done.precision),
        *several,
        str(done.recipe),
        *(word for path in done.configs for word in ("--config", str(path))),
        *done.overrides,
    ]


def launch_environment(options: RunOptions, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to add to the environment: the cores of this machine shared out to the ranks, unless the user decided."""
    if environ.get("OMP_NUM_THREADS"):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, count_cores() // max(1, options.complete().processes or 1)))}


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def display_line(options: RunOptions, environ: Mapping[str, str] = os.environ) -> str:
    """The line for the screen, ready to be copied into a shell whose environment has this Python's scripts."""
    assignments = [f"{name}={value}" for name, value in launch_environment(options, environ).items()]
    return " ".join([*assignments, "accelerate", "launch", *map(shlex.quote, launch_command(options)[3:])])
