"""The check before a job's training: one process on every node, which find each other through the run directory.

The first node opens the port, waits for the others' facts, asks each for its clock, and prints one table and one verdict, which all
nodes exit by. Everything passes through files in RUN/slurm, so the check of the shared folder is the check itself.
"""

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.starts import own_starts
from trainer.checkpoint.store import CHECKPOINTS, list_checkpoints
from trainer.errors import ConfigError
from trainer.run_folder import JOBS
from trainer.versions import library_versions

EXIT_CODE = 3
LIMIT_S = 50.0
"""For all of it, within the minute that a failing job may take."""
HERE_FRACTION, ANSWER_FRACTION = 0.6, 0.9
"""Of the limit: until when the first node waits for others to appear, and for what they answer; the rest is for the verdict."""
MAX_SKEW_S, MAX_LAG_S = 10.0, 10.0
POLL_S = 0.05


@dataclass(frozen=True)
class Node:
    """What one node says about itself, and how the first node sees it."""

    number: int
    name: str
    versions: dict[str, str]
    num_gpus: int
    """Visible in the job; 0 where it asked for none."""
    free_bytes: int
    """Where checkpoints go."""
    reached: str = ""
    """Why it cannot reach the first node's address and port; empty if it can."""
    skew_s: float = 0.0
    """How far its clock is ahead of the first node's."""
    lag_s: float = 0.0
    """What a file from the first node and one back take to be seen."""


def check_nodes(
    run: Path, address: str, port: int, *, ranks_per_node: int, environ: Mapping[str, str], limit_s: float = LIMIT_S
) -> int:
    """0, or EXIT_CODE on all nodes where something is missing; the first one prints what. Every node of the job calls it once."""
    number = int(environ.get("SLURM_NODEID", "0"))
    try:
        start, facts = own_starts(run, environ)[-1], own_facts(number, run)
        board = Board(run / JOBS / f"check-{start.job}-{start.number:03d}", limit_s)
        if number > 0:
            return answer(board, facts, address, port, environ=environ)
        room = Room(start.checkpoint_bytes, num_needed=2 if len(list_checkpoints(run / CHECKPOINTS)) < 2 else 1)
        return ask(board, facts, (address, port), room, ranks_per_node=ranks_per_node, environ=environ)
    except (OSError, ConfigError) as error:
        place = getattr(error, "filename", None) or run / JOBS
        print(
            f"error: node {number} ({own_name()}) cannot use {place}: {error}; set run_dir=PATH to a folder on a file system "
            "that all nodes share",
            flush=True,
        )
        return EXIT_CODE


def ask(
    board: "Board",
    facts: Mapping[str, Any],
    place: tuple[str, int],
    room: "Room",
    *,
    ranks_per_node: int,
    environ: Mapping[str, str],
) -> int:
    """The part of the first node: ask the others, print the table, leave the verdict. Returns it. place: its address and port."""
    count = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    with opened_port(*place) as problem, ThreadPoolExecutor(1) as pool:
        counting = pool.submit(count_gpus, environ)  # beside the waiting, whose clock runs
        others = gather(board, count)
        nodes = [Node(**facts, num_gpus=counting.result()), *others]
    gpus = ranks_per_node if int(environ.get("SLURM_GPUS_ON_NODE") or 0) else 0
    problems = [problem] if problem else []
    problems += problems_of(nodes, count, gpus=gpus, room=room)
    show(nodes, problems)
    board.write("verdict", {"code": EXIT_CODE if problems else 0})
    return EXIT_CODE if problems else 0


@dataclass(frozen=True)
class Room:
    """What the disk must take: the two checkpoints that a run keeps, or where they lie there the next one."""

    checkpoint_bytes: float
    num_needed: int


class Board:
    """Small files that nodes write for each other in a shared folder, until the time is up."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s, self.began = folder, limit_s, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        fresh = self.folder / f".{name}"
        fresh.write_text(json.dumps(content), encoding="utf-8")
        fresh.replace(self.folder / f"{name}.json")

    def wait(self, *names: str, fraction: float = 1.0) -> dict[str, dict[str, Any]]:
        """Those of the named files that are there before this fraction of the time is up, each with `seen`, when it was found.

        It looks at least once, however late it is.
        """
        found: dict[str, dict[str, Any]] = {}
        while True:
            is_late = time.monotonic() >= self.began + self.limit_s * fraction
            os.listdir(self.folder)  # makes network file systems look again
            for name in names:
                path = self.folder / f"{name}.json"
                if name not in found and path.exists():
                    found[name] = {**json.loads(path.read_text(encoding="utf-8")), "seen": time.time()}
            if is_late or len(found) == len(names):
                return found
            time.sleep(POLL_S)


@contextmanager
def opened_port(address: str, port: int) -> Iterator[str]:
    """Hold the first node's port open, so that the others can try to reach it; gives why that failed, or nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        problem = ""
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen(64)
            socket.getaddrinfo(address, port)
        except OSError as error:
            reason = error.strerror or error
            problem = f"the first node cannot open {address}:{port}: {reason}; another program may hold it, or the name does not resolve"
        # Without it the 66th node would find no place among the calls that wait to be taken.
        Thread(target=take_calls, args=(server,), daemon=True).start()
        yield problem
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # a thread that waits in accept() keeps a port that is closed


def take_calls(server: socket.socket) -> None:
    """Answer and hang up, until the socket is shut down."""
    with suppress(OSError):
        while True:
            server.accept()[0].close()


def answer(board: Board, facts: dict[str, Any], address: str, port: int, *, environ: Mapping[str, str]) -> int:
    """The part of all nodes but the first: tell about itself, answer once asked, exit by the verdict.

    GPUs are counted with the answer: the import that it takes may last as long as the first node waits for others to appear.
    """
    number = facts["number"]
    board.write(f"here-{number}", facts)
    if not board.wait("ask"):
        return EXIT_CODE
    clock = time.time()
    found = {"reached": why_unreachable(address, port), "num_gpus": count_gpus(environ)}
    board.write(f"answer-{number}", {**found, "clock": clock, "took": time.time() - clock})
    return int(board.wait("verdict").get("verdict", {"code": EXIT_CODE})["code"])


def gather(board: Board, count: int) -> list[Node]:
    """The part of the first node: what each other one says, with skew and lag; nodes that do not answer are left out."""
    nodes = []
    here = board.wait(*(f"here-{number}" for number in range(1, count)), fraction=HERE_FRACTION)
    asked = time.time()
    board.write("ask", {})
    answers = board.wait(*(name.replace("here", "answer") for name in here), fraction=ANSWER_FRACTION)
    for name, told in here.items():
        if (said := answers.get(name.replace("here", "answer"))) is not None:
            lag = said["seen"] - asked - said["took"]
            told |= {"reached": said["reached"], "num_gpus": said["num_gpus"]}
            told.pop("seen")
            nodes.append(Node(**told, skew_s=said["clock"] - asked - lag / 2, lag_s=lag))
    return sorted(nodes, key=lambda node: node.number)


def own_facts(number: int, run: Path) -> dict[str, Any]:
    """number, name, versions and free_bytes of this node; quick."""
    return {
        "number": number,
        "name": own_name(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "free_bytes": shutil.disk_usage(run).free,
    }


def count_gpus(environ: Mapping[str, str]) -> int:
    """Visible here, where the job asked for some; imports torch then, which takes seconds, on a cold file system many."""
    if not int(environ.get("SLURM_GPUS_ON_NODE") or 0):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def own_name() -> str:
    """Of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def why_unreachable(address: str, port: int) -> str:
    """Of the first node, from this one; empty if it answers."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"
    return ""


def problems_of(nodes: Sequence[Node], count: int, *, gpus: int, room: Room) -> list[str]:
    """What keeps these nodes from training together, each with its fix. gpus: asked for on each."""
    problems = []
    missing = sorted(set(range(count)) - {node.number for node in nodes})
    if missing:
        problems.append(
            f"node(s) {', '.join(map(str, missing))} of {count} did not answer in time through the run directory: they are "
            "down, or it is not on a file system that all nodes share; set run_dir=PATH to one"
        )
    first = nodes[0]
    for node in nodes:
        problems += node_problems(node, first, gpus)
    needed = room.num_needed * room.checkpoint_bytes
    if first.free_bytes < needed:
        problems.append(
            f"{first.free_bytes / 2**20:,.1f} MiB are free, and {room.num_needed} checkpoint(s) need {needed / 2**20:,.1f}; "
            "free space, or set run_dir=PATH to another disk"
        )
    return problems


def node_problems(node: Node, first: Node, gpus: int) -> Iterator[str]:
    """Of one node, compared with the first."""
    here = first.versions
    other = [
        f"{name} {version} (first node: {here.get(name)})"
        for name, version in node.versions.items()
        if here.get(name) != version
    ]
    if other:
        yield f"{node.name} has other versions: {', '.join(other)}; use one environment on a shared file system"
    if node.num_gpus < gpus:
        yield f"{node.name} sees {node.num_gpus} GPUs, and {gpus} were asked for; check --gpus-per-node and the driver"
    if node.reached:
        yield f"{node.name} cannot reach the first node at {node.reached}; check the network between them and the firewall"
    if abs(node.skew_s) > MAX_SKEW_S:
        yield f"the clock of {node.name} is {node.skew_s:+.0f} s from the first node's; ask the site's staff to set it"
    if node.lag_s > MAX_LAG_S:
        yield f"files take {node.lag_s:.0f} s between {node.name} and the first node; set run_dir=PATH to another file system"


def show(nodes: Sequence[Node], problems: Sequence[str]) -> None:
    """One table, one verdict."""
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "name", "torch", "GPUs", "free, GiB", "clock, s", "shared folder, s"):
        table.add_column(heading, justify="left" if heading in ("node", "name", "torch") else "right")
    for node in nodes:
        cells = (f"{node.free_bytes / 2**30:,.1f}", f"{node.skew_s:+.2f}", f"{node.lag_s:.2f}")
        table.add_row(str(node.number), node.name, node.versions["torch"], str(node.num_gpus), *cells)
    Console(soft_wrap=True, highlight=False).print(table)
    print("\n".join(f"error: {problem}" for problem in problems) or f"all {len(nodes)} node(s) are ready", flush=True)
