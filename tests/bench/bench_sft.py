"""Instruction tuning against TRL's SFTTrainer: learned tokens per second, isolation of packed conversations, collation.

    python tests/bench/bench_sft.py                  # 12 minutes on 2 cores; `bash launch/setup.sh --bench` installs trl
    python tests/bench/bench_sft.py --layers 30      # SmolLM2 in full: hours

Same pairs (Python functions and their docstrings, at most 1,024 tokens), same tokens (SmolLM2's tokenizer and chat template), same
targets (the answers), same model (SmolLM2's shape with fewer layers, fresh weights, trained in full), same optimizer, batch size 8 and
threads; each contestant in a fresh process, in turn: a first epoch warms up, the second is timed. Peers run as they come, without
evaluation, saving or logging. isolated: whether changing a packed conversation leaves its neighbour's logits as they were, bit for bit, by
the contestant's own batch and model. The last line is one JSON object of ratios: medians over rounds.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.sft_peer import BATCH, LEARNING_RATE, LENGTH, Job, collation_ratio, data_of, is_isolated, trl_run
from tests.bench.timing import in_turn, median_ratio, print_ratios, say, show, start_ranks_quietly
from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator
from trainer.config import FullConfig, InstructData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.data.assets import asset_path
from trainer.data.instruct import build_instruct
from trainer.loop import Trainer
from trainer.model.architecture import load_tokenizer
from trainer.model.load import build_model
from trainer.task import build_task


def main() -> None:
    """Measure, print, print ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    asset_path("smollm2")
    start_ranks_quietly()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", asked.layers)
        job = Job(folder, asked.pairs, asked.threads)
        write_pairs(folder / "pairs.jsonl", asked.pairs)
        contestants = {"samestep, padded": ("own", "none"), "samestep, packed": ("own", "best_fit")}
        if importlib.util.find_spec("trl"):
            contestants |= {"TRL, padded": ("trl", "none"), "TRL, packed": ("trl", "best_fit")}
        else:
            say("trl is not installed, and is left out: bash launch/setup.sh --bench")
        facts: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}

        def measure(name: str) -> float:
            who, packing = contestants[name]
            found = run_ranks(own_run if who == "own" else trl_run, "single", 1, args=(job, packing), timeout_s=3600)[0]
            facts[name].append(found)
            return float(found["targets_per_s"])

        speeds = in_turn({name: lambda name=name: measure(name) for name in contestants}, asked.rounds)
        show(f"Learned tokens per second, {asked.layers} layers, {asked.threads} threads", speeds, "targets/s")
        for name, found in facts.items():
            last = found[-1]
            say(f"{name}: loss {last['loss']:.4f}, padding {last['padding']:.1%}, isolated: {last['isolated']}")
        collation = (
            run_ranks(collation_ratio, "single", 1, args=(job,), timeout_s=600)[0] if "TRL, padded" in facts else None
        )
    padded = median_ratio(speeds, "samestep, padded", "TRL, padded")
    say("padded over TRL's padded: " + ("not measured" if padded is None else f"{padded:.2f}"))
    print_ratios(
        {
            "vs_trl_packed": median_ratio(speeds, "samestep, packed", "TRL, packed"),
            "vs_trl_padded": median_ratio(speeds, "samestep, packed", "TRL, padded"),
            "collation_vs_trl": collation,
        }
    )


def make_model(folder: Path, layers: int) -> None:
    """SmolLM2's shape with fewer layers, fresh weights, its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(asset_path("smollm2"), num_hidden_layers=layers)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(ModelConfig(source="asset:smollm2", task="clm")).save_pretrained(folder)


def write_pairs(path: Path, count: int) -> None:
    """The first pairs of at most LENGTH tokens, and one that is held out."""
    settings = InstructData(source="asset:stdlib", max_length=LENGTH, validation_fraction=0.001)
    found = build_instruct(settings, load_tokenizer(ModelConfig(source="asset:smollm2", task="clm")))
    turns = {conversation.place: conversation.turns for conversation in found.conversations}
    rows = [turns[sample.place] for sample in found.train.samples[: count + 1]]
    path.write_text("".join(json.dumps({"prompt": user.text, "response": answer.text}) + "\n" for user, answer in rows))


# In a process of its own


def own_run(job: Job, packing: str) -> dict[str, Any]:
    """samestep: the loop's own steps."""
    torch.set_num_threads(job.threads)
    config = RunConfig(
        name="bench",
        run_dir=job.folder / "run",
        model=ModelConfig(source=str(job.folder / "model"), task="clm"),
        method=FullConfig(),
        data=data_of(job, packing),
        optim=OptimConfig(peak_lr=LEARNING_RATE, schedule="constant", warmup_fraction=0.0),
        train=TrainConfig(num_epochs=2, global_batch_size=BATCH, metric="loss", resume="never"),
    )
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, (), accelerator), task)
    trainer.engine.model.train()
    isolated = packing == "best_fit" and is_isolated(trainer.engine.module, task.training_batch(np.arange(1)))
    for epoch in range(2):
        window, began = trainer.progress.window, time.perf_counter()
        before = sums_of(window)
        for step in range(task.steps_per_epoch):
            trainer.progress.step = epoch * task.steps_per_epoch + step
            trainer.train_step()
    seconds = time.perf_counter() - began
    targets, loss, tokens, positions = (now - then for now, then in zip(sums_of(window), before, strict=True))
    return {
        "targets_per_s": targets / seconds,
        "loss": loss / targets,
        "padding": 1 - tokens / positions,
        "isolated": isolated,
    }


def sums_of(window: Any) -> tuple[float, ...]:
    """Targets, loss, tokens and positions so far."""
    counts = (float(window.counts.get(name, 0.0)) for name in ("tokens", "positions"))
    return (window.num_targets, float(window.loss_sum), *counts)


if __name__ == "__main__":
    main()
