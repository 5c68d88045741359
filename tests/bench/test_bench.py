"""Every benchmark starts: none imports what the project no longer has, and none stops at the run that the demo has left."""

import importlib
from pathlib import Path

import pytest

from recipes.lora_sst2 import DEFAULTS
from tests.bench.timing import LORA_SST2
from trainer.checkpoint.resume import OUTCOME, decide_start


@pytest.mark.parametrize("name", sorted(file.stem for file in Path(__file__).parent.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"tests.bench.{name}")
    assert callable(getattr(module, "main", None)) == name.startswith("bench_")


def test_the_finished_run_of_the_demo_does_not_stop_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LORA_SST2.folder.mkdir(parents=True)
    (LORA_SST2.folder / OUTCOME).write_text('{"outcome": "finished"}', encoding="utf-8")
    assert decide_start(DEFAULTS).kind == "finished"
    assert decide_start(LORA_SST2).kind == "fresh"
