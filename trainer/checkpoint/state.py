"""state.json: the scalars of a training state, checked when read."""

from typing import Any

from trainer.checkpoint.manifest import Strict
from trainer.progress import Counters


class TrainingState(Strict):
    """What is not a tensor and the same on every rank."""

    counters: Counters
    """Step, best metric and more."""
    optimizer_steps: int
    """Steps that AdamW has taken; its bias correction depends on them."""
    loss_scale: float
    """fp16's dynamic scale; 1.0 otherwise."""
    good_steps: int
    """Since the scale last fell."""
    identity: dict[str, str | None]
    """Digests of `base` (frozen weights; None without any) and `data`."""
    config: dict[str, Any]
    """The resolved settings of the run."""
