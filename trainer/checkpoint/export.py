"""From a checkpoint of any backend to a model that plain transformers, or PEFT, opens. One CPU process, no training code.

A fully trained model is written shard by shard, so that one shard is in memory at a time. The rest is small, and is opened on its base,
which is loaded whole for that; for head and bitfit it is written too.
Invariant: what was written has been opened again: no tensor is missing, empty or different.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from trainer.backend import WEIGHT
from trainer.checkpoint.manifest import TEMPLATE, Manifest, read_json, read_manifest
from trainer.checkpoint.shards import ShardReader
from trainer.checkpoint.snapshot import BUFFER
from trainer.checkpoint.state import TrainingState, read_state
from trainer.checkpoint.store import CHECKPOINTS, describe_damage, list_checkpoints, newest_good
from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.model.architecture import load_architecture, load_tokenizer, meta_model
from trainer.model.bottleneck import SETTINGS_FILE, insert_bottlenecks
from trainer.model.export import (
    ADAPTER_FILE,
    export_model,
    exported_tensors,
    load_exported,
    write_info,
)
from trainer.model.identity import base_identity
from trainer.model.load import load_weights
from trainer.model.methods import METHODS
from trainer.model.stored import stored_tensors
from trainer.run_folder import INFO_FILE

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"
STORED = (f"{WEIGHT}/", f"{BUFFER}/")
"""What a model's files hold; no buffer has a parameter's name."""


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's folder: `path` itself, or the newest whole one of a run directory. CheckpointError says what is wrong."""
    if (path / CHECKPOINTS).is_dir():
        found, damages = newest_good(list_checkpoints(path / CHECKPOINTS))
        if found is None:
            raise CheckpointError(f"{path} has no whole checkpoint" + "".join(f"; {damage}" for damage in damages))
        return found
    damage = describe_damage(path)
    if damage is not None:
        raise CheckpointError(f"PATH ({path}) is no whole checkpoint and no run directory with one: {damage}")
    return path


def export_checkpoint(
    folder: Path, target: Path, *, trust_remote_code: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model or adapter of a verified checkpoint into `target`, which must not exist or be empty, and open it again.

    trust_remote_code: whether code of the model's repository may run; what the checkpoint says of it is only a wish.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"--output ({target}) exists already; give a folder that does not exist yet")
    manifest = read_manifest(folder)
    state = read_state(folder, manifest)
    config = read_settings(folder, manifest, state, trust_remote_code=trust_remote_code)
    reader = ShardReader(folder, [name for name in manifest.files if name.startswith("weights")])
    shapes = {key.partition("/")[2]: shape for key, shape in manifest.tensors.items() if key.startswith(STORED)}
    for name, shape in shapes.items():
        reader.check_tiling(key_of(reader, name), shape)
    info = read_json(folder / INFO_FILE)
    tokenizer = (
        AutoTokenizer.from_pretrained(folder) if "tokenizer.json" in manifest.files else load_tokenizer(config.model)
    )
    if TEMPLATE in manifest.files:
        tokenizer.chat_template = (folder / TEMPLATE).read_text(encoding="utf-8")
    try:
        if config.method.name == "full":
            check_model(folder, config, shapes)
            write_whole(reader, shapes, folder / "config.json", target, shard_bytes)
            tokenizer.save_pretrained(target)
            write_info(target, info)
            check_written(target, reader, shapes)
        else:
            model = trained_parts(config, folder, manifest, info.get("label_names", ()))
            tensors = dict(read_weights(reader, shapes))
            is_adapter = METHODS[config.method.name].is_adapter
            whole = tensors if is_adapter else stored_tensors(model) | tensors
            export_model(model, whole, tokenizer, target, info)
            check_loaded(target, exported_tensors(model, tensors), config, state.identity.get("base"))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def read_settings(folder: Path, manifest: Manifest, state: TrainingState, *, trust_remote_code: bool) -> RunConfig:
    """The run's settings, but for `trust_remote_code`. CheckpointError where this version does not know one of them."""
    try:
        config = RunConfig.model_validate_json(json.dumps(state.config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"{folder}: its setting {'.'.join(map(str, first['loc']))} is not one of this version ({first['msg']}); "
            f"export it with samestep {manifest.versions.get('samestep', 'of that time')}, which saved it"
        ) from None
    if config.model.trust_remote_code and not trust_remote_code:
        raise CheckpointError(
            f"{folder} was trained with model.trust_remote_code=true, on {config.model.source}; read the code there, and give "
            "--trust-remote-code to run it"
        )
    model = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
    return config.model_copy(update={"model": model})


def check_model(folder: Path, config: RunConfig, shapes: Mapping[str, list[int]]) -> None:
    """CheckpointError unless the checkpoint holds every tensor of the model that its settings name, from shapes alone."""
    remote = config.model.trust_remote_code
    model = meta_model(config.model, AutoConfig.from_pretrained(folder, trust_remote_code=remote))
    wanted = {name: list(tensor.shape) for name, tensor in stored_tensors(model).items()}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: {wrong[0]} is missing, or is not what {config.model.source} has; export is not possible"
        )


def trained_parts(config: RunConfig, folder: Path, manifest: Manifest, label_names: Sequence[str]) -> nn.Module:
    """What the tensors are put into: for an adapter the adapted model without weights, else the base with its weights."""
    architecture = load_architecture(config.model, label_names, target=config.target)
    if SETTINGS_FILE in manifest.files:
        model = meta_model(config.model, architecture)
        insert_bottlenecks(model, read_json(folder / SETTINGS_FILE))
        return model
    if ADAPTER_FILE not in manifest.files:
        return load_weights(config.model, architecture)[0]
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    base = meta_model(config.model, architecture)
    if settings.peft_type == peft.PeftType.VERA:
        base = base.to_empty(device="cpu")  # where its shared factors are drawn, from a seed in the settings
    with torch.device(base.device):
        return peft.get_peft_model(base, settings)


def read_weights(reader: ShardReader, shapes: Mapping[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor), one at a time; parameters are fp32."""
    for name, shape in shapes.items():
        yield name, reader.whole(key_of(reader, name)).view(shape)


def key_of(reader: ShardReader, name: str) -> str:
    """The key of a parameter or buffer in a checkpoint."""
    return next((prefix + name for prefix in STORED if prefix + name in reader.ranges), STORED[0] + name)


def write_whole(
    reader: ShardReader, shapes: Mapping[str, list[int]], config: Path, target: Path, shard_bytes: int
) -> None:
    """A Hugging Face model in shards of at most `shard_bytes`, or of one tensor that is larger."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, target / "config.json")
    groups: list[dict[str, list[int]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = sum(part.size for part in reader.ranges.get(key_of(reader, name), ()))
        if groups[-1] and size + num_bytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += num_bytes
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(read_weights(reader, group))
        try:
            save_file(tensors, target / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, which is no OSError there
            raise CheckpointError(
                f"--output ({target}) cannot be written ({error}); give a folder with more room"
            ) from None
        places |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = sum(part.size for name in shapes for part in reader.ranges.get(key_of(reader, name), ()))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_written(target: Path, reader: ShardReader, shapes: Mapping[str, list[int]]) -> None:
    """CheckpointError unless every tensor lies in the exported files, of its shape, not empty, equal. One tensor in memory at a time."""
    written: dict[str, Any] = {}
    for file in sorted(target.glob("*.safetensors")):
        tensors = safe_open(file, "pt")
        written |= dict.fromkeys(tensors.keys(), tensors)
    for name, tensor in read_weights(reader, shapes):
        if name not in written or tensor.numel() == 0 or not torch.equal(written[name].get_tensor(name), tensor):
            raise CheckpointError(f"{target}: {name} did not come back equal from the exported files; export again")


def check_loaded(target: Path, tensors: Mapping[str, Tensor], config: RunConfig, identity: str | None) -> None:
    """Open base and adapter as their user will. CheckpointError unless every trained tensor is there and equal."""
    model = load_exported(target, trust_remote_code=config.model.trust_remote_code)[0]
    loaded = stored_tensors(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tensors)
    if base_identity(model) != identity:
        raise CheckpointError(
            f"model.source ({config.model.source}) is not the base that this checkpoint was trained on; put that one there"
        )
    for name, tensor in tensors.items():
        if name not in loaded or tensor.numel() == 0 or not torch.equal(loaded[name], tensor):
            raise CheckpointError(f"{target}: {name} did not come back equal from the exported files; export again")
