"""Killed and started again, bit for bit: gradients in several buckets, whose order decides how ranks add, and adapters with dropout."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.resume_runs import (
    NUM_STEPS,
    make_config,
    metrics_of,
    same_weights,
    saved_at_the_end,
    start,
    train,
)
from tests.tiny import tiny_bert, tiny_sentences
from trainer.backend import wrap
from trainer.config import FullConfig, LoraConfig, MethodConfig, QloraConfig, RunConfig

BUCKETS = [
    pytest.param("ddp", 3, marks=pytest.mark.slow),
    *[pytest.param(b, 2, marks=pytest.mark.slow) for b in ("fsdp", "zero1", "zero2", "zero3")],
]
ADAPTERS = [
    ("ddp", 3),
    *[pytest.param(b, 3, marks=pytest.mark.slow) for b in ("fsdp", "zero1", "zero2", "zero3")],
    pytest.param("single", 1, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    tiny_bert(folder / "model", hidden_size=256)
    tiny_sentences(folder / "data.csv", rows=160)
    return folder


def train_in_buckets(config: RunConfig) -> dict[str, Any]:
    """As `train`, with DeepSpeed's buckets smaller than this model; DDP's first one, of 1 MiB, is smaller anyway."""
    wrap.MAX_BUCKET_ELEMENTS = 400_000
    return train(config)


def assert_killed_run_equals_whole(
    root: Path, folder: Path, backend: str, ranks: int, method: MethodConfig
) -> list[Any]:
    """Train without end, and killed in the sixth step on the last rank and started again. What the ranks saw."""
    plain = make_config(root, folder / "whole", eval_every=NUM_STEPS, log_every=1).model_copy(update={"method": method})
    whole = start(plain, backend, ranks, body=train_in_buckets)
    config = plain.model_copy(update={"run_dir": folder / "killed"})
    assert start(config, backend, ranks, fault=f"step@{ranks - 1}:6", body=train_in_buckets) is None
    seen = start(config, backend, ranks, body=train_in_buckets)
    assert whole is not None
    assert seen is not None
    for facts, expected in zip(seen, whole, strict=True):
        assert (facts["error"], expected["error"]) == (None, None)
        assert min(facts["losses"]) in (2, 4)  # the newest checkpoint was found
        assert same_weights(facts, expected)
        assert facts["counters"] == expected["counters"]
    assert metrics_of(config.folder) == metrics_of(folder / "whole")
    assert saved_at_the_end(config.folder) == saved_at_the_end(folder / "whole")
    return seen


@pytest.mark.parametrize(("backend", "ranks"), BUCKETS)
def test_gradients_in_several_buckets_continue_bit_for_bit(
    backend: str, ranks: int, root: Path, tmp_path: Path
) -> None:
    seen = assert_killed_run_equals_whole(root, tmp_path, backend, ranks, FullConfig())
    assert all(facts["num_buckets"] > 1 for facts in seen)


@pytest.mark.parametrize(("backend", "ranks"), ADAPTERS)
def test_adapters_with_dropout_continue_bit_for_bit_after_a_kill(
    backend: str, ranks: int, root: Path, tmp_path: Path
) -> None:
    """Dropout in the base and before the adapters' own factors."""
    assert_killed_run_equals_whole(root, tmp_path, backend, ranks, LoraConfig(dropout=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_qlora_with_dropout_continues_bit_for_bit_after_a_kill(backend: str, root: Path, tmp_path: Path) -> None:
    assert_killed_run_equals_whole(root, tmp_path, backend, 2, QloraConfig(dropout=0.1))
