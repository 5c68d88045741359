"""Trained weights as files that plain transformers and PEFT open: an adapter, or a whole model for full, head and bitfit.

A model with a head of samestep's own (model.pooling) opens with `load_exported` alone: plain transformers would draw a new head.

Last stop of a run, first of prediction. Invariant: what `export_model` leaves has been read back: no tensor is missing or empty.
Local to the process that calls it: the caller has gathered the weights from all ranks.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.config import ModelConfig, QloraConfig
from trainer.errors import CheckpointError, SamestepError
from trainer.model.architecture import (
    LOADING_ERRORS,
    first_line,
    load_architecture,
    load_tokenizer,
    model_loader,
    model_location,
)
from trainer.model.bottleneck import SETTINGS_FILE, bottleneck_settings, load_bottlenecks, save_bottlenecks
from trainer.model.identity import check_index, files_identity, identity_below
from trainer.model.load import load_weights, quantization_of
from trainer.model.stored import saved_buffers
from trainer.run_folder import ADAPTER_FILE, INFO_FILE, read_info

GENERATION_FILE = "generation_config.json"  # transformers' name for it
ENCODER = "prompt_encoder.default."
PROMPT = ENCODER + "embedding.weight"


def export_model(
    model: nn.Module,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    info: Mapping[str, Any],
) -> None:
    """Write adapter or model, tokenizer and samestep.json into a fresh folder, and read the tensors back.

    model: without DDP's or DeepSpeed's wrapper, but with PEFT's; its own weights may be shards and are not used.
    state: whole tensors by the model's parameter names: all of them, or of an adapter the trained ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bottlenecks = bottleneck_settings(model)
    if is_peft(model):
        stored = write_peft(cast(Any, model), state, folder)
    elif bottlenecks is not None:
        save_bottlenecks(bottlenecks, state, folder)
        stored = state
    else:
        stored = state = {**saved_buffers(model), **state}
        cast(PreTrainedModel, model).save_pretrained(folder, state_dict=dict(state))
    tokenizer.save_pretrained(folder)
    write_info(folder, info)
    verify_tensors(folder, {name: tensor.numel() for name, tensor in stored.items()})


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """samestep.json; and for plain transformers, what ends a text of a model that was trained on conversations."""
    (folder / INFO_FILE).write_text(json.dumps(dict(info), indent=1) + "\n", encoding="utf-8")
    if "stop_token_ids" in info:
        file = folder / GENERATION_FILE
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known["eos_token_id"] = info["stop_token_ids"]
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def write_peft(model: Any, state: Mapping[str, Tensor], folder: Path) -> Mapping[str, Tensor]:
    """Write PEFT's files and return the tensors that they should hold.

    Copies: PEFT asks modules for their state_dict(), which under FSDP2 frees weights that `state` may still point to.
    save_embedding_layers: samestep never resizes embeddings, and PEFT's "auto" asks the hub about it.
    """
    stored = exported_tensors(model, state)
    fixed = shared_factors(model)
    copies = {name: tensor.clone() for name, tensor in (fixed | dict(stored)).items()}
    if PROMPT in stored:
        # PEFT 0.21 asks the model for its prompt, whatever state_dict it is given (BasePromptEncoder._get_adapter_state_dict).
        model.get_prompt_embedding_to_save = lambda _: copies[PROMPT]
    model.save_pretrained(folder, state_dict=copies, save_embedding_layers=False)
    if PROMPT in stored:
        del model.get_prompt_embedding_to_save
    return fixed | dict(stored)


def shared_factors(model: Any) -> dict[str, Tensor]:
    """VeRA's two random factors, which PEFT stores with the scales that are trained; empty for another method."""
    shared = {name: getattr(model.base_model, name, {}) for name in ("vera_A", "vera_B")}
    return {f"base_model.{name}.default": factors["default"] for name, factors in shared.items() if len(factors)}


def exported_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What an exported adapter holds, by its names in the loaded model: the trained tensors, but a network's prompts for the network."""
    settings = cast(Any, model).peft_config["default"] if is_peft(model) else None
    if settings is None or not settings.is_prompt_learning:
        return state
    network = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(ENCODER)}
    return {PROMPT: prompts_of(settings, network), **rest}


def prompts_of(settings: Any, network: Mapping[str, Tensor]) -> Tensor:
    """(virtual tokens, width) the vectors that a prompt method has learned, on the CPU."""
    import peft

    if settings.peft_type == peft.PeftType.PROMPT_TUNING:
        return network["embedding.weight"]
    kind = peft.PrefixEncoder if settings.peft_type == peft.PeftType.PREFIX_TUNING else peft.PromptEncoder
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        encoder = kind(settings)
        encoder.load_state_dict(dict(network))
        return cast(Tensor, encoder(torch.arange(settings.num_virtual_tokens)[None])[0])


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    return hasattr(model, "peft_config")


def adapter_files(model: nn.Module) -> dict[str, str]:
    """The settings of an adapted model, as text by file name: what an adapter needs beside its tensors. Empty for another model."""
    if is_peft(model):
        settings = cast(Any, model).peft_config["default"].to_dict()
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        return {ADAPTER_FILE: json.dumps(plain, indent=1)}
    bottlenecks = bottleneck_settings(model)
    return {} if bottlenecks is None else {SETTINGS_FILE: json.dumps(bottlenecks, indent=1)}


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
    return {name: math.prod(shape) for name, shape in read_shapes(folder).items()}


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of each tensor in the folder's safetensors files, from their headers."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                shapes[name] = tensors.get_slice(name).get_shape()
    return shapes


def load_exported(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase, dict[str, Any]]:
    """(model in evaluation mode on the CPU, tokenizer, samestep.json) of an exported folder. CheckpointError where it does not open."""
    with opening(folder):
        info = read_info(folder)
        tokenizer = exported_tokenizer(folder, info, trust_remote_code=trust_remote_code)
        if any((folder / name).is_file() for name in (ADAPTER_FILE, SETTINGS_FILE)):
            model = put_adapter(load_base(info, trust_remote_code=trust_remote_code), folder, info)
        else:
            model = load_whole(folder, info, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer, info


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """What goes wrong while an exported folder is opened, as CheckpointError."""
    try:
        yield
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


def exported_tokenizer(folder: Path, info: dict[str, Any], *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """That of the folder, or without one the base's. Fills in a max_length that `info` lacks, as that of a plain PEFT adapter does."""
    if (folder / "tokenizer_config.json").is_file():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    else:
        tokenizer = load_tokenizer(ModelConfig(source=info["base"], trust_remote_code=trust_remote_code))
    if "label_names" in info:
        info.setdefault("max_length", min(tokenizer.model_max_length, 512) - info.get("num_virtual_tokens", 0))
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_whole(folder: Path, info: Mapping[str, Any], *, trust_remote_code: bool) -> nn.Module:
    """The model of a full or head run."""
    check_index(str(folder))
    architecture = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    loader = model_loader(model_settings(str(folder), info, trust_remote_code=trust_remote_code), architecture)
    model, report = loader.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder}: the exported weights lack {min(report['missing_keys'])}; export the model again"
        )
    return cast(nn.Module, model)


def put_adapter(model: nn.Module, folder: Path, info: Mapping[str, Any], name: str = "default") -> nn.Module:
    """The base with the adapter of `folder` on it, beside those that it has; all weights frozen.

    CheckpointError where a part or a setting of the adapter is missing, or the base is not the one it was trained on.
    """
    ours = (folder / SETTINGS_FILE).is_file()
    adapted = load_bottlenecks(model, folder) if ours else put_peft_adapter(model, folder, name)
    wanted = info.get("base_identity")
    if wanted is not None:
        # a base that was quantized in training is recognised by its files, quantized or not
        found = files_identity(model_location(info["base"])) if info.get("quantization") else identity_below(adapted)
        if found != wanted:
            raise CheckpointError(
                f"{folder}: this adapter was trained on other weights than {info['base']} holds now; put its own base there"
            )
    return adapted.requires_grad_(False)


def put_peft_adapter(model: Any, folder: Path, name: str) -> nn.Module:
    """The same for PEFT's files, without a look at the base."""
    import peft

    settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    lacks = [key for key in ("r", "lora_alpha") if settings.get("peft_type") == "LORA" and settings.get(key) is None]
    if lacks:  # PEFT would take 8
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} lacks {' and '.join(lacks)}, which scale the adapter's output; write down those of its training"
        )
    if is_peft(model):
        model.load_adapter(str(folder), adapter_name=name)
    else:
        model = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if sum(read_sizes(folder).values()) != sum(tensor.numel() for tensor in wanted.values()):
        raise CheckpointError(
            f"{folder}: the exported weights lack a part of the adapter; export it again"
        )  # PEFT only warns
    return cast(nn.Module, model)


def load_base(info: Mapping[str, Any], *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model of an exported adapter, as it was while the adapter was trained."""
    base = model_settings(info["base"], info, trust_remote_code=trust_remote_code)
    architecture = load_architecture(base, info.get("label_names", ()), target=info.get("target"))
    quantization = None
    if info.get("quantization"):
        method = QloraConfig(**info["quantization"])
        quantization = quantization_of(base, method, architecture, precision="no")
    return load_weights(base, architecture, quantization)[0]


def model_settings(source: str, info: Mapping[str, Any], *, trust_remote_code: bool) -> ModelConfig:
    """What samestep.json says of a model, for another source."""
    names = {name: info[name] for name in ("task", "pooling", "head_layers") if name in info}
    return ModelConfig(source=source, trust_remote_code=trust_remote_code, **names)
