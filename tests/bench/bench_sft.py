"""Instruction tuning against TRL's SFTTrainer: learned tokens per second, isolation of packed conversations, collation.

    python tests/bench/bench_sft.py                  # about 15 minutes on 2 cores; `bash launch/setup.sh --bench` installs trl
    python tests/bench/bench_sft.py --layers 30      # SmolLM2 in full: hours

Same pairs (Python functions and their docstrings, at most 1,024 tokens), same tokens (SmolLM2's tokenizer and chat template), same
targets (the answers), same model (SmolLM2's shape with fewer layers, fresh weights, trained in full), same optimizer, batch size 8 and
threads; each contestant in a fresh process, in turn: a first epoch warms up, the second is timed. Peers run as they come, without
evaluation, saving or logging. isolated: whether changing a packed conversation leaves its neighbour's logits as they were, bit for bit, by
the contestant's own batch and model. The last line is one JSON object of ratios: medians over rounds.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.timing import in_turn, median_ratio, print_ratios, say, show, start_ranks_quietly
from tests.rank_pool import run_ranks
from trainer.backend import build_accelerator
from trainer.config import FullConfig, InstructData, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.data.assets import asset_path
from trainer.data.batches import IGNORED
from trainer.data.instruct import InstructSplit, build_instruct
from trainer.loop import Trainer
from trainer.model.architecture import load_tokenizer
from trainer.model.load import build_model
from trainer.task import build_task

BATCH, LENGTH, LEARNING_RATE = 8, 1024, 1e-4


@dataclass(frozen=True)
class Job:
    """One measurement."""

    folder: Path
    """Holds the model without weights' folder `model`."""
    pairs: int
    threads: int


def main() -> None:
    """Measure, print, print ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    asset_path("smollm2")
    start_ranks_quietly()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", asked.layers)
        job = Job(folder, asked.pairs, asked.threads)
        write_pairs(folder / "pairs.jsonl", asked.pairs)
        contestants = {"samestep, padded": ("own", "none"), "samestep, packed": ("own", "best_fit")}
        if importlib.util.find_spec("trl"):
            contestants |= {"TRL, padded": ("trl", "none"), "TRL, packed": ("trl", "best_fit")}
        else:
            say("trl is not installed, and is left out: bash launch/setup.sh --bench")
        facts: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}

        def measure(name: str) -> float:
            who, packing = contestants[name]
            found = run_ranks(own_run if who == "own" else trl_run, "single", 1, args=(job, packing), timeout_s=3600)[0]
            facts[name].append(found)
            return float(found["targets_per_s"])

        speeds = in_turn({name: lambda name=name: measure(name) for name in contestants}, asked.rounds)
        show(f"Learned tokens per second, {asked.layers} layers, {asked.threads} threads", speeds, "targets/s")
        for name, found in facts.items():
            last = found[-1]
            say(f"{name}: loss {last['loss']:.4f}, padding {last['padding']:.1%}, isolated: {last['isolated']}")
        collation = (
            run_ranks(collation_ratio, "single", 1, args=(job,), timeout_s=600)[0] if "TRL, padded" in facts else None
        )
    print_ratios(
        {
            "vs_trl_packed": median_ratio(speeds, "samestep, packed", "TRL, packed"),
            "vs_trl_padded": median_ratio(speeds, "samestep, packed", "TRL, padded"),
            "padded_vs_trl_padded": median_ratio(speeds, "samestep, padded", "TRL, padded"),
            "collation_vs_trl": collation,
        }
    )


def make_model(folder: Path, layers: int) -> None:
    """SmolLM2's shape with fewer layers, fresh weights, its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(asset_path("smollm2"), num_hidden_layers=layers)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(ModelConfig(source="asset:smollm2", task="clm")).save_pretrained(folder)


def write_pairs(path: Path, count: int) -> None:
    """The first pairs of at most LENGTH tokens, and one that is held out."""
    settings = InstructData(source="asset:stdlib", max_length=LENGTH, validation_fraction=0.001)
    found = build_instruct(settings, load_tokenizer(ModelConfig(source="asset:smollm2", task="clm")))
    turns = {conversation.place: conversation.turns for conversation in found.conversations}
    rows = [turns[sample.place] for sample in found.train.samples[: count + 1]]
    path.write_text("".join(json.dumps({"prompt": user.text, "response": answer.text}) + "\n" for user, answer in rows))


def data_of(job: Job, packing: str) -> InstructData:
    """The settings of the data."""
    settings: dict[str, Any] = {"max_length": LENGTH, "packing": packing, "validation_fraction": 0.001, "generate": 0}
    return InstructData(source=str(job.folder / "pairs.jsonl"), **settings)


# In a process of its own


def own_run(job: Job, packing: str) -> dict[str, Any]:
    """samestep: the loop's own steps."""
    torch.set_num_threads(job.threads)
    config = RunConfig(
        name="bench",
        run_dir=job.folder / "run",
        model=ModelConfig(source=str(job.folder / "model"), task="clm"),
        method=FullConfig(),
        data=data_of(job, packing),
        optim=OptimConfig(peak_lr=LEARNING_RATE, schedule="constant", warmup_fraction=0.0),
        train=TrainConfig(num_epochs=2, global_batch_size=BATCH, metric="loss", resume="never"),
    )
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    trainer = Trainer(config, accelerator, build_model(config, (), accelerator), task)
    trainer.engine.model.train()
    isolated = packing == "best_fit" and is_isolated(trainer.engine.module, task.training_batch(np.arange(1)))
    for epoch in range(2):
        window, began = trainer.progress.window, time.perf_counter()
        before = sums_of(window)
        for step in range(task.steps_per_epoch):
            trainer.progress.step = epoch * task.steps_per_epoch + step
            trainer.train_step()
    seconds = time.perf_counter() - began
    targets, loss, tokens, positions = (now - then for now, then in zip(sums_of(window), before, strict=True))
    return {
        "targets_per_s": targets / seconds,
        "loss": loss / targets,
        "padding": 1 - tokens / positions,
        "isolated": isolated,
    }


def sums_of(window: Any) -> tuple[float, ...]:
    """Targets, loss, tokens and positions so far."""
    counts = (float(window.counts.get(name, 0.0)) for name in ("tokens", "positions"))
    return (window.num_targets, float(window.loss_sum), *counts)


def trl_run(job: Job, packing: str) -> dict[str, Any]:
    """TRL's SFTTrainer, as its documentation shows it."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(job.threads)
    seen: list[tuple[int, float, int, int]] = []
    times: list[float] = []

    class Watched(SFTTrainer):
        """Notes what each step holds."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            loss = float((found[0] if isinstance(found, tuple) else found).detach())
            held = (
                inputs["attention_mask"].sum()
                if "attention_mask" in inputs
                else torch.tensor(inputs["input_ids"].numel())
            )
            targets = int((inputs["labels"][:, 1:] != IGNORED).sum())
            seen.append((targets, loss, int(held), inputs["input_ids"].numel()))
            return found

    class Clock(TrainerCallback):
        """Notes when epochs begin and the last step ends."""

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.clear()
            times[:] = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[1:] = [time.perf_counter()]

    tokenizer = load_tokenizer(ModelConfig(source=str(job.folder / "model"), task="clm"))
    model = LlamaForCausalLM.from_pretrained(job.folder / "model", dtype=torch.float32)
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
        trainer = Watched(
            model=model, args=arguments, train_dataset=trl_dataset(job), processing_class=tokenizer, callbacks=[Clock()]
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


if __name__ == "__main__":
    main()
