"""What a checkpoint belongs to: the frozen weights under an adapter, and the training data. Local to the rank; no collective.

Both are short digests. A base model is recognised by a sample of every frozen tensor, so that a model of many gigabytes costs
milliseconds; two different trainings of one architecture differ in all of them.
"""

import hashlib
from typing import Any

import torch
from torch import nn

SAMPLED = 64  # elements of each tensor


def base_identity(model: nn.Module) -> str | None:
    """Digest of the frozen parameters by name, shape, type and sample; None where nothing is frozen. Before the backend wraps them."""
    digest, num_frozen = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and ".original_module." not in name:  # PEFT's unused copy of a new head
            num_frozen += 1
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // SAMPLED, 1)][:SAMPLED].contiguous().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if num_frozen else None


def data_identity(split: Any) -> str:
    """Digest of the tokens, lengths and labels that are trained on."""
    digest = hashlib.sha256()
    for array in (split.tokens, split.offsets, split.labels):
        digest.update(array.tobytes())
    return digest.hexdigest()
