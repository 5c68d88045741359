"""Blended embeddings: what the model is given, what it refuses, and that it stays what it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.tiny import tiny_bert
from trainer.errors import ConfigError
from trainer.model.mixup import blend_embeddings

OWN, OTHERS = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]]), torch.tensor([[2, 11, 3, 0], [2, 12, 13, 3]])
MASK, SHARE = torch.ones(2, 4, dtype=torch.int64), torch.tensor([0.75, 0.6])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path / "bert")).eval()


def test_the_model_reads_the_weighted_mean_of_both_texts_embeddings(model: Any) -> None:
    words = model.bert.embeddings.word_embeddings.weight
    mean = SHARE[:, None, None] * words[OWN] + (1 - SHARE[:, None, None]) * words[OTHERS]
    expected = model(inputs_embeds=mean, attention_mask=MASK).logits
    names = list(model.state_dict())
    blend_embeddings(model)
    found = model(input_ids=OWN, mix_ids=OTHERS, mix_share=SHARE, attention_mask=MASK).logits
    torch.testing.assert_close(found, expected)
    assert list(model.state_dict()) == names


def test_without_partners_the_model_is_what_it_was(model: Any) -> None:
    expected = model(input_ids=OWN, attention_mask=MASK).logits
    blend_embeddings(model)
    assert torch.equal(model(input_ids=OWN, attention_mask=MASK).logits, expected)
    assert not torch.equal(model(input_ids=OWN, mix_ids=OTHERS, mix_share=SHARE, attention_mask=MASK).logits, expected)


def test_embeddings_learn_from_both_texts(model: Any) -> None:
    blend_embeddings(model)
    model(input_ids=OWN, mix_ids=OTHERS, mix_share=SHARE, attention_mask=MASK).logits.sum().backward()
    learned = model.bert.embeddings.word_embeddings.weight.grad.abs().sum(1) > 0
    assert learned[[7, 8, 9, 11, 12, 13]].all() and not learned[[14, 15]].any()


def test_encoders_of_other_families_can_blend() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, max_position_embeddings=20, **small))
    distil = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    )
    for model in (roberta, distil):
        model.eval()
        blend_embeddings(model)
        plain = model(input_ids=OWN, attention_mask=MASK).logits
        assert not torch.equal(model(input_ids=OWN, mix_ids=OTHERS, mix_share=SHARE, attention_mask=MASK).logits, plain)


def test_a_model_that_looks_for_the_end_of_a_text_in_its_tokens_is_refused() -> None:
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    with pytest.raises(ConfigError, match=r"\(mixup\) cannot work with GPT2ForSequenceClassification.*leave mixup out"):
        blend_embeddings(GPT2ForSequenceClassification(config))
