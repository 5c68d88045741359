"""Pretraining of a small Llama from scratch on the source code of Python's standard library.

accelerate launch recipes/pretrain_clm.py
samestep run recipes/pretrain_clm.py --backend fsdp --processes 2 train.max_steps=200
samestep run recipes/pretrain_clm.py data.sources=tokens data.validation=held-out    # made by `samestep data tokenize`
"""

from pathlib import Path

from trainer.backend import build_accelerator
from trainer.config import ModelConfig, OptimConfig, RunConfig, StreamData, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="pretrain_clm",
    model=ModelConfig(source=str(Path(__file__).parent / "models/llama-8m"), task="clm", init="random"),
    data=StreamData(sources=("asset:stdlib",), validation="asset:stdlib-validation", sequence_length=256),
    optim=OptimConfig(peak_lr=2e-3, schedule="cosine", warmup_fraction=0.05, min_lr_fraction=0.1, weight_decay=0.1),
    train=TrainConfig(max_steps=300, global_batch_size=16, eval_every=100, metric="loss"),
)


def main(config: RunConfig) -> None:
    """The model's vocabulary is that of the tokenizer that made the data."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator, vocab_size=task.vocab_size)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
