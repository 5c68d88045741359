"""`samestep parity`: what it plans, how it judges, and the recipes' own steps on several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.parity import largest_relative, relative_distance

ROOT = Path(__file__).parents[2]


def test_distances_are_relative_to_the_reference() -> None:
    import numpy as np

    assert largest_relative([1.0, 2.0], [1.0, 2.2]) == pytest.approx(0.1)
    assert largest_relative([1.0], [1.0, 1.0]) == float("inf")
    one, two = {"gradient.w": np.array([3.0, 4.0], "f4")}, {"gradient.w": np.array([3.0, 4.5], "f4")}
    assert relative_distance(one, two, "gradient.") == pytest.approx(0.1)


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
