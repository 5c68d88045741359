"""Parity's promise and its teeth: all backends take the same steps, and every planted fault is found on every backend it applies to."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.parity import Record, compare, judge, verdict
from launch.parity_plan import Variant
from tests.distributed.parity_runs import BATCH, FAULTS, measure
from tests.rank_pool import BACKENDS
from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import FullConfig, LoraConfig, MethodConfig
from trainer.data.batches import rank_share
from trainer.probe import count_hidden, digest_of, digest_of_samples

Expected = Callable[[str, int], Record]
METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "lora": LoraConfig(rank=3, alpha=6, dropout=0.1, targets=("query", "value")),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    tiny_bert(folder / "model")
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> Expected:
    """The whole global batch on one process, by method and size; recorded once."""

    @cache
    def recorded(name: str, batch: int) -> Record:
        return measure(root, "single", 1, batch=batch, method=METHODS[name])[0]

    return recorded


@pytest.fixture
def reference(expected: Expected) -> Record:
    return expected("full", BATCH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_planted_fault_is_found_and_a_sound_run_is_not(backend: str, root: Path, reference: Record) -> None:
    # a split into micro-batches of 6, so that accumulation faults apply to single too
    faults: list[str | None] = [None, *FAULTS]
    found = measure(root, backend, 1 if backend == "single" else 2, faults=faults, micros=[6])
    verdicts = {fault: verdict(compare(reference, one), None) for fault, one in zip(faults, found, strict=True)}
    assert verdicts.pop(None) == "same"
    assert {fault: word for fault, word in verdicts.items() if word == "same"} == {}
    assert "samples differ" in verdicts["swapped_batch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "batch", "micros"), [("full", BATCH, (None, 3)), ("full", 48, (4, 16)), ("lora", 48, (4, 16))]
)
def test_three_processes_and_every_split_take_the_same_step(
    name: str, batch: int, micros: tuple[int | None, ...], backend: str, root: Path, expected: Expected
) -> None:
    """48 on three ranks: 4x4 and 16x1 of each; on one, 4x12 and 16x3. 24: whole shares of 8, and 3, 3, 2 of them."""
    ranks = 1 if backend == "single" else 3
    found = measure(root, backend, ranks, micros=micros, batch=batch, method=METHODS[name])
    words = [verdict(compare(expected(name, batch), one), None) for one in found]
    assert words == ["same"] * len(micros)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_no_farther_from_fp32_than_single_is(backend: str, root: Path, reference: Record) -> None:
    variants = [Variant("single"), Variant("single", precision="bf16"), Variant(backend, 2, precision="bf16")]
    single = measure(root, "single", 1, precision="bf16")[0]
    other = measure(root, backend, 1 if backend == "single" else 2, precision="bf16")[0]
    rows = judge(variants, [reference, single, other])
    assert [word for _, _, word in rows] == ["same", "same"]
    assert rows[0][1].gradient > 1e-4  # bf16 did happen


@pytest.mark.slow
def test_losses_agree_over_200_steps(root: Path) -> None:
    expected = measure(root, "single", 1, steps=200)[0]
    for backend in BACKENDS[1:]:
        found = measure(root, backend, 2, steps=200)[0]
        assert compare(expected, found).loss < 1e-5, backend


def test_learning_rate_does_not_depend_on_the_number_of_processes(root: Path, reference: Record) -> None:
    for world_size in (2, 3):
        found = measure(root, "ddp", world_size)[0]
        assert found.series("lr") == reference.series("lr")
    assert len(set(reference.series("lr"))) > 1


def test_ranks_hold_unequal_numbers_of_targets_in_every_step(root: Path, reference: Record) -> None:
    found = measure(root, "ddp", 2)[0]
    assert [step["targets_per_rank"] for step in found.facts["steps"]] == [[6, 12]] * 5
    steps = [dict(step) for step in found.facts["steps"]]
    steps[3]["targets_per_rank"] = [9, 9]
    equal = Record("x", found.facts | {"steps": steps}, found.tensors)
    assert "every rank had the same number of targets in step 4" in verdict(compare(reference, equal), None)


def test_hidden_labels_leave_ranks_unequal_for_any_batch_and_number_of_ranks() -> None:
    for size in range(1, 66):
        assert 0 <= count_hidden(size) < size
        visible = np.arange(size) >= count_hidden(size)
        for ranks in range(2, 10):
            counts = {int(visible[rank_share(np.arange(size), rank, ranks)].sum()) for rank in range(ranks)}
            assert len(counts) > 1, (size, ranks)
    assert count_hidden(1000) == 250


def test_sample_digest_depends_on_tokens_but_not_on_padding_or_on_who_reads_what() -> None:
    def digest(*rows: list[int], width: int = 4) -> int:
        ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return digest_of_samples({"input_ids": ids, "attention_mask": mask})

    assert digest([1, 2, 3], [4, 5]) == digest([4, 5], [1, 2, 3], width=7)
    assert digest([1, 2, 3], [4, 5]) == (digest([1, 2, 3]) + digest([4, 5])) % 2**64
    assert digest([1, 2]) == digest_of_samples({"input_ids": torch.tensor([[1, 2]])})
    padded = {
        "input_ids": torch.tensor([[1, 2, 0, 0]]),
        "num_tokens": torch.tensor([2]),
    }  # as rows of conversations are
    assert digest([1, 2]) == digest_of_samples(padded)
    assert len({digest([1, 2]), digest([2, 1]), digest([1, 2, 2]), digest([1], [2]), digest([1, 3])}) == 5


def test_weights_digest_tells_values_apart_but_not_the_sign_of_zero() -> None:
    assert digest_of({"a": torch.tensor([0.0, 1.0])}) == digest_of({"a": torch.tensor([-0.0, 1.0])})
    assert digest_of({"a": torch.tensor([0.0, 1.0])}) != digest_of({"a": torch.tensor([1e-38, 1.0])})
    assert digest_of({"a": torch.tensor([0.0])}) != digest_of({"b": torch.tensor([0.0])})


def test_a_different_start_or_a_missing_tensor_is_no_parity(reference: Record) -> None:
    changed = Record("x", reference.facts | {"weights_before": "other"}, reference.tensors)
    assert "starting weights differ" in verdict(compare(reference, changed), None)
    fewer = Record("x", reference.facts, dict(list(reference.tensors.items())[1:]))
    assert math.isinf(compare(reference, fewer).gradient)
