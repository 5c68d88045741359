"""`samestep methods --measure`: real trainings of a tiny model on real sentences, and what is said of one that fails."""

from pathlib import Path

import pytest

from launch.methods_measure import RECIPE, in_process, measure_methods, train
from tests.tiny import tiny_bert
from trainer.config import LoraConfig
from trainer.errors import ConfigError


def test_a_training_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(
        ConfigError, match=r"optim\.peek_lr=1 failed with exit code 2:\n(.|\n)*did you mean `optim.peak_lr`"
    ):
        in_process(train, [str(RECIPE), "optim.peek_lr=1"])


@pytest.mark.slow
def test_a_method_and_a_model_from_random_weights_are_measured(tmp_path: Path) -> None:
    base = tiny_bert(tmp_path / "base")
    lora, scratch = measure_methods(str(base), [LoraConfig(rank=2, targets=("query",))], steps=2)
    assert (lora.method, scratch.method) == ("lora", "scratch")
    for row in (lora, scratch):
        assert 0.3 < row.accuracy < 0.7
        assert min(row.train_per_s, row.predict_per_s, row.base_per_s) > 0
        assert row.peak_bytes > 2e8
    head = 4 * (2 * 32 + 2)
    assert 4 * 2 * 2 * (32 + 32) + head < lora.saved_bytes < 4_000 < scratch.saved_bytes
