"""Whether a run starts, continues or has ended, from its folder and its settings alone. Imports no torch, writes nothing.

One process decides and tells the others. A setting that would change what is trained must be what it was (`must_match`); others
(`may_change`, marked in trainer/config) may differ from start to start.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.manifest import MANIFEST, STATE, read_json
from trainer.checkpoint.store import CHECKPOINTS, list_checkpoints
from trainer.config import RunConfig, may_change
from trainer.errors import CheckpointError, ConfigError
from trainer.run_folder import JOB_FILE, job_id

OUTCOME = "outcome.json"
LENGTH = ("train.num_epochs", "train.max_steps")
"""What `train.extend` allows to grow."""


WORDS = ("auto", "never")
"""That train.resume knows; anything else is a path."""


@dataclass(frozen=True)
class Start:
    """What a run does first."""

    kind: Literal["fresh", "continue", "finished"]
    """fresh: in an empty run directory, an earlier one is moved aside."""
    checkpoints: tuple[Path, ...] = ()
    """To start from: the newest first. More than one: a damaged one is passed over."""
    is_named: bool = False
    """train.resume names the checkpoint: it is that one or none."""
    words: str = ""
    """For the log."""


def decide_start(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Start:
    """How the run of these settings begins. ConfigError or CheckpointError where it must not."""
    is_anew = config.train.resume == "never" and not was_begun_by_this_job(config.folder, environ)
    if config.probe is not None or is_anew:
        return Start("fresh")
    own = tuple(list_checkpoints(config.folder / CHECKPOINTS))
    outcome = read_outcome(config.folder)
    if not own and outcome != "finished":  # nothing has begun, or a start that failed before its first checkpoint
        is_path = config.train.resume not in WORDS
        return start_from_path(config, Path(config.train.resume)) if is_path else Start("fresh")
    words = check_settings(config, own)
    if outcome == "finished" and not is_extended(config, own):
        return Start("finished", words=finished_words(config))
    if not own:
        return Start("fresh")
    return Start("continue", own, words="; ".join(filter(None, [words, words_on_path(config, own)])))


def was_begun_by_this_job(folder: Path, environ: Mapping[str, str]) -> bool:
    """Whether this is a restarted Slurm job, and an earlier start of it began the run here: `never` was heeded then."""
    try:
        is_restarted = environ.get("SLURM_RESTART_COUNT", "0") != "0"
        return is_restarted and (folder / JOB_FILE).read_text(encoding="utf-8") == job_id(environ)
    except OSError:
        return False


def start_from_path(config: RunConfig, path: Path) -> Start:
    """train.resume=PATH: a checkpoint or a run directory, from which a run without checkpoints of its own begins."""
    given = (path,) if (path / MANIFEST).is_file() else tuple(list_checkpoints(path / CHECKPOINTS))[:1]
    if not given:
        raise CheckpointError(f"train.resume ({path}) is neither a checkpoint nor a run directory with one")
    return Start("fresh", given, is_named=True, words=check_settings(config, given))


def words_on_path(config: RunConfig, own: tuple[Path, ...]) -> str:
    """What becomes of train.resume=PATH in a run that has checkpoints. ConfigError for an older one of them."""
    if config.train.resume in WORDS:
        return ""
    path = Path(config.train.resume).resolve()
    if path in [folder.resolve() for folder in own[1:]]:
        raise ConfigError(
            f"train.resume ({config.train.resume}) is an earlier checkpoint of this very run, which would train the later steps "
            "again at every start; set name=NEW to branch off from it"
        )
    is_newest = path in (own[0].resolve(), config.folder.resolve())
    return "" if is_newest else f"train.resume is left aside: {config.folder} has checkpoints of its own"


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
    """What differs harmlessly from the newest readable checkpoint, in words. ConfigError for a difference that is not.

    Settings that only one side knows come from another version of samestep; they are named, not refused.
    """
    found = newest_settings(checkpoints)
    if found is None:
        return ""
    folder, before = found
    now = flat_values(config.model_dump(mode="json"))
    changed = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    movable = set(may_change(config)) | (grown(before, now) if config.train.extend else set())
    switched = any(name.endswith(".name") and name != "name" for name in changed)  # another method has other settings
    refused = [name for name in changed if name not in movable]
    if refused:
        raise ConfigError(*refusals(config, folder, refused, before, now))
    words = [f"{name} {shown(before[name])} -> {shown(now[name])}" for name in changed]
    words += [] if switched else [f"{name} is of another version" for name in sorted(before.keys() ^ now.keys())]
    return "changed since the last start: " + ", ".join(words) if words else ""


def refusals(
    config: RunConfig, folder: Path, names: list[str], before: dict[str, Any], now: dict[str, Any]
) -> Iterator[str]:
    """One message a changed setting, with the ways out."""
    ways = (
        f"name=NEW to start another run, or train.resume=never to start this one anew ({config.folder} is moved aside)"
    )
    if set(names) <= grown(before, now):
        ways += ", or train.extend=true to go on with the new length (the schedule follows it)"
    elif set(names) <= set(LENGTH):
        ways += ", or train.extend=true with a larger number in its place to go on (the schedule follows it)"
    for name in names:
        yield (
            f"{name} ({shown(now[name])}) was {shown(before[name])} when {folder} was saved, and must stay so; "
            f"set it back, or {ways}"
        )


def grown(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """The settings of the run's length that are larger than they were; from epochs to steps is no comparison."""
    known = [name for name in LENGTH if isinstance(before.get(name), int | float) and now[name] is not None]
    return {name for name in known if now[name] > before[name]}


def is_extended(config: RunConfig, checkpoints: tuple[Path, ...]) -> bool:
    """Whether train.extend gives the run more steps than the newest checkpoint's settings did."""
    found = newest_settings(checkpoints)
    return (
        config.train.extend and found is not None and bool(grown(found[1], flat_values(config.model_dump(mode="json"))))
    )


def newest_settings(checkpoints: tuple[Path, ...]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose settings can be read, and these."""
    return next(((folder, stored) for folder in checkpoints if (stored := stored_settings(folder)) is not None), None)


def stored_settings(folder: Path) -> dict[str, Any] | None:
    """Dotted name -> value of the settings in a checkpoint's state.json; None where it cannot be read."""
    try:
        return flat_values(read_json(folder / STATE)["config"])
    except (CheckpointError, KeyError, AttributeError, RecursionError):
        return None


def flat_values(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    values: dict[str, Any] = {}
    for name, value in section.items():
        values |= flat_values(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def shown(value: object) -> str:
    """A value as people write it."""
    return "none" if value is None else str(value)
