"""Augmented training on real ranks: the same steps on every backend, for any number of ranks and micro-batches."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import build_accelerator
from trainer.config import Augmentation, ClassificationData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.progress import Window
from trainer.task import build_task

NUM_TARGETS, STEPS = 14, 6
"""An epoch of the 56 training sentences is 4 steps."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("augment")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=80)
    (folder / "synonyms.tsv").write_text("film\tstory\nstory\tfilm\tmusic\nlong\tshort\n", encoding="utf-8")
    return folder


def make_config(root: Path, run: Path, *, method: str = "full", micro: int | None = None) -> RunConfig:
    kinds = ("synonyms", "delete", "insert", "swap", "mixup")
    augment = Augmentation(kinds=kinds, probability=0.8, fraction=0.3, synonyms=str(root / "synonyms.tsv"))
    return RunConfig(
        name="augment",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), dropout=0.0, attention_dropout=0.0, head_dropout=0.0),
        method={"name": method},  # type: ignore[arg-type]
        data=ClassificationData(source=str(root / "data.csv"), augment=augment),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(max_steps=STEPS, global_batch_size=NUM_TARGETS, log_every=1, micro_batch_size=micro),
    )


def losses(config: RunConfig) -> list[float]:
    """Loss and gradient norm of every step in turn, into the second epoch; runs on every rank."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, task.label_names, accelerator), task)
    numbers = []
    for _ in range(config.train.max_steps or 0):
        trainer.progress.window = Window()
        trainer.compute_gradients()
        trainer.apply_gradients()
        loss, targets = trainer.engine.sum_over_ranks([float(trainer.progress.window.loss_sum), NUM_TARGETS])
        numbers += [loss / targets * trainer.world_size, trainer.progress.grad_norm]
    trainer.prefetch.close()
    return numbers


@pytest.mark.parametrize("method", ["full", "lora"])
def test_backends_take_the_same_augmented_steps(method: str, root: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    backends = ("single", "ddp", "fsdp", "zero3") if method == "full" else ("single", "fsdp")
    for backend in backends:
        config = make_config(root, tmp_path / backend, method=method, micro=None if backend == "single" else 3)
        world_size = 1 if backend == "single" else 2
        found[backend] = run_ranks(losses, backend, world_size, args=(config,))[0]
    assert len(set(found["single"])) == 2 * STEPS
    for backend in backends[1:]:
        assert found[backend] == pytest.approx(found["single"], rel=2e-4), backend


def train(config: RunConfig, stop_at: int | None) -> list[float]:
    """Losses and metrics that the run's file holds after it; runs on every rank. stop_at: a step after which a stop is asked for."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, task.label_names, accelerator), task)
    if stop_at is not None:
        trainer.stop_seen = lambda: trainer.progress.step == stop_at  # type: ignore[method-assign]
    trainer.fit()
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in lines for name in ("train/loss", "train/grad_norm", "test/loss") if name in line]


def test_a_run_goes_on_with_the_same_forms_on_another_backend(root: Path, tmp_path: Path) -> None:
    whole = run_ranks(train, "single", 1, args=(make_config(root, tmp_path / "whole", method="lora"), None))[0]
    config = make_config(root, tmp_path / "stopped", method="lora")
    first = run_ranks(train, "ddp", 2, args=(config, 4))[0]
    assert len(first) < len(whole) == 2 * STEPS + 1
    assert run_ranks(train, "single", 1, args=(config, None))[0] == pytest.approx(whole, rel=1e-4)
