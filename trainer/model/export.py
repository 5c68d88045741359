"""Trained weights as files that plain transformers and PEFT open: an adapter for lora, a whole model for full and head.

Last stop of a run, first of prediction. Invariant: what `export_model` leaves has been read back: no tensor is missing or empty.
Local to the process that calls it: the caller has gathered the weights from all ranks.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.config import ModelConfig
from trainer.errors import CheckpointError, SamestepError
from trainer.model.architecture import AUTO_MODELS, LOADING_ERRORS, first_line, load_architecture, model_location

INFO_FILE = "samestep.json"


def export_model(
    model: nn.Module,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    info: Mapping[str, Any],
) -> None:
    """Write adapter or model, tokenizer and samestep.json into a fresh folder, and read the tensors back.

    model: without DDP's or DeepSpeed's wrapper, but with PEFT's; its own weights may be shards and are not used.
    state: whole tensors by the model's parameter names: all of them, or for lora the trainable ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_adapter(model):
        # Copies: PEFT asks modules for their state_dict(), which under FSDP2 frees weights that `state` may still point to.
        # save_embedding_layers: samestep never resizes embeddings, and PEFT's "auto" asks the hub about it.
        copies = {name: tensor.clone() for name, tensor in state.items()}
        cast(Any, model).save_pretrained(folder, state_dict=copies, save_embedding_layers=False)
    else:
        state = {**saved_buffers(model), **state}
        cast(PreTrainedModel, model).save_pretrained(folder, state_dict=dict(state))
    tokenizer.save_pretrained(folder)
    (folder / INFO_FILE).write_text(json.dumps(dict(info), indent=1) + "\n", encoding="utf-8")
    verify_tensors(folder, {name: tensor.numel() for name, tensor in state.items()})


def is_adapter(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    return hasattr(model, "peft_config")


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """PEFT's adapter_config.json of a wrapped model."""
    settings = cast(Any, model).peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


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


def verify_tensors(folder: Path, sizes: Mapping[str, int]) -> None:
    """CheckpointError unless the folder's tensors have as many elements as `sizes` together, none of them empty."""
    written = read_sizes(folder)
    empty = [name for name in written if written[name] == 0] + [name for name in sizes if sizes[name] == 0]
    if empty:
        raise CheckpointError(
            f"{folder}: {empty[0]} was exported empty; its weights had not been gathered from all ranks"
        )
    if sum(written.values()) != sum(sizes.values()):
        raise CheckpointError(
            f"{folder}: {len(written)} tensors with {sum(written.values()):,} elements were written, but the model has "
            f"{len(sizes)} with {sum(sizes.values()):,}; check the disk and export again"
        )


def read_sizes(folder: Path) -> dict[str, int]:
    """Elements of each tensor in the folder's safetensors files."""
    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                sizes[name] = math.prod(tensors.get_slice(name).get_shape())
    return sizes


def load_exported(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase, dict[str, Any]]:
    """(model in evaluation mode on the CPU, tokenizer, samestep.json) of an exported folder. CheckpointError where it does not open."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if (folder / "adapter_config.json").is_file():
            model = load_adapter(folder, info, trust_remote_code)
        else:
            model = load_whole(folder, info, trust_remote_code)
    except SamestepError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: no exported model ({error.filename} is missing); give a finished run's folder"
        ) from None
    except (*LOADING_ERRORS, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the exported model does not open ({first_line(error)}); export it again"
        ) from error
    return model.eval(), tokenizer, info


def load_whole(folder: Path, info: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    """The model of a full or head run."""
    model, report = AUTO_MODELS[info.get("task", "classification")].from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder}: the exported weights lack {min(report['missing_keys'])}; export the model again"
        )
    return cast(nn.Module, model)


def load_adapter(folder: Path, info: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    """The base model that samestep.json names, with the adapter on it."""
    from peft import PeftModel

    base = ModelConfig(
        source=info["base"], task=info.get("task", "classification"), trust_remote_code=trust_remote_code
    )
    model = AUTO_MODELS[base.task].from_pretrained(
        model_location(base.source),
        config=load_architecture(base, info.get("label_names", ())),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the base's own head, which the adapter's replaces
        trust_remote_code=trust_remote_code,
    )
    adapted = PeftModel.from_pretrained(model, str(folder))
    stored = [p for name, p in adapted.named_parameters() if "lora_" in name or ".modules_to_save." in name]
    if sum(read_sizes(folder).values()) != sum(parameter.numel() for parameter in stored):
        raise CheckpointError(
            f"{folder}: the exported weights lack a part of the adapter; export it again"
        )  # PEFT only warns
    return cast(nn.Module, adapted)
