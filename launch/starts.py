"""The starts of a run under Slurm: noted in RUN/slurm/starts.jsonl by each job, read by whoever decides or reports."""

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.resume import OUTCOME, read_outcome
from trainer.checkpoint.store import CHECKPOINTS, list_checkpoints, step_of
from trainer.errors import ConfigError
from trainer.run_folder import JOBS, job_id

CANCELLED = "cancelled"
"""In RUN/slurm: `samestep cancel` was here, and for which job. A marker of another job means nothing."""
STARTS = "starts.jsonl"


@dataclass(frozen=True)
class JobStart:
    """One start of a run under Slurm."""

    job: str
    """Its id; ARRAY_TASK for a task of an array."""
    number: int
    """0 for the first start of its job, counted by Slurm; a requeued job keeps its id."""
    step: int
    """Of the newest checkpoint when it began; that of an earlier run where it trains anew."""
    nodes: int
    began: float
    checkpoint_bytes: float
    """Of one checkpoint, as far as is known."""
    log: str
    git: str | None = None
    """Revision of the code, with -dirty where files differ from it."""
    earlier_outcome_ns: int | None = None
    """When the outcome of an earlier run was written, which lies there until training moves that run aside; None without one."""


def note_start(
    folder: Path, checkpoint_bytes: float, environ: Mapping[str, str], *, is_fresh: bool = False
) -> JobStart:
    """Append this start to RUN/slurm/starts.jsonl. is_fresh: training will move an earlier run aside."""
    jobs = folder / JOBS
    number = int(environ.get("SLURM_RESTART_COUNT", "0"))
    start = JobStart(
        job=job_id(environ),
        number=number,
        step=newest_step(folder),
        nodes=int(environ.get("SLURM_JOB_NUM_NODES", "1")),
        began=time.time(),
        checkpoint_bytes=checkpoint_bytes,
        log=f"job-{environ.get('SLURM_JOB_ID', '0')}-start-{number:03d}.log",
        git=git_revision(),
        earlier_outcome_ns=outcome_written_ns(folder) if is_fresh else None,
    )
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        with (jobs / STARTS).open("a", encoding="utf-8") as file:
            file.write(("" if _ends_with_a_line(jobs / STARTS) else "\n") + json.dumps(vars(start)) + "\n")
    except OSError as error:
        raise ConfigError(
            f"run_dir ({folder}) cannot be written from this node: {error.strerror or error}; set run_dir=PATH to a folder "
            "on a file system that all nodes share"
        ) from None
    return start


def own_starts(run: Path, environ: Mapping[str, str]) -> list[JobStart]:
    """Those of this job, the first one first: another job of the run may have begun meanwhile, and will find it in use."""
    job = job_id(environ)
    found = [start for start in read_starts(run) if start.job == job]
    if not found:
        raise ConfigError(f"RUN ({run}) has no start of job {job}: is it this job's run directory?")
    return found


def read_starts(run: Path) -> list[JobStart]:
    """The starts of a run under Slurm, the first one first. ConfigError where there was none."""
    starts = known_starts(run)
    if not starts:
        raise ConfigError(
            f"RUN ({run}) was not started by slurm/train.sbatch: there is no start in {run / JOBS / STARTS}; give the run directory"
        )
    return starts


def known_starts(run: Path) -> list[JobStart]:
    """The same, or none. A line that a full disk or a power cut left torn is not counted."""
    starts: list[JobStart] = []
    try:
        lines = (run / JOBS / STARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return starts
    for line in lines:
        with suppress(ValueError, TypeError):
            starts.append(JobStart(**json.loads(line)))
    return starts


def _ends_with_a_line(file: Path) -> bool:
    content = file.read_bytes()
    return not content or content.endswith(b"\n")


def outcome_of(run: Path, start: JobStart) -> str | None:
    """How this start, the newest, has ended: finished, stopped or failed; None for one that was killed or is running."""
    written = outcome_written_ns(run)
    return None if written is None or written == start.earlier_outcome_ns else read_outcome(run)


def outcome_written_ns(run: Path) -> int | None:
    """When the outcome in the run directory was written, by the file system's clock; None without one."""
    try:
        return (run / OUTCOME).stat().st_mtime_ns
    except OSError:
        return None


def newest_step(run: Path) -> int:
    """Of the newest checkpoint; 0 without one."""
    return max((step_of(folder) for folder in list_checkpoints(run / CHECKPOINTS)), default=0)


def newest_written(run: Path) -> float:
    """When the newest checkpoint was written, by the file system's clock; 0 without one."""
    newest = max(list_checkpoints(run / CHECKPOINTS), key=step_of, default=None)
    return 0.0 if newest is None else newest.stat().st_mtime


def is_cancelled(run: Path, job: str) -> bool:
    """Whether `samestep cancel` was here for this job."""
    try:
        return (run / JOBS / CANCELLED).read_text(encoding="utf-8").strip() == job
    except OSError:
        return False


def git_revision() -> str | None:
    """Of the working directory, with -dirty where files differ from it; None outside of git, or without git."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    return done.stdout.strip() or None
