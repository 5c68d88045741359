"""A classification head of samestep's own, on the first token or the mean of all: one or two layers.

Below trainer/model/architecture.py, which takes `pooled_class` in place of transformers' class where model.pooling says so. The class is
transformers' own but for its head and its forward pass, so that saving, PEFT, checkpoints and sharding find what they know; the settings
stand in config.json as `pooled_head`. Plain transformers cannot rebuild the head: trainer/model/export.py's load_exported does.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from trainer.config import ModelConfig
from trainer.errors import ConfigError

BIDIRECTIONAL = ("xlnet",)
"""Architectures with a causal language model and without a masked one, whose tokens see what follows all the same."""


class PooledHead(nn.Module):
    """Dropout and a linear layer; with two layers a linear layer and tanh before them."""

    def __init__(self, width: int, num_outputs: int, *, layers: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width) if layers == 2 else None
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(width, num_outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, width) -> logits (B, C)."""
        if self.dense is not None:
            pooled = torch.tanh(self.dense(pooled))
        return cast(Tensor, self.out_proj(self.dropout(pooled)))


class Pooled:
    """Goes before a `*ForSequenceClassification` class; see `pooled_class`."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of transformers' class, which stands behind this one
        replace_head(cast(PreTrainedModel, self), config)

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        *,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PreTrainedModel:
        """The model with new weights, as transformers' Auto classes make one."""
        made = cast(Any, cls)._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
        return cast(PreTrainedModel, made)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """`.logits` (B, C). Token inputs are (B, T); the losses are the task's, so labels must be None. PEFT names all of these."""
        assert labels is None, "the loss is computed outside the model"
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        model = cast(Any, self)
        given = {name: value for name, value in inputs.items() if value is not None}
        outputs = model.base_model(**given, return_dict=True)
        pooled = pool(outputs[0], attention_mask, model.config.pooled_head["pooling"])
        return SequenceClassifierOutput(
            logits=model.classifier(pooled),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, W) in the dtype of `hidden` (B, T, W): its first token, or the mean in fp32 of those that the mask (B, T) shows."""
    if pooling == "first":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.float().mean(dim=1).to(hidden.dtype)
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    return ((hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)).to(hidden.dtype)


@functools.cache
def pooled_class(kind: type[PreTrainedModel]) -> Any:
    """transformers' class with our head and forward pass, such as PooledBertForSequenceClassification.

    A class and no changed instance, so that from_pretrained draws the head as the architecture does, and reads it back. It stands in
    the module of the original, where transformers looks for the attention kernels that it supports.
    """
    return type(f"Pooled{kind.__name__}", (Pooled, kind), {"__module__": kind.__module__})


def replace_head(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Put a PooledHead in place of all that stands beside the encoder, and take the encoder's own pooler away. In place."""
    encoder: Any = model.base_model
    for name, child in list(model.named_children()):
        if child is not encoder:
            delattr(model, name)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    settings = cast(Any, config).pooled_head
    cast(Any, model).classifier = PooledHead(
        encoder_width(config), cast(int, config.num_labels), layers=settings["layers"], dropout=settings["dropout"]
    )


def encoder_width(config: PretrainedConfig) -> int:
    """Of the last layer's outputs. OPT may project them from its hidden size."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def check_pooling(model: ModelConfig, architecture: PretrainedConfig) -> None:
    """ConfigError for an architecture whose last layer cannot be pooled as model.pooling says."""
    kind = type(architecture)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or architecture.is_encoder_decoder:
        why = "is an encoder and a decoder" if architecture.is_encoder_decoder else "is no encoder of transformers"
        raise ConfigError(
            f"model.pooling ({model.pooling}) reads the last layer of one stack, and {architecture.model_type} {why}; set "
            "model.pooling=model"
        )
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if model.pooling == "first" and causal and architecture.model_type not in BIDIRECTIONAL:
        raise ConfigError(
            f"model.pooling (first): the first token of {architecture.model_type}, a decoder, sees no other token; use "
            "model.pooling=mean, or model.pooling=model, which reads the last token"
        )
