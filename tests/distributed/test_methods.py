"""Every method on every backend: the loss of one process, a resume that is bit for bit, an export that holds what was trained."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.distributed.resume_runs import make_config, same_weights, start, train
from tests.rank_pool import BACKENDS, run_ranks
from tests.support_matrix import record
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.export import export_checkpoint, find_checkpoint
from trainer.checkpoint.manifest import read_manifest
from trainer.config import QloraConfig, RunConfig
from trainer.model.export import load_exported
from trainer.model.load import build_model
from trainer.model.methods import METHODS as METHODS_TABLE

STEPS = 6
METHODS = ("full", "head", "lora", "dora", "qlora", "prefix", "prompt", "ia3", "adapter", "bitfit")
SHARING = {"rslora": "fsdp", "vera": "zero2", "p_tuning": "zero3"}
"""Methods that share the code of these, and the cell of each that runs with the slow tests."""
COVERING = {
    ("qlora", "fsdp"), ("qlora", "zero3"), ("dora", "zero3"), ("prefix", "zero3"), ("prompt", "fsdp"),
    ("ia3", "zero2"), ("adapter", "zero3"), ("bitfit", "zero1"), ("head", "zero1"), ("prefix", "ddp"),
}  # fmt: skip
"""In the default suite: every method but full and lora, which most other tests train, on every backend that shards or reduces."""
SLOW = ("ddp", "fsdp")
"""The other cells of these, and of qlora, run with the slow tests; the rest by `launch/test.sh --all`, which runs all and fills the
README's matrix."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=96)
    return folder


def method_config(root: Path, run: Path, method: str) -> RunConfig:
    """Without dropout, which differs between numbers of ranks, and with room for virtual tokens."""
    plain = make_config(root, run, method=method, max_steps=STEPS, save_every=3, eval_every=STEPS, global_batch_size=8)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "head_dropout": 0.0}
    short = plain.data.model_copy(update={"max_length": 64})
    return plain.model_copy(update={"model": plain.model.model_copy(update=quiet), "data": short})


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
    for method, backend in itertools.product((*METHODS, *SHARING), BACKENDS):
        is_slow = SHARING[method] == backend if method in SHARING else backend in SLOW or method == "qlora"
        later = pytest.mark.slow if is_slow else pytest.mark.all
        marks = [] if (method, backend) in COVERING else [later]
        chosen.append(pytest.param(method, backend, marks=marks))
    assert len(chosen) == 78
    return chosen


@pytest.mark.parametrize(("method", "backend"), cells())
def test_a_method_trains_resumes_and_exports_on_a_backend(
    method: str, backend: str, root: Path, tmp_path: Path
) -> None:
    check_cell(method, backend, root, tmp_path)
    record(method, backend, "tested")


def check_cell(method: str, backend: str, root: Path, tmp_path: Path) -> None:
    """The losses of one process, a resume that is bit for bit, checkpoint and export of what is trained alone."""
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
        assert facts["losses"] == pytest.approx({step: expected["losses"][step] for step in (3, 4, 5)}, rel=1e-6)
        assert same_weights(facts, expected)
    trained = whole[0]["weights"]
    stored = read_manifest(find_checkpoint(config.folder)).tensors
    assert {name.removeprefix("weight/") for name in stored if name.startswith("weight/")} == trained.keys()
    assert {name.partition("/")[2] for name in stored} <= trained.keys()  # moments too: of the base there is nothing
    check_exports(config, tmp_path / "exported", trained)


def check_exports(config: RunConfig, target: Path, trained: dict[str, np.ndarray]) -> None:
    """The run's own export, and one from its last checkpoint: the same tensors, what was trained, and the logits of the trained model."""
    run = config.folder
    export_checkpoint(find_checkpoint(run), target)
    for one, other in zip(
        sorted((run / "model").glob("*.safetensors")), sorted(target.glob("*.safetensors")), strict=True
    ):
        first, second = load_file(one), load_file(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    info = json.loads((run / "model" / "samestep.json").read_text())
    assert bool(info.get("base_identity")) == METHODS_TABLE[info["method"]].is_adapter  # checked by load_exported
    model = load_exported(run / "model")[0]
    loaded = dict(model.named_parameters())
    if info["method"] != "p_tuning":  # whose network is exported as the vectors that it makes
        assert trained.keys() <= loaded.keys()
        assert all(np.array_equal(loaded[name].detach().numpy(), array) for name, array in trained.items())
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        expected = rebuilt(config, trained)(input_ids=ids).logits
        # not bit for bit: in training LoRA's scale comes before the second factor
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)


def rebuilt(config: RunConfig, trained: dict[str, np.ndarray]) -> torch.nn.Module:
    """The model as a run builds it, with the trained weights put in by name."""
    model = build_model(config, ("negative", "positive"), Accelerator(cpu=True)).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in trained.items():
            parameters[name].copy_(torch.from_numpy(array))
    return model


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


_single_int8: list[float] = []


@pytest.mark.parametrize(
    "backend", ["ddp", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2"))]
)
def test_eight_bits_train_the_same_on_a_backend_that_keeps_parameters(backend: str, root: Path, tmp_path: Path) -> None:
    if not _single_int8:
        one = start(int8_config(root, tmp_path / "single"), "single", 1)
        assert one is not None
        _single_int8.extend(one[0]["losses"].values())
    two = start(int8_config(root, tmp_path / backend), backend, 2)
    assert two is not None
    assert [facts["error"] for facts in two] == [None, None]
    summed = [sum(facts["losses"][step] for facts in two) for step in range(STEPS)]
    assert summed == pytest.approx(_single_int8, rel=1e-5)


def test_eight_bits_are_refused_on_fsdp_for_a_reason_that_still_stands(root: Path, tmp_path: Path) -> None:
    refused = start(int8_config(root, tmp_path / "refused"), "fsdp", 2)
    assert refused is not None
    assert all("method.quantize (int8) does not run on fsdp" in facts["error"] for facts in refused)
    died = run_ranks(train_unchecked, "fsdp", 2, args=(int8_config(root, tmp_path / "unchecked"),))
    assert all("'CB'" in message for message in died)  # remove the refusal when this fails
