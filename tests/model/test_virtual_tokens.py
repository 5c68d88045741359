"""Prompt methods put virtual tokens before a row, which take positions of the model."""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from tests.tiny import tiny_llama
from trainer.config import (
    MethodConfig,
    ModelConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    RunConfig,
    StreamData,
    TrainConfig,
)
from trainer.errors import ConfigError
from trainer.model.methods import apply_method
from trainer.task.clm import check_positions

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.mark.parametrize("method", [PromptConfig(), PTuningConfig(), PrefixConfig()])
def test_rows_and_virtual_tokens_must_fit_the_positions_together(method: MethodConfig, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    config = RunConfig(
        name="x",
        model=ModelConfig(source=str(tmp_path), task="clm"),
        method=method,
        data=StreamData(isolate=False),
        train=TrainConfig(max_steps=1, metric="loss"),
    )
    check_positions(config, 108)
    with pytest.raises(ConfigError, match=r"\(109\) must be at most 108, .* less method\.num_virtual_tokens \(20\)"):
        check_positions(config, 109)
    bert = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=40,
    )
    for length, fits in ((20, True), (21, False)):  # the reason: an encoder has no position for the last token
        torch.manual_seed(0)
        model = apply_method(AutoModelForSequenceClassification.from_config(bert), method).eval()
        with contextlib.nullcontext() if fits else pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, length, dtype=torch.int64), attention_mask=torch.ones(1, length))
