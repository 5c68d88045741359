"""What tasks share that let the exported model answer held-out texts: the answers, spread over ranks, and how near they come."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from trainer.backend import Engine
from trainer.data.batches import Ids, rank_share
from trainer.screen import announce

GENERATED_TOGETHER = 16
"""Texts of one rank that are answered in one batch."""

Answered = tuple[str, bool, str]
"""The answer, whether the model ended it, and what was wanted."""


def answer_metrics(
    answered: Callable[[Ids], list[Answered]],
    count: int,
    scores: Mapping[str, Callable[[str, str], float]],
    engine: Engine,
) -> dict[str, float]:
    """stop_rate, the mean of each score of (answer, wanted), and how many were answered; nothing where count is 0. Collective.

    answered: the answers to held-out texts, by their number.
    """
    if not count:
        return {}
    announce(f"answering {count} held-out texts", is_main=engine.rank == 0)
    sums = torch.zeros(count, 1 + len(scores), dtype=torch.float64)
    share = rank_share(np.arange(count), engine.rank, engine.world_size)
    for start in range(0, len(share), GENERATED_TOGETHER):
        places = share[start : start + GENERATED_TOGETHER]
        for place, (answer, has_stopped, wanted) in zip(places, answered(places), strict=True):
            sums[place] = torch.tensor([has_stopped, *(score(answer, wanted) for score in scores.values())])
    means = (engine.sum_array_over_ranks(sums).sum(dim=0) / count).tolist()
    return dict(zip(("stop_rate", *scores), means, strict=True)) | {"generated": count}
