"""fp16's loss scale: halved by an overflow, whose step moves nothing; doubled by good steps; the gradient never notices."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_precision import BATCH, distance, small_model
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import Engine, build_accelerator, build_engine
from trainer.backend.engine import LOSS_SCALE_GROWTH_EVERY
from trainer.config import ClassificationData, FullConfig, ModelConfig, RunConfig, TrainConfig
from trainer.data.batches import rank_share
from trainer.loop import Trainer
from trainer.loss import classification_loss_sum
from trainer.model.load import build_model
from trainer.task import build_task

TOO_HIGH = 2.0**60


def step_of(engine: Engine) -> dict[str, Any]:
    """One step on the same batch each time, as the loop takes it: what the engine held before and after."""
    before = whole(engine.weights(trainable_only=True))
    scale = engine.loss_scale
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1, 200, (BATCH, 12), generator=generator), torch.arange(BATCH) % 2
    part = torch.from_numpy(rank_share(np.arange(BATCH), engine.rank, engine.world_size))
    with engine.micro_batch(last=True):
        logits = engine.forward({"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part])}).logits
        engine.backward(classification_loss_sum(logits, labels[part]) / BATCH)
    norm = engine.grad_norm()
    gradients = whole(engine.gradients())
    engine.step(norm, 1.0) if np.isfinite(norm) else engine.discard()
    moved = distance({"w": whole(engine.weights(trainable_only=True))}, {"w": before}, "w")
    return {"norm": norm, "gradients": gradients, "moved": moved, "scales": (scale, engine.loss_scale)} | {
        "optimizer_steps": engine.optimizer_steps
    }


def whole(tensors: Any) -> dict[str, np.ndarray]:
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in tensors}


def run() -> list[dict[str, Any]]:
    """A scale that overflows, a good one, and one that is about to grow; runs on every rank."""
    config = RunConfig(name="t", train=TrainConfig(max_steps=4, global_batch_size=BATCH))
    accelerator = build_accelerator(config)
    model = small_model("bert")
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters(), lr=1e-6))
    steps = []
    for scale, good_steps in ((TOO_HIGH, 0), (2.0**10, 0), (2.0**10, LOSS_SCALE_GROWTH_EVERY - 1), (None, 0)):
        if scale is not None:
            engine.restore_loss_scale(scale, good_steps)
        steps.append(step_of(engine))
    return steps


@pytest.mark.parametrize("backend", ["single", "fsdp", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_an_overflow_halves_the_scale_and_moves_nothing_and_good_steps_double_it(backend: str) -> None:
    for overflowed, good, grown, after in run_ranks(
        run, backend, 1 if backend == "single" else 2, precision="fp16", timeout_s=60
    ):
        assert not np.isfinite(overflowed["norm"]) and overflowed["moved"] == 0
        assert overflowed["scales"] == (TOO_HIGH, TOO_HIGH / 2)
        assert good["scales"] == (2.0**10, 2.0**10) and good["moved"] > 0
        assert grown["scales"] == (2.0**10, 2.0**11) and after["scales"] == (2.0**11, 2.0**11)
        assert [step["optimizer_steps"] for step in (overflowed, good, grown, after)] == [0, 1, 2, 3]
        for step in (grown, after):  # weights hardly move at this learning rate
            assert step["norm"] == pytest.approx(good["norm"], rel=0.01)
            assert distance(step, good, "gradients") < 0.02


def lowest() -> float:
    """The scale after a restore from the lowest one that halving reaches."""
    config = RunConfig(name="t", train=TrainConfig(max_steps=1, global_batch_size=BATCH))
    accelerator = build_accelerator(config)
    model = small_model("bert")
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters()))
    assert engine.loss_scale > 1.0
    engine.restore_loss_scale(None, 0)  # of a checkpoint in another precision
    assert engine.loss_scale > 1.0
    engine.restore_loss_scale(1.0, 0)
    return engine.loss_scale


def test_a_scale_that_was_halved_to_1_is_restored_too() -> None:
    assert run_ranks(lowest, "single", 1, precision="fp16") == [1.0]


def train_until_taken(folder: Path) -> dict[str, Any]:
    """The loop from a scale that overflows a few times; runs on every rank."""
    config = RunConfig(
        name="t",
        run_dir=folder / "run",
        model=ModelConfig(source=str(folder / "model"), dropout=0.0, attention_dropout=0.0, head_dropout=0.0),
        method=FullConfig(),
        data=ClassificationData(source=str(folder / "data.csv")),
        train=TrainConfig(max_steps=40, global_batch_size=8),
    )
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, task.label_names, accelerator), task)
    seen = []
    with ExitStack() as opened:
        trainer.begin(opened)
        trainer.engine.restore_loss_scale(2.0**26, 0)
        while trainer.engine.optimizer_steps == 0:
            trainer.train_step()
            seen.append(
                (trainer.progress.grad_norm, trainer.engine.loss_scale, float(trainer.progress.window.loss_sum))
            )
    return {"seen": seen, "step": trainer.progress.step, "num_skipped": trainer.progress.num_skipped}


@pytest.mark.parametrize("backend", ["single", "zero2"])
def test_the_loop_leaves_out_overflows_and_counts_none_as_a_bad_step(backend: str, tmp_path: Path) -> None:
    """train.on_nonfinite stops by default, which a scale that is too high does not."""
    tiny_bert(tmp_path / "model")
    tiny_sentences(tmp_path / "data.csv")
    for found in run_ranks(
        train_until_taken, backend, 1 if backend == "single" else 2, args=(tmp_path,), precision="fp16"
    ):
        *overflows, taken = found["seen"]
        assert 1 <= len(overflows) < 20 and np.isfinite(taken[0])
        for number, (norm, scale, loss_sum) in enumerate(overflows, 1):
            assert not np.isfinite(norm) and scale == 2.0 ** (26 - number)
            assert loss_sum == 0.0  # taken out of the next log line
        assert taken[1] == overflows[-1][1] and taken[2] > 0
        assert (found["step"], found["num_skipped"]) == (len(found["seen"]), 0)
