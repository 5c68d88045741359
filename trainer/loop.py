"""The training loop. `fit` decides when, `train_step` decides what; there is no callback, hook, scheduler or sampler.

Every rank runs every line here; collectives are in the engine. The step taken depends on (config, weights, global batch) alone,
not on how many ranks share the batch: each loss is a sum over targets, scaled by 1 / (targets of the whole global batch).
"""

import math
import time
from contextlib import ExitStack

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import agree_on_start, build_engine
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.identity import base_identity, data_identity
from trainer.checkpoint.randomness import seed_generators
from trainer.checkpoint.resume import Start
from trainer.config import RunConfig, TrainConfig
from trainer.data.batches import IGNORED, GlobalBatches, micro_batches
from trainer.data.classify import ClassificationSet, Split
from trainer.divergence import judge_step
from trainer.errors import DivergedError
from trainer.evaluate import evaluate_logits
from trainer.faults import fault_point
from trainer.loss import classification_loss_sum, count_correct
from trainer.metrics import classification_metrics
from trainer.optim import build_optimizer, lr_of_step
from trainer.output import RunOutput
from trainer.progress import Progress, Window
from trainer.stop import StopRequest
from trainer.watchdog import Watchdog


class Trainer:
    """Trains `model` on `data` as `config` says, on the backend of `accelerator`. Every rank makes one."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, model: nn.Module, data: ClassificationSet) -> None:
        self.config, self.accelerator, self.data = config, accelerator, data
        identity = {"base": base_identity(model), "data": data_identity(data.train)}
        optimizer = build_optimizer(model, config, fused=accelerator.device.type in ("cpu", "cuda"))
        self.engine = build_engine(accelerator, model, optimizer, config)
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        train, by_length = config.train, config.data.group_by_length
        self.batches = GlobalBatches(data.train.lengths, train.global_batch_size, train.seed, group_by_length=by_length)
        self.steps_per_epoch = self.batches.per_epoch
        self.num_steps = count_steps(config.train, self.steps_per_epoch)
        self.eval_every = config.train.eval_every or self.steps_per_epoch
        self.progress = Progress()
        self.metric: float | None = None  # of the last evaluation
        self.returned_to = -1  # by the last rollback
        self.stop: StopRequest | None = None
        self.checkpoints = Checkpointer(config, self.engine, identity=identity)

    # When

    def fit(self) -> None:
        """Continue or start, train to the last step, to early stopping or to a stop request; test the exported best weights.

        With `config.probe` set, records some steps instead (trainer/probe.py).
        """
        if self.config.probe is not None:
            from trainer.probe import record_probe

            record_probe(self)
            return
        with ExitStack() as opened:
            self.begin(opened)
            opened.push(self.note_failure)
            while not self.is_over():
                self.train_step()
                if self.is_due(self.config.train.log_every):
                    self.log()
                if self.is_due(self.eval_every):
                    self.evaluate_and_keep_best()
                if self.is_due(self.config.train.save_every or self.eval_every):
                    self.save()
            self.finish()

    def note_failure(self, kind: type[BaseException] | None, *_: object) -> None:
        """Called when training ends: a run that diverged, which it does on all ranks, says so in its folder."""
        if kind is not None and issubclass(kind, DivergedError):
            self.output.failed(self.progress)

    def begin(self, opened: ExitStack) -> None:
        """Open the run directory, anew or where its newest good checkpoint ends. Collective; `opened` closes everything."""
        seed_generators(hash_seed(self.config.train.seed, self.rank))  # from here on only dropout draws
        self.engine.model.train()  # from_pretrained leaves it in evaluation mode, without dropout
        start = agree_on_start(self.config)
        self.output = RunOutput(self.config, self.engine, self.data, self.num_steps, is_fresh=start.kind == "fresh")
        opened.callback(self.output.close)
        self.stop = StopRequest(self.config, is_main=self.rank == 0)
        opened.callback(self.stop.close)
        self.checkpoints.say = self.output.log.say
        opened.enter_context(Watchdog(self.config, self.engine))
        opened.callback(self.checkpoints.close)
        self.checkpoints.clean()
        if start.checkpoints:
            self.restore(start)

    def restore(self, start: Start) -> None:
        """Take up the state of the newest good checkpoint. Collective."""
        if self.engine.settles_in_first_step:
            self.compute_gradients()
            self.engine.discard()
        self.progress = self.checkpoints.restore(start)
        self.output.continue_from(self.progress, start.words)

    def save(self) -> None:
        """Checkpoint the state after this step; returns once it is copied. Collective."""
        progress = self.progress
        metric = self.metric if progress.evaluated_step == progress.step else None
        self.checkpoints.save(progress, self.output.small_files(), metric=metric)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now: always after the last, not where a rollback returned to."""
        if self.progress.step == self.returned_to:
            return False
        return self.progress.step % every == 0 or self.progress.step >= self.num_steps

    def is_over(self) -> bool:
        """The last step taken, a stop asked for by any rank, or no better metric for `train.patience` evaluations."""
        progress, patience = self.progress, self.config.train.patience
        waited_enough = patience is not None and progress.evaluations_since_best >= patience
        return progress.step >= self.num_steps or progress.stop_asked or waited_enough

    # What

    def train_step(self) -> None:
        """One optimizer step on the next global batch. Collective."""
        started = time.perf_counter()
        if self.progress.step in self.progress.left_out_steps:
            self.progress.step += 1
            return
        fault_point("step", self.rank)
        self.compute_gradients()
        self.apply_gradients()
        self.progress.window.elapsed_s += time.perf_counter() - started

    def compute_gradients(self) -> None:
        """Leave the gradient of the global batch's mean loss in the engine, and its norm in `progress`. Collective."""
        self.progress.begin_step()
        self.engine.heartbeat.beat(f"reading the data of step {self.progress.step + 1}")
        fault_point("data", self.rank)
        batches = self.micro_batches_of_step(self.progress.step)
        local_targets = sum(count_targets(batch) for batch in batches)
        flags = [self.stop_seen(), self.checkpoints.has_failed]
        num_targets, num_stops, num_failed = self.engine.sum_over_ranks([float(n) for n in (local_targets, *flags)])
        if num_failed:
            self.checkpoints.wait()  # raises on all ranks
        for position, batch in enumerate(batches):
            with self.engine.micro_batch(last=position == len(batches) - 1):
                loss = self.loss_sum(batch)
                loss = loss * (1.0 + 0.0 * loss.detach())  # a loss that is not finite makes its gradient so too
                self.engine.backward(loss / max(num_targets, 1.0))
        self.progress.grad_norm = self.engine.grad_norm()
        self.progress.stop_asked = num_stops > 0
        self.progress.num_targets += int(num_targets)

    def apply_gradients(self) -> None:
        """Move the weights at this step's learning rate, or leave the step out as train.on_nonfinite and on_spike say. Collective."""
        progress, engine = self.progress, self.engine
        progress.lr = self.lr_of_step(progress.step)
        engine.set_learning_rate(progress.lr)
        scale_is_too_high = engine.loss_scale > 1.0 and not math.isfinite(progress.grad_norm)  # a part of fp16
        action = "skip" if scale_is_too_high else judge_step(progress, progress.grad_norm, self.config.train)
        if action == "take":
            engine.step(progress.grad_norm, self.config.optim.max_grad_norm)
        else:
            engine.discard()
            progress.forget_step()
        if action == "rollback":
            self.roll_back()
        else:
            progress.step += 1

    def roll_back(self) -> None:
        """Return to the newest good checkpoint, from where the step at hand is left out. Collective."""
        bad, problem = self.progress, f"step {self.progress.step + 1}: gradient norm {self.progress.grad_norm:.3g}"
        self.progress = self.checkpoints.roll_back(bad)
        self.returned_to = self.progress.step
        self.output.continue_from(self.progress, "")
        self.output.log.say(f"{problem}; rolled back to step {self.progress.step}, and that step is left out from here")

    def lr_of_step(self, step: int) -> float:
        """The learning rate of 0-based `step`."""
        return lr_of_step(step, self.num_steps, self.config)

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

    # Data

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids of 0-based `step`, the same on every rank and for any number of them."""
        return self.batches.at(step)

    def micro_batches_of_step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step as CPU tensors; every rank has the same number of them."""
        ids = self.global_batch(step)
        self.progress.window.num_samples += len(ids)
        self.progress.num_samples += len(ids)
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
        self.metric = metrics[name]
        if is_best:
            progress.best_metric, progress.best_step = metrics[name], progress.step
            self.output.export(progress.step)
        self.output.eval_metrics(progress.step, metrics, is_best=is_best)

    def finish(self) -> None:
        """After a stop request: save, so that the same command goes on. Else evaluate, save, test what was exported, report. Collective."""
        progress = self.progress
        stopped = progress.stop_asked and progress.step < self.num_steps
        if not stopped and progress.window.num_samples:
            self.log()
        if not stopped and progress.evaluated_step != progress.step:
            self.evaluate_and_keep_best()
        if self.checkpoints.saved_step != progress.step:
            self.save()
        self.checkpoints.wait()
        if stopped:
            self.output.stopped(progress)
        else:
            self.output.report(progress)


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
