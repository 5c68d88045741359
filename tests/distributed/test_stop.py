"""A request to stop, by file or by signal to one rank: all ranks end at one step, with a checkpoint."""

import json
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.distributed.loop_runs import (
    after_step,
    fit_one,
    lines_with,
    make_config,
    signal_last_rank,
    touch_stop_file,
    train,
)
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.store import describe_damage
from trainer.loop import Trainer
from trainer.stop import END_TIME, SPARE_S, STOP_FILE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


def test_a_request_to_stop_ends_all_ranks_at_one_step_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    asked: dict[str, Callable[[Trainer], None]] = {
        "file": touch_stop_file,
        "usr1": partial(signal_last_rank, signal.SIGUSR1),
        "term": partial(signal_last_rank, signal.SIGTERM),
    }
    runs = [
        (make_config(root, tmp_path / name, max_steps=50, eval_every=50), partial(after_step, 3, act))
        for name, act in asked.items()
    ]
    for number, by_rank in enumerate(zip(*run_ranks(train, "ddp", args=(runs,)), strict=True)):
        run = runs[number][0].folder
        assert [facts["step"] for facts in by_rank] == [4, 4], (
            run.name
        )  # the flags are summed with the next step's targets
        assert all(facts["restored"] and facts["error"] is None for facts in by_rank)
        assert [
            line["step"] for line in lines_with("eval/loss", run)
        ] == []  # the machine may be about to be taken away
        assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000004"]
        assert json.loads((run / "outcome.json").read_text()) == {"outcome": "stopped", "step": 4}
        assert "stopped on request after step 4" in (run / "log.txt").read_text(encoding="utf-8")
        assert not (run / STOP_FILE).exists()


@pytest.mark.slow
def test_a_run_saves_and_ends_before_its_jobs_end_without_a_signal(root: Path, tmp_path: Path) -> None:
    """It knows when the job ends, and how long its steps and saves take; on both ranks at one step."""
    config = make_config(root, tmp_path / "run", max_steps=10**6, eval_every=10**6, save_every=20)
    end = time.time() + SPARE_S + 10
    seen = run_ranks(train, "ddp", 2, args=([(config, None)],), environ={END_TIME: str(int(end))})
    assert time.time() < end
    (step,) = {facts["step"] for (facts,) in seen}
    assert step > 20  # so that a save has been timed
    assert json.loads((config.folder / "outcome.json").read_text()) == {"outcome": "stopped", "step": step}
    newest = sorted((config.folder / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{step:08d}"
    assert describe_damage(newest) is None


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_sharded_backends_too(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", max_steps=50, eval_every=2)
    change = partial(after_step, 2, partial(signal_last_rank, signal.SIGUSR1))
    assert [facts["step"] for facts in fit_one(config, change, backend=backend)] == [3, 3]
    assert "step-00000003" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
