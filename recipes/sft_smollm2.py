"""LoRA: SmolLM2-135M-Instruct learns to write docstrings, from the functions of Python's standard library, packed into full rows.

accelerate launch recipes/sft_smollm2.py
samestep run recipes/sft_smollm2.py --backend fsdp --processes 2 data.packing=none
samestep run recipes/sft_smollm2.py data.source=chats.jsonl    # messages, ShareGPT, Alpaca, or prompt and response
"""

from trainer.backend import build_accelerator
from trainer.config import InstructData, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="sft_smollm2",
    model=ModelConfig(source="asset:smollm2", task="clm"),
    method=LoraConfig(rank=16, alpha=32, targets="all-linear"),
    data=InstructData(source="asset:stdlib", max_length=256, packing="best_fit", validation_rows=64),
    optim=OptimConfig(peak_lr=5e-4, schedule="cosine", warmup_fraction=0.1, weight_decay=0.0),
    train=TrainConfig(
        max_steps=100, global_batch_size=4, eval_every=25, eval_batch_size=16, log_every=5, metric="loss"
    ),
)


def main(config: RunConfig) -> None:
    """The template is saved with the adapter, so that it is asked as it was trained."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
