"""Pretraining of a small BART from scratch by text infilling and sentence permutation, on Python's standard library.

accelerate launch recipes/pretrain_bart.py
samestep run recipes/pretrain_bart.py --backend fsdp --processes 2 train.max_steps=100
samestep data show recipes/pretrain_bart.py 0 --plot pretrain_bart.png
"""

from pathlib import Path

from trainer.backend import build_accelerator
from trainer.config import ModelConfig, OptimConfig, RunConfig, StreamData, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="pretrain_bart",
    model=ModelConfig(source=str(Path(__file__).parent / "models/bart-9m"), task="seq2seq", init="random"),
    data=StreamData(objective="infilling", sequence_length=128, packing="concat", isolate=False),
    optim=OptimConfig(peak_lr=5e-4, schedule="cosine", warmup_fraction=0.2, min_lr_fraction=0.1, weight_decay=0.1),
    train=TrainConfig(max_steps=300, global_batch_size=16, eval_every=100, eval_batch_size=16, metric="loss"),
)


def main(config: RunConfig) -> None:
    """The data's tokenizer gets the mask token that it lacks; it is saved with the model."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    ids = task.special_ids
    model = build_model(config, task.label_names, accelerator, vocab_size=task.vocab_size, special_ids=ids)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
