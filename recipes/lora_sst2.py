"""LoRA fine-tuning of a sentence encoder on SST sentences: is the review positive or negative?

accelerate launch recipes/lora_sst2.py
accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/lora_sst2.py optim.peak_lr=5e-4
samestep run recipes/lora_sst2.py --backend ddp --processes 2 train.seed=1
"""

from trainer.backend import build_accelerator
from trainer.config import ClassificationData, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="lora_sst2",
    model=ModelConfig(source="asset:minilm"),
    method=LoraConfig(rank=16, alpha=32, targets="all-linear"),
    data=ClassificationData(source="asset:sst", labels=("negative", "positive")),
    optim=OptimConfig(peak_lr=5e-4, schedule="linear", warmup_fraction=0.1, weight_decay=0.01),
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
