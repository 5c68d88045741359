"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247), which PEFT does not have.

A Bottleneck takes the place of the linear layer it follows, so an adapted model runs as before: no merging, no hooks. It starts as the
identity. Files: adapter_model.safetensors with the trained tensors, bottleneck_config.json with what `insert_bottlenecks` needs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from trainer.config import AdapterConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.model.heads import without_adapter
from trainer.model.targets import encoder_linears, kind_of, resolve_targets

SETTINGS_FILE, WEIGHTS_FILE = "bottleneck_config.json", "adapter_model.safetensors"
INITIAL_STD = 0.01  # of the layer down, as in the paper

LAST_LAYERS = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"),
        ("attention.output.dense", "output.dense"),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), ("self_attn.o_proj", "mlp.down_proj")),
    "mpnet": ("attention.attn.o", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
}
"""model_type -> the last linear layer of attention and of the feed-forward layer, named within the block."""


class Bottleneck(nn.Module):
    """A linear layer, and after it: down to `size`, an activation, up again, added."""

    def __init__(self, layer: nn.Module, size: int, activation: str) -> None:
        super().__init__()
        width = layer.nf if isinstance(layer, Conv1D) else cast(nn.Linear, layer).out_features
        self.layer, self.activation = layer, getattr(functional, activation)
        device = cast(Tensor, layer.weight).device
        self.down, self.up = nn.Linear(width, size, device=device), nn.Linear(size, width, device=device)
        nn.init.normal_(self.down.weight, std=INITIAL_STD)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., width in) -> (..., width out)."""
        output = self.layer(inputs)
        return cast(Tensor, output + self.up(self.activation(self.down(output))))


def bottleneck_targets(model: nn.Module, method: AdapterConfig) -> list[str]:
    """Whole names of the layers that an adapter follows. ConfigError for an architecture whose layers are not known."""
    if method.targets is not None:
        return resolve_targets(model, method.targets)
    kind = cast(Any, without_adapter(model)).config.model_type
    if kind not in LAST_LAYERS:
        known = ", ".join(dict.fromkeys(map(kind_of, encoder_linears(model))))
        raise ConfigError(
            f"method.name (adapter): where adapters go is not known for {kind}; set method.targets to the last layers of attention "
            f"and feed-forward layer. It has: {known}"
        )
    wanted = LAST_LAYERS[kind][1:] if method.placement == "pfeiffer" else LAST_LAYERS[kind]
    return [name for name in encoder_linears(model) if kind_of(name) in wanted]


def insert_bottlenecks(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Freeze the model, put adapters after `settings["targets"]` and unfreeze `settings["trained"]`. In place; notes the settings."""
    model.requires_grad_(False)
    for name in settings["targets"]:
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, Bottleneck(layer, settings["size"], settings["activation"]))
    for name in settings["trained"]:
        model.get_submodule(name).requires_grad_(True)
    cast(Any, model).bottleneck_settings = dict(settings)


def bottleneck_settings(model: nn.Module) -> dict[str, Any] | None:
    """What the model was adapted with; None for one without bottlenecks."""
    return getattr(model, "bottleneck_settings", None)


def save_bottlenecks(settings: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> None:
    """Write settings and trained tensors."""
    (folder / SETTINGS_FILE).write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE, {"format": "pt"})


def load_bottlenecks(model: nn.Module, folder: Path) -> nn.Module:
    """Insert and fill the adapters of `folder`. CheckpointError where they do not fit the model."""
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    state = load_file(folder / WEIGHTS_FILE)
    try:
        insert_bottlenecks(model, settings)
        wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if wanted.keys() != state.keys():
            raise CheckpointError(f"{folder}: its tensors are not those of {SETTINGS_FILE}; export the adapter again")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(state[name])
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its adapters do not fit the base model ({error}); give the base they were trained on"
        ) from None
    return model
