"""`samestep parity`: its options -> the variants to run. Pure: starts nothing, reads no file.

Every variant shares the same global batch, and the first one is the reference: `single` in fp32, the whole global batch at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.command import RunOptions
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """One way to share the same global batch."""

    backend: str
    processes: int = 1
    micro_batch: int | None = None
    global_batch: int | None = None
    """What the splits imply; None: the recipe's."""
    precision: str = "no"

    @property
    def label(self) -> str:
        """Short name for tables and folders: backend, processes, micro-batch x accumulation, precision."""
        words = [self.backend, f"x{self.processes}"]
        if self.micro_batch and self.global_batch:
            words.append(f"{self.micro_batch}x{self.global_batch // (self.micro_batch * self.processes)}")
        return " ".join([*words, *([] if self.precision == "no" else [self.precision])])

    def run_options(self, common: RunOptions) -> RunOptions:
        """What it is started with."""
        sizes = {"train.global_batch_size": self.global_batch, "train.micro_batch_size": self.micro_batch}
        own = [f"{name}={size}" for name, size in sizes.items() if size]
        return replace(
            common,
            backend=self.backend,
            processes=self.processes,
            precision=self.precision,
            overrides=(*common.overrides, *own),
        )


def plan_parity(backends: str, processes: str, split: str, precision: str) -> list[Variant]:
    """The reference first, for bf16 and fp16 then single's own, then every combination. ConfigError where there is nothing to compare.

    One process is `single`; the other backends run on each number above 1. A split is that of a rank: the ranks' shares of one global
    batch, of which `single` takes micro-batches of the same size.
    """
    names, counts, splits = words_of(backends), _counts(processes), [_split(word) for word in words_of(split)]
    several = [n for n in counts if n > 1]
    if any(name != "single" for name in names) and not several:
        raise ConfigError(
            f"--processes ({processes}): one process is single; the other backends need 2 or more: set --processes 2, or --backends single"
        )
    ranks = several if any(name != "single" for name in names) else [1]
    size = _global_batch(splits, ranks)
    known = [Variant("single", global_batch=size)]
    if precision != "no":
        known.append(replace(known[0], precision=precision))
    micro_batches: list[int | None] = [*(micro for micro, _ in splits)] if splits else [None]
    found = [
        Variant(name, count, micro, size, precision)
        for name in names
        for count in ([1] if name == "single" else ranks)
        for micro in micro_batches
    ]
    compared = [variant for variant in dict.fromkeys(found) if variant not in known]
    if not compared:
        raise ConfigError(
            f"--backends ({backends}): nothing to compare with single on one process; add a backend such as ddp, or a --split"
        )
    return [*known, *compared]


def words_of(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _counts(text: str) -> list[int]:
    words = words_of(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(
            f"--processes ({text}): must be whole numbers above 0, separated by commas; such as --processes 1,2"
        )
    return [int(word) for word in words]


def _split(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word)
    if not found:
        raise ConfigError(f"--split ({word}): must be MICRO-BATCHxACCUMULATION; such as --split 4x4,16x1")
    return int(found.group(1)), int(found.group(2))


def _global_batch(splits: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int | None:
    """The size that all splits imply on all numbers of ranks; None without splits."""
    implied = {micro * times * count: f"{micro}x{times} on {count}" for micro, times in splits for count in ranks}
    if len(implied) > 1:
        sizes = ", ".join(f"{size} ({words})" for size, words in sorted(implied.items()))
        raise ConfigError(
            f"--split: micro-batch x accumulation x processes must give one global batch, but gives {sizes}; change the splits, "
            "or give one number of processes"
        )
    return next(iter(implied), None)
