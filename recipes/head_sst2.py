"""Head-only training on SST sentences: the encoder is frozen, and a classifier learns to read what it says.

accelerate launch recipes/head_sst2.py
accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/head_sst2.py train.num_epochs=10
samestep run recipes/head_sst2.py --backend ddp --processes 2 model.head_dropout=0
"""

from trainer.backend import build_accelerator
from trainer.config import ClassificationData, HeadConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="head_sst2",
    model=ModelConfig(source="asset:minilm"),
    method=HeadConfig(),
    data=ClassificationData(source="asset:sst", labels=("negative", "positive")),
    optim=OptimConfig(peak_lr=1e-3, schedule="linear", warmup_fraction=0.1, weight_decay=0.01),
    train=TrainConfig(num_epochs=3, global_batch_size=32, eval_every=100),
)


def main(config: RunConfig) -> None:
    """Data before model, so that a mistake in the data is found before any weights load."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
