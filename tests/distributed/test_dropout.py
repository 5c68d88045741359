"""Dropout is on from the first step of training, off in evaluation and in parity, and drawn anew on every rank."""

from pathlib import Path
from typing import Any

from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import build_accelerator
from trainer.config import ClassificationData, FullConfig, ModelConfig, ProbeConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.dropout import FastDropout
from trainer.model.load import build_model
from trainer.task import build_task


def watch(folder: Path, probe: bool) -> dict[str, Any]:
    """Run a few steps; for each forward pass, whether dropout was on, and what the model's first dropout let through."""
    config = RunConfig(
        name="t",
        run_dir=folder / ("probed" if probe else "run"),
        model=ModelConfig(source=str(folder / "model"), dropout=0.5),
        method=FullConfig(),
        data=ClassificationData(source=str(folder / "data.csv")),
        train=TrainConfig(max_steps=2, global_batch_size=8, eval_every=2),
        probe=ProbeConfig(folder=folder / "probe", steps=2) if probe else None,
    )
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    seen: dict[str, Any] = {"training": [], "kept": []}
    first = next(module for module in model.modules() if isinstance(module, FastDropout))

    def note(module: FastDropout, args: Any, output: Any) -> None:
        seen["training"].append(module.training)
        seen["kept"].append((output[0, 0] != 0).int().tolist())

    first.register_forward_hook(note)
    Trainer(config, accelerator, model, task).fit()
    return seen


def make(folder: Path) -> Path:
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv")
    return folder


def test_dropout_is_on_from_the_first_step_and_differs_between_ranks(tmp_path: Path) -> None:
    one, other = run_ranks(watch, "ddp", 2, args=(make(tmp_path), False))
    assert one["training"][:2] == [True, True] and not any(one["training"][2:])
    assert 0 in one["kept"][0] and one["kept"][0] != one["kept"][1]
    assert one["kept"][0] != other["kept"][0]


def test_parity_runs_without_dropout(tmp_path: Path) -> None:
    assert not any(run_ranks(watch, "single", 1, args=(make(tmp_path), True))[0]["training"])
