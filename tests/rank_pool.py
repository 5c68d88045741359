"""Real ranks for tests in about a second: a forkserver imports the heavy libraries once, every rank is a fork of it.

`run_ranks(body, backend="zero3", world_size=2, args=(...))` runs an importable function on every rank, in the environment that
`accelerate launch` would set, and returns its results by rank.
"""

import itertools
import multiprocessing
import os
import queue
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "transformers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "deepspeed",
    "torch.distributed.fsdp",
    "sklearn.metrics",
]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
BACKEND_ENV: dict[str, dict[str, str]] = {
    "single": {},
    "ddp": {},
    "fsdp": FSDP,
    "fsdp_offload": FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
    "zero1": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "zero2_offload": ZERO
    | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
    "zero3_offload": ZERO
    | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
}
BACKENDS = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
OFFLOADED = ("fsdp_offload", "zero2_offload", "zero3_offload")
LINGER_S = 10
"""Seconds for which a rank that is done stays: the others may still be reading what its last collective, or new group, sent."""


def run_ranks(
    body: Callable[..., Any],
    backend: str,
    world_size: int = 2,
    *,
    args: tuple[Any, ...] = (),
    precision: str = "no",
    environ: dict[str, str] | None = None,
    timeout_s: float = 120,
) -> list[Any]:
    """Results of `body(*args)` by rank. Raises AssertionError with the traceback of the first rank that failed."""
    assert (backend == "single") == (world_size == 1) or backend != "single", "single is one process"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results, collected = context.Queue(), context.Event()
    env = BACKEND_ENV[backend] | {"ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": "1"} | (environ or {})
    (port,) = free_ports(1)
    ranks = []
    with tempfile.TemporaryDirectory(prefix="samestep-ranks-") as logs:
        for rank in range(world_size):
            place = {} if backend == "single" else rank_env(rank, world_size, port)
            log = log_of(logs, rank)
            process = context.Process(target=_rank, args=(body, args, rank, env | place, results, collected, log))
            process.start()
            ranks.append(process)
        try:
            outcomes = _collect(results, ranks, timeout_s, logs)
        finally:
            collected.set()
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
    errors = [f"rank {rank} of {world_size} ({backend}) failed:\n{error}" for rank, _, error in outcomes if error]
    if errors:
        raise AssertionError("\n".join(errors))
    return [value for _, value, _ in outcomes]


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for one rank on one machine."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now: below those that the system gives to others, who could take one before it is used."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    drawn = random.SystemRandom().sample(range(lowest // 2, lowest), lowest // 4)
    return list(itertools.islice(filter(is_free, drawn), count))


def is_free(port: int) -> bool:
    """Whether nobody listens on a TCP port."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def log_of(logs: str, rank: int) -> Path:
    """What a rank prints: library chatter, kept out of pytest's output, and the only witness of a rank that died."""
    return Path(logs) / f"rank-{rank}.log"


def last_words(logs: str, rank: int) -> str:
    """The end of its log."""
    log = log_of(logs, rank)
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


def _rank(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    env: dict[str, str],
    results: Any,
    collected: Any,
    log: Path,
) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    with log.open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            results.put((rank, body(*args), None))
            collected.wait(LINGER_S)
        except BaseException:  # every failure reaches the test, with its rank
            results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # no interpreter teardown: gloo threads of other ranks may still be talking


def _collect(results: Any, ranks: list[Any], timeout_s: float, logs: str) -> list[tuple[int, Any, str | None]]:
    """One outcome per rank; once one rank has failed the others get a few seconds, since they may wait for it forever."""
    outcomes: list[tuple[int, Any, str | None]] = []
    deadline = time.monotonic() + timeout_s
    while len(outcomes) < len(ranks):
        try:
            outcome = results.get(timeout=0.2)
        except queue.Empty:
            dead = [
                rank
                for rank, p in enumerate(ranks)
                if p.exitcode not in (None, 0) and rank not in {o[0] for o in outcomes}
            ]
            if dead or time.monotonic() > deadline:
                missing = sorted(set(range(len(ranks))) - {o[0] for o in outcomes})
                outcomes.extend(
                    (rank, None, f"no result: died or timed out\n{last_words(logs, rank)}") for rank in missing
                )
            continue
        outcomes.append(outcome)
        if outcome[2]:
            deadline = min(deadline, time.monotonic() + 3)
    return sorted(outcomes, key=lambda outcome: outcome[0])
