"""state.json: the scalars of a training state, checked when read. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from trainer.checkpoint.manifest import STATE, Manifest, Strict, checksum, read_json
from trainer.errors import CheckpointError
from trainer.progress import Counters


class TrainingState(Strict):
    """What is not a tensor and the same on every rank."""

    counters: Counters
    """Step, best metric and more."""
    optimizer_steps: int
    """Steps that AdamW has taken; its bias correction depends on them."""
    own_steps: dict[str, int] = Field(default_factory=dict)
    """Of parameters that have taken fewer, by name: no pass reached them in some steps."""
    loss_scale: float
    """fp16's dynamic scale; 1.0 otherwise."""
    good_steps: int
    """Since the scale last fell."""
    identity: dict[str, str | None]
    """Digests of `base` (frozen weights; None without any) and `data`; ids of token datasets by the settings that name them."""
    config: dict[str, Any]
    """The resolved settings of the run."""


def read_state(folder: Path, manifest: Manifest) -> TrainingState:
    """state.json; CheckpointError where it is none, or where its settings are not those that the manifest was written for."""
    try:
        state = TrainingState.model_validate_json(json.dumps(read_json(folder / STATE)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{folder / STATE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if checksum(state.config) != manifest.config_hash:
        raise CheckpointError(f"{folder / STATE}: its settings are not those that {folder} was saved with")
    return state
