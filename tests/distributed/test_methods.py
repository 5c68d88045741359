"""Every method on every backend: the loss of one process, a resume that is bit for bit, an export that holds what was trained."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.resume_runs import make_config, same_weights, start, train
from tests.rank_pool import BACKENDS, run_ranks
from tests.support_matrix import record
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.export import export_checkpoint, find_checkpoint
from trainer.config import QloraConfig, RunConfig
from trainer.model.export import load_exported
from trainer.model.methods import METHODS as METHODS_TABLE

STEPS = 6
METHODS = ("full", "head", "lora", "dora", "qlora", "prefix", "prompt", "ia3", "adapter", "bitfit")
COVERING = {
    ("qlora", "fsdp"), ("qlora", "zero3"), ("dora", "zero3"), ("dora", "fsdp"), ("prefix", "zero3"), ("prompt", "fsdp"),
    ("ia3", "zero2"), ("adapter", "zero3"), ("bitfit", "zero1"), ("head", "zero1"), ("prefix", "ddp"), ("adapter", "fsdp"),
}  # fmt: skip
"""In the default suite: every method, every backend."""
SLOW = ("ddp", "fsdp")
"""The other cells of these run with the slow tests, the rest by `launch/test.sh --all`, which runs all and fills the README's matrix."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=96)
    return folder


def method_config(root: Path, run: Path, method: str) -> RunConfig:
    """Without dropout, which differs between numbers of ranks."""
    plain = make_config(root, run, method=method, max_steps=STEPS, save_every=3, eval_every=STEPS, global_batch_size=8)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "head_dropout": 0.0}
    return plain.model_copy(update={"model": plain.model.model_copy(update=quiet)})


_single: dict[str, list[float]] = {}


def losses_of_single(root: Path, method: str) -> list[float]:
    """Of one process, trained once for all tests of a method."""
    if method not in _single:
        seen = start(method_config(root, root / f"single-{method}", method), "single", 1)
        assert seen is not None
        assert seen[0]["error"] is None
        _single[method] = list(seen[0]["losses"].values())
    return _single[method]


def cells() -> list[Any]:
    chosen = []
    for method, backend in itertools.product(METHODS, BACKENDS):
        later = pytest.mark.slow if backend in SLOW else pytest.mark.all
        marks = [] if (method, backend) in COVERING else [later]
        chosen.append(pytest.param(method, backend, marks=marks))
    assert len(chosen) == 60
    return chosen


@pytest.mark.parametrize(("method", "backend"), cells())
def test_a_method_trains_resumes_and_exports_on_a_backend(
    method: str, backend: str, root: Path, tmp_path: Path
) -> None:
    ranks = 1 if backend == "single" else 2
    config = method_config(root, tmp_path / "run", method)
    whole = start(config, backend, ranks)
    assert whole is not None
    assert [facts["error"] for facts in whole] == [None] * ranks
    summed = [sum(facts["losses"][step] for facts in whole) for step in range(STEPS)]
    assert summed == pytest.approx(losses_of_single(root, method), rel=1e-5)
    assert max(summed) - min(summed) > 1e-3

    again = method_config(root, tmp_path / "again", method)
    stopped = start(again, backend, ranks, fault=f"step@{ranks - 1}:3:usr1")
    assert stopped is not None
    assert {facts["step"] for facts in stopped} == {3}
    resumed = start(again, backend, ranks)
    assert resumed is not None
    for facts, expected in zip(resumed, whole, strict=True):
        assert facts["error"] is None
        assert sorted(facts["losses"]) == [3, 4, 5]
        assert same_weights(facts, expected)
    check_exports(config.folder, tmp_path / "exported", whole[0]["weights"])
    record(method, backend, "tested")


def check_exports(run: Path, target: Path, trained: dict[str, np.ndarray]) -> None:
    """The run's own export, and one from its last checkpoint: the same tensors, and what was trained."""
    export_checkpoint(find_checkpoint(run), target)
    for one, other in zip(
        sorted((run / "model").glob("*.safetensors")), sorted(target.glob("*.safetensors")), strict=True
    ):
        first, second = load_file(one), load_file(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    info = json.loads((run / "model" / "samestep.json").read_text())
    assert bool(info.get("base_identity")) == METHODS_TABLE[info["method"]].is_adapter  # checked by load_exported
    loaded = dict(load_exported(run / "model")[0].named_parameters())
    for name, array in trained.items():
        if name in loaded:
            assert np.array_equal(loaded[name].detach().numpy(), array), name


def int8_config(root: Path, run: Path) -> RunConfig:
    config = method_config(root, run, "qlora")
    return config.model_copy(update={"method": QloraConfig(quantize="int8")})


def train_unchecked(config: RunConfig) -> str:
    """One start without our refusal; what it died of."""
    import trainer.model.methods as table

    table.REPLACES_PARAMETERS = ()
    try:
        train(config)
    except AttributeError as error:
        return str(error)
    return "it trained"


def test_eight_bits_train_the_same_on_a_backend_that_keeps_parameters(root: Path, tmp_path: Path) -> None:
    one = start(int8_config(root, tmp_path / "single"), "single", 1)
    two = start(int8_config(root, tmp_path / "ddp"), "ddp", 2)
    assert one is not None
    assert two is not None
    summed = [sum(facts["losses"][step] for facts in two) for step in range(STEPS)]
    assert summed == pytest.approx(list(one[0]["losses"].values()), rel=1e-5)


def test_eight_bits_are_refused_on_fsdp_for_a_reason_that_still_stands(root: Path, tmp_path: Path) -> None:
    refused = start(int8_config(root, tmp_path / "refused"), "fsdp", 2)
    assert refused is not None
    assert all("method.quantize (int8) does not run on fsdp" in facts["error"] for facts in refused)
    died = run_ranks(train_unchecked, "fsdp", 2, args=(int8_config(root, tmp_path / "unchecked"),))
    assert all("'CB'" in message for message in died)  # remove the refusal when this fails
