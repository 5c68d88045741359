"""Trained weights that a loss does not reach: never (XLNet's mask_emb in classification), or not in every pass (idle experts)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import BertConfig

from tests.rank_pool import BACKENDS, run_ranks
from trainer.backend import build_accelerator, build_engine
from trainer.config import RunConfig, TrainConfig

STEPS, LR = 3, 1e-2
SHARDED = BACKENDS[2:]
BOTH = ((0, 1),)
"""Every pass goes through both experts."""
SPLIT = ((0,), (1,))
"""A rank's first pass goes through the one expert, its second through the other."""
AMONG_RANKS = (((0,),), ((1,),))
"""One rank goes through the one expert, the other through the other."""


@dataclass(frozen=True)
class Case:
    """Which experts the passes of each rank go through, in every step."""

    passes_of_rank: tuple[tuple[tuple[int, ...], ...], ...]
    find: bool = False
    """train.ddp_find_unused_parameters."""
    from_step: int = 0
    """Before it every pass goes through both experts."""
    decay: float = 0.0


class Experts(torch.nn.Module):
    """Two experts and a weight that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = BertConfig()  # where ZeRO looks for a size
        self.unread = torch.nn.Parameter(torch.ones(4, 4))
        self.shared = torch.nn.Linear(4, 4)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, inputs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        shared = self.shared(inputs)
        return torch.stack([self.experts[int(expert)](shared).square().sum() for expert in experts]).sum()


def train(case: Case) -> list[tuple[float, dict[str, Any]]]:
    """Norm and weights after each step; runs on every rank."""
    settings = TrainConfig(max_steps=STEPS, global_batch_size=8, ddp_find_unused_parameters=case.find)
    accelerator = build_accelerator(RunConfig(name="t", train=settings))
    model = Experts()
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=case.decay))
    found = []
    for step in range(STEPS):
        passes = case.passes_of_rank[engine.rank] if step >= case.from_step else BOTH
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for position, experts in enumerate(passes):
            with engine.micro_batch(last=position == len(passes) - 1):
                engine.backward(engine.forward({"inputs": inputs, "experts": torch.tensor(experts)}))
        norm = engine.grad_norm()
        engine.step(norm, None)
        found.append((norm, {name: weight.clone().numpy() for name, weight in engine.weights(trainable_only=True)}))
    return found


def assert_steps_of_one_process(ranks: list[list[tuple[float, dict[str, Any]]]], passes: Any) -> None:
    (expected,) = run_ranks(train, "single", 1, args=(Case((passes,)),))
    for found in ranks:
        for (norm, weights), (wanted_norm, wanted) in zip(found, expected, strict=True):
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
            for name, weight in wanted.items():
                assert weights[name] == pytest.approx(weight, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("backend", SHARDED)
def test_a_weight_that_no_pass_reaches_is_left_as_on_one_process(backend: str) -> None:
    assert_steps_of_one_process(run_ranks(train, backend, args=(Case((BOTH, BOTH)),)), BOTH * 2)


@pytest.mark.parametrize("backend", SHARDED)
def test_zero_decays_a_weight_that_no_pass_reaches_and_fsdp_does_not(backend: str) -> None:
    """DeepSpeed steps whole partitions; torch's AdamW passes a weight without a gradient over."""
    for found in run_ranks(train, backend, args=(Case((BOTH, BOTH), decay=0.5),)):
        left = 1.0 if backend == "fsdp" else (1 - LR * 0.5) ** STEPS
        assert found[-1][1]["unread"] == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("passes_of_rank", [AMONG_RANKS, (SPLIT, ((0, 1), (0,)))], ids=["ranks", "passes"])
def test_ddp_finds_the_weights_that_some_passes_do_not_reach(passes_of_rank: Any) -> None:
    ranks = run_ranks(train, "ddp", args=(Case(passes_of_rank, find=True),))
    assert_steps_of_one_process(ranks, (*passes_of_rank[0], *passes_of_rank[1]))


def test_ddp_names_a_weight_that_no_pass_reaches_in_the_first_step() -> None:
    """DDP's own error comes in the second forward pass, after a step with gradients that were not reduced."""
    with pytest.raises(
        AssertionError, match=r"BackendError: 1 trained weights, such as unread, have no part .*_parameters=true"
    ):
        run_ranks(train, "ddp", args=(Case((BOTH, BOTH)),))


@pytest.mark.parametrize("case", [Case(AMONG_RANKS), Case((SPLIT, SPLIT))], ids=["ranks", "passes"])
@pytest.mark.parametrize("backend", SHARDED)
def test_passes_that_reach_different_weights_end_the_run(backend: str, case: Case) -> None:
    """Measured before there was a check: norms of 39.6 on fsdp and 32.5 on zero1 and zero2 where one process had 36.2."""
    assert_refused(backend, case)


@pytest.mark.parametrize("backend", ["fsdp", "zero1", "zero2"])
def test_passes_that_begin_to_reach_different_weights_end_the_run(backend: str) -> None:
    """Not zero3: it gathers weights in the order of the first step, and hangs where a rank leaves one out; the watchdog ends that."""
    assert_refused(backend, Case(AMONG_RANKS, from_step=1))


def assert_refused(backend: str, case: Case) -> None:
    with pytest.raises(
        AssertionError, match=r"BackendError: . trained weights, such as experts.*_unused_parameters=true"
    ):
        run_ranks(train, backend, args=(case,))


def resume(backend_find: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Weights after four steps in one go, and with a restored state after two; what was saved of single weights' steps."""
    settings = TrainConfig(max_steps=4, global_batch_size=8, ddp_find_unused_parameters=backend_find)
    accelerator = build_accelerator(RunConfig(name="t", train=settings))

    def fresh() -> Any:
        model = Experts()
        return build_engine(accelerator, model, torch.optim.AdamW(model.parameters(), lr=LR))

    def steps(engine: Any, numbers: range) -> None:
        for step in numbers:
            experts = torch.tensor([0, 1] if step % 2 else [0])
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            with engine.micro_batch(last=True):
                engine.backward(engine.forward({"inputs": inputs, "experts": experts}))
            engine.step(engine.grad_norm(), None)

    def weights(engine: Any) -> dict[str, Any]:
        return {name: weight.clone().numpy() for name, weight in engine.weights(trainable_only=True)}

    whole, again = fresh(), fresh()
    steps(whole, range(2))
    saved = {piece.key: piece.values.clone() for piece in whole.local_state()}
    taken, own = whole.optimizer_steps, whole.own_steps
    for piece in again.local_state():
        piece.values.copy_(saved[piece.key])
    again.state_was_written(taken, own)
    for engine in (whole, again):
        steps(engine, range(2, 4))
    return weights(whole), weights(again), own


@pytest.mark.parametrize(("backend", "ranks"), [("single", 1), ("ddp", 2)])
def test_a_weight_that_some_steps_did_not_reach_resumes_exactly(backend: str, ranks: int) -> None:
    """AdamW counts its steps apart, and its bias correction depends on them."""
    for whole, again, own in run_ranks(resume, backend, ranks, args=(backend == "ddp",)):
        assert own == {"unread": 0, "experts.1.weight": 1, "experts.1.bias": 1}
        for name, weight in whole.items():
            assert (weight == again[name]).all(), name
