"""Full fine-tuning of a sentence encoder on SST sentences: every weight is trained.

accelerate launch recipes/full_sst2.py
accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/full_sst2.py optim.layer_decay=0.9
samestep run recipes/full_sst2.py --backend zero3 --processes 2 data.augment.kinds=synonyms,delete
"""

from trainer.backend import build_accelerator
from trainer.config import ClassificationData, FullConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="full_sst2",
    model=ModelConfig(source="asset:minilm"),
    method=FullConfig(),
    data=ClassificationData(source="asset:sst", labels=("negative", "positive")),
    optim=OptimConfig(peak_lr=2e-5, head_lr=1e-3, schedule="linear", warmup_fraction=0.1, weight_decay=0.01),
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
