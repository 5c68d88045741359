"""The training loop. `fit` decides when, `train_step` decides what; there is no callback, hook, scheduler or sampler.

Every rank runs every line here; collectives are in the engine. The step taken depends on (config, weights, global batch) alone,
not on how many ranks share the batch: each loss is a sum over targets, scaled by 1 / (targets of the whole global batch).
"""

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import build_engine
from trainer.config import RunConfig, TrainConfig
from trainer.data.batches import IGNORED, epoch_batches, micro_batches
from trainer.data.classify import ClassificationSet, Split
from trainer.errors import DivergedError
from trainer.evaluate import evaluate_logits
from trainer.loss import classification_loss_sum, count_correct
from trainer.metrics import classification_metrics
from trainer.optim import build_optimizer, lr_at, peak_lr
from trainer.output import RunOutput
from trainer.stop import StopRequest


@dataclass
class Window:
    """Sums of this rank since the last log line."""

    loss_sum: Tensor | float = 0.0
    num_correct: Tensor | int = 0
    num_targets: int = 0
    num_samples: int = 0
    elapsed_s: float = 0.0


@dataclass
class Progress:
    """Where the run stands; the same on every rank."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluated_step: int = -1
    evaluations_since_best: int = 0
    num_skipped: int = 0
    grad_norm: float = math.nan
    lr: float = 0.0
    stop_asked: bool = False
    window: Window = field(default_factory=Window)
    sums_before: Window = field(default_factory=Window)
    """The window as it was before the step at hand."""


class Trainer:
    """Trains `model` on `data` as `config` says, on the backend of `accelerator`. Every rank makes one."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, model: nn.Module, data: ClassificationSet) -> None:
        self.config, self.accelerator, self.data = config, accelerator, data
        optimizer = build_optimizer(model, config, fused=accelerator.device.type in ("cpu", "cuda"))
        self.engine = build_engine(accelerator, model, optimizer, config)
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.steps_per_epoch = len(self.batches_of_epoch(0))
        self.num_steps = count_steps(config.train, self.steps_per_epoch)
        self.progress = Progress()
        self.stop: StopRequest | None = None

    # When

    def fit(self) -> None:
        """Train to the last step, to early stopping or to a stop request; export the best weights and test what was exported.

        With `config.probe` set, records some steps instead (trainer/probe.py).
        """
        if self.config.probe is not None:
            from trainer.probe import record_probe

            return record_probe(self)
        torch.manual_seed(hash_seed(self.config.train.seed, self.rank))  # from here on only dropout draws
        self.output = RunOutput(self.config, self.engine, self.data, self.num_steps)
        self.stop = StopRequest(self.config.folder, is_main=self.accelerator.is_main_process)
        self.engine.model.train()  # from_pretrained leaves it in evaluation mode, without dropout
        try:
            while self.progress.step < self.num_steps and not self.is_over():
                self.train_step()
                if self.is_due(self.config.train.log_every):
                    self.log()
                if self.is_due(self.config.train.eval_every or self.steps_per_epoch):
                    self.evaluate_and_keep_best()
            self.finish()
        finally:
            self.stop.close()
            self.output.close()

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens after the step just taken; always after the last."""
        return self.progress.step % every == 0 or self.progress.step == self.num_steps

    def is_over(self) -> bool:
        """Stop asked for by any rank, or no better metric for `train.patience` evaluations."""
        patience = self.config.train.patience
        return self.progress.stop_asked or (patience is not None and self.progress.evaluations_since_best >= patience)

    # What

    def train_step(self) -> None:
        """One optimizer step on the next global batch. Collective."""
        started = time.perf_counter()
        self.compute_gradients()
        self.apply_gradients()
        self.progress.window.elapsed_s += time.perf_counter() - started

    def compute_gradients(self) -> None:
        """Leave the gradient of the global batch's mean loss in the engine, and its norm in `progress`. Collective."""
        self.progress.sums_before = replace(self.progress.window)
        batches = self.micro_batches_of_step(self.progress.step)
        local = [float(sum(count_targets(batch) for batch in batches)), float(self.stop_seen())]
        num_targets, num_stops = self.engine.sum_over_ranks(local)
        for position, batch in enumerate(batches):
            with self.engine.micro_batch(last=position == len(batches) - 1):
                loss = self.loss_sum(batch)
                loss = loss * (1.0 + 0.0 * loss.detach())  # a loss that is not finite makes its gradient so too
                self.engine.backward(loss / max(num_targets, 1.0))
        self.progress.grad_norm = self.engine.grad_norm()
        self.progress.stop_asked = num_stops > 0

    def apply_gradients(self) -> None:
        """Move the weights at this step's learning rate, or leave the step out where the gradient is not finite. Collective."""
        progress = self.progress
        progress.lr = self.lr_of_step(progress.step)
        self.engine.set_learning_rate(progress.lr)
        if math.isfinite(progress.grad_norm):
            self.engine.step(progress.grad_norm, self.config.optim.max_grad_norm)
        else:
            self.engine.discard()
            self.forget_step()
            self.count_skipped()
        progress.step += 1

    def lr_of_step(self, step: int) -> float:
        """The learning rate of 0-based `step`: a pure function of the config, whatever the number of processes."""
        optim = self.config.optim
        return lr_at(
            step,
            total_steps=self.num_steps,
            peak=peak_lr(self.config),
            schedule=optim.schedule,
            warmup_fraction=optim.warmup_fraction,
            min_lr_fraction=optim.min_lr_fraction,
        )

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward pass of one micro-batch: the loss summed over its targets. Collective under fsdp and zero3."""
        inputs = self.engine.to_device(batch)
        labels = inputs.pop("labels")
        logits = self.engine.forward(inputs).logits
        loss = classification_loss_sum(logits, labels)
        window = self.progress.window
        window.loss_sum = window.loss_sum + loss.detach()
        window.num_correct = window.num_correct + count_correct(logits.detach(), labels)
        window.num_targets += count_targets(batch)
        return loss

    def forget_step(self) -> None:
        """Take the step's loss out of the sums for the next log line."""
        window, before = self.progress.window, self.progress.sums_before
        window.loss_sum, window.num_correct, window.num_targets = (
            before.loss_sum,
            before.num_correct,
            before.num_targets,
        )

    def count_skipped(self) -> None:
        """A step whose gradient was not finite: raise on every rank, or count it as skipped."""
        if self.engine.precision == "fp16" and self.engine.loss_scale > 1.0:
            return  # the dynamic loss scale was too high, which is part of fp16
        self.progress.num_skipped += 1
        train = self.config.train
        place = f"step {self.progress.step + 1}: the gradient norm is {self.progress.grad_norm}"
        if train.on_nonfinite == "stop":
            raise DivergedError(f"{place}; lower optim.peak_lr, or set train.on_nonfinite=skip to leave such steps out")
        if self.progress.num_skipped > train.max_skipped_steps:
            raise DivergedError(
                f"{place}, such step number {self.progress.num_skipped}, more than train.max_skipped_steps "
                f"({train.max_skipped_steps}); lower optim.peak_lr"
            )

    # Data

    def batches_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """The global batches of one epoch, the same on every rank; kept until another epoch is asked for."""
        if getattr(self, "_epoch", None) != epoch:
            train, data = self.config.train, self.data
            by_length = self.config.data.group_by_length
            self._batches = epoch_batches(
                data.train.lengths, train.global_batch_size, train.seed, epoch, group_by_length=by_length
            )
            self._epoch = epoch
        return self._batches

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids of 0-based `step`, the same on every rank and for any number of them."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.batches_of_epoch(epoch)[position]

    def micro_batches_of_step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step as CPU tensors; every rank has the same number of them."""
        ids = self.global_batch(step)
        self.progress.window.num_samples += len(ids)
        shares = micro_batches(ids, self.rank, self.world_size, self.config.train.micro_batch_size)
        return [self.data.collate(self.data.train, share) for share in shares]

    # Watching

    def stop_seen(self) -> bool:
        """This rank's own flag; acted on only once summed over ranks."""
        return self.stop is not None and self.stop.seen()

    def log(self) -> None:
        """Write the sums over all ranks since the last call. Collective."""
        window, progress = self.progress.window, self.progress
        sums = [float(window.loss_sum), float(window.num_correct), float(window.num_targets)]
        loss_sum, num_correct, num_targets = self.engine.sum_over_ranks(sums)
        values = {
            "epoch": round(progress.step / self.steps_per_epoch, 4),
            "train/loss": loss_sum / max(num_targets, 1),
            "train/accuracy": num_correct / max(num_targets, 1),
            "train/lr": progress.lr,
            "train/grad_norm": progress.grad_norm,
            "samples_per_s": window.num_samples / max(window.elapsed_s, 1e-9),
        }
        self.output.train_metrics(progress.step, values)
        progress.window = Window()

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics over a whole split, each example counted once whatever the number of ranks. Collective."""
        batch_size = self.config.train.eval_batch_size
        self.engine.model.eval()
        logits = evaluate_logits(self.engine.forward, self.data, split, self.engine, batch_size=batch_size)
        self.engine.model.train()
        return classification_metrics(logits, split.labels)

    def evaluate_and_keep_best(self) -> None:
        """Evaluate on the validation split; export the weights when the watched metric is the best so far. Collective."""
        progress, name = self.progress, self.config.train.metric
        progress.evaluated_step = progress.step
        metrics = self.evaluate(self.data.validation)
        is_best = progress.best_metric is None or is_better(name, metrics[name], progress.best_metric)
        progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
        if is_best:
            progress.best_metric, progress.best_step = metrics[name], progress.step
            self.output.export()
        self.output.eval_metrics(progress.step, metrics, is_best=is_best)

    def finish(self) -> None:
        """Log and evaluate the steps since the last time (after a stop or an early end), test what was exported, report. Collective."""
        if self.progress.window.num_samples:
            self.log()
        if self.progress.evaluated_step != self.progress.step:
            self.evaluate_and_keep_best()
        self.output.report(self.progress, asked_to_stop=self.progress.stop_asked)


def count_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if train.max_steps is not None:
        return train.max_steps
    assert train.num_epochs is not None, "TrainConfig checks that one of them is set"
    return math.ceil(train.num_epochs * steps_per_epoch)


def count_targets(batch: dict[str, Tensor]) -> int:
    """Examples of a CPU batch that count in the loss."""
    return int((batch["labels"] != IGNORED).sum())


def is_better(name: str, value: float, best: float) -> bool:
    """Whether a metric improved; a loss improves by falling, and anything is better than nan."""
    if math.isnan(best):
        return True
    return value < best if name == "loss" else value > best


def hash_seed(seed: int, rank: int) -> int:
    """A seed for the dropout of one rank."""
    return (seed * 1_000_003 + rank) % 2**63
