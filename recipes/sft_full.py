"""Full fine-tuning on instructions of the small model that recipes/pretrain_clm.py made: it learns to write docstrings.

accelerate launch recipes/pretrain_clm.py && accelerate launch recipes/sft_full.py
samestep run recipes/sft_full.py --backend zero2 --processes 2 model.source=my_model data.source=chats.jsonl
"""

from trainer.backend import build_accelerator
from trainer.config import FullConfig, InstructData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="sft_full",
    model=ModelConfig(source="runs/pretrain_clm/model", task="clm"),
    method=FullConfig(),
    data=InstructData(source="asset:stdlib", max_length=256, packing="best_fit", validation_rows=64),
    optim=OptimConfig(peak_lr=5e-4, schedule="cosine", warmup_fraction=0.1, weight_decay=0.01),
    train=TrainConfig(max_steps=200, global_batch_size=16, eval_every=50, log_every=10, metric="loss"),
)


def main(config: RunConfig) -> None:
    """A model without a chat template of its own is taught Alpaca's, which is saved with it."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
