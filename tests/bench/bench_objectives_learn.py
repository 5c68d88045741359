"""What 200 steps of each objective change: held-out loss at step 0 and after, and what token frequencies alone would give.

    python tests/bench/bench_objectives_learn.py                    # about 30 minutes on 2 cores
    python tests/bench/bench_objectives_learn.py span_corruption plm    # some of them

Loss is that of the recipe over all held-out targets. Of the targets that are text (no special token, no sentinel: these are nearly free)
also their own loss after 200 steps, beside the unigram entropy: that of the frequencies of tokens in the text of these 200 steps, which a
model gets that knows nothing else. Exit code 1 where the loss fell by less than 10 %, or where a model from scratch is above the entropy.
The last line is one JSON object: objective -> [loss at step 0, after, text loss after, unigram entropy], nats.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from launch.preflight import load_recipe
from trainer.backend import build_accelerator
from trainer.data.batches import IGNORED
from trainer.loop import Trainer
from trainer.loss import token_losses
from trainer.model.load import build_model
from trainer.quiet import quiet_libraries
from trainer.resolve import resolve
from trainer.task import build_task
from trainer.task.objective import logits_of

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS, BATCH = 200, 64, 16
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.eval_every=100",
    f"data.validation_rows={ROWS}",
    "data.sequence_length=128",
    "train.resume=never",
)
PAIRS = ("model.task=mlm_pairs", "train.metric=loss")
RUNS: dict[str, tuple[str, ...]] = {
    "clm": ("pretrain_clm", "train.global_batch_size=16"),
    "mlm": ("pretrain_mlm",),
    "mlm_nsp": ("pretrain_mlm", "data.objective=mlm_nsp", *PAIRS),
    "mlm_sop": ("pretrain_mlm", "data.objective=mlm_sop", *PAIRS),
    "span_corruption": ("pretrain_t5",),
    "infilling": ("pretrain_bart",),
    "plm": ("pretrain_xlnet",),
}
"""Objective -> its recipe, and what is set beside SETTINGS."""
LEAST_FALL = 0.1


def main() -> None:
    """Measure and print."""
    quiet_libraries()
    found, missed = {}, []
    for name in sys.argv[1:] or RUNS:
        before, after, text, entropy, is_new = learn(name)
        print(
            f"{name}: {before:.3f} -> {after:.3f} ({after / before - 1:+.1%}); text {text:.3f}, unigram {entropy:.3f}"
        )
        found[name] = [round(value, 4) for value in (before, after, text, entropy)]
        if after > (1 - LEAST_FALL) * before or (is_new and text >= entropy):
            missed.append(name)
    print(json.dumps(found))
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


def learn(name: str) -> tuple[float, float, float, float, bool]:
    """Held-out loss before and after, that of text after, the entropy of text, and whether the model began from random weights."""
    recipe, *settings = RUNS[name]
    defaults = load_recipe(ROOT / "recipes" / f"{recipe}.py").DEFAULTS
    config = resolve(type(defaults), defaults, [*SETTINGS, *settings, f"name=learn_{name}"]).config
    accelerator = build_accelerator(config)
    task: Any = build_task(config, accelerator)
    is_new = config.model.init == "random"
    ids = task.special_ids if is_new else None
    model = build_model(config, (), accelerator, vocab_size=task.vocab_size, special_ids=ids)
    trainer = Trainer(config, accelerator, model, task)
    before = trainer.evaluate()["loss"]
    trainer.fit()
    lines = map(json.loads, (config.folder / "metrics.jsonl").read_text().splitlines())
    after = [line["eval/loss"] for line in lines if "eval/loss" in line][-1]
    is_special = torch.zeros(task.vocab_size, dtype=torch.bool)
    if hasattr(task, "vocabulary"):  # clm has no special tokens but the one between documents
        is_special[torch.from_numpy(task.vocabulary.is_special).nonzero()[:, 0]] = True
    return before, after, text_loss(trainer, task, is_special), unigram_entropy(task, is_special), is_new


def text_loss(trainer: Trainer, task: Any, is_special: torch.Tensor) -> float:
    """Mean loss of the held-out targets that are text."""
    losses = []
    trainer.engine.model.eval()
    for first in range(0, ROWS, BATCH):
        batch = task.validation_batch(np.arange(first, first + BATCH))
        with torch.no_grad():
            logits = logits_of(trainer.engine.forward(task.model_inputs(batch)))
        labels = batch["labels"]
        is_text = (labels != IGNORED) & ~is_special[labels.clamp(min=0)]
        losses.append(token_losses(logits, labels)[is_text])
    return float(torch.cat(losses).mean())


def unigram_entropy(task: Any, is_special: torch.Tensor) -> float:
    """Of the text that the model has read; some 300,000 tokens, as of the 1,300 targets of the held-out rows it comes out 0.8 too small."""
    counts = torch.zeros(task.vocab_size, dtype=torch.float64)
    for step in range(STEPS):
        batch = task.training_batch(task.global_batch(step))
        counts += torch.bincount(batch["input_ids"].flatten(), minlength=task.vocab_size)
    counts[is_special] = 0
    return float(torch.special.entr(counts / counts.sum()).sum())


if __name__ == "__main__":
    main()
