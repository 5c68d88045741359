"""What one rank alone keeps: the random numbers of its own device, not of the one that happens to be current."""

import pytest
import torch

from trainer.checkpoint.own import read_generators, write_generators

CUDA = "rng/cuda"


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


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_another_accelerator_is_read_and_written_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mps has one device, and takes no number."""
    state = {"now": torch.full((16,), 1, dtype=torch.uint8)}
    module = torch.get_device_module(kind)
    monkeypatch.setattr(
        module, "get_rng_state", lambda *place: state["now"] if bool(place) == (kind != "mps") else None
    )
    monkeypatch.setattr(module, "set_rng_state", lambda given, *place: state.update(now=given))
    device = torch.device(kind, 0)
    found = read_generators(device)
    assert found[f"rng/{kind}"].tolist() == [1] * 16
    write_generators(found | {f"rng/{kind}": torch.full((16,), 7, dtype=torch.uint8)}, device)
    assert state["now"].tolist() == [7] * 16


def test_a_rank_on_the_cpu_has_no_random_numbers_of_a_gpu() -> None:
    assert CUDA not in read_generators(torch.device("cpu"))
