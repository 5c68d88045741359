"""What the tests of resuming share: a small training with dropout on real ranks, started, killed, started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.store import list_checkpoints
from trainer.config import ClassificationData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.errors import AlreadyFinished, SamestepError
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.task import build_task

NUM_STEPS = 9
"""Of a run: 7 steps are an epoch of the 112 sentences that are trained on, in batches of 16."""


def make_config(root: Path, run: Path, *, method: str = "full", **train: Any) -> RunConfig:
    """Dropout everywhere, three parameter groups, a checkpoint every second step, a line of metrics every third."""
    settings = {"max_steps": NUM_STEPS, "global_batch_size": 16, "log_every": 3, "save_every": 2, "eval_every": 4}
    return RunConfig(
        name="resume",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), dropout=0.1, attention_dropout=0.1, head_dropout=0.1),
        method={"name": method},  # type: ignore[arg-type]
        data=ClassificationData(source=str(root / "data.csv")),
        optim=OptimConfig(peak_lr=5e-3, head_lr=1e-2),
        train=TrainConfig(**(settings | train)),
    )


def train(config: RunConfig) -> dict[str, Any]:
    """One start of the recipe on this rank; what it saw, errors of the user included."""
    facts: dict[str, Any] = {"error": None, "losses": {}, "ids": {}, "rows": {}}
    try:
        accelerator = build_accelerator(config)
        task = build_task(config, accelerator)
        ids = getattr(task, "special_ids", None)
        model = build_model(config, task.label_names, accelerator, vocab_size=task.vocab_size, special_ids=ids)
        trainer = Trainer(config, accelerator, model, task)
        note_steps(trainer, facts)
        trainer.fit()
        facts["step"] = trainer.progress.step
        facts["num_buckets"] = count_buckets(trainer.engine.model)
        facts["counters"] = vars(trainer.progress.counters())
        facts["weights"] = {
            name: tensor.detach().cpu().numpy().copy() for name, tensor in trainer.engine.weights(trainable_only=True)
        }
    except (SamestepError, AlreadyFinished) as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    return facts


def count_buckets(model: Any) -> int:
    """Into how many parts a gradient is cut for its reduction over ranks: DDP's own, FSDP2's units, as many as DeepSpeed's size makes."""
    if hasattr(model, "_get_ddp_logging_data"):
        return len(
            model._get_ddp_logging_data().get("rebuilt_bucket_sizes", "").split(",")
        )  # rebuilt in the first steps
    if isinstance(model, FSDPModule):
        return sum(isinstance(module, FSDPModule) for module in model.modules())
    size = getattr(getattr(model, "optimizer", None), "reduce_bucket_size", None)
    return 1 if size is None else -(-sum(p.numel() for p in model.parameters()) // int(size))


def note_steps(trainer: Trainer, facts: dict[str, Any]) -> None:
    """Note every step's own loss on this rank, its sample ids, and the tokens that the model got."""
    take_step = trainer.train_step

    def and_note() -> None:
        step, before = trainer.progress.step, float(trainer.progress.window.loss_sum)
        take_step()
        facts["losses"][step] = float(trainer.progress.window.loss_sum) - before
        facts["ids"][step] = trainer.global_batch(step).tolist()
        facts["rows"][step] = [row for batch in read.pop(step, []) for row in batch["input_ids"].tolist()]

    read: dict[int, list[dict[str, Tensor]]] = {}
    micro_batches_of_step = trainer.micro_batches_of_step

    def read_step(step: int) -> list[dict[str, Tensor]]:
        read[step] = micro_batches_of_step(step)
        return read[step]

    trainer.micro_batches_of_step = read_step  # type: ignore[method-assign]
    trainer.train_step = and_note  # type: ignore[method-assign]


def start(
    config: RunConfig, backend: str, ranks: int, fault: str = "", *, body: Callable[[RunConfig], Any] = train
) -> list[dict[str, Any]] | None:
    """Start the run; None where a fault killed it."""
    environ = {"SAMESTEP_FAULT": fault} if fault else {}
    try:
        return run_ranks(body, backend, ranks, args=(config,), environ=environ)
    except AssertionError as error:
        if fault and "died or timed out" in str(error):
            return None
        raise


def same_weights(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Equal to the last bit."""
    assert one["weights"].keys() == two["weights"].keys()
    return all(np.array_equal(one["weights"][name], two["weights"][name]) for name in one["weights"])


def saved_at_the_end(run: Path) -> dict[str, str]:
    """BLAKE3 of every file of tensors in the newest checkpoint: weights, moments, and the random numbers of each rank."""
    newest = list_checkpoints(run / "checkpoints")[0]
    return {name: file.blake3 for name, file in read_manifest(newest).files.items() if name.endswith(".safetensors")}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_per_s")} for line in lines]
