"""Whether a checkpoint belongs to a run: its base model, its data, its tensors, its ranks. Each check raises what the user can do."""

from collections.abc import Mapping
from pathlib import Path

from trainer.backend.pieces import BITSANDBYTES_MOMENTS
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.own import TASK
from trainer.checkpoint.shards import ShardReader, shard_name
from trainer.checkpoint.state import TrainingState
from trainer.config import RunConfig
from trainer.errors import CheckpointError


def check_identity(folder: Path, state: TrainingState, identity: Mapping[str, str | None], config: RunConfig) -> None:
    """CheckpointError where base model or data are not those of this run."""
    if state.identity.get("base") != identity.get("base"):
        raise CheckpointError(
            f"{folder} was trained on another base model than model.source ({config.model.source}) is now; "
            "give the base it was trained on, or set train.resume=never"
        )
    names = sorted((state.identity.keys() | identity.keys()) - {"base"})
    changed = [name for name in names if state.identity.get(name) != identity.get(name)]
    if changed:
        ids = [f"{n} was dataset {state.identity.get(n)} and is {identity.get(n)}" for n in changed if n != "data"]
        words = f" ({'; '.join(ids)})" if ids else ""
        raise CheckpointError(
            f"{folder} was trained on other data than the settings of section data name now{words}; "
            "give the same data, or set train.resume=never"
        )


def check_ranks(folder: Path, manifest: Manifest, world_size: int) -> None:
    """CheckpointError where the data was a stream that belongs to another number of ranks."""
    first = ShardReader(folder, [shard_name("rank", 0, manifest.world_size)])
    if TASK in first.ranges and manifest.world_size != world_size:
        raise CheckpointError(
            f"{folder}: its data is tokenized while it is read (data.kind=live), which goes on only on {manifest.world_size} "
            "rank(s); start as many, or make a token dataset with `samestep data tokenize`"
        )


def check_names(folder: Path, wanted: Mapping[str, list[int]], stored: Mapping[str, list[int]]) -> None:
    """CheckpointError unless the model's trainable tensors and the checkpoint's are the same, in name and shape."""
    for key in sorted(wanted.keys() ^ stored.keys()):
        lacks = f"{folder} lacks {key}" if key in wanted else f"{folder} holds {key}, which this model does not train"
        raise CheckpointError(f"{lacks}; it belongs to another model or method")
    for key, shape in wanted.items():
        if list(stored[key]) != list(shape):
            raise CheckpointError(f"{folder}: {key} has shape {tuple(stored[key])}, but the model's has {tuple(shape)}")


def check_blocks(folder: Path, manifest: Manifest, backend: str, world_size: int) -> None:
    """CheckpointError where moments of bitsandbytes, whose blocks are promised to go on as they were saved only, would go on elsewhere."""
    has_blocks = any(key.startswith(f"{BITSANDBYTES_MOMENTS[0]}/") for key in manifest.tensors)
    if has_blocks and (manifest.backend, manifest.world_size) != (backend, world_size):
        raise CheckpointError(
            f"{folder}: moments of bitsandbytes' optimizers (optim.name) go on only on {manifest.backend} with {manifest.world_size} "
            f"process(es), which saved them, not on {backend} with {world_size}; start as many there, or set train.resume=never"
        )
