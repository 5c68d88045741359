"""Named entities: MiniLM finds the names that Python source defines and imports (function, class, argument, module).

accelerate launch recipes/ner.py
samestep run recipes/ner.py --backend ddp --processes 2 data.source=train.conll data.validation=dev.conll data.test=test.conll
"""

from trainer.backend import build_accelerator
from trainer.config import FullConfig, ModelConfig, OptimConfig, RunConfig, TagData, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="ner",
    model=ModelConfig(source="asset:minilm", task="token_classification"),
    method=FullConfig(),
    data=TagData(source="asset:stdlib", max_length=128),
    optim=OptimConfig(peak_lr=3e-4, head_lr=1e-3, schedule="linear", warmup_fraction=0.1, weight_decay=0.01),
    train=TrainConfig(max_steps=240, global_batch_size=32, eval_every=80, metric="f1"),
)


def main(config: RunConfig) -> None:
    """The head has a class for B and I of each type of entity, and one for words outside of any."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
