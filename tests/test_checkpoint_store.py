"""Folders of checkpoints: what is published, what is kept, and that a kill at any moment leaves a whole one. No torch, no ranks."""

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.json_values import JSON
from trainer.checkpoint import store
from trainer.checkpoint.manifest import FileEntry, Manifest, checksum, manifest_text, read_manifest, write_synced
from trainer.errors import CheckpointError

SHARD = "weights-00001-of-00001.safetensors"


def write(root: Path, step: int, *, nonce: str = "n") -> tuple[Path, str]:
    """A fresh folder with one shard, and its manifest's text."""
    folder = store.start_folder(root, step, nonce)
    entry = write_synced(folder / SHARD, f"weights of {step}".encode())
    return folder, manifest_text(manifest(step, {SHARD: entry}))


def manifest(step: int, files: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        format="samestep-checkpoint-1", step=step, backend="ddp", world_size=1, precision="no", metric=0.5,
        config_hash="0" * 64, versions={"torch": "2"}, tensors={"weight/a": [3, 0]}, files=files,
    )  # fmt: skip


def save(root: Path, step: int) -> Path:
    folder, text = write(root, step)
    return store.publish(folder, root, text, step)


def steps(root: Path) -> list[int]:
    return [store.step_of(folder) for folder in store.list_checkpoints(root)]


def test_a_checkpoint_appears_under_its_name_once_it_is_whole(tmp_path: Path) -> None:
    folder, text = write(tmp_path, 100)
    assert store.list_checkpoints(tmp_path) == []
    target = store.publish(folder, tmp_path, text, 100)
    store.point_latest(tmp_path, 100)
    assert target.name == "step-00000100"
    assert store.describe_damage(target) is None
    assert (tmp_path / store.LATEST).read_text() == "step-00000100\n"
    assert read_manifest(target).step == 100


def test_a_second_save_of_a_step_is_refused_and_the_first_is_kept(tmp_path: Path) -> None:
    target = save(tmp_path, 1)
    before = (target / SHARD).stat().st_ino
    folder, text = write(tmp_path, 1, nonce="again")
    with pytest.raises(CheckpointError, match="exists already"):
        store.publish(folder, tmp_path, text, 1)
    assert (target / SHARD).stat().st_ino == before


def test_files_that_this_rank_does_not_see_whole_are_missed(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "checkpoints", 1)
    entry = FileEntry(size=len("weights of 1"), blake3="0" * 64)
    store.check_all_here(folder, {SHARD: entry})
    other = SHARD.replace("weights", "optimizer")
    with pytest.raises(
        CheckpointError, match=rf"{other} was written with 12 bytes, and rank 0 sees 0: .* set run_dir=PATH"
    ):
        store.check_all_here(folder, {SHARD: entry, other: entry})
    (folder / SHARD).write_text("part")
    with pytest.raises(CheckpointError, match="rank 0 sees 4"):
        store.check_all_here(folder, {SHARD: entry})


def test_retention_keeps_the_newest_the_best_and_the_protected(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000020.keep").touch()
    assert store.prune(tmp_path, keep_last=2, best_step=40, nonce="n") == []
    assert steps(tmp_path) == [70, 60, 40, 20]


def test_a_pruning_that_fails_is_reported_and_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    (complaint,) = store.prune(tmp_path, keep_last=2, best_step=None, nonce="n")
    assert "step-00000001 could not be deleted: Read-only file system" in complaint


def test_leftovers_of_killed_saves_and_prunings_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write(tmp_path, 2, nonce="killed")
    (tmp_path / ".trash-step-00000000-x").mkdir()
    assert store.remove_leftovers(tmp_path) == [".tmp-step-00000002-killed", ".trash-step-00000000-x"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs, and nothing may catch it as an error."""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), keep_last=st.integers(2, 4))
def test_no_sequence_of_saves_kills_and_prunings_loses_the_newest_whole_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, keep_last: int
) -> None:
    rng, root = random.Random(seed), tmp_path_factory.mktemp("property")
    best, newest, protected = None, 0, set()

    def maybe_die(name: str, rank: int) -> None:
        if rng.random() < 0.15:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "fault_point", maybe_die)
        for step in range(1, 15):
            if step in steps(root):
                continue
            try:
                folder, text = write(root, step, nonce=str(step))
                maybe_die("shard", 0)
                store.publish(folder, root, text, step)
                store.prune(root, keep_last=keep_last, best_step=best, nonce=str(step))
            except Killed:
                store.remove_leftovers(root)
            newest = max([newest, *steps(root)])
            found, damages = store.newest_good(store.list_checkpoints(root))
            assert damages == []
            assert (store.step_of(found) if found else 0) == newest
            assert protected <= set(steps(root))
            if best is not None:
                assert best in steps(root)
            if newest and rng.random() < 0.3:
                best = newest
            if newest and rng.random() < 0.1:
                protected.add(newest)
                (root / f"{store.step_name(newest)}{store.KEEP_SUFFIX}").touch()
    store.prune(root, keep_last=keep_last, best_step=best, nonce="end")
    kept = set(steps(root))
    assert len(kept - protected - {best}) <= keep_last
    shutil.rmtree(root)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["format", "step", "backend", "world_size", "tensors", "files", "versions", "checksum"]),
    value=JSON,
)
def test_any_value_in_a_manifest_gives_a_manifest_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: object
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = manifest(1, {}).model_dump(mode="json") | {name: value}
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": checksum(content)}))
    with suppress(CheckpointError):
        read_manifest(folder)
    assert store.describe_damage(folder) is None or isinstance(store.describe_damage(folder), str)
    shutil.rmtree(folder)
