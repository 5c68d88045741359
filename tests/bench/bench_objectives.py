"""Collators of the objectives against transformers' own, and their share of a training step.

    python tests/bench/bench_objectives.py            # about 4 minutes
    python tests/bench/bench_objectives.py --rounds 1 --seconds 0.5

Both sides make torch batches of the same rows of 512 tokens, in turn, in one process with one thread. transformers' collators get
tensors and, for masks, the special_tokens_mask, their quickest way. For plm transformers' collator also makes the masks of (T, T) that
XLNet is given; samestep's hands over an order and makes the masks of it on the model's device, as part of the step. Here both are made on
the CPU and count: plm_vs_transformers is of the whole. The share of a step is that of reading, collating and making masks of one global
batch of a recipe in a step of its own, two threads, the largest of all recipes; training reads ahead in a thread, so it is an upper bound
of what is waited for. The last line is one JSON object; more than 1 is faster. Exit code 1 where a goal (GOALS) is missed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
)

from launch.preflight import load_recipe
from tests.bench.timing import in_turn, median_ratio, print_ratios, say, show
from trainer.backend import build_accelerator
from trainer.config import RunConfig, StreamData
from trainer.data.assets import asset_path
from trainer.data.objectives import Rows, Vocabulary, build_objective, row_length
from trainer.data.objectives.vocabulary import complete, vocabulary_of
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.quiet import quiet_libraries
from trainer.resolve import resolve
from trainer.task import build_task
from trainer.task.objective import permutation_inputs

LENGTH, BATCH = 512, 32
ROLES = ("start", "end", "mask", "sentinels")
RECIPES = ("pretrain_clm", "pretrain_mlm", "pretrain_t5", "pretrain_bart", "pretrain_xlnet")
PAIRS = ("mlm_nsp", "mlm_sop")
"""Objectives of pretrain_mlm with pairs of texts."""
GOALS = {"mlm_vs_transformers": 2.0, "plm_vs_transformers": 10.0}
MOST_OF_STEP = 0.05
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    asked = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    speeds = in_turn({name: repeated(make, asked.seconds) for name, make in collators().items()}, asked.rounds)
    show("collators", speeds, "tokens/s")
    torch.set_num_threads(2)
    shares = {name: share_of_step(name) for name in RECIPES}
    for objective in PAIRS:
        words = (f"data.objective={objective}", "model.task=mlm_pairs", "train.metric=loss")
        shares[objective] = share_of_step("pretrain_mlm", words)
    for name, share in shares.items():
        say(f"{name}: reading and collating takes {share:.2%} of a step")
    ratios = {
        "mlm_vs_transformers": median_ratio(speeds, "mlm", "transformers mlm"),
        "plm_vs_transformers": median_ratio(speeds, "plm with masks", "transformers plm"),
        "share_of_step": round(max(shares.values()), 4),
    }
    print_ratios(ratios)
    if ratios["share_of_step"] > MOST_OF_STEP or any(ratios[name] < goal for name, goal in GOALS.items()):
        sys.exit(1)


def repeated(make: Callable[[], Any], seconds: float) -> Callable[[], float]:
    """A contestant: tokens a second of making the same batch again and again."""

    def run() -> float:
        make()
        began, batches = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            make()
            batches += 1
        return batches * BATCH * LENGTH / (time.perf_counter() - began)

    return run


def collators() -> dict[str, Callable[[], Any]]:
    """What makes a batch, by name."""
    tokenizer: Any = AutoTokenizer.from_pretrained(asset_path("minilm"))
    complete(tokenizer, ROLES)
    vocabulary = vocabulary_of(tokenizer, ROLES, objective="", source="")
    theirs = theirs_on(tokenizer)
    plm = ours(vocabulary, "plm")
    names = ("mlm", *PAIRS, "span_corruption", "infilling")
    return {
        **{name: ours(vocabulary, name) for name in names},
        "plm, the order alone": plm,
        "plm with masks": lambda: permutation_inputs(plm()),
        **theirs,
    }


def random_ids(vocabulary_size: int, shape: tuple[int, int]) -> np.ndarray:
    """Tokens that are text."""
    return np.random.default_rng(0).integers(2000, vocabulary_size - 200, shape)


def ours(vocabulary: Vocabulary, objective: str) -> Callable[[], dict[str, torch.Tensor]]:
    """samestep's collator on a batch of rows; each call has other sample numbers, and so other masks."""
    data = StreamData(objective=objective, sequence_length=LENGTH, isolate=False)  # type: ignore[arg-type]
    made, length = build_objective(data, vocabulary, 0), row_length(data)
    ids, held = random_ids(vocabulary.size, (BATCH, length)), np.full(BATCH, length)
    documents = np.zeros_like(ids)
    calls = iter(range(10**9))

    def run() -> dict[str, torch.Tensor]:
        samples = next(calls) * BATCH + np.arange(BATCH)
        others = Rows(ids[::-1], held, samples, documents)
        batch = made.batch(Rows(ids, held, samples, documents, others))
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    return run


def theirs_on(tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """transformers' collators on framed rows."""
    ids = random_ids(len(tokenizer), (BATCH, LENGTH))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    special = np.zeros_like(ids)
    special[:, [0, -1]] = 1
    mlm = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    plm = DataCollatorForPermutationLanguageModeling(tokenizer)
    rows = [
        {"input_ids": torch.tensor(i), "special_tokens_mask": torch.tensor(s)}
        for i, s in zip(ids, special, strict=True)
    ]
    return {
        "transformers mlm": lambda: mlm([dict(row) for row in rows]),
        "transformers plm": lambda: plm([row["input_ids"].clone() for row in rows]),
    }


def share_of_step(recipe: str, settings: Sequence[str] = ()) -> float:
    """Seconds of reading and collating a global batch, of those of a whole step with everything else, medians of 6 steps."""
    defaults: RunConfig = load_recipe(ROOT / "recipes" / f"{recipe}.py").DEFAULTS
    with tempfile.TemporaryDirectory() as name:
        config = resolve(type(defaults), defaults, [f"run_dir={name}/run", *settings]).config
        accelerator = build_accelerator(config)
        task: Any = build_task(config, accelerator)
        ids = task.special_ids if config.model.init == "random" else None
        model = build_model(config, (), accelerator, vocab_size=task.vocab_size, special_ids=ids)
        trainer = Trainer(config, accelerator, model, task)
        reading, stepping = [], []
        for step in range(8):
            began = time.perf_counter()
            batches = trainer.read_step(step)
            for batch in batches:
                task.model_inputs(batch)
            reading.append(time.perf_counter() - began)
            began = time.perf_counter()
            for batch in batches:
                trainer.engine.backward(trainer.loss_sum(batch) / 100)
            trainer.engine.step(trainer.engine.grad_norm(), 1.0)
            stepping.append(time.perf_counter() - began)
        trainer.prefetch.close()
    read_s, step_s = statistics.median(reading[2:]), statistics.median(stepping[2:])
    say(f"{' '.join((recipe, *settings))}: {read_s * 1e3:.1f} ms of {(read_s + step_s) * 1e3:,.0f} ms a step")
    return read_s / (read_s + step_s)


if __name__ == "__main__":
    main()
