"""What becomes of a step whose gradient is not finite or far larger than usual: take it, leave it out, roll back, or stop.

Pure: the gradient norm is the same on all ranks, so all of them decide alike. Counters live in Progress and survive a restart.
"""

import math
from typing import Literal

from trainer.config import TrainConfig
from trainer.errors import DivergedError
from trainer.progress import Counters

Action = Literal["take", "skip", "rollback"]
SPIKE_WARM_UP = 20
"""Steps taken before a gradient can be called a spike: at first everything is unusual."""
MEMORY = 0.95
"""Of the moving average of the gradient norm."""


def judge_step(progress: Counters, grad_norm: float, train: TrainConfig) -> Action:
    """What to do with the step at hand; counts it where it is left out. DivergedError, on all ranks, to stop."""
    if not math.isfinite(grad_norm):
        return act(progress, train, train.on_nonfinite, f"the gradient norm is {grad_norm}", "train.on_nonfinite")
    usual = progress.usual_grad_norm
    is_watched = train.on_spike != "ignore" and progress.num_normal_steps >= SPIKE_WARM_UP
    if usual is not None and is_watched and grad_norm > train.spike_factor * usual:
        problem = (
            f"the gradient norm is {grad_norm:.3g}, more than train.spike_factor ({train.spike_factor:g}) x {usual:.3g}"
        )
        return act(progress, train, train.on_spike, problem, "train.on_spike")
    progress.usual_grad_norm = grad_norm if usual is None else MEMORY * usual + (1 - MEMORY) * grad_norm
    progress.num_normal_steps += 1
    return "take"


def act(progress: Counters, train: TrainConfig, policy: str, problem: str, setting: str) -> Action:
    """Carry out the policy: count, and stop where a cap is passed."""
    place = f"step {progress.step + 1}: {problem}"
    if policy == "skip":
        progress.num_skipped += 1
        if progress.num_skipped > train.max_skipped_steps:
            raise DivergedError(
                f"{place}, such step number {progress.num_skipped}, more than train.max_skipped_steps "
                f"({train.max_skipped_steps}); lower optim.peak_lr"
            )
        return "skip"
    if policy == "rollback":
        if progress.num_rollbacks >= train.max_rollbacks:
            raise DivergedError(
                f"{place} after {progress.num_rollbacks} rollbacks, as many as train.max_rollbacks allows; lower optim.peak_lr"
            )
        return "rollback"
    raise DivergedError(
        f"{place}; lower optim.peak_lr, or set {setting}=skip to leave such steps out, or {setting}=rollback to go back "
        "to the last checkpoint and leave the step out from there"
    )
