"""Where a run stands: what must survive a restart beside weights, moments and random numbers.

`Counters` are the same on every rank and go into a checkpoint's state.json; `Window` holds one rank's own sums. Local to the rank.
Imports no torch: `samestep checkpoint inspect` reads counters on a login node.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COUNT = "count/"


@dataclass
class Window:
    """Sums of this rank since the last log line."""

    loss_sum: "Tensor | float" = 0.0
    num_targets: int = 0
    num_samples: int = 0
    elapsed_s: float = 0.0
    counts: "dict[str, Tensor | float]" = field(default_factory=dict)
    """The task's own, by name; replaced, never changed in place."""

    def add_counts(self, counts: "Mapping[str, Tensor]") -> None:
        """One micro-batch more."""
        self.counts = {name: self.counts.get(name, 0.0) + count for name, count in counts.items()}

    def numbers(self) -> dict[str, float]:
        """The sums by name, the task's own as count/NAME."""
        own = {part.name: float(getattr(self, part.name)) for part in fields(self) if part.name != "counts"}
        return own | {f"{COUNT}{name}": float(count) for name, count in self.counts.items()}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> "Window":
        """The reverse of `numbers`."""
        counts: dict[str, Tensor | float] = {
            name.removeprefix(COUNT): count for name, count in numbers.items() if name.startswith(COUNT)
        }
        targets, samples = int(numbers["num_targets"]), int(numbers["num_samples"])
        return cls(numbers["loss_sum"], targets, samples, numbers["elapsed_s"], counts)


@dataclass
class Counters:
    """Where the run stands; the same on every rank, and saved."""

    step: int = 0
    """Optimizer steps taken or left out: the position in the data and in the schedule."""
    num_samples: int = 0
    """Samples seen, over all ranks."""
    num_targets: int = 0
    """Targets seen, over all ranks."""
    num_tokens: int = 0
    """Tokens seen up to the last log line, over all ranks, without padding; 0 where the task counts none."""
    best_metric: float | None = None
    best_step: int = 0
    evaluated_step: int = -1
    evaluations_since_best: int = 0
    num_skipped: int = 0
    """Steps left out because of a gradient that was not finite or too large."""
    num_rollbacks: int = 0
    left_out_steps: list[int] = field(default_factory=list)
    """Steps whose batch a rollback decided to leave out."""
    usual_grad_norm: float | None = None
    """Moving average of the gradient norm, against which a spike is measured."""
    num_normal_steps: int = 0
    """Steps in that average."""
    lr: float = 0.0


@dataclass
class Progress(Counters):
    """The counters, and what this process alone knows."""

    grad_norm: float = math.nan
    stop_asked: bool = False
    window: Window = field(default_factory=Window)
    window_before: Window = field(default_factory=Window)
    """The window as it was before the step at hand."""

    def begin_step(self) -> None:
        """Remember the sums, so that a step that is left out can be taken out of them."""
        self.window_before = replace(self.window)

    def forget_step(self) -> None:
        """Take the step's loss out of the sums for the next log line."""
        window, before = self.window, self.window_before
        window.loss_sum, window.num_targets, window.counts = before.loss_sum, before.num_targets, before.counts

    def counters(self) -> Counters:
        """What a checkpoint keeps."""
        return Counters(**{part.name: getattr(self, part.name) for part in fields(Counters)})

    @classmethod
    def restored(cls, counters: Counters) -> "Progress":
        """The reverse of `counters`."""
        return cls(**vars(counters))


def is_better(name: str, value: float, best: float) -> bool:
    """Whether a metric improved; a loss or an error improves by falling, and anything is better than nan."""
    if math.isnan(best):
        return True
    return value < best if name in ("loss", "mae") else value > best
