"""Whether a run starts, continues or has ended, from its folder and its settings alone. Imports no torch, writes nothing.

One process decides and tells the others. A setting that would change what is trained must be what it was (`must_match`); others
(`may_change`, marked in config.py) may differ from start to start.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from trainer.checkpoint.manifest import MANIFEST, STATE, read_json
from trainer.checkpoint.store import CHECKPOINTS, list_checkpoints, step_of
from trainer.config import RunConfig, may_change
from trainer.errors import CheckpointError, ConfigError

OUTCOME = "outcome.json"
LENGTH = ("train.num_epochs", "train.max_steps")
"""What `train.extend` allows to change."""


@dataclass(frozen=True)
class Start:
    """What a run does first."""

    kind: Literal["fresh", "continue", "finished"]
    checkpoints: tuple[Path, ...] = ()
    """To continue from: the newest first. More than one: a damaged one is passed over."""
    words: str = ""
    """For the log."""


def decide_start(config: RunConfig) -> Start:
    """How the run of these settings begins. ConfigError or CheckpointError where it must not."""
    if config.probe is not None or config.train.resume == "never":
        return Start("fresh")
    own = tuple(list_checkpoints(config.folder / CHECKPOINTS))
    if config.train.resume != "auto":
        return start_from_path(config, Path(config.train.resume), own)
    outcome = read_outcome(config.folder)
    if not own and outcome is None:
        return Start("fresh")
    changed = check_settings(config, own)
    if outcome == "finished" and not config.train.extend:
        return Start("finished", words=finished_words(config))
    if not own:
        return Start("fresh")
    return Start("continue", own, words=changed)


def start_from_path(config: RunConfig, path: Path, own: tuple[Path, ...]) -> Start:
    """train.resume=PATH: a checkpoint or a run directory. Only a run that has no checkpoint yet begins there."""
    given = (path,) if (path / MANIFEST).is_file() else tuple(list_checkpoints(path / CHECKPOINTS))[:1]
    if not given:
        raise CheckpointError(f"train.resume ({path}) is neither a checkpoint nor a run directory with one")
    if own and given[0].resolve() not in [folder.resolve() for folder in own]:
        words = f"train.resume is left aside: {config.folder} has checkpoints of its own"
        return Start("continue", own, words="; ".join(filter(None, [words, check_settings(config, own)])))
    return Start("continue", given, words=check_settings(config, given))


def read_outcome(folder: Path) -> str | None:
    """finished, stopped or failed; None for a run that was killed or is running."""
    try:
        return str(read_json(folder / OUTCOME).get("outcome"))
    except CheckpointError:
        return None


def finished_words(config: RunConfig) -> str:
    """What the user is told who starts a finished run again."""
    return (
        f"{config.folder}: this run is finished. Set name=NEW for another run, train.resume=never to train it again (the "
        "earlier one is moved aside), or a larger train.num_epochs or train.max_steps with train.extend=true to go on"
    )


def check_settings(config: RunConfig, checkpoints: tuple[Path, ...]) -> str:
    """What differs harmlessly from the newest readable checkpoint, in words. ConfigError for a difference that is not."""
    stored = next((found for found in map(stored_config, checkpoints) if found is not None), None)
    if stored is None:
        return ""
    before, now = flat_values(stored), flat_values(config)
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    movable = set(may_change(config)) | (set(LENGTH) if config.train.extend else set())
    refused = [name for name in changed if name not in movable]
    if refused:
        raise ConfigError(*refusals(config, refused, before, now))
    return ", ".join(f"{name} {shown(before.get(name))} -> {shown(now.get(name))}" for name in changed)


def refusals(config: RunConfig, names: list[str], before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """One message a changed setting, the last with the ways out."""
    ways = (
        f"name=NEW to start another run, or train.resume=never to start this one anew ({config.folder} is moved aside)"
    )
    if set(names) <= set(LENGTH):
        ways += ", or train.extend=true to go on with the new length (the schedule follows it)"
    for name in names:
        yield (
            f"{name} ({shown(now.get(name))}) was {shown(before.get(name))} when {config.folder} was trained, and must stay so; "
            f"set it back, or {ways}"
        )


def stored_config(folder: Path) -> RunConfig | None:
    """The settings in a checkpoint's state.json; None where they cannot be read."""
    try:
        return RunConfig.model_validate_json(json.dumps(read_json(folder / STATE).get("config")))
    except (CheckpointError, ValidationError):
        return None


def flat_values(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values |= flat_values(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def shown(value: object) -> str:
    """A value as people write it."""
    return "none" if value is None else str(value)


def newest_step(checkpoints: tuple[Path, ...]) -> int:
    """The step of the first of them; 0 for none."""
    return step_of(checkpoints[0]) if checkpoints else 0
