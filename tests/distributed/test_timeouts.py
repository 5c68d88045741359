"""No process group gives up before the watchdog would: it is the one that says which rank hangs."""

from datetime import timedelta

import pytest
import torch
from torch.distributed import distributed_c10d

from tests.distributed.test_verify import tiny_model
from tests.rank_pool import run_ranks
from trainer.backend import SideGroup, build_accelerator, build_engine
from trainer.backend.build import group_timeout
from trainer.backend.heartbeat import PATIENCE
from trainer.backend.side import NEVER
from trainer.config import RunConfig, TrainConfig


def test_a_group_waits_longer_than_any_phase_that_the_watchdog_permits() -> None:
    for hang_timeout_s in (0.1, 300.0, 3000.0):
        assert group_timeout(hang_timeout_s).total_seconds() > PATIENCE * hang_timeout_s
    assert group_timeout(0.1) == timedelta(minutes=30)  # data may be read for so long before there is a watchdog
    assert group_timeout(None) == group_timeout(1e300) == NEVER


def timeouts() -> tuple[set[float], float]:
    """Seconds: those of all process groups that training uses, and that of the side group."""
    config = RunConfig(name="t", train=TrainConfig(max_steps=1, global_batch_size=8, hang_timeout_s=1000))
    accelerator = build_accelerator(config)
    model = tiny_model()
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters()))
    training = {seconds_of(group) for group in distributed_c10d._world.pg_map}
    return training, seconds_of(SideGroup(engine.rank, engine.world_size).group)


def seconds_of(group: torch.distributed.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_every_process_group_has_the_timeout_that_was_asked_for(backend: str) -> None:
    for training, side in run_ranks(timeouts, backend, 2):
        assert training == {1000 * (PATIENCE + 1)}
        assert side == NEVER.total_seconds()
