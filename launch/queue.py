"""`samestep status | logs`: where submitted runs stand, from the queue and from what lies in their run directories. Imports no torch."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from launch.starts import known_starts, newest_step, outcome_of
from trainer.checkpoint.resume import read_outcome
from trainer.errors import ConfigError
from trainer.run_folder import JOBS
from trainer.screen import clock

SUBMISSION = "submission.json"
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/lora_sst2.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; of an array, any of its tasks.")]


def status(runs: Runs) -> None:
    """One line a run: where it stands in the queue, step, loss, time left, restarts, and what it waits for.

    Example: samestep status runs/lora_sst2
    """
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "job", "state", "step", "loss", "left", "restarts", "waits for"):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "left", "restarts") else "left")
    for run in tasks_of(runs):
        table.add_row(*status_of(run))
    Console(soft_wrap=True, highlight=False).print(table)


def tasks_of(runs: Sequence[Path]) -> list[Path]:
    """The runs, and those that were submitted in one array with them."""
    found = [Path(task) for run in runs for task in read_submission(run).get("tasks", [run])]
    return list(dict.fromkeys(found))


def status_of(run: Path) -> Iterator[str]:
    """The cells of one run."""
    job = job_of(run)
    state, reason = queue_state(job)
    starts = known_starts(run)
    outcome = outcome_of(run, starts[-1]) if starts else read_outcome(run)
    yield run.name
    yield job
    yield state or outcome or ("not in the queue" if starts else "submitted")
    line, total = last_metrics(run), total_steps(run)
    step = int(line.get("step", newest_step(run)))
    yield f"{step:,}" + (f"/{total:,}" if total else "")
    yield f"{line['train/loss']:.4f}" if isinstance(line.get("train/loss"), float) else ""
    yield time_left(run, line, step, total) if outcome != "finished" else ""
    yield str(max((start.number for start in starts if start.job == starts[-1].job), default=0))
    yield reason


def queue_state(job: str) -> tuple[str, str]:
    """(state, why it waits) as squeue says; empty where the job is not in the queue."""
    if shutil.which("squeue") is None:
        raise ConfigError("squeue is not here: ask from a login node of the Slurm cluster")
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%r"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:  # which a job is that ended a while ago
        raise ConfigError(f"squeue could not say where job {job} is: {done.stderr.strip()}; try again")
    state, _, reason = done.stdout.strip().split("\n")[0].partition("|")
    return state, "" if reason == "None" else reason


def read_submission(run: Path) -> dict[str, Any]:
    """What `samestep submit` noted; nothing for a script that was given to sbatch by hand."""
    try:
        found: dict[str, Any] = json.loads((run / JOBS / SUBMISSION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def job_of(run: Path) -> str:
    """The newest job of a run. ConfigError for a folder that no job knows."""
    submitted, starts = read_submission(run), known_starts(run)
    if not submitted and not starts:
        raise ConfigError(f"RUN ({run}): no job was submitted for it; start with samestep submit RECIPE")
    if not submitted or (starts and starts[-1].began > submitted["submitted"]):
        return starts[-1].job
    return str(submitted["job"])


def last_metrics(run: Path) -> dict[str, Any]:
    """The newest line of training metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):  # cut by a full disk or a kill
            found: dict[str, Any] = json.loads(line)
            if "train/loss" in found:
                return found
    return {}


def total_steps(run: Path) -> int | None:
    """Of the run's settings, where they are a number of steps, or a log line tells how far an epoch is."""
    settings, line = read_settings(run), last_metrics(run)
    train = settings.get("train", {})
    if train.get("max_steps"):
        return int(train["max_steps"])
    if train.get("num_epochs") and line.get("epoch"):
        return round(float(line["step"] * train["num_epochs"] / line["epoch"]))
    return None


def time_left(run: Path, line: dict[str, Any], step: int, total: int | None) -> str:
    """At the speed of the last log line."""
    size = read_settings(run).get("train", {}).get("global_batch_size")
    if not total or not size or not line.get("samples_per_s"):
        return ""
    return clock((total - step) * float(size) / float(line["samples_per_s"]))


def read_settings(run: Path) -> dict[str, Any]:
    """config.yaml of a run that has begun."""
    try:
        return dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def logs(
    run: Run,
    *,
    start: Annotated[int | None, typer.Option(min=0, help="Which start; the newest if not given.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing what comes, of later starts too.")] = False,
) -> None:
    """Print what one start of a run wrote; without --start also what kept the job from starting again.

    Example: samestep logs runs/lora_sst2 --start 0
    """
    starts = known_starts(run)
    if start is not None and start >= len(starts):
        raise ConfigError(f"--start ({start}): the run has {len(starts)} start(s), counted from 0")
    path = newest_log(run) if start is None else run / JOBS / starts[start].log
    if not path.is_file():
        raise ConfigError(f"{path} is not there (yet)")
    place = print_from(path, 0)
    if start is None and not follow:
        print(said_after(path), end="")
    said = seen = ""
    while follow:
        time.sleep(1.0)
        before, place = place, print_from(path, place)
        more = said_after(path) if start is None and place == before else ""
        if more == seen and more not in ("", said):  # twice the same: not what the log is about to have too
            print(more.removeprefix(said), end="", flush=True)
            said = more
        seen = more
        if start is None and (newer := newest_log(run)) != path and newer.is_file():
            path, place, said, seen = newer, print_from(newer, 0), "", ""


def newest_log(run: Path) -> Path:
    """Of the newest start; the output of the job script where the newest job has none, because its settings were refused."""
    job, starts = job_of(run), known_starts(run)
    if not starts or starts[-1].job != job:
        written = {path.stat().st_mtime: path for path in (run / JOBS).glob("job-*.out")}
        if written and max(written) > read_submission(run)["submitted"]:
            return written[max(written)]
    if not starts:
        raise ConfigError(
            f"RUN ({run}): its job {job} has not started yet; samestep status {run} says what it waits for"
        )
    return run / JOBS / starts[-1].log


def print_from(path: Path, place: int) -> int:
    """Print a file from this byte on; returns where it ended."""
    with path.open("rb") as file:
        file.seek(place)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return place + len(text)


def said_after(log: Path) -> str:
    """What the job script said after the last line of this log of a start: it failed before it could note another start."""
    output = log.with_name(log.name.split("-start-")[0] + ".out")
    last = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
    if not last or not output.is_file():
        return ""
    _, found, rest = output.read_text(encoding="utf-8", errors="replace").rpartition(last)
    return rest.lstrip("\n") if found else ""
