"""What belongs to a model's files: parameters, and the buffers that are saved with them."""

from torch import Tensor, nn


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's files; none of the usual encoders has one.

    Not from `state_dict()`: under FSDP2 that frees unsharded weights, which `state` may still point to.
    """
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the model's files hold: its parameters and buffers."""
    return dict(model.named_parameters()) | saved_buffers(model)
