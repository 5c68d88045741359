"""What one rank alone has, as tensors and back: its random number generators (torch on CPU and GPU, numpy, Python) and its open sums."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.shards import ShardReader, shard_name
from trainer.data.batches import random_words
from trainer.errors import CheckpointError
from trainer.progress import Window

WINDOW, RANDOM, TASK = "window/", "rng/", "task"
SAME_ON_ALL = (f"{WINDOW}num_samples", f"{WINDOW}elapsed_s")
"""Open sums that every rank counts for all."""


@dataclass(frozen=True)
class Own:
    """One rank's file of a checkpoint."""

    window: dict[str, float]
    """Open sums by key."""
    generators: dict[str, Tensor]
    task: bytes
    """Empty where the task has no state of its own."""


def read_own(folder: Path, num_ranks: int) -> list[Own]:
    """What each of the ranks that saved had. CheckpointError unless the sums can be taken up."""
    found = [read_rank(folder, shard_name("rank", rank, num_ranks)) for rank in range(num_ranks)]
    for number, own in enumerate(found):
        try:
            read_window(own.window)
        except (KeyError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{folder}: rank {number} has no usable sums since the last log line: {error}"
            ) from None
        if own.window.keys() != found[0].window.keys():
            raise CheckpointError(f"{folder}: the sums of rank {number} are of other quantities than those of rank 0")
    return found


def read_rank(folder: Path, name: str) -> Own:
    """One rank's file. CheckpointError where an entry is incomplete, or a sum is not one number."""
    reader = ShardReader(folder, [name])
    entries = {key: reader.whole(key) for key in reader.ranges}
    sums = {key: entry for key, entry in entries.items() if key.startswith(WINDOW)}
    wrong = [key for key, entry in sums.items() if entry.numel() != 1 or entry.dtype != torch.float64]
    task = entries.get(TASK, torch.empty(0, dtype=torch.uint8))
    wrong += [TASK] if task.dtype != torch.uint8 else []
    if wrong:
        raise CheckpointError(f"{folder / name}: {wrong[0]} has another type or length than samestep writes")
    generators = {key: entry for key, entry in entries.items() if key.startswith(RANDOM)}
    missing = read_generators(torch.device("cpu")).keys() - generators.keys()
    if missing:
        raise CheckpointError(f"{folder / name} lacks {min(missing)}")
    return Own({key: float(entry) for key, entry in sums.items()}, generators, bytes(task.tolist()))


def check_generators(folder: Path, states: Mapping[str, Tensor], device: torch.device) -> None:
    """CheckpointError where this process's generators cannot be put there; they stay where they are."""
    before = read_generators(device)
    try:
        write_generators(states, device)
        wrong = [key for key, state in read_generators(device).items() if not torch.equal(state, states[key])]
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    finally:
        write_generators(before, device)
    if wrong:
        raise CheckpointError(f"{folder}: its random number generators cannot be taken up ({wrong[0]})")


def read_generators(device: torch.device) -> dict[str, Tensor]:
    """Name -> flat tensor; together they decide every number that is drawn later by a rank on `device`."""
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
    if device.type != "cpu":
        module, place = torch.get_device_module(device), () if device.type == "mps" else (device,)
        states[f"{RANDOM}{device.type}"] = module.get_rng_state(*place)
    return states


def write_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put all generators where `read_generators` found them."""
    gauss = states["rng/python_gauss"].tolist()
    random.setstate((3, tuple(states["rng/python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["rng/numpy"].tolist()
    if not 0 <= position <= len(keys):
        raise ValueError("numpy's generator stands outside of its words")  # numpy 2 takes it, and reads there
    cached = states["rng/numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["rng/torch"])
    own = f"{RANDOM}{device.type}"
    if own in states:
        module, place = torch.get_device_module(device), () if device.type == "mps" else (device,)
        module.set_rng_state(states[own], *place)


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
