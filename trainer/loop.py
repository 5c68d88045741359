"""The training loop. `fit` decides when, `train_step` decides what; there is no callback, hook, scheduler or sampler.

Every rank runs every line here; collectives are in the engine. The step taken depends on (config, weights, global batch) alone,
not on how many ranks share the batch: each loss is a sum over targets, scaled by 1 / (targets of the whole global batch).
"""

import math
import time
from contextlib import ExitStack

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend import agree_on_start, build_engine
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.own import rank_seed, seed_generators
from trainer.checkpoint.resume import Start
from trainer.config import RunConfig
from trainer.data.batches import micro_batches
from trainer.data.prefetch import Prefetch
from trainer.divergence import judge_step
from trainer.errors import DataError, DivergedError
from trainer.faults import fault_point
from trainer.loss import count_targets
from trainer.model.identity import base_identity
from trainer.optim import build_optimizer, count_steps, lr_of_step
from trainer.output import RunOutput
from trainer.progress import Progress, Window, is_better
from trainer.stop import StopRequest
from trainer.task import Task
from trainer.watchdog import Watchdog


class Trainer:
    """Trains `model` on `task` as `config` says, on the backend of `accelerator`. Every rank makes one."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, model: nn.Module, task: Task) -> None:
        self.config, self.accelerator, self.task = config, accelerator, task
        self.identity = {"base": base_identity(model), **task.identity()}
        optimizer = build_optimizer(model, config, fused=accelerator.device.type in ("cpu", "cuda"))
        self.engine = build_engine(accelerator, model, optimizer)
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.num_steps = count_steps(config.train, task.steps_per_epoch)
        self.eval_every = config.train.eval_every or task.steps_per_epoch
        self.progress = Progress()
        self.metric: float | None = None  # of the last evaluation
        self.returned_to = -1  # by the last rollback
        self.stop: StopRequest | None = None
        self.checkpoints = Checkpointer(config, self.engine, identity=self.identity)
        self.prefetch = Prefetch(self.read_step)

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
        seed_generators(rank_seed(self.config.train.seed, self.rank))  # from here on only dropout draws
        self.engine.model.train()  # from_pretrained leaves it in evaluation mode, without dropout
        start = agree_on_start(self.config)
        base, is_fresh = self.identity["base"], start.kind == "fresh"
        self.output = RunOutput(self.config, self.engine, self.task, self.num_steps, base=base, is_fresh=is_fresh)
        opened.callback(self.output.close)
        self.stop = StopRequest(self.config, is_main=self.rank == 0, save_s=self.checkpoints.seconds_of_a_save)
        opened.callback(self.stop.close)
        self.checkpoints.say = self.output.log.say
        opened.enter_context(Watchdog(self.config, self.engine))
        opened.callback(self.checkpoints.close)
        opened.callback(self.prefetch.close)
        self.checkpoints.clean()
        if start.checkpoints:
            self.restore(start)
            self.stop.forget()
        self.checkpoints.prepare()

    def restore(self, start: Start) -> None:
        """Take up the state of the newest good checkpoint. Collective."""
        if self.engine.settles_in_first_step:
            self.compute_gradients()
            self.engine.discard()
        self.progress = self.checkpoints.restore(start)
        self.read_on()
        self.output.continue_from(self.progress, start.words)

    def save(self) -> None:
        """Checkpoint the state after this step; returns once it is copied. Collective."""
        progress = self.progress
        metric = self.metric if progress.evaluated_step == progress.step else None
        self.engine.heartbeat.beat(f"reading the data of step {progress.step + 1}")
        self.prefetch.settle()
        files, state = self.output.small_files(progress.step), self.task.rank_state(progress.step)
        self.checkpoints.save(progress, files, metric=metric, rank_state=state)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now: always after the last, not where a rollback returned to."""
        step = self.progress.step
        return step != self.returned_to and (step % every == 0 or step >= self.num_steps)

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
        batches, problem = self.batches_or_problem(self.progress.step)
        local_targets = sum(count_targets(batch) for batch in batches)
        flags = [self.stop_seen(), self.checkpoints.has_failed, problem is not None]
        sums = self.engine.sum_over_ranks([float(number) for number in (local_targets, *flags)])
        num_targets, num_stops, num_failed, num_unread = sums
        if num_failed or num_unread:
            self.checkpoints.wait()  # where a save failed, it raises on all ranks
            self.checkpoints.raise_together(problem, DataError)
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
        self.read_on()
        self.output.continue_from(self.progress, "")
        self.output.log.say(f"{problem}; rolled back to step {self.progress.step}, and that step is left out from here")

    def lr_of_step(self, step: int) -> float:
        """The learning rate of 0-based `step`."""
        return lr_of_step(step, self.num_steps, self.config)

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward pass of one micro-batch: the loss summed over its targets. Collective under fsdp and zero3."""
        task, window = self.task, self.progress.window
        on_device = self.engine.to_device(batch)
        outputs = self.engine.forward(task.model_inputs(on_device))
        loss = task.loss_sum(outputs, on_device)
        window.loss_sum = window.loss_sum + loss.detach()
        with torch.no_grad():
            window.add_counts(dict(zip(task.count_names, task.counts(outputs, on_device), strict=True)))
        window.num_targets += count_targets(batch)
        return loss

    # Data

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids of 0-based `step`, the same on every rank and for any number of them."""
        return self.task.global_batch(step)

    def micro_batches_of_step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step as CPU tensors; every rank has the same number of them."""
        ids = self.global_batch(step)
        self.progress.window.num_samples += len(ids)
        self.progress.num_samples += len(ids)
        return self.prefetch.at(step)

    def batches_or_problem(self, step: int) -> tuple[list[dict[str, Tensor]], str | None]:
        """The same, or what is wrong with the data: this rank's alone, which the others must be told."""
        try:
            return self.micro_batches_of_step(step), None
        except DataError as error:
            return [], f"{error} (found by rank {self.rank})" if self.world_size > 1 else str(error)

    def read_step(self, step: int) -> list[dict[str, Tensor]]:
        """The same, without noting it; runs in a thread, ahead of its step."""
        fault_point("read", self.rank)
        shares = micro_batches(self.global_batch(step), self.rank, self.world_size, self.config.train.micro_batch_size)
        return [self.engine.pinned(self.task.training_batch(share)) for share in shares]

    def read_on(self) -> None:
        """Let the data stand where the restored state does."""
        self.prefetch.drop()
        self.task.restore_rank_state(self.progress.step, self.checkpoints.rank_state)

    # Watching

    def stop_seen(self) -> bool:
        """This rank's own flag; acted on only once summed over ranks."""
        return self.stop is not None and self.stop.seen()

    def log(self) -> None:
        """Write the sums over all ranks since the last line; none where every step since then was left out. Collective."""
        window, progress, names = self.progress.window, self.progress, self.task.count_names
        sums = [window.loss_sum, window.num_targets, *(window.counts.get(name, 0.0) for name in names)]
        loss_sum, num_targets, *rest = self.engine.sum_over_ranks([float(number) for number in sums])
        if not num_targets:
            return
        counts = dict(zip(names, rest, strict=True))
        progress.num_tokens += int(counts.get("tokens", 0))
        loss, seconds = loss_sum / num_targets, max(window.elapsed_s, 1e-9)
        values = {
            "epoch": round(progress.step / self.task.steps_per_epoch, 4),
            "train/loss": loss,
            **self.task.train_metrics(loss, num_targets, counts, seconds),
            **({"tokens_seen": progress.num_tokens} if "tokens" in counts else {}),
            "train/lr": progress.lr,
            "train/grad_norm": progress.grad_norm,
            "samples_per_s": window.num_samples / seconds,
        }
        self.output.train_metrics(progress.step, values)
        progress.window = Window()

    def evaluate(self) -> dict[str, float]:
        """Metrics over the whole validation split. Collective."""
        self.engine.model.eval()
        evaluation = self.task.evaluate(self.engine.forward, self.engine, "validation")
        self.engine.model.train()
        return evaluation.metrics

    def evaluate_and_keep_best(self) -> None:
        """Evaluate on the validation split; export the weights when the watched metric is the best so far. Collective."""
        progress, name = self.progress, self.config.watched_metric
        progress.evaluated_step = progress.step
        metrics = self.evaluate()
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
        if not stopped and (progress.evaluated_step != progress.step or progress.best_metric is None):
            self.evaluate_and_keep_best()
        if self.checkpoints.saved_step != progress.step:
            self.save()
        self.checkpoints.wait()
        (self.output.stopped if stopped else self.output.report)(progress)
