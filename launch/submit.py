"""`samestep submit | cancel`: a recipe in a Slurm queue, from the login node; status and logs are in queue.py.

Everything of a submission lies in RUN/slurm: script, copies of the --config files, submission.json (job, options, git revision),
starts.jsonl, a log for each start.
"""

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.command import RunOptions, backend_names
from launch.queue import SUBMISSION, Runs, job_of, queue_state, read_submission
from launch.slurm import TEMPLATE, Cluster, Submission, load_cluster, script_text, variants_of
from launch.starts import CANCELLED, git_revision, known_starts
from trainer.config import PRECISIONS
from trainer.errors import ConfigError
from trainer.run_folder import JOBS


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    backend: Annotated[str | None, typer.Option(help=f"{', '.join(backend_names())}.")] = None,
    precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}; no is fp32.")] = "no",
    nodes: Annotated[str, typer.Option(help="A number, or MIN-MAX: as many as there are when it starts.")] = "1",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="One rank for each.")] = 0,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="On nodes without GPUs.")] = 1,
    time_limit: Annotated[str | None, typer.Option("--time", help="Of one start, such as 4:00:00.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Of all kinds.")] = 1000,
    cluster: Annotated[str | None, typer.Option(help="Profile ~/.config/samestep/clusters/NAME.yaml.")] = None,
    array: Annotated[list[str] | None, typer.Option(help="KEY=V1,V2,...: a task for each; may be repeated.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="YAML file of settings; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the script, submit nothing.")
    ] = False,
) -> None:
    """Write a job script into the run directory and submit it; the run finishes, however often it is interrupted.

    Example: samestep submit recipes/lora_sst2.py --backend fsdp --nodes 4 --gpus-per-node 8 --time 4:00:00
    """
    variants, words = variants_of(array or ()), tuple(overrides or ())
    found = settings_of(RunOptions(recipe, configs=tuple(config or ()), overrides=words))
    asked = Submission(
        recipe=recipe,
        name=found.name,
        run_dir=str(found.folder),
        variants=variants,
        overrides=tuple(word for word in words if not (variants and word.startswith("run_dir="))),
        configs=tuple(config or ()),
        backend=backend,
        precision=precision,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        time_limit=time_limit,
        max_restarts=max_restarts,
        cluster=load_cluster(cluster, Path.home()) if cluster is not None else Cluster(),
    )
    check_settings(asked)
    script = script_text(asked, TEMPLATE.read_text(encoding="utf-8"))
    if dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not here: submit from a login node of a Slurm cluster, or look at the script with --dry-run"
        )
    refuse_a_second_job(asked)
    job = submit_script(asked, script)
    print(f"job {job}: {', '.join(asked.run_dirs)}\nsamestep status {asked.run_dirs[0]}")


def settings_of(options: RunOptions) -> Any:
    """The recipe's settings; with mistakes in them, what is left without."""
    from launch.preflight import try_recipe

    attempt = try_recipe(options, 1)
    if attempt.resolved is None:
        raise ConfigError(*attempt.problems)
    return attempt.resolved.config


def check_settings(asked: Submission) -> None:
    """What the job will check when it starts; of an array each task's settings. ConfigError with every problem."""
    from launch.preflight import check_submission

    shared = RunOptions(asked.recipe, asked.backend, None, asked.precision, asked.configs, asked.overrides)
    tasks = [
        replace(shared, overrides=(*asked.overrides, f"run_dir={folder}", *words))
        for folder, words in zip(asked.run_dirs, asked.variants, strict=False)
    ]
    check_submission(tasks or [shared], asked.world_sizes(), on_gpus=asked.gpus_per_node > 0)


def refuse_a_second_job(asked: Submission) -> None:
    """ConfigError where a job of this run is still in the queue: two would take each other's folder."""
    problems = []
    for folder in map(Path, asked.run_dirs):
        if not (read_submission(folder) or known_starts(folder)):
            continue
        job = job_of(folder)
        if state := queue_state(job)[0]:
            problems.append(
                f"run_dir ({folder}): job {job} of this run is in the queue ({state}); wait for its end, or end it with "
                f"samestep cancel {folder}; or set name=NEW for another run"
            )
    if problems:
        raise ConfigError(*problems)


def submit_script(asked: Submission, script: str) -> str:
    """Put script and settings files into the run directories, hand the script to sbatch, note what was submitted. Returns the job's id."""
    for folder in asked.run_dirs:
        jobs = Path(folder) / JOBS
        try:
            jobs.mkdir(parents=True, exist_ok=True)
            (jobs / "train.sbatch").write_text(script, encoding="utf-8")
            for path, copy in asked.config_copies(folder):
                Path(copy).write_bytes(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"run_dir ({folder}) cannot be written: {error.strerror or error}; set run_dir=PATH"
            ) from None
    path = Path(asked.run_dirs[0]) / JOBS / "train.sbatch"
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    for number, folder in enumerate(asked.run_dirs):
        facts = {
            "job": f"{job}_{number}" if asked.variants else job,
            "tasks": [str(Path(task).absolute()) for task in asked.run_dirs],
            "varied": asked.variants[number] if asked.variants else (),
            "submitted": time.time(),
            "git": git_revision(),
            "options": vars(asked) | {"cluster": asked.cluster.model_dump(exclude_unset=True)},
        }
        text = json.dumps(facts, indent=1, default=str) + "\n"
        (Path(folder) / JOBS / SUBMISSION).write_text(text, encoding="utf-8")
    return job


def cancel(
    runs: Runs, *, now: Annotated[bool, typer.Option("--now", help="Kill it, without a last save.")] = False
) -> None:
    """Let a run save and end, without another start; one that waits in the queue is taken out of it.

    Example: samestep cancel runs/lora_sst2
    """
    for run in runs:
        job = job_of(run)
        state, _ = queue_state(job)
        if not state:
            print(f"{run}: job {job} is not in the queue")
            continue
        (run / JOBS).mkdir(parents=True, exist_ok=True)
        (run / JOBS / CANCELLED).write_text(job, encoding="utf-8")
        is_saving = state == "RUNNING" and not now
        words = ["scancel", "--batch", "--signal=USR1", job] if is_saving else ["scancel", job]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"RUN ({run}): scancel refused job {job}: {done.stderr.strip()}")
        print(f"{run}: job {job} " + ("saves and ends; it is not started again" if is_saving else "is cancelled"))
