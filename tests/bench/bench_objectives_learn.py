"""What 200 steps of each pretraining recipe change: held-out loss at step 0 and after, and that of token frequencies.

    python tests/bench/bench_objectives_learn.py                    # about 25 minutes on 2 cores
    python tests/bench/bench_objectives_learn.py t5 xlnet           # some of them

The last number is the loss of a model that knows only how frequent each token is among the targets of the same 200 steps: the unigram
entropy. The last line is one JSON object: recipe -> [loss at step 0, after 200 steps, unigram], nats.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from launch.preflight import load_recipe
from trainer.backend import build_accelerator
from trainer.data.batches import IGNORED
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.quiet import quiet_libraries
from trainer.resolve import resolve
from trainer.task import build_task

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("mlm", "t5", "bart", "xlnet")
STEPS = 200
SETTINGS = (f"train.max_steps={STEPS}", "train.eval_every=100", "data.validation_rows=64", "train.resume=never")


def main() -> None:
    """Measure and print."""
    quiet_libraries()
    found = {name: learn(name) for name in sys.argv[1:] or RECIPES}
    for name, (before, after, entropy) in found.items():
        print(f"{name}: {before:.3f} -> {after:.3f} ({after / before - 1:+.1%}); unigram {entropy:.3f}")
    print(json.dumps({name: [round(value, 4) for value in values] for name, values in found.items()}))


def learn(name: str) -> tuple[float, float, float]:
    """Held-out loss before and after, and the entropy of the held-out targets."""
    defaults = load_recipe(ROOT / "recipes" / f"pretrain_{name}.py").DEFAULTS
    config = resolve(type(defaults), defaults, [*SETTINGS, f"name=learn_{name}"]).config
    accelerator = build_accelerator(config)
    task: Any = build_task(config, accelerator)
    ids = task.special_ids if config.model.init == "random" else None
    model = build_model(config, (), accelerator, vocab_size=task.vocab_size, special_ids=ids)
    trainer = Trainer(config, accelerator, model, task)
    before = trainer.evaluate()["loss"]
    trainer.fit()
    last = json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[-1])
    return before, last["eval/loss"], unigram_loss(task)


def unigram_loss(task: Any) -> float:
    """Of the held-out targets, by how often each token was a target in training, nats."""
    seen = np.concatenate([targets(task.training_batch(task.global_batch(step))) for step in range(STEPS)])
    counts = np.bincount(seen, minlength=task.vocab_size) + 0.5
    held_out = targets(task.validation_batch(np.arange(task.num_validation_rows)))
    return float(-np.log(counts[held_out] / counts.sum()).mean())


def targets(batch: Any) -> np.ndarray:
    """What is to be found."""
    labels = batch["labels"].numpy()
    return labels[labels != IGNORED]


if __name__ == "__main__":
    main()
