"""Summaries by the small T5 that recipes/pretrain_t5.py made: it learns to say in a line what a Python function does.

accelerate launch recipes/pretrain_t5.py && accelerate launch recipes/summarize.py
samestep run recipes/summarize.py --backend fsdp --processes 2 model.source=google-t5/t5-small data.prefix="summarize: "
samestep run recipes/summarize.py method.name=lora data.source=articles.jsonl data.text=article data.target=highlights
"""

from trainer.backend import build_accelerator
from trainer.config import FullConfig, ModelConfig, OptimConfig, PairData, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="summarize",
    model=ModelConfig(source="runs/pretrain_t5/model", task="seq2seq"),
    method=FullConfig(),
    data=PairData(source="asset:stdlib", max_length=256, max_target_length=48, generate=64, new_tokens=48),
    optim=OptimConfig(peak_lr=2e-3, schedule="cosine", warmup_fraction=0.1, weight_decay=0.01),
    train=TrainConfig(max_steps=200, global_batch_size=16, eval_every=50, log_every=10, metric="loss"),
)


def main(config: RunConfig) -> None:
    """Validation are functions whose source the model has not learned a summary of."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
