"""What one rank alone keeps: the random numbers of its own device, not of the one that happens to be current."""

import pytest
import torch

from trainer.checkpoint.own import CUDA, read_generators, write_generators


def test_a_ranks_own_device_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have no GPU: torch's own functions stand for two of them."""
    states = {torch.device("cuda", number): torch.full((16,), number, dtype=torch.uint8) for number in (0, 1)}
    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    found = read_generators(second)
    assert found[CUDA].tolist() == [1] * 16
    write_generators(found | {CUDA: torch.full((16,), 7, dtype=torch.uint8)}, second)
    assert [int(state[0]) for state in states.values()] == [0, 7]


def test_a_rank_on_the_cpu_has_no_random_numbers_of_a_gpu() -> None:
    assert CUDA not in read_generators(torch.device("cpu"))
