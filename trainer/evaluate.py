"""What evaluation gathers: logits of a whole split, each example counted once under any number of ranks; what went wrong on a rank."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.backend import Engine
from trainer.data.batches import evaluation_batches, rank_share
from trainer.data.classify import TARGETS, ClassificationSet, Split


def evaluate_logits(
    forward: Callable[[Mapping[str, Tensor]], Any],
    data: ClassificationSet,
    split: Split,
    engine: Engine,
    *,
    batch_size: int,
) -> np.ndarray:
    """Logits of every example of `split`, (N, C) float64, in the split's order, on every rank.

    forward: a model call that returns an object with `.logits`, such as `engine.forward`. batch_size: per rank.
    Collective: every rank makes the same number of forward passes (an empty share is a dummy sample), then one sum over ranks.
    """
    logits = torch.zeros(len(split), len(data.label_names), dtype=torch.float64)
    with torch.no_grad():
        for ids in evaluation_batches(split.lengths, batch_size, engine.world_size):
            share = rank_share(ids, engine.rank, engine.world_size)
            inputs = engine.to_device(data.collate(split, share))
            for name in TARGETS:
                inputs.pop(name, None)
            logits[torch.from_numpy(share)] = forward(inputs).logits[: len(share)].double().cpu()
    return engine.sum_array_over_ranks(logits).numpy()


TEXT_BYTES = 2000
"""Of a message that a rank tells the others."""


def texts_of_ranks(text: str, engine: Engine) -> list[str]:
    """The text of each rank, the first TEXT_BYTES of it. Collective: one all-reduce."""
    content = text.encode(errors="replace")[:TEXT_BYTES]
    table = torch.zeros(engine.world_size, TEXT_BYTES)
    table[engine.rank, : len(content)] = torch.tensor(list(content), dtype=torch.float32)
    rows = engine.sum_array_over_ranks(table).to(torch.uint8).numpy()
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]
