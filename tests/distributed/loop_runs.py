"""What the tests of the loop share: a small training without dropout on real ranks, one line of metrics per step, changed as it runs."""

import json
import os
import signal
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator
from trainer.config import ClassificationData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.errors import SamestepError
from trainer.evaluate import evaluate_logits
from trainer.loop import Trainer
from trainer.loss import classification_loss_sum
from trainer.model.load import build_model
from trainer.stop import SIGNALS, STOP_FILE
from trainer.task import build_task, targets

BATCH, STEPS_PER_EPOCH = 16, 7  # 112 of the 160 sentences are trained on


def make_config(root: Path, run_dir: Path, *, method: str = "lora", **train: Any) -> RunConfig:
    """Without dropout, so that numbers can be compared; one line of metrics per step."""
    length = {} if "num_epochs" in train else {"max_steps": 6}
    return RunConfig(
        name="loop",
        run_dir=run_dir,
        model=ModelConfig(source=str(root / "model"), dropout=0.0, attention_dropout=0.0, head_dropout=0.0),
        method={"name": method},  # type: ignore[arg-type]
        data=ClassificationData(source=str(root / "data.csv")),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(**({"global_batch_size": BATCH, "log_every": 1} | length | train)),
    )


Change = Callable[[Trainer], None]


def train(runs: list[tuple[RunConfig, Change | None]]) -> list[dict[str, Any]]:
    """One training after the other in one process group; runs on every rank. What this rank saw of each."""
    accelerator = build_accelerator(runs[0][0])
    handlers = [signal.getsignal(number) for number in SIGNALS]
    seen = []
    for config, change in runs:
        task = build_task(config, accelerator)
        model = build_model(config, task.label_names, accelerator)
        accelerator.free_memory()
        trainer = Trainer(config, accelerator, model, task)
        written = writes_below(config.folder)
        targets.classification_loss_sum = classification_loss_sum
        if change is not None:
            change(trainer)
        error = None
        try:
            trainer.fit()
        except SamestepError as raised:
            error = f"{type(raised).__name__}: {raised}"
        facts = vars(trainer.progress.counters())
        facts |= {"error": error, "written": list(written), "validation": task.data.validation}
        facts |= {"restored": [signal.getsignal(number) for number in SIGNALS] == handlers}
        seen.append(facts | getattr(trainer, "noted", {}))
    return seen


def writes_below(folder: Path) -> list[str]:
    """A list that grows with what this process makes, opens for writing, renames or removes in `folder`."""
    written: list[str] = []
    changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate", "os.symlink"}

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in changing) and str(arguments[0]).startswith(str(folder)):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(notice)
    return written


def fit_one(config: RunConfig, change: Change | None = None, *, backend: str = "ddp", ranks: int = 2) -> list[Any]:
    return [seen[0] for seen in run_ranks(train, backend, ranks, args=([(config, change)],))]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def lines_with(key: str, run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if key in line]


def assert_reported(run: Path) -> None:
    """The run ended as a whole run ends."""
    for name in ("config.yaml", "log.txt", "curves.png", "confusion.png", "summary.md", "model/samestep.json"):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()
    assert read_metrics(run)[-1]["test/count"] == 24


# Changes of a live trainer, on every rank


def after_step(number: int, act: Callable[[Trainer], None], trainer: Trainer) -> None:
    """Call `act` once, when this rank has taken step `number`."""
    take_step = trainer.train_step

    def step_and_act() -> None:
        take_step()
        if trainer.progress.step == number:
            act(trainer)

    trainer.train_step = step_and_act  # type: ignore[method-assign]


def note_mode(trainer: Trainer) -> None:
    """Note for each step whether dropout would act in it."""
    loss_sum = trainer.loss_sum
    trainer.noted = {"modes": []}  # type: ignore[attr-defined]

    def and_note(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        trainer.noted["modes"].append(all(module.training for module in trainer.engine.model.modules()))  # type: ignore[attr-defined]
        return loss_sum(batch)

    trainer.loss_sum = and_note  # type: ignore[method-assign]


def signal_last_rank(number: signal.Signals, trainer: Trainer) -> None:
    if trainer.rank == trainer.world_size - 1:
        os.kill(os.getpid(), number)


def touch_stop_file(trainer: Trainer) -> None:
    if trainer.rank == 0:
        (trainer.config.folder / STOP_FILE).touch()


def spoil(factor: float, offset: float, steps: Container[int], trainer: Trainer) -> None:
    """Make the loss of these 1-based steps `factor * loss + offset` on the last rank; note the weights after each step."""
    take_step = trainer.train_step
    trainer.noted = {"weights": []}  # type: ignore[attr-defined]

    def spoilt(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hit = trainer.rank == trainer.world_size - 1 and trainer.progress.step + 1 in steps
        loss = classification_loss_sum(logits, labels)
        return loss * factor + offset if hit else loss

    def step_and_note() -> None:
        take_step()
        weights = [tensor.cpu().numpy().ravel().copy() for _, tensor in trainer.engine.weights(trainable_only=True)]
        trainer.noted["weights"].append(np.concatenate(weights))  # type: ignore[attr-defined]

    targets.classification_loss_sum = spoilt  # in this process until the next training
    trainer.train_step = step_and_note  # type: ignore[method-assign]


def ruin_after(number: int, trainer: Trainer) -> None:
    """A learning rate that ruins the weights after 1-based step `number`; note what the engine predicted at the best step."""
    trainer.lr_of_step = lambda step: 1e-2 if step < number else 1.0  # type: ignore[method-assign]
    evaluate_and_keep_best = trainer.evaluate_and_keep_best
    trainer.noted = {}  # type: ignore[attr-defined]

    def and_note() -> None:
        evaluate_and_keep_best()
        if trainer.progress.best_step == trainer.progress.step:
            engine, split = trainer.engine, trainer.task.data.validation
            engine.model.eval()
            trainer.noted["logits"] = evaluate_logits(engine.forward, trainer.task.data, split, engine, batch_size=5)  # type: ignore[attr-defined]
            engine.model.train()

    trainer.evaluate_and_keep_best = and_note  # type: ignore[method-assign]
