"""`samestep methods`: its counts are those of models that are really built and really saved, and its chart is drawn."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from tests.test_predict import export_run
from tests.tiny import tiny_bert, tiny_llama
from trainer.config import ModelConfig
from trainer.model.estimate import estimate_methods
from trainer.model.export import read_sizes
from trainer.model.methods import METHODS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("estimate") / "base", hidden_size=64)


@pytest.mark.slow
def test_files_are_as_large_as_estimated(base: Path, tmp_path: Path) -> None:
    model = ModelConfig(source=str(base))
    found, refused = estimate_methods(model)
    assert not refused
    assert [row.method for row in found] == list(METHODS)
    for row in found:
        if METHODS[row.method].is_adapter:
            run = export_run(tmp_path / row.method, base, row.method)
            assert sum(read_sizes(run / "model").values()) * 4 == row.file_bytes, row.method


def test_a_quantized_base_takes_less_memory_and_full_training_the_most(base: Path) -> None:
    rows = {row.method: row for row in estimate_methods(ModelConfig(source=str(base)))[0]}
    assert rows["qlora"].training_bytes < rows["lora"].training_bytes < rows["full"].training_bytes
    assert rows["full"].training_bytes == 16 * rows["full"].trainable
    assert rows["lora"].share_of_matrices is not None


def test_methods_that_do_not_fit_are_named_with_the_reason(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    found, refused = estimate_methods(ModelConfig(source=str(tmp_path), task="clm"), rank=2, targets=("q_proj",))
    assert set(refused) == {"head", "bitfit"}
    assert "have none" in refused["bitfit"]
    lora = next(row for row in found if row.method == "lora")
    assert lora.trainable == 2 * 2 * (32 + 32)


def test_the_command_prints_a_row_for_each_method_and_draws_a_chart(base: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["methods", str(base), "--chart", str(tmp_path / "charts" / "bars.png")])
    assert result.exit_code == 0, result.output
    firsts = [line.split()[0] for line in result.output.splitlines()]
    assert [word for word in firsts if word in METHODS] == list(METHODS)
    assert (tmp_path / "charts" / "bars.png").read_bytes().startswith(b"\x89PNG")
