"""`samestep job begin | check | end`: what slurm/train.sbatch asks for around training, on the cluster's nodes.

Each start leaves a line in RUN/slurm/starts.jsonl, and `end` decides by it and by what training left whether there is another one.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.command import CONFIG_FOLDER, RunOptions
from launch.starts import (
    CANCELLED,
    JobStart,
    is_cancelled,
    newest_step,
    newest_written,
    note_start,
    outcome_of,
    own_starts,
)
from trainer.checkpoint.resume import OUTCOME, decide_start
from trainer.checkpoint.store import CHECKPOINTS, list_checkpoints
from trainer.run_folder import JOBS, job_id
from trainer.stop import STOP_FILE

job_app = typer.Typer(
    no_args_is_help=True, help="What slurm/train.sbatch asks for inside a job.", rich_markup_mode=None
)


@job_app.command()
def begin(
    world_size: Annotated[int, typer.Argument(min=1, help="Ranks on all nodes.")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    backend: Annotated[str, typer.Option()] = "single",
    precision: Annotated[str, typer.Option()] = "no",
    config: Annotated[list[Path] | None, typer.Option("--config")] = None,
) -> None:
    """Check recipe and settings, note the start, print the run directory, this start's log and the backend's file, a line each."""
    options = RunOptions(recipe, backend, world_size, precision, tuple(config or ()), tuple(overrides or ()))
    from launch.preflight import check_job

    with redirect_stdout(sys.stderr):  # what a recipe prints when it is imported is not for the script
        found = check_job(options)
    folder, kind = found.folder, decide_start(found).kind
    start = note_start(folder, checkpoint_size(found), os.environ, is_fresh=kind == "fresh")
    if kind == "continue":
        (folder / OUTCOME).unlink(missing_ok=True)  # of an earlier start: this one has its own, or dies without one
    if is_cancelled(folder, start.job):  # on its way here: one step, a save, and no other start
        (folder / STOP_FILE).touch()
    else:
        (folder / STOP_FILE).unlink(missing_ok=True)  # of an earlier start
    print(folder, folder / JOBS / start.log, CONFIG_FOLDER / f"{backend}.yaml", sep="\n")


@job_app.command()
def check(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    address: Annotated[str, typer.Argument(help="Of the first node.")],
    port: Annotated[int, typer.Argument(help="Where the ranks will meet.")],
    *,
    ranks_per_node: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Run once on every node: is everything there that training needs? One table by the first node; exit code 3 where it is not."""
    from launch.node_check import check_nodes

    raise typer.Exit(check_nodes(run, address, port, ranks_per_node=ranks_per_node, environ=os.environ))


@job_app.command()
def end(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    *,
    max_restarts: Annotated[int, typer.Option(min=0)],
    unready: Annotated[bool, typer.Option("--unready", help="The check of the nodes ended this start.")] = False,
) -> None:
    """Print finished, cancelled, failed, stuck or requeue; why, on the error stream."""
    state = job_state(os.environ)
    verdict, why = decide(
        run, own_starts(run, os.environ), max_restarts=max_restarts, job_state=state, has_trained=not unready
    )
    if verdict == "cancelled":
        (run / JOBS / CANCELLED).unlink(missing_ok=True)
    (run / STOP_FILE).unlink(missing_ok=True)  # a signal may have come after training had ended
    print(f"samestep: {why}", file=sys.stderr, flush=True)
    print(verdict)


def decide(
    run: Path, starts: Sequence[JobStart], *, max_restarts: int, job_state: str, has_trained: bool = True
) -> tuple[str, str]:
    """What comes after a start that has ended, and why, in words. Looks at the run directory, changes nothing.

    job_state: as Slurm calls it; a job that somebody cancelled is not started again. has_trained: false where the check of the nodes
    ended the start, which is then forgiven for its lack of progress, unless the one before it had made none either.
    """
    start = starts[-1]
    outcome, step, number = outcome_of(run, start), newest_step(run), start.number
    if outcome == "finished":
        return "finished", f"the run is finished at step {step}"
    if is_cancelled(run, start.job) or job_state == "CANCELLED":
        return "cancelled", f"cancelled after step {step}, which is saved; submitting it again goes on from there"
    if outcome == "failed":
        return "failed", "training could not go on (see above); another start would end the same way"
    is_old = (
        step == start.step and newest_written(run) <= start.began
    )  # else it began anew, or wrote a damaged one again
    if not has_trained:
        is_old = is_old and [before.step for before in starts[-2:-1]] == [step]
    if number > 0 and is_old:
        return "stuck", (
            f"no progress since the last restart: the newest checkpoint is still that of step {step}; start {number + 1} of job "
            f"{start.job} is the last. What went wrong stands above, and in {run / JOBS / start.log}"
        )
    if number >= max_restarts:
        return (
            "stuck",
            f"restarted {number} times, which is the cap (--max-restarts {max_restarts}); the run is at step {step}",
        )
    how = "stopped on request" if outcome == "stopped" else "ended without a word"
    how = how if has_trained else "had nodes that were not ready"
    return (
        "requeue",
        f"{how} at step {step}; the job is put back into the queue (restart {number + 1} of {max_restarts})",
    )


def checkpoint_size(config: Any) -> float:
    """What one checkpoint takes: as much as the newest one, or weights and two moments of what is trained."""
    for folder in list_checkpoints(config.folder / CHECKPOINTS)[:1]:
        return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    from trainer.model.estimate import CHECKPOINTED, estimate

    return float(CHECKPOINTED * estimate(config.model, config.method).trainable)


def job_state(environ: Mapping[str, str]) -> str:
    """RUNNING, CANCELLED, ... as `scontrol` says of this job; empty where it says nothing.

    Slurm 22.05 shows a job whose script still runs as COMPLETING when it was cancelled, preempted (it starts such a job again itself) or
    its time is over.
    """
    done = subprocess.run(["scontrol", "show", "job", "-o", job_id(environ)], capture_output=True, text=True)
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    state = words.get("JobState", "")
    return "CANCELLED" if state == "COMPLETING" and words.get("Reason") != "TimeLimit" else state
