"""Whether packed documents see each other, found by trying: a property of the model's code that no setting states."""

import torch
from transformers import PreTrainedModel

from trainer.errors import ConfigError

DOCUMENT, PADDING = 8, 3  # tokens


def check_isolation(model: PreTrainedModel, setting: str) -> None:
    """ConfigError unless position ids that start anew keep two documents of a row apart. Two forward passes of 32 tokens.

    Of two rows, one of them padded as a batch of packed rows is. setting: what asks for it, and its way out, as "data.isolate=false".
    """
    attention = model.config._attn_implementation or ""
    if "flash" in attention:
        raise ConfigError(
            f"model.attention ({attention}) keeps the documents of a packed row apart only where a row is alone in its batch "
            f"(transformers' _is_packed_sequence); use model.attention=sdpa, or {setting}"
        )
    device = next(model.parameters()).device  # quantized weights are on the GPU where there is one
    positions = torch.arange(DOCUMENT, device=device).repeat(2, 2)
    positions[1, -PADDING:] = 0
    ids = torch.arange(4 * DOCUMENT, device=device).view(2, -1) % model.config.vocab_size
    other = ids.clone()
    other[:, :DOCUMENT] = (other[:, :DOCUMENT] + 1) % model.config.vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():  # without a cache, whose presence makes transformers look at positions no more
        first, second = (
            model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, DOCUMENT:] for rows in (ids, other)
        )
    model.train(was_training)
    if not torch.equal(first, second):
        raise ConfigError(
            f"{type(model).__name__} does not keep the documents of a packed row apart: they see each other; use "
            f"model.attention=sdpa, another architecture, or {setting}"
        )
