"""recipes/pretrain_clm.py itself: killed mid-epoch and started again on other numbers of ranks, it reads and learns as one run would."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from launch.preflight import load_recipe
from tests.distributed.resume_runs import metrics_of
from tests.rank_pool import run_ranks
from tests.tiny import tiny_llama, tiny_tokens
from trainer.task import Task

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pretrain_clm.py"
NUM_STEPS, BATCH = 10, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny_llama(folder / "model")
    for number, documents in enumerate((120, 60, 20)):
        tiny_tokens(folder / f"tokens-{number}", documents, seed=number)
    return folder


def settings_of(root: Path, run: Path) -> list[str]:
    """Two mixed sources, packed, every step logged, a checkpoint every second one."""
    data = f"data.sources={root}/tokens-0,{root}/tokens-1 data.weights=3,1 data.validation={root}/tokens-2"
    shape = f"model.source={root}/model data.sequence_length=48 data.max_epochs=4 data.cache={root}/cache"
    train = f"train.max_steps={NUM_STEPS} train.global_batch_size={BATCH} train.log_every=1 train.save_every=2"
    return [*f"{data} {shape} {train} train.eval_every=5 run_dir={run}".split(), "optim.peak_lr=1e-2"]


def run_noted(settings: list[str], notes: Path) -> None:
    """The recipe on this rank; what is read is noted at once, so that a kill leaves it. Runs on every rank."""
    recipe = load_recipe(RECIPE)
    build = recipe.build_task

    def build_noted(*arguments: Any) -> Task:
        task: Task = build(*arguments)
        read = task.training_batch

        def training_batch(ids: np.ndarray) -> dict[str, Tensor]:
            batch = read(ids)
            rows = {name: tensor.tolist() for name, tensor in batch.items()}
            with (notes / f"{os.environ.get('RANK', 0)}.jsonl").open("a") as file:
                file.write(
                    json.dumps([{name: rows[name][n] for name in rows} | {"id": i} for n, i in enumerate(ids.tolist())])
                    + "\n"
                )
            return batch

        task.training_batch = training_batch  # type: ignore[method-assign]
        return task

    recipe.build_task = build_noted
    recipe.run_recipe(recipe.main, recipe.DEFAULTS, settings)


def part(root: Path, run: Path, place: tuple[str, int], fault: str = "") -> list[dict[int, Any]]:
    """One start on (backend, ranks); by rank, the samples that it read."""
    notes = run.with_name(f"{run.name}-{'-'.join(map(str, place))}-{bool(fault)}")
    notes.mkdir(parents=True)
    environ = {"SAMESTEP_FAULT": fault} if fault else {}
    try:
        run_ranks(run_noted, *place, args=(settings_of(root, run), notes), environ=environ)
    except AssertionError as error:
        if not fault or "died or timed out" not in str(error):
            raise
    lines = [(notes / f"{rank}.jsonl").read_text().split("\n")[:-1] for rank in range(place[1])]  # the last may be cut
    return [{row.pop("id"): row for line in of_rank for row in json.loads(line)} for of_rank in lines]


def whole_steps(seen: list[dict[int, Any]]) -> list[int]:
    """Steps of which every sample was read, none by two ranks."""
    ids = [number for of_rank in seen for number in of_rank]
    assert len(ids) == len(set(ids))
    return [step for step in range(NUM_STEPS) if set(range(step * BATCH, (step + 1) * BATCH)) <= set(ids)]


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> tuple[Path, dict[int, Any]]:
    (seen,) = part(root, root / "whole", ("single", 1))
    return root / "whole", seen


@pytest.mark.parametrize("backend", ["fsdp", *[pytest.param(b, marks=pytest.mark.slow) for b in ("ddp", "zero2")]])
def test_killed_on_two_ranks_and_resumed_on_one_and_then_three(
    backend: str, root: Path, tmp_path: Path, uninterrupted: tuple[Path, dict[int, Any]]
) -> None:
    run, (whole, expected) = tmp_path / "run", uninterrupted
    parts = [
        part(root, run, (backend, 2), fault="step@1:6"),
        part(root, run, ("single", 1), fault="step@0:6"),
        part(root, run, (backend, 3)),
    ]
    for seen in parts:
        for of_rank in seen:
            for number, row in of_rank.items():
                assert number >= NUM_STEPS * BATCH or row == expected[number]  # one step is read ahead
    assert whole_steps(parts[0])[:5] == [0, 1, 2, 3, 4]
    steps = [[step for step in whole_steps(seen) if step > 1] for seen in parts]  # the first settle a resumed engine
    assert steps[1][0] in (2, 4), "it began with a checkpoint"
    assert steps[1][0] < steps[2][0], "and so did the next, with a later one"
    for one in steps:
        assert one == list(range(one[0], one[-1] + 1))
    assert {step for one in steps for step in one} == set(range(2, NUM_STEPS))
    lines = metrics_of(run)
    assert len(lines) == len(metrics_of(whole)) > NUM_STEPS
    for line, wanted in zip(lines, metrics_of(whole), strict=True):
        assert line.keys() == wanted.keys()
        assert line == pytest.approx(wanted, rel=1e-5, abs=1e-9)
