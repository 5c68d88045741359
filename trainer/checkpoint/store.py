"""The folders of a run's checkpoints: which are there, which are whole, how a new one appears and an old one goes. No torch.

One rank publishes and prunes; any process may list and verify. Invariants: `step-N` appears by one rename of a complete, synced folder;
nothing is deleted under its own name, and never the newest complete one.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from trainer.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    hash_file,
    is_file_name,
    read_json,
    read_manifest,
    require_regular,
    sync_folder,
    write_synced,
)
from trainer.errors import CheckpointError
from trainer.faults import fault_point

CHECKPOINTS, LATEST, KEEP_SUFFIX, ROLLBACKS = "checkpoints", "latest", ".keep", "rollbacks.json"
STEP_NAME = re.compile(r"step-(\d{8,})")
UNFINISHED, DISCARDED = ".tmp-", ".trash-"


def step_name(step: int) -> str:
    """step-00000100."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder name states."""
    match = STEP_NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Folders named like checkpoints, newest step first; published ones only, whole or damaged."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def describe_damage(folder: Path, *, is_hashed: Callable[[str], bool] = lambda name: True) -> str | None:
    """None for a whole checkpoint; otherwise what is wrong. is_hashed: leaves files, by name, to whoever reads them."""
    try:
        check_layout(folder)
        manifest = read_manifest(folder)
        check_files(folder, manifest, is_hashed)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    return None


def check_layout(folder: Path) -> None:
    """CheckpointError unless the folder is a real one that holds files of known names only."""
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a checkpoint is no link")
    for entry in folder.iterdir():
        if entry.name != MANIFEST and not is_file_name(entry.name):
            raise CheckpointError(f"{entry} does not belong to a checkpoint; move it away")
        require_regular(entry)


def check_files(folder: Path, manifest: Manifest, is_hashed: Callable[[str], bool]) -> None:
    """CheckpointError unless folder and manifest name the same files, each of its size, and of its hash if `is_hashed`."""
    match = STEP_NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointError(f"{folder} says step {manifest.step} in its manifest")
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if present != set(manifest.files):
        odd = sorted(present ^ set(manifest.files))[0]
        raise CheckpointError(f"{folder / odd} is {'not in the manifest' if odd in present else 'missing'}")
    for name, entry in sorted(manifest.files.items()):
        size = (folder / name).stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{folder / name} has {size:,} bytes, not the {entry.size:,} that were written")
        if is_hashed(name) and hash_file(folder / name).blake3 != entry.blake3:
            raise CheckpointError(f"{folder / name} was changed after it was written: its BLAKE3 differs")


def start_folder(root: Path, step: int, nonce: str) -> Path:
    """The fresh folder that all ranks write a checkpoint into; every rank may make it."""
    folder = root / f"{UNFINISHED}{step_name(step)}-{nonce}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_all_here(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """CheckpointError unless the files that all ranks say they wrote lie in this rank's folder, each of its size.

    They are looked up by name: a network file system may list a folder as it was a minute ago.
    """
    for name, entry in sorted(files.items()):
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size != entry.size:
            raise CheckpointError(
                f"{name} was written with {entry.size:,} bytes, and rank 0 sees {size:,}: the run directory ({folder.parents[1]}) must be "
                "on a file system that all nodes share; set run_dir=PATH"
            )


def publish(folder: Path, root: Path, manifest_text: str, step: int) -> Path:
    """Write the manifest and give a complete folder its name. One rank only, after all ranks have written and synced."""
    fault_point("save.agreed", 0)
    write_synced(folder / MANIFEST, manifest_text.encode())
    fault_point("save.manifest", 0)
    sync_folder(folder)
    target = root / step_name(step)
    if target.exists():
        raise CheckpointError(
            f"{target} exists already; a step is saved once, and an older checkpoint is never replaced"
        )
    folder.rename(target)
    sync_folder(root)
    fault_point("save.renamed", 0)
    return target


def point_latest(root: Path, step: int) -> None:
    """Let `latest` name a checkpoint, by one atomic replacement."""
    fresh = root / f".{LATEST}"
    fresh.unlink(missing_ok=True)
    write_synced(fresh, f"{step_name(step)}\n".encode())
    os.replace(fresh, root / LATEST)
    sync_folder(root)
    fault_point("save.pointer", 0)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint that is in the way of a new one; it is kept, and no longer listed."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aside-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def prune(root: Path, *, keep_last: int, best_step: int | None, nonce: str) -> list[str]:
    """Delete all but the newest `keep_last` whole-looking checkpoints, the best one and those with a `.keep` file beside them.

    Returns what could not be deleted and why; a checkpoint that stays too long is no reason to stop.
    """
    assert keep_last >= 2, keep_last
    complaints = []
    for folder in prunable(root, keep_last, best_step):
        discarded = folder.with_name(f"{DISCARDED}{folder.name}-{nonce}")
        try:
            folder.rename(discarded)
            fault_point("save.pruning", 0)
            shutil.rmtree(discarded)
        except OSError as error:
            complaints.append(f"{folder} could not be deleted: {error.strerror or error}")
    return complaints


def prunable(root: Path, keep_last: int, best_step: int | None) -> Iterator[Path]:
    """Checkpoints that retention does not hold on to, oldest first. One without a manifest does not count as one of the last."""
    complete = [folder for folder in list_checkpoints(root) if (folder / MANIFEST).is_file()]
    for folder in reversed(complete[keep_last:]):
        protected = folder.with_name(folder.name + KEEP_SUFFIX).exists()
        if step_of(folder) != best_step and not protected:
            yield folder


def remove_leftovers(root: Path) -> list[str]:
    """Delete what killed saves and killed prunings left. One rank only, before any save. Returns the names."""
    removed = []
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if entry.name.startswith((UNFINISHED, DISCARDED)):
            shutil.rmtree(entry, ignore_errors=True)
            removed.append(entry.name)
    return removed


def write_rollbacks(root: Path, number: int, left_out_steps: list[int]) -> None:
    """Remember rollbacks beside the checkpoints, which are older than they. One rank only."""
    fresh = root / f".{ROLLBACKS}"
    fresh.unlink(missing_ok=True)
    write_synced(fresh, json.dumps({"number": number, "left_out_steps": left_out_steps}).encode())
    os.replace(fresh, root / ROLLBACKS)


def read_rollbacks(root: Path) -> tuple[int, list[int]] | None:
    """How many, and the steps that are left out since; None where there were none."""
    if not (root / ROLLBACKS).exists():
        return None
    content = read_json(root / ROLLBACKS)
    try:
        return int(content["number"]), [int(step) for step in content["left_out_steps"]]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{root / ROLLBACKS} is damaged; delete it, and rollbacks are counted anew") from None


def newest_good(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first whole checkpoint of `folders`, and what is wrong with those before it."""
    damages: list[str] = []
    for folder in folders:
        damage = describe_damage(folder)
        if damage is None:
            return folder, damages
        damages.append(damage)
    return None, damages
