"""`samestep parity`: what it plans, how it judges, and the recipes' own steps on several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.parity import Variant, global_batch_override, largest_relative, plan_variants, relative_distance
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "backend", "overrides"),
    [
        ("lora_sst2", "zero3", []),
        ("pretrain_clm", "zero2", []),
        ("pretrain_mlm", "fsdp", ["data.objective=mlm_nsp", "model.task=mlm_pairs"]),
        ("pretrain_t5", "fsdp", []),
        ("pretrain_bart", "zero2", []),
        ("pretrain_xlnet", "ddp", []),
        ("qa", "fsdp", []),
        ("ner", "zero2", []),
    ],
)
def test_recipes_take_the_same_steps_on_two_processes(recipe: str, backend: str, overrides: list[str]) -> None:
    argv = ["parity", f"recipes/{recipe}.py", "--backends", backend, "--processes", "2", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: every variant takes the same steps" in done.stdout
