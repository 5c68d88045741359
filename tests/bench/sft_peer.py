"""TRL's SFTTrainer on the pairs, model and settings of bench_sft.py, and what both contestants are asked."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from trainer.config import InstructData, ModelConfig
from trainer.data.batches import IGNORED
from trainer.data.instruct import InstructSplit, build_instruct
from trainer.model.architecture import load_tokenizer

BATCH, LENGTH, LEARNING_RATE = 8, 1024, 1e-4


@dataclass(frozen=True)
class Job:
    """One measurement."""

    folder: Path
    """Holds the model without weights' folder `model`."""
    pairs: int
    threads: int


def data_of(job: Job, packing: str) -> InstructData:
    """The settings of the data."""
    settings: dict[str, Any] = {"max_length": LENGTH, "packing": packing, "validation_fraction": 0.001, "generate": 0}
    return InstructData(source=str(job.folder / "pairs.jsonl"), **settings)


def trl_run(job: Job, packing: str) -> dict[str, Any]:
    """TRL's SFTTrainer, as its documentation shows it, in a process of its own."""
    from trl import SFTConfig

    torch.set_num_threads(job.threads)
    tokenizer = load_tokenizer(ModelConfig(source=str(job.folder / "model"), task="clm"))
    model = LlamaForCausalLM.from_pretrained(job.folder / "model", dtype=torch.float32)
    seen: list[tuple[int, float, int, int]] = []
    times: list[float] = []
    watched, clock = watching(seen, times)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_length=LENGTH,
            num_train_epochs=2,
            packing=packing == "best_fit",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = watched(
            model=model, args=arguments, train_dataset=trl_dataset(job), processing_class=tokenizer, callbacks=[clock]
        )
        isolated = packing == "best_fit" and is_isolated(model, dict(next(iter(trainer.get_train_dataloader()))))
        trainer.train()
    targets, positions = sum(step[0] for step in seen), sum(step[3] for step in seen)
    return {
        "targets_per_s": targets / (times[1] - times[0]),
        "loss": sum(step[0] * step[1] for step in seen) / targets,
        "padding": 1 - sum(step[2] for step in seen) / positions,
        "isolated": isolated,
    }


def watching(seen: list[tuple[int, float, int, int]], times: list[float]) -> tuple[type, Any]:
    """An SFTTrainer and a callback. seen: of the last epoch's steps, targets, loss, tokens, positions; times: its begin and last end."""
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Watched(SFTTrainer):
        """Notes what each step holds."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            loss = float((found[0] if isinstance(found, tuple) else found).detach())
            positions = inputs["input_ids"].numel()
            held = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else positions
            seen.append((int((inputs["labels"][:, 1:] != IGNORED).sum()), loss, held, positions))
            return found

    class Clock(TrainerCallback):
        """Notes when epochs begin and the last step ends."""

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.clear()
            times[:] = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[1:] = [time.perf_counter()]

    return Watched, Clock()


def trl_dataset(job: Job) -> Any:
    """The training conversations as prompts and completions."""
    from datasets import Dataset

    found = build_instruct(
        data_of(job, "none"), load_tokenizer(ModelConfig(source=str(job.folder / "model"), task="clm"))
    )
    turns = {conversation.place: conversation.turns for conversation in found.conversations}
    rows = [turns[sample.place] for sample in found.train.samples]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": user.text}],
                "completion": [{"role": "assistant", "content": answer.text}],
            }
            for user, answer in rows
        ]
    )


def is_isolated(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether other tokens in the first conversation of a row leave the logits of the second as they were, bit for bit."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    positions = inputs.get("position_ids")
    if positions is None:
        return False
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return False
    other = inputs["input_ids"].clone()
    other[0, : starts[1]] = (other[0, : starts[1]] + 1) % model.config.vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        one, two = (
            model(**{**inputs, "input_ids": ids}, use_cache=False).logits for ids in (inputs["input_ids"], other)
        )
    model.train(was_training)
    return bool(torch.equal(one[0, starts[1] :], two[0, starts[1] :]))


def collation_ratio(job: Job) -> float:
    """Padded batches per second of InstructSplit.batch over those of TRL's collator, on the same rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.set_num_threads(job.threads)
    tokenizer = load_tokenizer(ModelConfig(source=str(job.folder / "model"), task="clm"))
    split: InstructSplit = build_instruct(data_of(job, "none"), tokenizer).train
    padding = int(tokenizer.pad_token_id or 0)
    groups = [np.arange(start, start + BATCH) for start in range(0, len(split) - BATCH + 1, BATCH)]
    examples = [
        {"input_ids": sample.ids.tolist(), "completion_mask": sample.is_target.astype(int).tolist()}
        for sample in split.samples
    ]
    theirs = DataCollatorForLanguageModeling(pad_token_id=padding)
    ratios = []
    for _ in range(5):
        began = time.perf_counter()
        for group in groups:
            split.batch(group, padding)
        middle = time.perf_counter()
        for group in groups:
            theirs([examples[index] for index in group])
        ratios.append((time.perf_counter() - middle) / (middle - began))
    return round(statistics.median(ratios), 4)
