"""The head is found by structure, on every kind of classification model."""

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from trainer.model.heads import encoder_of, head_modules, head_parameters

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = {
    "bert": (BertConfig(**SMALL), ("classifier",)),
    "roberta": (RobertaConfig(**SMALL), ("classifier",)),
    "albert": (AlbertConfig(embedding_size=8, **SMALL), ("classifier",)),
    "distilbert": (DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32), ("pre_classifier", "classifier")),
    "gpt2": (GPT2Config(n_embd=16, n_layer=2, n_head=2), ("score",)),
    "llama": (LlamaConfig(num_key_value_heads=2, **SMALL), ("score",)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_is_what_stands_beside_the_encoder(name: str) -> None:
    model, expected = build(*ARCHITECTURES[name])
    assert head_modules(model) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_and_encoder_are_the_whole_model(name: str) -> None:
    model, _ = build(*ARCHITECTURES[name])
    parts = [*encoder_of(model).parameters(), *head_parameters(model)]
    assert {id(p) for p in parts} == {id(p) for p in model.parameters()}
    assert len(parts) == len(list(model.parameters()))


def test_pooler_of_bert_belongs_to_the_encoder() -> None:
    model, _ = build(*ARCHITECTURES["bert"])
    pooler = {id(p) for p in model.get_submodule("bert.pooler").parameters()}
    assert pooler and not pooler & {id(p) for p in head_parameters(model)}


def build(architecture: PretrainedConfig, expected: tuple[str, ...]) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(architecture), expected
