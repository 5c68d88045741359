"""What one rank alone has, as tensors and back: its random number generators (torch on CPU and GPU, numpy, Python) and its open sums."""

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import random_words
from trainer.progress import Window

WINDOW, TASK = "window/", "task"
SAME_ON_ALL = (f"{WINDOW}num_samples", f"{WINDOW}elapsed_s")
"""Open sums that every rank counts for all."""


def read_generators() -> dict[str, Tensor]:
    """Name -> flat tensor; together they decide every number that is drawn later."""
    version, words, gauss = random.getstate()
    assert version == 3, version
    _, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states = {
        "rng/python": torch.tensor(words, dtype=torch.int64),
        "rng/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng/numpy": torch.from_numpy(np.append(keys.astype(np.int64), [position, has_gauss])),
        "rng/numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "rng/torch": torch.get_rng_state(),  # bytes come after 8-byte numbers, which then stay aligned
    }
    if torch.cuda.is_available():
        states["rng/cuda"] = torch.cuda.get_rng_state()
    return states


def write_generators(states: Mapping[str, Tensor]) -> None:
    """Put all generators where `read_generators` found them."""
    gauss = states["rng/python_gauss"].tolist()
    random.setstate((3, tuple(states["rng/python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["rng/numpy"].tolist()
    cached = states["rng/numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["rng/torch"])
    if "rng/cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["rng/cuda"])


def seed_generators(seed: int) -> None:
    """Start all generators anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def window_tensors(window: Window) -> dict[str, Tensor]:
    """A rank's open sums, each a float64 tensor of one element."""
    return {f"{WINDOW}{name}": torch.tensor([number], dtype=torch.float64) for name, number in window.numbers().items()}


def read_window(numbers: Mapping[str, float]) -> Window:
    """The reverse, from numbers by key."""
    return Window.from_numbers({key.removeprefix(WINDOW): number for key, number in numbers.items()})


def bytes_tensor(state: bytes) -> dict[str, Tensor]:
    """The task's state as an entry; none where it is empty."""
    return {TASK: torch.frombuffer(bytearray(state), dtype=torch.uint8)} if state else {}


def topology_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one rank of a run that continues under another topology."""
    return int(random_words(1, seed, step, rank)[0] >> 1)


def rank_seed(seed: int, rank: int) -> int:
    """A seed for the dropout of one rank."""
    return (seed * 1_000_003 + rank) % 2**63
