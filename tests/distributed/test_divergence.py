"""A step whose loss or gradient is not finite, or far too large, on one rank: all ranks stop, skip or roll back alike, and count."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.loop_runs import fit_one, lines_with, make_config, spoil, train
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer import divergence
from trainer.config import RunConfig, TrainConfig
from trainer.divergence import SPIKE_WARM_UP, judge_step
from trainer.errors import DivergedError
from trainer.progress import Progress


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divergence")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


SPOILT = {"nan": (float("nan"), 0.0), "inf": (float("inf"), 0.0)}


def test_a_nonfinite_loss_on_one_rank_raises_on_all_ranks_with_the_step(root: Path, tmp_path: Path) -> None:
    runs = [
        (make_config(root, tmp_path / name), partial(spoil, factor, offset, range(3, 4)))
        for name, (factor, offset) in SPOILT.items()
    ]
    for seen in run_ranks(train, "ddp", args=(runs,)):
        for facts in seen:
            assert facts["error"].startswith("DivergedError: step 3: ")
            assert "train.on_nonfinite=skip" in facts["error"]
            assert facts["restored"]
    for config, _ in runs:
        assert [line["step"] for line in lines_with("train/loss", config.folder)] == [1, 2]


@pytest.mark.parametrize(
    "backend", ["ddp", "fsdp", "zero2", *[pytest.param(b, marks=pytest.mark.slow) for b in ("zero1", "zero3")]]
)
def test_skip_leaves_the_step_out_on_all_ranks(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip")
    for facts in fit_one(config, partial(spoil, *SPOILT["nan"], range(3, 4)), backend=backend):
        assert (facts["error"], facts["num_skipped"], facts["step"]) == (None, 1, 6)
        moved = [not np.array_equal(one, two) for one, two in zip(facts["weights"], facts["weights"][1:], strict=False)]
        assert moved == [True, False, True, True, False]  # of steps 2 to 6; the last one's rate is 0
        assert np.isfinite(facts["weights"][-1]).all()
    lines = lines_with("train/loss", tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]  # no loss of 0.0 for a step that has none
    assert "| skipped steps | 1 |" in (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")


def test_more_skipped_steps_than_allowed_raise_on_all_ranks(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip", max_skipped_steps=2)
    for facts in fit_one(config, partial(spoil, *SPOILT["nan"], range(2, 100))):
        assert facts["error"].startswith("DivergedError: step 4: ")
        assert "train.max_skipped_steps (2)" in facts["error"]


def test_an_infinite_loss_with_a_finite_gradient_is_not_finite_either(root: Path, tmp_path: Path) -> None:
    for facts in fit_one(make_config(root, tmp_path / "run"), partial(spoil, 1.0, float("inf"), range(3, 4))):
        assert (facts["error"] or "").startswith("DivergedError: step 3: ")


def test_the_logged_loss_leaves_skipped_steps_out(root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="skip", log_every=6)
    fit_one(config, partial(spoil, *SPOILT["nan"], range(3, 4)))
    assert [line["train/loss"] is not None for line in lines_with("train/loss", tmp_path / "run")] == [True]


# Rolling back, counting, spikes


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_a_rollback_leaves_the_bad_step_out_on_all_ranks(backend: str, root: Path, tmp_path: Path) -> None:
    config = make_config(root, tmp_path / "run", on_nonfinite="rollback", max_steps=9, save_every=2, eval_every=9)
    for facts in fit_one(config, partial(spoil, *SPOILT["nan"], {6}), backend=backend):
        assert facts["error"] is None
        assert (facts["step"], facts["num_rollbacks"], facts["left_out_steps"]) == (9, 1, [5])
        assert all(np.isfinite(weights).all() for weights in facts["weights"])
    assert [line["step"] for line in lines_with("train/loss", config.folder)] == [1, 2, 3, 4, 5, 7, 8, 9]
    log = (config.folder / "log.txt").read_text(encoding="utf-8")
    assert re.search("step 6: gradient norm (nan|inf); rolled back to step 4", log)


def test_rollbacks_have_a_cap_that_survives_a_restart(root: Path, tmp_path: Path) -> None:
    settings = {"on_nonfinite": "rollback", "max_rollbacks": 2, "max_steps": 9, "save_every": 2, "eval_every": 9}
    config = make_config(root, tmp_path / "run", **settings)
    spoilt = partial(spoil, *SPOILT["nan"], {4, 5, 6})
    for facts in fit_one(config, spoilt):
        assert "DivergedError: step 6" in facts["error"]
        assert "2 rollbacks, as many as train.max_rollbacks allows" in facts["error"]
    for facts in fit_one(config, spoilt):
        assert "2 rollbacks, as many as train.max_rollbacks allows" in facts["error"]  # not counted from 0 again


def test_skipped_steps_are_counted_across_a_restart(root: Path, tmp_path: Path) -> None:
    settings = {"on_nonfinite": "skip", "max_skipped_steps": 2, "max_steps": 9, "save_every": 2, "eval_every": 9}
    config = make_config(root, tmp_path / "run", **settings)
    arguments = ([(config, partial(spoil, *SPOILT["nan"], {2, 5, 7}))],)
    with pytest.raises(AssertionError, match="died or timed out"):
        run_ranks(train, "ddp", 2, args=arguments, environ={"SAMESTEP_FAULT": "step@0:6"})
    for (facts,) in run_ranks(train, "ddp", 2, args=arguments):
        assert "DivergedError: step 7" in facts["error"]
        assert "number 3, more than train.max_skipped_steps (2)" in facts["error"]


POLICIES = ("stop", "skip", "rollback")


def train_warm(runs: list[tuple[RunConfig, Any]]) -> list[dict[str, Any]]:
    """As `train`, but a gradient can be a spike from the fourth step on."""
    divergence.SPIKE_WARM_UP = 3  # in this process, which is a fork of its own
    return train(runs)


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_a_spike_on_one_rank_is_met_by_all_as_the_policy_says(backend: str, root: Path, tmp_path: Path) -> None:
    runs = [
        (
            make_config(
                root, tmp_path / policy, max_steps=8, save_every=2, eval_every=8, on_spike=policy, spike_factor=20
            ),
            partial(spoil, 1e5, 0.0, {6}),
        )
        for policy in POLICIES
    ]
    for seen in run_ranks(train_warm, backend, 2, args=(runs,)):
        stopped, skipped, rolled_back = seen
        assert re.match(
            r"DivergedError: step 6: the gradient norm is .* more than train.spike_factor \(20\)", stopped["error"]
        )
        assert (skipped["error"], skipped["step"], skipped["num_skipped"]) == (None, 8, 1)
        assert np.array_equal(skipped["weights"][4], skipped["weights"][5])
        assert not np.array_equal(skipped["weights"][5], skipped["weights"][6])
        assert (rolled_back["error"], rolled_back["num_rollbacks"], rolled_back["left_out_steps"]) == (None, 1, [5])


def test_a_spike_is_judged_by_the_usual_norm() -> None:
    train_config = TrainConfig(max_steps=1, on_spike="skip", spike_factor=5)
    progress = Progress()
    for _ in range(SPIKE_WARM_UP):
        assert judge_step(progress, 50.0 if progress.num_normal_steps == 3 else 1.0, train_config) == "take"
    assert judge_step(progress, 4.0, train_config) == "take"
    usual = progress.usual_grad_norm
    assert judge_step(progress, 1000.0, train_config) == "skip"
    assert progress.usual_grad_norm == usual  # a spike does not raise the bar for the next
    assert judge_step(Progress(), 1e9, train_config) == "take"
    with pytest.raises(DivergedError, match=r"train\.on_spike=skip"):
        judge_step(progress, 1000.0, train_config.model_copy(update={"on_spike": "stop"}))
