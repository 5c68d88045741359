"""The frozen weights that an adapter belongs to, as a short digest. Local to the rank; no collective.

A base model is recognised by a sample of every frozen tensor, so that a model of many gigabytes costs milliseconds; two different
trainings of one architecture differ in all of them. A quantized base is recognised by the files that it was read from: a GPU rounds a few
weights otherwise than a CPU, and the tensors that are never quantized stay the same when an adapter is merged into the others.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from trainer.errors import ConfigError

SAMPLED = 64  # elements of each tensor


def base_identity(model: nn.Module) -> str | None:
    """Digest of the base's frozen parameters, whichever layers PEFT adapts; None where nothing is frozen.

    Before the backend wraps them. Of a quantized base it is that of its files, which `note_files` has noted.
    """
    noted = getattr(model, "files_identity", None)
    if noted is not None:
        return cast(str, noted)
    digest, num_frozen = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        unused = ".original_module." in name  # PEFT's copy of a new head
        if not (parameter.requires_grad or unused):
            num_frozen += 1
            own_name = name.replace(".base_layer.", ".")
            digest.update(f"{own_name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample_of(parameter.detach()))
    return digest.hexdigest() if num_frozen else None


def identity_below(model: nn.Module) -> str | None:
    """Digest of the base under an adapter, as it was while the adapter was trained; leaves all weights frozen."""
    adapters = getattr(model, "peft_config", {})
    for name, parameter in model.named_parameters():
        if adapters:  # whose names stand in those of all their tensors
            parameter.requires_grad_(not adapters.keys().isdisjoint(name.split(".")))
    identity = base_identity(model)
    model.requires_grad_(False)
    return identity


def note_files(model: nn.Module, location: str) -> None:
    """Make the digest of its files the identity of a quantized model. In place."""
    cast(Any, model).files_identity = files_identity(location)


def files_identity(location: str) -> str:
    """Digest of a sample of every tensor in the safetensors files of a folder or hub id; the same for any number of files."""
    samples = {}
    for file in weight_files(location):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)  # mapped into memory, not read
                samples[name] = f"{name} {tuple(tensor.shape)}".encode() + sample_of(tensor)
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()


def weight_files(location: str) -> list[Path]:
    """The safetensors files of a model that has been loaded: of a folder, or in the hub's cache. ConfigError where it has none."""

    def find(name: str) -> Path | None:
        if Path(location).is_dir():
            return file if (file := Path(location) / name).is_file() else None
        cached = try_to_load_from_cache(location, name)
        return Path(cached) if isinstance(cached, str) else None

    if (whole := find(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        return files_of_index(index)
    raise ConfigError(
        f"model.source ({location}) has no safetensors files, by which a base that is quantized is recognised; save it with "
        "transformers' save_pretrained first"
    )


def check_index(location: str) -> None:
    """ConfigError where a local folder's index, if it is read, names files elsewhere: transformers opens whatever it names."""
    places = (
        SAFE_WEIGHTS_NAME,
        SAFE_WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
    )  # as transformers prefers them
    read = next((file for name in places if (file := Path(location) / name).is_file()), None)
    if read is not None and read.name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        files_of_index(read)


def files_of_index(index: Path) -> list[Path]:
    """The files that hold a model's weights, all beside their index. ConfigError where it is broken or names anything else."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is no index of weights ({error!r:.100}); fetch or save the model again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or not (index.parent / name).is_file():
            raise ConfigError(f"{index} names {name!r:.100}, which is no file beside it; fetch or save the model again")
    return [index.parent / name for name in names]


def sample_of(tensor: Tensor) -> bytes:
    """Up to 64 elements, evenly spaced, as fp32."""
    flat = tensor.reshape(-1)
    sample = flat[:: max(flat.numel() // SAMPLED, 1)][:SAMPLED].float().contiguous().cpu()
    return sample.view(torch.uint8).numpy().tobytes()
