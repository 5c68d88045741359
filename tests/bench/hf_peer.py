"""The peer of bench_sst2.py: what a user of transformers and PEFT writes to train the recipe's model on the recipe's samples.

Torch's own dropout and attention, DataCollatorWithPadding, HF Trainer. Invariant: rates, ranks, batch size and learning rate are the
recipe's; the functions of a Job run on a fresh rank.
"""

import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.bench.timing import WARM_UP, Job, set_up
from trainer.config import LoraConfig, RunConfig
from trainer.data.classify import ClassificationSet, Split
from trainer.model.load import load_architecture, model_location
from trainer.model.targets import resolve_targets
from trainer.optim import peak_lr


def hf_model(config: RunConfig, data: ClassificationSet) -> nn.Module:
    """What a user of transformers and PEFT builds: the recipe's layers, rank and rates, torch's own dropout and attention."""
    import peft
    from transformers import AutoModelForSequenceClassification

    method, source = config.method, model_location(config.model.source)
    assert isinstance(method, LoraConfig)
    torch.manual_seed(config.train.seed)
    architecture = load_architecture(config.model, data.label_names)
    plain = AutoModelForSequenceClassification.from_pretrained(source, config=architecture, dtype=torch.float32)
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=method.rank,
        lora_alpha=int(method.alpha),
        lora_dropout=method.dropout,
        target_modules=resolve_targets(plain, method.targets),
    )
    return peft.get_peft_model(plain, lora)


def hf_trainer(config: RunConfig, data: ClassificationSet, model: nn.Module, **options: Any) -> Any:
    """A Trainer with the recipe's optimizer, schedule and batch size; `options` are TrainingArguments."""
    from transformers import DataCollatorWithPadding, TrainingArguments
    from transformers import Trainer as HfTrainer

    optim, train = config.optim, config.train
    arguments = TrainingArguments(
        per_device_train_batch_size=train.global_batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        learning_rate=peak_lr(config),
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_fraction,  # below 1: a fraction
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm or 0.0,
        seed=train.seed,
        use_cpu=not torch.accelerator.is_available(),
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return HfTrainer(
        model=model,
        args=arguments,
        train_dataset=hf_dataset(data.train),
        eval_dataset=hf_dataset(data.validation),
        data_collator=DataCollatorWithPadding(data.tokenizer),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
    )


def hf_dataset(split: Split) -> Any:
    """The same tokens and labels as a `datasets.Dataset`."""
    from datasets import Dataset

    rows = [row.tolist() for row in np.split(split.tokens, split.offsets[1:-1])]
    masks = [[1] * len(row) for row in rows]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": masks, "labels": split.labels.tolist()})


def hf_seconds(job: Job, sampling: str) -> float:
    """One epoch of HF Trainer, from the epoch's first to its last step; the warm-up is a Trainer of its own."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter()

    _, data = set_up(job)
    model, clock = hf_model(job.config, data), Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "save_strategy": "no", "train_sampling_strategy": sampling}
        hf_trainer(job.config, data, model, max_steps=WARM_UP, **options).train()
        trainer = hf_trainer(job.config, data, model, num_train_epochs=1, **options)
        trainer.add_callback(clock)
        trainer.train()
    return clock.ended - clock.started


def hf_accuracy(job: Job) -> float:
    """Test accuracy of HF Trainer with random batches: as many epochs, the best of as many evaluations."""
    _, data = set_up(job)
    assert data.test is not None
    train = job.config.train
    schedule: dict[str, Any] = {"num_train_epochs": train.num_epochs, "max_steps": train.max_steps or -1}
    if train.max_steps is not None:
        del schedule["num_train_epochs"]
    for kind in ("eval", "save"):
        schedule[f"{kind}_strategy"] = "steps" if train.eval_every else "epoch"
        schedule[f"{kind}_steps"] = train.eval_every or 500
    with tempfile.TemporaryDirectory() as folder:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_total_limit": 1}
        trainer = hf_trainer(job.config, data, hf_model(job.config, data), output_dir=folder, **best, **schedule)
        trainer.train()
        return float(trainer.evaluate(hf_dataset(data.test))["eval_accuracy"])
