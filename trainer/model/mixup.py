"""Blended word embeddings inside the model's own forward pass, so that every backend gathers the weights that it needs as always.

Called by `build_model` before a backend wraps the model. Invariant: without `mix_ids` the model is what it was, and names of
parameters and modules never change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError

MIX_IDS, MIX_SHARE = "mix_ids", "mix_share"
"""Inputs of a blended batch: (B, T) int64 tokens of the partners, and (B,) fp32 shares of the samples themselves."""


def blend_embeddings(model: nn.Module) -> None:
    """Let `model` also take `mix_ids` and `mix_share`. ConfigError for a model that reads embeddings otherwise than tokens.

    The forward method of this one object is replaced. A module around the model would give every parameter another name, in
    checkpoints, exports and optimizer groups; embeddings looked up outside of the forward pass would meet shards.
    """
    plain: Callable[..., Any] = model.forward

    def forward(
        input_ids: Tensor | None = None, mix_ids: Tensor | None = None, mix_share: Tensor | None = None, **inputs: Any
    ) -> Any:
        if input_ids is None or mix_ids is None or mix_share is None:
            return plain(input_ids=input_ids, **inputs)
        return plain(inputs_embeds=blended(model, input_ids, mix_ids, mix_share), **inputs)

    check_reads_embeddings(model)
    model.forward = forward


def blended(model: Any, input_ids: Tensor, mix_ids: Tensor, mix_share: Tensor) -> Tensor:
    """(B, T, H): share x the samples' embeddings + (1 - share) x the partners'; one look-up for both."""
    own, others = model.get_input_embeddings()(torch.cat([input_ids, mix_ids])).chunk(2)
    share = mix_share.to(own.dtype)[:, None, None]
    return share * own + (1 - share) * others


def check_reads_embeddings(model: Any) -> None:
    """ConfigError where the model's logits change when it is given a padded batch's embeddings in place of its tokens."""
    device = next(model.parameters()).device  # quantized weights are on the GPU where there is one
    padding = model.config.pad_token_id or 0
    first, second, third = [token for token in range(4) if token != padding][:3]
    tokens = torch.tensor([[first, second, third, second], [third, second, padding, padding]], device=device)
    mask = (tokens != padding).long()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=tokens, attention_mask=mask).logits
            embeddings = model.get_input_embeddings()(tokens)
            found = model(inputs_embeds=embeddings, attention_mask=mask).logits
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{_cannot(model)} ({error}); leave mixup out") from None
    finally:
        model.train(training)
    is_exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())  # else it may compute in bf16
    if not torch.allclose(expected, found, atol=1e-4 if is_exact else 1e-2):
        raise ConfigError(f"{_cannot(model)}: it looks for the end of a text in its tokens; leave mixup out")


def _cannot(model: Any) -> str:
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    return f"data.augment.kinds (mixup) cannot work with {name}, which does not read word embeddings as it reads tokens"
