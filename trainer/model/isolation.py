"""Whether packed documents see each other, found by trying: a property of the model's code that no setting states."""

import torch
from transformers import PreTrainedModel

from trainer.errors import ConfigError

DOCUMENT = 8  # tokens


def check_isolation(model: PreTrainedModel) -> None:
    """ConfigError unless position ids that start anew keep two documents of a row apart. Two forward passes of 16 tokens, on the CPU."""
    positions = torch.arange(DOCUMENT).repeat(2)[None]
    ids = torch.arange(2 * DOCUMENT)[None] % model.config.vocab_size
    other = ids.clone()
    other[:, :DOCUMENT] = (other[:, :DOCUMENT] + 1) % model.config.vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():  # without a cache, whose presence makes transformers look at positions no more
        first, second = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits[:, DOCUMENT:] for row in (ids, other)
        )
    model.train(was_training)
    if not torch.equal(first, second):
        raise ConfigError(
            f"data.isolate (true) has no effect on {type(model).__name__}: its documents see each other in a packed row; use "
            "model.attention=sdpa, another architecture, or data.isolate=false"
        )
