"""QLoRA: SmolLM2-135M-Instruct in 4 bits learns to write docstrings, from the functions of Python's standard library.

accelerate launch recipes/qlora_instruct.py
samestep run recipes/qlora_instruct.py --backend fsdp --processes 2 method.rank=16
samestep run recipes/qlora_instruct.py data.source=pairs.jsonl    # lines of {"prompt": ..., "response": ...}
"""

from trainer.backend import build_accelerator
from trainer.config import InstructData, ModelConfig, OptimConfig, QloraConfig, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="qlora_instruct",
    model=ModelConfig(source="asset:smollm2", task="clm"),
    method=QloraConfig(quantize="nf4", rank=8, alpha=16, targets="all-linear"),
    data=InstructData(source="asset:stdlib", max_length=256, validation_rows=64),
    optim=OptimConfig(peak_lr=3e-4, schedule="cosine", warmup_fraction=0.1, weight_decay=0.0),
    train=TrainConfig(max_steps=60, global_batch_size=8, eval_every=20, eval_batch_size=16, log_every=5, metric="loss"),
)


def main(config: RunConfig) -> None:
    """Only the adapter is trained, saved and exported; the base stays where it is."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
