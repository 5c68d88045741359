"""What makes a folder a run directory, and where its exported model lies. Imports no torch: commands answer at once.

Place in the flow: training writes such folders (trainer/log.py, trainer/output.py), prediction opens them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import CheckpointError

RUN_FILES = ("config.yaml", "metrics.jsonl")
"""Either of them makes a folder a run directory."""

JOBS = "slurm"
"""Subfolder that holds what Slurm jobs leave: script, starts, logs. It stays where it is when an earlier run is moved aside."""

JOB_FILE = "job.txt"
"""The Slurm job that began this run."""

MODEL_FOLDER = "model"
"""Subfolder of a run directory that holds the exported model or adapter."""

INFO_FILE = "samestep.json"
"""In an exported model's folder: what prediction needs to know."""


NEEDED = {"classification": ("base", "label_names", "max_length")}
"""What prediction needs to know, by task."""


def find_exported(path: Path, task: str | None = "classification") -> Path:
    """The folder of an exported model of a task, None for any: `path` itself or the model folder in it. CheckpointError says what lacks."""
    if (path / INFO_FILE).is_file():
        return _checked(path, task)
    if (path / MODEL_FOLDER / INFO_FILE).is_file():
        return _checked(path / MODEL_FOLDER, task)
    raise CheckpointError(_why_nothing_was_found(path))


def job_id(environ: Mapping[str, str]) -> str:
    """Of the Slurm job that this process runs in; empty outside of one.

    ARRAY_TASK for a task of an array: its SLURM_JOB_ID is the whole array's for one of the tasks, on which scontrol and scancel
    would act all at once.
    """
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def is_run(path: Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    return any((path / name).is_file() for name in RUN_FILES)


def _checked(folder: Path, wanted: str | None) -> Path:
    """The folder, once its samestep.json says what prediction needs."""
    file = folder / INFO_FILE
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        task = info.get("task", "classification")
        missing = [name for name in NEEDED.get(task, ("base",)) if name not in info]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); take the model folder from its run again") from None
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; take the model folder from its run again")
    if wanted is not None and task != wanted:
        raise CheckpointError(
            f"{folder} holds a model of task {task}, and this is for {wanted}; samestep predict RUN asks it by its task"
        )
    return folder


def _why_nothing_was_found(path: Path) -> str:
    if not path.exists():
        return f"RUN ({path}) does not exist; {_runs_beside(path)}"
    if not path.is_dir():
        return f"RUN ({path}) is a file, and must be a run directory; {_runs_beside(path)}"
    if is_run(path):
        return (
            f"RUN ({path}) has no exported model, because the run has not finished its first evaluation; run it again"
        )
    if any((path / name).is_file() for name in ("adapter_config.json", "bottleneck_config.json", "config.json")):
        return (
            f"RUN ({path}) holds a model without {INFO_FILE}, which samestep writes beside it; copy that file there too"
        )
    return (
        f"RUN ({path}) is not a run directory: it has neither {' nor '.join(RUN_FILES)}; {_runs_beside(path / 'any')}"
    )


def _runs_beside(path: Path) -> str:
    """A fix that names the runs which lie where `path` was looked for, or in runs/."""
    for parent in (path.parent, Path("runs")):
        ready = sorted(run for run in parent.glob("*") if (run / MODEL_FOLDER / INFO_FILE).is_file())
        if ready:
            return "runs with a model are " + ", ".join(map(str, ready[:8])) + (", ..." if len(ready) > 8 else "")
    return "give the run directory that training printed, such as runs/lora_sst2"
