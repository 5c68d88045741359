"""`samestep submit | status | cancel | logs` beside a queue: what is noted, refused and shown. Slurm's commands are scripts here."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.cli import main
from launch.queue import SUBMISSION, last_metrics, queue_state, time_left, total_steps
from launch.starts import CANCELLED, STARTS
from trainer.errors import ConfigError
from trainer.run_folder import JOBS

ROOT = Path(__file__).resolve().parents[2]
QUEUE = """#!/bin/bash
printf '%s\\n' "$0 $*" >>"$(dirname "$0")/called"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sbatch, squeue and scancel alone on PATH: the first job is 12, and nothing is in the queue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    answer(
        folder,
        sbatch="echo 12",
        squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        scancel="",
    )
    return folder


def answer(folder: Path, **programs: str) -> None:
    """Let these commands do so."""
    for name, text in programs.items():
        (folder / name).write_text(QUEUE + text + "\n")
        (folder / name).chmod(0o755)


def samestep(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code, and what was printed."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    return int(str(ended.value.code or 0)), printed.out + printed.err


def notes(run: Path, starts: list[Mapping[str, object]], job: str | None = None) -> Path:
    """A run directory with these starts, and a submission of a job."""
    (run / JOBS).mkdir(parents=True)
    if starts:
        (run / JOBS / STARTS).write_text(starts_text(starts))
    if job:
        (run / JOBS / SUBMISSION).write_text(json.dumps({"job": job, "tasks": [str(run)], "submitted": 2.0}))
    return run


def starts_text(starts: list[Mapping[str, object]]) -> str:
    """Lines of starts.jsonl."""
    rest = {"number": 0, "step": 0, "nodes": 1, "began": 1.0, "checkpoint_bytes": 1.0}
    return "".join(json.dumps({**rest, **start}) + "\n" for start in starts)


def test_everything_of_a_submission_lies_in_the_run_directory_and_is_found_from_anywhere(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """git, which is not on the nodes of every site, is not on PATH."""
    monkeypatch.setenv("PATH", str(slurm) + os.pathsep + str(tools(tmp_path, "bash", "dirname")))
    (tmp_path / "long.yaml").write_text("train: {num_epochs: 4}\n")
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes" / "lora_sst2.py")
    words = ["run_dir=runs/a", "--array", "optim.peak_lr=1e-3,5e-4", "--config", "long.yaml", "--max-restarts", "7"]
    code, printed = samestep(capsys, "submit", recipe, *words)
    assert code == 0, printed
    assert "job 12: runs/a-0, runs/a-1" in printed
    for number, rate in enumerate(("1e-3", "5e-4")):
        jobs = tmp_path / f"runs/a-{number}" / JOBS
        assert (jobs / "config-0-long.yaml").read_text() == "train: {num_epochs: 4}\n"
        assert (
            f"run_dir=runs/a-{number} optim.peak_lr={rate} --config runs/a-{number}/slurm/config-0-long.yaml"
            in (jobs / "train.sbatch").read_text()
        )
        noted = json.loads((jobs / SUBMISSION).read_text())
        assert (noted["job"], noted["git"], noted["options"]["max_restarts"]) == (f"12_{number}", None, 7)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    code, printed = samestep(capsys, "status", str(tmp_path / "runs" / "a-1"))
    assert [line.split()[:3] for line in printed.splitlines()[1:]] == [
        ["a-0", "12_0", "submitted"],
        ["a-1", "12_1", "submitted"],
    ]


def tools(tmp_path: Path, *names: str) -> Path:
    """A folder for PATH with these programs of the system alone."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(f"/usr/bin/{name}")
    return folder


def test_a_run_whose_job_is_in_the_queue_is_not_submitted_again(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = notes(tmp_path / "run", [], job="11")
    answer(slurm, squeue="echo 'RUNNING|None'")
    code, printed = samestep(capsys, "submit", "recipes/lora_sst2.py", f"run_dir={run}")
    assert code == 2
    assert (
        f"job 11 of this run is in the queue (RUNNING); wait for its end, or end it with samestep cancel {run}"
        in printed
    )
    assert "sbatch" not in (slurm / "called").read_text()
    answer(slurm, squeue="exit 0")
    assert samestep(capsys, "submit", "recipes/lora_sst2.py", f"run_dir={run}")[0] == 0


def test_a_queue_that_cannot_be_asked_is_an_error_and_a_job_that_ended_is_not(slurm: Path) -> None:
    assert queue_state("9") == ("", "")
    answer(slurm, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"squeue could not say where job 9 is: .*Unable to contact"):
        queue_state("9")


def test_cancelling_names_the_job_that_it_is_for(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = notes(tmp_path / "run-1", [{"job": "12_1", "log": "job-12-start-000.log"}])
    answer(slurm, squeue="echo 'RUNNING|None'")
    code, printed = samestep(capsys, "cancel", str(run))
    assert (code, "saves and ends" in printed) == (0, True)
    assert (run / JOBS / CANCELLED).read_text() == "12_1"
    assert "scancel --batch --signal=USR1 12_1\n" in (slurm / "called").read_text()


def test_logs_show_what_kept_a_job_from_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = notes(tmp_path / "run", [], job="5")
    code, printed = samestep(capsys, "logs", str(run))
    assert code == 2
    assert "its job 5 has not started yet" in printed
    (run / JOBS / "job-5.out").write_text("error: optim.peek_lr\n")
    assert samestep(capsys, "logs", str(run)) == (0, "error: optim.peek_lr\n")


def test_logs_show_what_kept_a_job_from_starting_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = notes(tmp_path / "run", [{"job": "5", "log": "job-5-start-000.log"}], job="5")
    log = "step 10\nsamestep: stopped\n"
    (run / JOBS / "job-5-start-000.log").write_text(log)
    (run / JOBS / "job-5.out").write_text("module loaded\n" + log)
    assert samestep(capsys, "logs", str(run)) == (0, log)
    (run / JOBS / "job-5.out").write_text("module loaded\n" + log + "error: data.csv is gone\n")
    assert samestep(capsys, "logs", str(run)) == (0, log + "error: data.csv is gone\n")
    assert samestep(capsys, "logs", str(run), "--start", "0") == (0, log)


def test_followed_logs_go_on_with_the_next_start(tmp_path: Path) -> None:
    first = {"job": "5", "log": "job-5-start-000.log"}
    run = notes(tmp_path / "run", [first])
    (run / JOBS / "job-5-start-000.log").write_text("first\n")
    words = [sys.executable, "-m", "launch.cli", "logs", str(run), "--follow"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "first\n"
            (run / JOBS / "job-5-start-001.log").write_text("second\n")
            with (run / JOBS / STARTS).open("a") as file:
                file.write(starts_text([first | {"number": 1, "log": "job-5-start-001.log"}]))
            assert process.stdout.readline() == "second\n"
        finally:
            process.kill()


def test_status_knows_steps_and_time_left_from_the_run_directory(tmp_path: Path) -> None:
    lines = [{"step": 10, "epoch": 0.5, "train/loss": 0.7, "samples_per_s": 40.0}, {"step": 10, "eval/loss": 0.6}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 15, "train/loss": 0.'  # the disk was full
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("train: {num_epochs: 3, max_steps: null, global_batch_size: 8}\n")
    line = last_metrics(tmp_path)
    assert line == lines[0]
    assert total_steps(tmp_path) == 60
    assert time_left(tmp_path, line, 10, 60) == "0:00:10"
