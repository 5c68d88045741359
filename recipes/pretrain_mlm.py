"""Domain-adaptive masked language modelling: MiniLM reads the sentences of asset:sst, those of the training split only, without labels.

accelerate launch recipes/pretrain_mlm.py
accelerate launch recipes/lora_sst2.py name=lora_sst2_adapted model.source=runs/pretrain_mlm/model    # and compare
samestep run recipes/pretrain_mlm.py data.sources=tokens data.validation=held-out    # made with its tokenizer
"""

from trainer.backend import build_accelerator
from trainer.config import ModelConfig, OptimConfig, RunConfig, StreamData, TrainConfig
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import run_recipe
from trainer.task import build_task

DEFAULTS = RunConfig(
    name="pretrain_mlm",
    model=ModelConfig(source="asset:minilm", task="mlm"),
    data=StreamData(
        sources=("asset:sst-train",),
        validation="asset:sst-validation",
        objective="mlm",
        sequence_length=128,
        packing="concat",
        isolate=False,
        max_epochs=10,
    ),
    optim=OptimConfig(peak_lr=5e-4, head_lr=2e-3, schedule="linear", warmup_fraction=0.1, weight_decay=0.01),
    train=TrainConfig(max_steps=200, global_batch_size=16, eval_every=50, eval_batch_size=16, metric="loss"),
)


def main(config: RunConfig) -> None:
    """MiniLM came without a head for masked tokens; one is drawn, which the summary says, and trained with the rest."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    model = build_model(config, task.label_names, accelerator, vocab_size=task.vocab_size)
    Trainer(config, accelerator, model, task).fit()


if __name__ == "__main__":
    run_recipe(main, DEFAULTS)
