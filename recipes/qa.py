"""Extractive question answering: a sentence encoder learns to mark the answer in a long text, here the source of Python's standard library.

accelerate launch recipes/qa.py
samestep run recipes/qa.py --backend ddp --processes 2 data.source=train-v2.0.json data.validation=dev-v2.0.json
"""

from trainer.backend import build_accelerator
from trainer.config import FullConfig, ModelConfig, OptimConfig, QuestionData, RunConfig, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="qa",
    model=ModelConfig(source="asset:minilm", task="question_answering", dropout=0.0, attention_dropout=0.0),
    method=FullConfig(),
    data=QuestionData(source="asset:stdlib", max_length=256, stride=64, validation_rows=256),
    optim=OptimConfig(peak_lr=3e-4, schedule="linear", warmup_fraction=0.1, weight_decay=0.01),
    train=TrainConfig(max_steps=240, global_batch_size=16, eval_every=120, metric="f1"),
)


def main(config: RunConfig) -> None:
    """Without dropout: so few steps see hardly a question twice, and a CPU draws masks slowly."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
