"""Parity's promise and its teeth: all backends take the same steps, and every planted fault is found on every backend it applies to."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.parity import Record, compare, judge, read_record, verdict
from launch.parity_plan import Variant
from tests.rank_pool import BACKENDS, run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import build_accelerator
from trainer.config import (
    ClassificationData,
    FullConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.probe import digest_of, is_hidden
from trainer.task import build_task

BATCH = 24


def make_config(
    root: Path, *, steps: int = 5, micro: int | None = None, method: MethodConfig | None = None
) -> RunConfig:
    return RunConfig(
        name="parity",
        model=ModelConfig(source=str(root / "model")),
        method=method or FullConfig(),
        data=ClassificationData(source=str(root / "data.csv"), validation_fraction=0.1, test_fraction=0),
        optim=OptimConfig(peak_lr=1e-3, max_grad_norm=0.5),
        train=TrainConfig(max_steps=max(steps, 20), global_batch_size=BATCH, micro_batch_size=micro),
        probe=ProbeConfig(folder=root / "unused", steps=steps),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


def record(config: RunConfig, folders: list[Path], faults: list[str | None]) -> None:
    """One probe per fault in the same process group; runs on every rank."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    for folder, fault in zip(folders, faults, strict=True):
        probed = config.model_copy(update={"probe": ProbeConfig(folder=folder, steps=config.probe.steps)})
        torch.manual_seed(0)
        model = build_model(probed, task.label_names, accelerator)
        plain = copy.deepcopy(model)
        accelerator.free_memory()
        trainer = Trainer(probed, accelerator, model, task)
        if fault is not None:
            FAULTS[fault](trainer, plain)
        trainer.fit()


# The planted faults. Each changes a live trainer the way a real mistake would.


def wrong_scale_on_one_rank(trainer: Trainer, plain: torch.nn.Module) -> None:
    if trainer.rank == trainer.world_size - 1:
        trainer.engine.divides_by *= 1.01


def doubled_learning_rate(trainer: Trainer, plain: torch.nn.Module) -> None:
    set_rate = trainer.engine.set_learning_rate
    trainer.engine.set_learning_rate = lambda lr: set_rate(2 * lr)


def swapped_batch(trainer: Trainer, plain: torch.nn.Module) -> None:
    batch_of = trainer.micro_batches_of_step
    trainer.micro_batches_of_step = lambda step: batch_of({1: 2, 2: 1}.get(step, step))


def accumulation_not_divided(trainer: Trainer, plain: torch.nn.Module) -> None:
    loss_sum = trainer.loss_sum
    count = len(trainer.micro_batches_of_step(0))
    trainer.progress.window = type(trainer.progress.window)()
    trainer.loss_sum = lambda batch: loss_sum(batch) * count
    assert count > 1


def dropped_last_micro_batch(trainer: Trainer, plain: torch.nn.Module) -> None:
    batches_of = trainer.micro_batches_of_step
    trainer.micro_batches_of_step = lambda step: batches_of(step)[:-1]


def mean_of_means(trainer: Trainer, plain: torch.nn.Module) -> None:
    """Each micro-batch divides by its own targets, and the means are averaged: what `outputs.loss` and DDP do by themselves."""
    loss_sum = trainer.loss_sum
    shares = len(trainer.micro_batches_of_step(0)) * trainer.world_size
    trainer.progress.window = type(trainer.progress.window)()

    def local_mean(batch: dict[str, Any]) -> torch.Tensor:
        own = max(int((batch["labels"] != -100).sum()), 1)
        of_all = int((~is_hidden(trainer.global_batch(trainer.progress.step))).sum())  # undoes the loop's own division
        return loss_sum(batch) / own * of_all / shares

    trainer.loss_sum = local_mean


def clipping_before_reduction(trainer: Trainer, plain: torch.nn.Module) -> None:
    """Each rank clips its own gradient to the maximum norm before the ranks are summed."""
    loss_sum, limit = trainer.loss_sum, 0.05

    def clipped(batch: dict[str, Any]) -> torch.Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        plain.zero_grad()
        torch.nn.functional.cross_entropy(plain.eval()(**inputs).logits, batch["labels"], reduction="sum").backward()
        gradients = [p.grad for p in plain.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / BATCH
        return loss_sum(batch) * min(1.0, limit / max(norm, 1e-12))

    trainer.loss_sum = clipped


FAULTS = {
    "wrong_scale_on_one_rank": wrong_scale_on_one_rank,
    "doubled_learning_rate": doubled_learning_rate,
    "swapped_batch": swapped_batch,
    "accumulation_not_divided": accumulation_not_divided,
    "dropped_last_micro_batch": dropped_last_micro_batch,
    "mean_of_means": mean_of_means,
    "clipping_before_reduction": clipping_before_reduction,
}


def measure(
    root: Path, backend: str, world_size: int, name: str, faults: list[str | None], **settings: Any
) -> list[Record]:
    folders = [root / f"{name}-{backend}-{world_size}-{fault}" for fault in faults]
    precision = settings.pop("precision", "no")
    run_ranks(record, backend, world_size, args=(make_config(root, **settings), folders, faults), precision=precision)
    return [read_record(f"{backend} x{world_size}", folder) for folder in folders]


@pytest.fixture(scope="module")
def reference(root: Path) -> Record:
    return measure(root, "single", 1, "reference", [None])[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_planted_fault_is_found_and_a_sound_run_is_not(backend: str, root: Path, reference: Record) -> None:
    # a split into micro-batches of 6, so that accumulation faults apply to single too
    faults: list[str | None] = [None, *FAULTS]
    found = measure(root, backend, 1 if backend == "single" else 2, "faults", faults, micro=6)
    verdicts = {fault: verdict(compare(reference, one), None) for fault, one in zip(faults, found, strict=True)}
    assert verdicts.pop(None) == "same"
    assert {fault: word for fault, word in verdicts.items() if word == "same"} == {}


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "single"])
def test_three_processes_and_unequal_splits_take_the_same_step(backend: str, root: Path, reference: Record) -> None:
    for micro in (None, 3):
        found = measure(root, backend, 3, f"split{micro}", [None], micro=micro)[0]
        assert verdict(compare(reference, found), None) == "same"


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "single"])
def test_lora_takes_the_same_step(backend: str, root: Path) -> None:
    lora = LoraConfig(rank=3, alpha=6, dropout=0.1, targets=("query", "value"))
    expected = measure(root, "single", 1, "lora", [None], method=lora)[0]
    found = measure(root, backend, 2, "lora", [None], method=lora)[0]
    assert verdict(compare(expected, found), None) == "same"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_no_farther_from_fp32_than_single_is(backend: str, root: Path, reference: Record) -> None:
    variants = [Variant("single"), Variant("single", precision="bf16"), Variant(backend, 2, precision="bf16")]
    single = measure(root, "single", 1, "bf16", [None], precision="bf16")[0]
    other = measure(root, backend, 1 if backend == "single" else 2, "bf16b", [None], precision="bf16")[0]
    rows = judge(variants, [reference, single, other])
    assert [word for _, _, word in rows] == ["same", "same"]
    assert rows[0][1].gradient > 1e-4  # bf16 did happen


@pytest.mark.slow
def test_losses_agree_over_200_steps(root: Path) -> None:
    expected = measure(root, "single", 1, "long", [None], steps=200)[0]
    for backend in BACKENDS[1:]:
        found = measure(root, backend, 2, "long", [None], steps=200)[0]
        assert compare(expected, found).loss < 1e-5, backend


def test_learning_rate_does_not_depend_on_the_number_of_processes(root: Path, reference: Record) -> None:
    for world_size in (2, 3):
        found = measure(root, "ddp", world_size, "lr", [None])[0]
        assert found.series("lr") == reference.series("lr")
    assert len(set(reference.series("lr"))) > 1


def test_ranks_hold_unequal_numbers_of_targets(root: Path) -> None:
    found = measure(root, "ddp", 2, "targets", [None])[0]
    assert any(len(set(step["targets_per_rank"])) > 1 for step in found.facts["steps"])


def test_a_quarter_of_the_labels_is_hidden_and_shares_of_ids_in_a_row_differ() -> None:
    hidden = is_hidden(np.arange(16_000))
    assert hidden.mean() == pytest.approx(0.25, abs=0.01)
    per_share = hidden.reshape(-1, 2, 16).sum(axis=2)  # two ranks of 16 rows each, as packed rows in order
    assert (per_share[:, 0] != per_share[:, 1]).mean() > 0.7


def test_weights_digest_tells_values_apart_but_not_the_sign_of_zero() -> None:
    assert digest_of({"a": torch.tensor([0.0, 1.0])}) == digest_of({"a": torch.tensor([-0.0, 1.0])})
    assert digest_of({"a": torch.tensor([0.0, 1.0])}) != digest_of({"a": torch.tensor([1e-38, 1.0])})
    assert digest_of({"a": torch.tensor([0.0])}) != digest_of({"b": torch.tensor([0.0])})


def test_a_different_start_or_a_missing_tensor_is_no_parity(reference: Record) -> None:
    changed = Record("x", reference.facts | {"weights_before": "other"}, reference.tensors)
    assert "starting weights differ" in verdict(compare(reference, changed), None)
    fewer = Record("x", reference.facts, dict(list(reference.tensors.items())[1:]))
    assert math.isinf(compare(reference, fewer).gradient)
