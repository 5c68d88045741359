"""A device that has no room for the test at the end of a run: the run is finished all the same, and says what is missing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resume_runs import make_config, metrics_of, train
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer import output
from trainer.config import RunConfig
from trainer.task.classification import ClassificationTask


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


def without_room(where: str, config: RunConfig) -> dict[str, Any]:
    """Rank 1 has no room for the exported model, for its forward passes, or rank 0 for the samples."""
    opened, draw = output.load_exported, ClassificationTask.write_report

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    def opened_without_room(folder: Path) -> Any:
        model, *rest = opened(folder)
        if os.environ["RANK"] == "1" and where == "model":
            model.to = refuse
        if os.environ["RANK"] == "1" and where == "forward":
            model.forward = refuse
        return model, *rest

    output.load_exported = opened_without_room
    ClassificationTask.write_report = refuse if where == "samples" else draw  # type: ignore[assignment,method-assign]
    return train(config)


@pytest.mark.parametrize("where", ["model", "forward"])
def test_a_test_without_room_on_one_rank_ends_a_run_that_counts_as_finished(
    where: str, root: Path, tmp_path: Path
) -> None:
    config = make_config(root, tmp_path / "run", max_steps=2)
    for facts in run_ranks(without_room, "ddp", 2, args=(where, config)):
        assert "training is finished and the model is whole, but it was not tested" in str(facts["error"])
    assert json.loads((config.folder / "outcome.json").read_text()) == {"outcome": "finished", "step": 2}


def test_samples_without_room_leave_a_run_finished_and_tested(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", max_steps=2)
    for facts in run_ranks(without_room, "ddp", 2, args=("samples", config)):
        assert facts["error"] is None
    assert json.loads((config.folder / "outcome.json").read_text()) == {"outcome": "finished", "step": 2}
    assert "samples were not written" in (config.folder / "log.txt").read_text(encoding="utf-8")
    assert "test/loss" in metrics_of(config.folder)[-1]
