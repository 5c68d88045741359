"""Damaged and hostile checkpoints: refused or passed over, never loaded silently, never executed, never a traceback."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.distributed.resume_runs import make_config, train
from tests.rank_pool import run_ranks
from tests.tiny import tiny_bert, tiny_sentences
from trainer.checkpoint.manifest import MANIFEST, STATE, checksum, hash_file
from trainer.checkpoint.resume import Start
from trainer.checkpoint.store import describe_damage, list_checkpoints
from trainer.errors import CheckpointError

NUM_BAD = 500
CANARY = "samestep-canary"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with checkpoints of steps 2 and 3 (the last)."""
    root = tmp_path_factory.mktemp("damage")
    tiny_bert(root / "model")
    tiny_sentences(root / "data.csv", rows=160)
    config = make_config(root, root / "run", method="lora", max_steps=3)
    (facts,) = run_ranks(train, "single", 1, args=(config,))
    assert facts["error"] is None
    return root / "run"


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


# Ways to ruin a checkpoint; each takes the folder and a source of randomness


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def flip_a_bit(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    os.truncate(file, rng.randrange(file.stat().st_size))


def delete(folder: Path, rng: random.Random) -> None:
    any_file(folder, rng).unlink()


def add_a_foreign_file(folder: Path, rng: random.Random) -> None:
    name = rng.choice(
        [
            "weights-00009-of-00009.safetensors",
            "model.safetensors",
            "hook.py",
            "state.json~",
            ".hidden",
            "pytorch_model.bin",
        ]
    )
    (folder / name).write_bytes(rng.randbytes(50))


def add_a_folder(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(["inner", "rank-00001-of-00001.safetensors.d"])).mkdir()


def replace_by_a_link(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    outside = folder.parent / f"outside-{rng.randrange(10**9)}"
    shutil.move(file, outside)
    file.symlink_to(outside)


def replace_by_a_pickle(folder: Path, rng: random.Random) -> None:
    any_file(folder, rng).write_bytes(pickle.dumps(Canary(folder.parent / CANARY)))


def edit_the_manifest(folder: Path, rng: random.Random) -> None:
    """Any value changed, the checksum left as it was."""
    edit(folder, rng, forge=False)


def forge_the_manifest(folder: Path, rng: random.Random) -> None:
    """A structural lie with a matching checksum."""
    edit(folder, rng, forge=True)


def edit(folder: Path, rng: random.Random, *, forge: bool) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    name = rng.choice(sorted(content["files"]))
    lies: list[Callable[[], Any]] = [
        lambda: content["files"].update({"../escape": content["files"].pop(name)}),
        lambda: content["files"].update({"/etc/passwd": content["files"].pop(name)}),
        lambda: content["files"].pop(name),
        lambda: content["files"][name].update(size=content["files"][name]["size"] + 1),
        lambda: content["files"][name].update(size="12"),
        lambda: content["files"][name].update(blake3="0" * 64),
        lambda: content.update(step=content["step"] + 1),
        lambda: content.update(step=-1),
        lambda: content.update(world_size=0),
        lambda: content.update(format="samestep-checkpoint-2"),
        lambda: content.update(unknown=1),
        lambda: content.pop(rng.choice(sorted(content.keys() - {"checksum"}))),
        lambda: content["tensors"].pop(rng.choice(sorted(content["tensors"]))),
        lambda: content["tensors"].update({rng.choice(sorted(content["tensors"])): [1, 2, 3]}),
        lambda: content["tensors"].update({"weight/extra": [4]}),
        lambda: content["tensors"].update({"weight/extra": [-4]}),
        lambda: content["tensors"].update({"weight/extra": "4"}),
    ]
    before = json.dumps(content, sort_keys=True)
    while json.dumps(content, sort_keys=True) == before:
        rng.choice(lies)()
    write_manifest(folder, content, forge=forge)


def write_manifest(folder: Path, content: dict[str, Any], *, forge: bool) -> None:
    if forge:
        content.pop("checksum", None)
        content["checksum"] = checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def forge_the_state(folder: Path, rng: random.Random) -> None:
    """A state that no run can have, hashed as if it were ours."""
    state = json.loads((folder / STATE).read_text())
    lies: list[Callable[[], Any]] = [
        lambda: state.update(counters=[]),
        lambda: state["counters"].update(step="3"),
        lambda: state["counters"].pop("step"),
        lambda: state.update(optimizer_steps=None),
        lambda: state.update(identity={"base": "other", "data": state["identity"]["data"]}),
        lambda: state.update(identity={"base": state["identity"]["base"], "data": "other"}),
        lambda: state.update(surprise=1),
    ]
    rng.choice(lies)()
    text = rng.choice(
        [json.dumps(state), "[" * 100_000, "null", json.dumps(state)[:-9], '"\ud800"'.encode("utf-8", "surrogatepass")]
    )
    (folder / STATE).write_bytes(text if isinstance(text, bytes) else text.encode())
    rehash(folder, STATE)


def forge_a_shard(folder: Path, rng: random.Random) -> None:
    """Tensor files that are none, hashed as if they were ours."""
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    content = file.read_bytes()
    header = b'{"weight/x@0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    lies = [
        b"",
        content[: len(content) // 2],
        pickle.dumps(Canary(folder.parent / CANARY)),
        (2**62).to_bytes(8, "little") + content[8:],
        content.replace(b"@0", b"@1"),
        content.replace(b"@0", b"@x"),
        len(header).to_bytes(8, "little") + header + bytes(4),
    ]
    file.write_bytes(rng.choice(lies))
    rehash(folder, file.name)


def rehash(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = hash_file(folder / name).model_dump()
    write_manifest(folder, content, forge=True)


WAYS = [
    *[flip_a_bit, truncate, delete, add_a_foreign_file, add_a_folder, replace_by_a_link, replace_by_a_pickle],
    *[edit_the_manifest, forge_the_manifest, forge_the_state, forge_a_shard],
]


def ruin(good: Path, number: int, room: Path) -> Path:
    """A ruined copy of a checkpoint, in a folder of its own, under the same name."""
    rng = random.Random(number)
    folder = room / str(number) / good.name
    shutil.copytree(good, folder)
    WAYS[number % len(WAYS)](folder, rng)
    return folder


def restore_each(root: Path, run: Path, room: Path) -> list[tuple[int, str, list[str]]]:
    """On one rank: offer every bad checkpoint, with a good one behind it. (number, how it ended, what was said)."""
    from trainer.backend import build_accelerator
    from trainer.loop import Trainer
    from trainer.model.load import build_model
    from trainer.task import build_task

    config = make_config(root, root / "other", method="lora", max_steps=3)
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, task.label_names, accelerator), task)
    newest, older = list_checkpoints(run / "checkpoints")
    outcomes = []
    for number in range(NUM_BAD):
        said: list[str] = []
        trainer.checkpoints.say = said.append
        bad = ruin(newest, number, room)
        try:
            progress = trainer.checkpoints.restore(Start("continue", (bad, older)))
            outcome = f"step {progress.step}"
        except CheckpointError as error:
            outcome = f"refused: {error}"
        shutil.rmtree(bad.parent)
        outcomes.append((number, outcome, said))
    return outcomes


def test_500_bad_checkpoints_are_refused_or_passed_over(run: Path, tmp_path: Path) -> None:
    (outcomes,) = run_ranks(restore_each, "single", 1, args=(run.parent, run, tmp_path), timeout_s=300)
    assert len(outcomes) == NUM_BAD
    for number, outcome, said in outcomes:
        way = WAYS[number % len(WAYS)].__name__
        if outcome.startswith("refused: "):
            assert way.startswith("forge"), (way, outcome)
        else:
            assert outcome == "step 2", (way, number, outcome)  # the older one
            assert said[0].startswith("checkpoint passed over: "), (way, said)
    assert not list(tmp_path.rglob(CANARY))


def test_verify_exits_with_3_and_names_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = list_checkpoints(run / "checkpoints")[0]
    for number in (0, 1, 2, 3, 5, 7):
        folder = ruin(newest, number, tmp_path)
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", "verify", str(folder)])
        assert ended.value.code in (3, 2)  # 2: without its manifest it is no checkpoint any more
        output = capsys.readouterr()
        assert "DAMAGED" in output.out or "neither a checkpoint" in output.err
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "verify", str(run)])
    assert ended.value.code == 0


def test_a_whole_checkpoint_has_no_damage(run: Path) -> None:
    assert [describe_damage(folder) for folder in list_checkpoints(run / "checkpoints")] == [None, None]
