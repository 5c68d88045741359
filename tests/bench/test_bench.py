"""Every benchmark starts: none imports what the project no longer has."""

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", sorted(file.stem for file in Path(__file__).parent.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"tests.bench.{name}")
    assert callable(getattr(module, "main", None)) == name.startswith("bench_")
