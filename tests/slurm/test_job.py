"""What is decided around a start: whether there is another one, when time runs out. No Slurm needed."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cli import main
from launch.job import decide
from launch.starts import CANCELLED, JobStart, newest_step, note_start, outcome_of, read_starts
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.resume import OUTCOME, read_outcome
from trainer.checkpoint.store import CHECKPOINTS, step_name
from trainer.config import RunConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.log import start_run_folder
from trainer.run_folder import JOBS
from trainer.stop import END_TIME, SPARE_S, STOP_FILE, Deadline, StopRequest

START = JobStart(job="7", number=0, step=0, nodes=2, began=0.0, checkpoint_bytes=0.0, log="x.log")


def make_run(folder: Path, *, outcome: str | None, step: int) -> Path:
    """A run directory as training leaves it."""
    (folder / JOBS).mkdir(parents=True)
    if outcome:
        (folder / OUTCOME).write_text(json.dumps({"outcome": outcome, "step": step}))
    if step:
        checkpoint = folder / CHECKPOINTS / step_name(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("outcome", "step", "number", "before", "state", "verdict"),
    [
        ("finished", 10, 0, 0, "RUNNING", "finished"),
        ("finished", 10, 30, 10, "CANCELLED", "finished"),
        ("stopped", 5, 0, 0, "RUNNING", "requeue"),
        ("stopped", 5, 3, 4, "TIMEOUT", "requeue"),
        ("stopped", 5, 3, 4, "CANCELLED", "cancelled"),  # scancel
        ("failed", 5, 0, 0, "RUNNING", "failed"),  # diverged
        (None, 0, 0, 0, "RUNNING", "requeue"),  # killed before its first checkpoint: perhaps the node's fault
        (None, 0, 1, 0, "RUNNING", "stuck"),
        (None, 6, 2, 6, "NODE_FAIL", "stuck"),
        (None, 6, 2, 4, "NODE_FAIL", "requeue"),
        (None, 4, 2, 6, "RUNNING", "requeue"),  # begun anew
        (None, 6, 20, 4, "RUNNING", "stuck"),  # the cap
    ],
)
def test_what_training_left_decides_whether_there_is_another_start(
    outcome: str | None, step: int, number: int, before: int, state: str, verdict: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", outcome=outcome, step=step)
    assert newest_step(run) == step
    starts = [replace(START, number=number, step=before, began=time.time() + 60)]  # after the checkpoints were written
    found, why = decide(run, starts, max_restarts=20, job_state=state)
    assert found == verdict, why
    (run / JOBS / CANCELLED).write_text("6")  # another job
    assert decide(run, starts, max_restarts=20, job_state=state) == (found, why)
    (run / JOBS / CANCELLED).write_text("7")
    found, why = decide(run, starts, max_restarts=20, job_state=state)
    assert found == ("finished" if outcome == "finished" else "cancelled"), why


def test_a_damaged_checkpoint_that_was_written_again_is_progress(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outcome=None, step=6)
    again = replace(START, number=2, step=6, began=time.time() - 60)
    assert decide(run, [again], max_restarts=20, job_state="NODE_FAIL")[0] == "requeue"


@pytest.mark.parametrize(
    ("before", "number", "verdict"),
    [
        (4, 2, "requeue"),  # the start before it had come from step 4 to 6
        (6, 2, "stuck"),  # that one had made no progress either
        (4, 20, "stuck"),  # the cap
    ],
)
def test_a_restart_on_nodes_that_are_not_ready_is_put_back_unless_the_one_before_it_brought_nothing(
    before: int, number: int, verdict: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", outcome=None, step=6)
    now = time.time() + 60  # after the checkpoint was written
    starts = [replace(START, number=number - 1, step=before), replace(START, number=number, step=6, began=now)]
    found, why = decide(run, starts, max_restarts=20, job_state="RUNNING", has_trained=False)
    assert found == verdict, why
    assert decide(run, starts, max_restarts=20, job_state="RUNNING")[0] == "stuck"


def test_a_torn_line_hides_no_other_start(tmp_path: Path) -> None:
    first = note_start(tmp_path, 1.0, {"SLURM_JOB_ID": "30"})
    file = tmp_path / JOBS / "starts.jsonl"
    file.write_bytes(file.read_bytes() + b'{"job": "31", "number\x00\x00')
    second = note_start(tmp_path, 1.0, {"SLURM_JOB_ID": "32"})
    assert read_starts(tmp_path) == [first, second]
    file.write_bytes(b"\x00\x00")
    assert read_starts_or_none(tmp_path) is None


def test_a_start_is_noted_and_read_back(tmp_path: Path) -> None:
    environ = {"SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NUM_NODES": "4"}
    run = make_run(tmp_path / "run", outcome=None, step=9)
    assert read_starts_or_none(run) is None
    first = note_start(run, 100.0, {"SLURM_JOB_ID": "30"})
    second = note_start(run, 100.0, environ)
    assert (first.job, first.number, first.nodes) == ("30", 0, 1)
    assert (second.job, second.number, second.step, second.nodes) == ("31", 2, 9, 4)
    assert read_starts(run) == [first, second]
    assert first.git == second.git
    assert len((first.git or "").removesuffix("-dirty")) == 40
    line = (run / JOBS / "starts.jsonl").read_text().splitlines()[0]
    older = {name: value for name, value in json.loads(line).items() if name != "git"}
    (run / JOBS / "starts.jsonl").write_text(json.dumps(older) + "\n")
    assert read_starts(run) == [replace(first, git=None)]


def test_a_task_of_an_array_goes_by_its_own_id_and_logs_by_the_one_that_no_other_task_has(tmp_path: Path) -> None:
    environ = {"SLURM_JOB_ID": "40", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
    start = note_start(tmp_path, 1.0, environ)
    assert (start.job, start.log) == ("40_2", "job-40-start-000.log")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments for `job begin` of a tiny run."""
    tiny_bert(tmp_path / "model")
    tiny_sentences(tmp_path / "data.csv", rows=32)
    recipe = tmp_path / "loud.py"
    recipe.write_text("print('a recipe that prints')\n" + Path("recipes/lora_sst2.py").read_text())
    settings = {"run_dir": tmp_path / "run", "model.source": tmp_path / "model", "data.source": tmp_path / "data.csv"}
    return [str(recipe), *(f"{name}={value}" for name, value in settings.items())]


def begin(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["job", "begin", "1", *words])
    assert not ended.value.code


def test_a_job_begins_with_three_lines_and_without_what_earlier_starts_left(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = make_run(tmp_path / "run", outcome="failed", step=0)
    (run / STOP_FILE).touch()
    (run / JOBS / CANCELLED).write_text("6")
    begin(*words)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        str(run),
        str(run / JOBS / "job-7-start-000.log"),
        str(Path("accelerate_configs/single.yaml").resolve()),
    ]
    assert "a recipe that prints" in printed.err
    assert decide(run, read_starts(run), max_restarts=9, job_state="RUNNING")[0] == "requeue"  # it has not failed
    assert not (run / STOP_FILE).exists()
    assert (run / JOBS / CANCELLED).read_text() == "6"

    (run / JOBS / CANCELLED).write_text("7")  # cancelled while it starts
    (run / OUTCOME).write_text(json.dumps({"outcome": "finished", "step": 9}))
    begin(*words)
    assert (run / OUTCOME).exists()  # there is nothing to do, so nothing will write it again
    assert (run / STOP_FILE).exists()
    assert decide(run, read_starts(run)[:1], max_restarts=9, job_state="RUNNING")[0] == "finished"
    (run / OUTCOME).unlink()
    assert decide(run, read_starts(run)[:1], max_restarts=9, job_state="RUNNING")[0] == "cancelled"


def test_an_outcome_stays_with_the_run_that_is_moved_aside_and_is_not_that_of_the_new_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = make_run(tmp_path / "run", outcome="finished", step=9)
    (run / "config.yaml").touch()
    begin(*words, "train.resume=never")
    starts = read_starts(run)
    assert (outcome_of(run, starts[-1]), read_outcome(run)) == (None, "finished")
    assert decide(run, starts, max_restarts=9, job_state="RUNNING")[0] == "requeue"  # died before it trained
    moved = start_run_folder(run)
    assert moved is not None
    assert read_outcome(moved) == "finished"
    (run / OUTCOME).write_text(json.dumps({"outcome": "failed", "step": 1}))
    assert decide(run, starts, max_restarts=9, job_state="RUNNING")[0] == "failed"


def test_what_an_earlier_start_left_is_gone_where_the_run_continues(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = make_run(tmp_path / "run", outcome="failed", step=9)
    begin(*words)
    assert not (run / OUTCOME).exists()


def read_starts_or_none(run: Path) -> list[JobStart] | None:
    try:
        return read_starts(run)
    except ConfigError:
        return None


def test_what_jobs_left_stays_where_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outcome="finished", step=0)
    note_start(run, 0.0, {})
    assert start_run_folder(run / "other") is None
    (run / "config.yaml").touch()
    (run / STOP_FILE).touch()  # asked for before the run began
    moved = start_run_folder(run)
    assert moved is not None
    assert not (moved / JOBS).exists()
    assert (run / STOP_FILE).exists()
    assert (moved / "config.yaml").exists()
    assert len(read_starts(run)) == 1
    assert start_run_folder(tmp_path / "run") == tmp_path / "run.2"  # it holds a log by now
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / STOP_FILE).touch()
    assert start_run_folder(tmp_path / "new") is None
    assert (tmp_path / "new" / STOP_FILE).exists()


def test_a_run_stops_while_there_is_time_for_a_step_and_a_save() -> None:
    deadline = Deadline({"SAMESTEP_END_TIME": "1000"}, save_s=lambda: 20.0)
    needed = SPARE_S + 2 * 20.0 + 2 * 5.0
    assert not deadline.is_near(900.0)
    assert not deadline.is_near(905.0)  # a step takes 5 s
    assert not deadline.is_near(909.0)
    assert not deadline.is_near(914.0)
    for now in range(919, 1000):
        assert deadline.is_near(float(now)) == (now + needed > 1000)
    restored = Deadline({"SAMESTEP_END_TIME": "1000"}, save_s=lambda: 20.0)
    assert not restored.is_near(700.0)
    restored.forget()  # a restore of 200 s, which is no step
    assert not restored.is_near(900.0)
    assert not Deadline({}, save_s=lambda: 1.0).is_near(math.inf)
    assert not Deadline({"SAMESTEP_END_TIME": "soon"}, save_s=lambda: 1.0).is_near(1e12)


def test_a_run_asks_to_stop_when_its_jobs_end_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(name="r", run_dir=tmp_path, train=TrainConfig(num_epochs=3))
    for seconds, is_near in ((3600, False), (SPARE_S - 1, True)):
        monkeypatch.setenv(END_TIME, str(int(time.time() + seconds)))
        request = StopRequest(config, is_main=True)
        assert request.seen() == is_near
        request.close()
