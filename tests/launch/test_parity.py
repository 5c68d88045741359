"""`samestep parity`: what it plans, how it judges, and one real run of it."""

from pathlib import Path

import pytest

from launch.parity import Variant, global_batch_override, largest_relative, plan_variants, relative_distance
from trainer.errors import ConfigError


def test_the_reference_comes_first_and_single_runs_on_one_process() -> None:
    labels = [v.label for v in plan_variants(["single", "ddp"], [1, 2, 3], [], "no")]
    assert labels == ["single x1", "ddp x2", "ddp x3"]


def test_bf16_is_measured_against_single_in_fp32_and_in_bf16() -> None:
    labels = [v.label for v in plan_variants(["single", "fsdp"], [2], [], "bf16")]
    assert labels == ["single x1", "single x1 bf16", "fsdp x2 bf16"]


def test_splits_share_one_global_batch() -> None:
    variants = plan_variants(["ddp"], [2], [(4, 4), (16, 1)], "no")
    assert global_batch_override(variants, []) == ["train.global_batch_size=32"]
    with pytest.raises(ConfigError, match=r"must give one global batch, but gives 16 .* 32"):
        global_batch_override(plan_variants(["single", "ddp"], [2], [(4, 4)], "no"), [])
    with pytest.raises(ConfigError, match=r"implies train\.global_batch_size=32, but train\.global_batch_size=8"):
        global_batch_override(variants, ["train.global_batch_size=8"])


def test_distances_are_relative_to_the_reference() -> None:
    import numpy as np

    assert largest_relative([1.0, 2.0], [1.0, 2.2]) == pytest.approx(0.1)
    assert largest_relative([1.0], [1.0, 1.0]) == float("inf")
    one, two = {"gradient.w": np.array([3.0, 4.0], "f4")}, {"gradient.w": np.array([3.0, 4.5], "f4")}
    assert relative_distance(one, two, "gradient.") == pytest.approx(0.1)


def test_variant_label_names_backend_processes_split_and_precision() -> None:
    assert Variant("zero3", 2, 4, 4, "bf16").label == "zero3 x2 4x4 bf16"
    assert Path(Variant("zero3", 2).label.replace(" ", "_")).name == "zero3_x2"
