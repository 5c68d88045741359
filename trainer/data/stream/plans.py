"""Packing plans between starts: files named by what decides them, safe to delete, complete or absent. Any process may make one."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.data.stream.packing import Plan
from trainer.data.stream.shards import hash_bytes

HEADER = 3
"""Words before the data: hash, rows, pieces."""


def load_or_make_plan(folder: Path | None, key: str, sequence_length: int, make: Callable[[], Plan]) -> Plan:
    """The plan of this key from `folder`, or made and kept there. A file that is not whole is made again."""
    if folder is None:
        return make()
    path = folder / f"{key}.plan"
    plan = read_plan(path, sequence_length)
    if plan is None:
        plan = make()
        write_plan(path, plan)
    return plan


def write_plan(path: Path, plan: Plan) -> None:
    """One file of int64: temporary, synced, renamed. A full or read-only folder costs only time, so it is no error."""
    body = np.concatenate([plan.row_starts, plan.starts, plan.lengths]).astype("<i8").tobytes()
    head = np.array([int(hash_bytes(body)[:15], 16), plan.num_rows, len(plan.starts)], "<i8").tobytes()
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(head + body)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)


def read_plan(path: Path, sequence_length: int) -> Plan | None:
    """None for a file that is missing or damaged."""
    try:
        words = np.fromfile(path, "<i8")
    except OSError:
        return None
    if len(words) < HEADER:
        return None
    digest, rows, pieces = (int(word) for word in words[:HEADER])
    body = words[HEADER:]
    if int(hash_bytes(body.tobytes())[:15], 16) != digest or len(body) != rows + 1 + 2 * pieces:
        return None
    return Plan(body[: rows + 1], body[rows + 1 : rows + 1 + pieces], body[rows + 1 + pieces :], sequence_length)
