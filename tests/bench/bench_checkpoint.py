"""What a checkpoint costs while training goes on, against Accelerate's save_state and torch.save.

    python tests/bench/bench_checkpoint.py               # 135M parameters, FSDP2 and DDP, 2 processes, 3 rounds: about 15 minutes
    python tests/bench/bench_checkpoint.py --layers 2 --rounds 1

In one run and one process group: 30 steps, which show how far steps vary on this machine by themselves; 30 steps with one save by
samestep in the 10th; the same state by `accelerator.save_state`, which training waits for; by `torch.save`, without sharding or
optimizer names; then samestep's restore, verification included, and `load_state`, both from files that are not in the page cache, as
after a restart.
save(): until training continues. stall: longest step minus the median step. total: wall time of the 30 steps minus 30 median steps.
published: from the call to the rename. memory: what the copy keeps, part of it free heap before, and what a save adds meanwhile.
The last line is one JSON object of ratios to save_state and load_state: of each the worse backend, the median over rounds.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.timing import print_ratios, say, start_ranks_quietly
from tests.rank_pool import run_ranks
from trainer.backend import Engine, build_accelerator, build_engine
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import Start
from trainer.checkpoint.store import list_checkpoints
from trainer.config import RunConfig, TrainConfig
from trainer.progress import Progress

STEPS, SAVE_AT, TOKENS, VOCABULARY = 30, 10, 48, 49152
Round = dict[str, float]


def main() -> None:
    """Measure both backends, print the table, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's shape; 30 are 135M parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where checkpoints are written (default: a temporary folder)"
    )
    asked = parser.parse_args()
    start_ranks_quietly()
    rounds: dict[str, list[Round]] = {}
    for backend in ("fsdp", "ddp"):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            arguments = (Path(folder), asked.layers, asked.rounds)
            rounds[backend] = run_ranks(measure, backend, 2, args=arguments, timeout_s=3600)[0]
        say(f"{backend}: {len(rounds[backend])} rounds done")
    show(rounds)
    print_ratios(
        {
            "stall_vs_save_state": worst(rounds, "stall_s", "save_state_s"),
            "total_vs_save_state": worst(rounds, "total_s", "save_state_s"),
            "restore_vs_load_state": worst(rounds, "restore_s", "load_state_s"),
            "bytes_vs_save_state": worst(rounds, "bytes", "save_state_bytes"),
        }
    )


def worst(rounds: dict[str, list[Round]], of: str, over: str) -> float:
    """The worse backend's median ratio."""
    return round(max(statistics.median(one[of] / one[over] for one in found) for found in rounds.values()), 4)


def show(rounds: dict[str, list[Round]]) -> None:
    """Medians, a line per figure."""
    table = Table(title="135M parameters and AdamW's moments, 2 processes, one thread each", title_justify="left")
    for heading in ("", *rounds):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in next(iter(rounds.values()))[0]:
        middle = max if "memory" in name else statistics.median
        table.add_row(name, *(f"{middle([one[name] for one in found]):,.2f}" for found in rounds.values()))
    Console(width=100).print(table)


# On every rank


def measure(folder: Path, num_layers: int, num_rounds: int) -> list[Round]:
    """Every round's figures; those of rank 0 count, which all others keep step with."""
    config = RunConfig(
        name="bench", run_dir=folder / "run", train=TrainConfig(max_steps=1, global_batch_size=2, resume="never")
    )
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=num_layers, tie_word_embeddings=True, **shape)
    )
    engine = build_engine(accelerator, model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    checkpoints = Checkpointer(config, engine, identity={"base": None, "data": "random"})
    checkpoints.clean()
    for _ in range(3):
        take_step(engine)
    before = resident_bytes()
    checkpoints.prepare()  # takes what a save needs, so that the copy itself gets no new memory
    snapshot = max(resident_bytes() - before, sum(image.size for image in checkpoints.snapshots.images.values()))
    rounds = [one_round(number, folder, accelerator, engine, checkpoints) for number in range(num_rounds)]
    return [one | {"memory of the snapshot of rank 0, MiB": snapshot / 2**20} for one in rounds]


def take_step(engine: Engine) -> float:
    """One optimizer step on one random sample of TOKENS tokens per rank. Returns its seconds."""
    started = time.perf_counter()
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    with engine.micro_batch(last=True):
        logits = engine.forward({"input_ids": ids}).logits
        engine.backward(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) / engine.world_size)
    engine.step(engine.grad_norm(), 1.0)
    return time.perf_counter() - started


def one_round(number: int, folder: Path, accelerator: Any, engine: Engine, checkpoints: Checkpointer) -> Round:
    """Train without a save, with one, save otherwise, restore, load."""
    plain = [take_step(engine) for _ in range(STEPS)]
    steps: list[float] = []
    published: list[float] = []
    with sampled_memory() as memory:
        for step in range(STEPS):
            started = time.perf_counter()
            if step == SAVE_AT:
                before, memory.peak = memory.peak, 0.0  # of the steps without a save
                checkpoints.save(Progress(step=number + 1), {}, metric=None)
                save_s = time.perf_counter() - started
                pending, saved_at = checkpoints.saver.pending, started
                assert pending is not None
                pending.add_done_callback(lambda _: published.append(time.perf_counter()))
            take_step(engine)
            steps.append(time.perf_counter() - started)
    assert published, "the save outlived the steps, and `total` would leave out what remains of it"
    checkpoints.wait()
    median = statistics.median(steps)
    longest = max(range(STEPS), key=steps.__getitem__)
    other = folder / f"save-state-{number}"
    dist.barrier()
    save_state_s = timed(lambda: accelerator.save_state(str(other)))
    torch_save_s = timed(lambda: torch_save(engine, folder / "torch.pt"))
    (newest, *_) = list_checkpoints(checkpoints.root)
    forget((newest, other))
    restore_s = timed(lambda: checkpoints.restore(Start("continue", (newest,))))
    load_state_s = timed(lambda: accelerator.load_state(str(other)))
    return {
        "median step_s": median,
        "save() itself_s": save_s,
        "longest step is that many after the save": longest - SAVE_AT,
        "stall_s": max(steps) - median,
        "stall_s of 30 steps without a save": max(plain) - statistics.median(plain),
        "total_s": sum(steps) - STEPS * median,
        "total_s of 30 steps without a save": sum(plain) - STEPS * statistics.median(plain),
        "published_s": published[0] - saved_at,
        "save_state_s": save_state_s,
        "torch_save_s": torch_save_s,
        "restore_s": restore_s,
        "load_state_s": load_state_s,
        "bytes": size_of(newest),
        "save_state_bytes": size_of(other),
        "further memory while saving, rank 0, MiB": (memory.peak - before) / 2**20,
    }


class Memory:
    """The most that this process had resident, since `peak` was last set."""

    peak = 0.0


@contextmanager
def sampled_memory() -> Iterator[Memory]:
    """Looks every 20 ms; the kernel's own high-water mark never falls, and hides what comes after a larger moment."""
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            memory.peak = max(memory.peak, resident_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def resident_bytes() -> float:
    """Memory of this process that is in use now."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget(folders: tuple[Path, ...]) -> None:
    """Take the files out of the page cache, as after a restart: both are read from disk."""
    dist.barrier()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def torch_save(engine: Engine, path: Path) -> None:
    """What many loops do: rank 0 saves what it holds."""
    state = {"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}
    if engine.rank == 0:
        torch.save(state, path)


def timed(act: Callable[[], object]) -> float:
    """Seconds until all ranks are done."""
    dist.barrier()
    started = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - started


def size_of(folder: Path) -> float:
    """Bytes of all files below."""
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


if __name__ == "__main__":
    main()
