"""Ways to ruin a checkpoint, for tests of what samestep does about it: by accident, and by a forger who knows the format.

A way takes the checkpoint's folder and a source of randomness. Those that are named forge_... leave sizes, hashes and checksums in order.
"""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.manifest import MANIFEST, STATE, checksum, hash_file
from trainer.checkpoint.shards import ShardReader, image_of
from trainer.checkpoint.store import CHECKPOINTS

CANARY = "samestep-canary"


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


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
    any_file(folder, rng).write_bytes(pickle.dumps(Canary(canary_of(folder))))


def canary_of(folder: Path) -> Path:
    """What a pickle in this ruined checkpoint would leave, in a place that stays."""
    return folder.parents[2] / CANARY


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
    header += b" " * (-len(header) % 8)  # so that its tensor is aligned, and read
    lies = [
        b"",
        content[: len(content) // 2],
        pickle.dumps(Canary(canary_of(folder))),
        (2**62).to_bytes(8, "little") + content[8:],
        content.replace(b"@0", b"@1"),
        content.replace(b"@0", b"@x"),
        len(header).to_bytes(8, "little") + header + bytes(4),
    ]
    file.write_bytes(rng.choice(lies))
    rehash(folder, file.name)


def forge_a_ranks_own(folder: Path, rng: random.Random) -> None:
    """A rank's file in order, but for what is in it, hashed as if it were ours."""
    file = rng.choice(sorted(folder.glob("rank-*")))
    reader = ShardReader(folder, [file.name])
    entries = {key: reader.whole(key) for key in reader.ranges}
    sums = [key for key in entries if key.startswith("window/")]
    own = {key: entry for key, entry in entries.items() if key not in sums}
    double, random_words = torch.float64, entries["rng/python"]
    lies: list[dict[str, torch.Tensor]] = [
        own,
        {key: entries[key] for key in sums},
        {key: entry for key, entry in entries.items() if key != "rng/torch"},
        {key: entry for key, entry in entries.items() if key != "window/loss_sum"},
        entries | {"window/num_targets": torch.zeros(2, dtype=double)},
        entries | {"window/num_targets": torch.full((1,), float("nan"), dtype=double)},
        entries | {"window/num_samples": torch.full((1,), float("inf"), dtype=double)},
        entries | {"window/loss_sum": torch.zeros(1, dtype=torch.int64)},
        entries | {"rng/python": random_words[:-1]},
        entries | {"rng/python": -random_words},
        entries | {"rng/python": random_words.double()},
        entries | {"rng/python_gauss": torch.zeros(2, dtype=double)},
        entries | {"rng/numpy": torch.cat([entries["rng/numpy"][:-2], torch.tensor([10**6, 0])])},
        entries | {"rng/numpy_gauss": torch.zeros(0, dtype=double)},
        entries | {"rng/torch": entries["rng/torch"][:100]},
        entries | {"rng/torch": torch.full_like(entries["rng/torch"], 255)},
    ]
    chosen = rng.choice(lies)
    file.unlink()
    image_of(dict(sorted(chosen.items(), key=lambda pair: -pair[1].dtype.itemsize))).write(file)
    rehash(folder, file.name)


def rehash(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = hash_file(folder / name).model_dump()
    write_manifest(folder, content, forge=True)


WAYS = [
    *[flip_a_bit, truncate, delete, add_a_foreign_file, add_a_folder, replace_by_a_link, replace_by_a_pickle],
    *[edit_the_manifest, forge_the_manifest, forge_the_state, forge_a_shard, forge_a_ranks_own],
]


def ruin(good: Path, number: int, room: Path) -> Path:
    """A ruined copy of a checkpoint in a run directory of its own, `room`/NUMBER/checkpoints, under the same name."""
    folder = room / str(number) / CHECKPOINTS / good.name
    shutil.copytree(good, folder)
    WAYS[number % len(WAYS)](folder, random.Random(number))
    return folder


def way_of(number: int) -> str:
    """How the checkpoint of this number was ruined."""
    return WAYS[number % len(WAYS)].__name__
