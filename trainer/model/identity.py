"""The frozen weights that an adapter belongs to, as a short digest. Local to the rank; no collective.

A base model is recognised by a sample of every frozen tensor, so that a model of many gigabytes costs
milliseconds; two different trainings of one architecture differ in all of them. Quantized weights are left out: a GPU rounds a few
of them otherwise than a CPU, and norms and embeddings, which are never quantized, tell two models apart as well.
"""

import hashlib

import torch
from torch import nn

SAMPLED = 64  # elements of each tensor


def base_identity(model: nn.Module) -> str | None:
    """Digest of the frozen parameters by name, shape, type and sample; None where nothing is frozen. Before the backend wraps them."""
    digest, num_frozen = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        is_quantized = hasattr(parameter, "quant_state") or parameter.dtype == torch.int8
        unused = ".original_module." in name  # PEFT's copy of a new head
        if not (parameter.requires_grad or unused or is_quantized):
            num_frozen += 1
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // SAMPLED, 1)][:SAMPLED].contiguous().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if num_frozen else None
