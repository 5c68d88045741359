"""Speed of LoRA on SST sentences, against Hugging Face's Trainer and against bare PyTorch.

    python tests/bench/bench_sst2.py                     # 2,000 samples, 3 rounds: under 20 minutes on 2 cores
    python tests/bench/bench_sst2.py --accuracy          # also trains samestep and HF Trainer in full with 3 paired seeds
    python tests/bench/bench_sst2.py --only ddp --samples 256 --rounds 1

Everything follows recipes/lora_sst2.py, whose dropout is the model's own (0.1), as a Hugging Face user has it: same weights, LoRA
layers, dropout rates, samples, batch size, learning rate and threads for all. A peer's model is plain transformers and PEFT, with
torch's own dropout; the bare loops take samestep's model, optimizer and batches, made into tensors
beforehand. Each contestant takes warm-up steps first, then one whole epoch is timed, without evaluation or logging.
The last line is one JSON object of ratios: medians over rounds; null is what was not measured.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.bench.hf_peer import hf_accuracy, hf_model, hf_seconds
from tests.bench.timing import (
    LORA_SST2,
    WARM_UP,
    Job,
    Values,
    in_turn,
    median_ratio,
    print_ratios,
    samestep_seconds,
    samples_per_s,
    say,
    set_up,
    show,
    start_ranks_quietly,
    time_steps,
)
from tests.rank_pool import run_ranks
from trainer.config import RunConfig
from trainer.data.batches import epoch_batches, micro_batches
from trainer.data.classify import ClassificationSet, read_splits
from trainer.loop import Trainer
from trainer.model.export import export_model
from trainer.model.load import build_model
from trainer.optim import build_optimizer
from trainer.predict.classify import load_predictor
from trainer.task.classification import ClassificationTask

PARTS = ("speed", "predict", "ddp")
NUM_SENTENCES = 1000
SEEDS = (0, 1, 2)
LONGEST_S = 4 * 3600  # full training on one thread


def main() -> None:
    """Measure, print tables, print ratios."""
    asked = parse_arguments()
    start_ranks_quietly()
    job = Job(LORA_SST2, asked.samples, asked.threads)
    speed = measure_speed(job, asked.rounds) if "speed" in asked.only else {}
    predict = measure_prediction(job, asked.rounds) if "predict" in asked.only else {}
    ddp = measure_ddp(job, asked.rounds) if "ddp" in asked.only else {}
    accuracy = measure_accuracy(job) if asked.accuracy else None
    show_all(job, speed, predict, ddp)
    print_ratios(
        {
            "samples_per_s_vs_hf_trainer": median_ratio(speed, "samestep", "HF Trainer"),
            "vs_hf_group_by_length": median_ratio(speed, "samestep", "HF Trainer, group_by_length"),
            "accuracy_minus_hf": accuracy,
            "vs_bare_loop": median_ratio(speed, "samestep", "bare PyTorch loop"),
            "predict_vs_one_at_a_time": median_ratio(predict, "samestep", "one at a time, 128 tokens"),
            "predict_bf16_vs_one_at_a_time": median_ratio(predict, "samestep, bf16", "one at a time, 128 tokens"),
            "ddp2_vs_1": median_ratio(ddp, "samestep, 2 ranks", "samestep, 1 process"),
            "ddp2_vs_bare_ddp2": median_ratio(ddp, "samestep, 2 ranks", "bare DDP, 2 ranks"),
        }
    )


def parse_arguments() -> argparse.Namespace:
    """The options; `python tests/bench/bench_sst2.py --help` prints them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000, help="training samples (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turn (default 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--accuracy", action="store_true", help="also train in full, 3 seeds: about 40 minutes more")
    return parser.parse_args()


def show_all(job: Job, speed: Values, predict: Values, ddp: Values) -> None:
    """The tables of what was measured."""
    if speed:
        show(f"Training, {job.num_samples:,} samples, {job.num_threads} threads", speed, "samples/s")
    if predict:
        show(f"Prediction, {job.num_threads} threads", predict, "sentences/s")
    if ddp:
        show(f"DDP, {job.num_samples:,} samples, one thread a rank", ddp, "samples/s")


# What is compared


def measure_speed(job: Job, rounds: int) -> Values:
    """Training samples per second of one process."""
    contestants = {
        "samestep": samples_per_s(samestep_seconds, job),
        "HF Trainer": samples_per_s(hf_seconds, job, "random"),
        "HF Trainer, group_by_length": samples_per_s(hf_seconds, job, "group_by_length"),
        "bare PyTorch loop": samples_per_s(bare_seconds, job),
    }
    return in_turn(contestants, rounds)


def measure_ddp(job: Job, rounds: int) -> Values:
    """Training samples per second of two ranks with one thread each, and of one process with one thread."""
    one_thread = replace(job, num_threads=1)
    contestants = {
        "samestep, 1 process": samples_per_s(samestep_seconds, one_thread),
        "samestep, 2 ranks": samples_per_s(samestep_seconds, one_thread, backend="ddp"),
        "bare DDP, 2 ranks": samples_per_s(bare_seconds, one_thread, backend="ddp"),
    }
    return in_turn(contestants, rounds)


def measure_prediction(job: Job, rounds: int) -> Values:
    """Sentences per second of samestep's predictor, and of the loop that many tutorials show."""
    return in_turn(
        {
            "samestep": lambda: run_ranks(predictor_speed, "single", 1, args=(job, "no"), timeout_s=600)[0],
            "samestep, bf16": lambda: run_ranks(predictor_speed, "single", 1, args=(job, "bf16"), timeout_s=600)[0],
            "one at a time, 128 tokens": lambda: one_at_a_time(job, merged=False),
            "the same, adapter merged": lambda: one_at_a_time(job, merged=True),
        },
        rounds,
    )


def measure_accuracy(job: Job) -> float:
    """Mean test accuracy of samestep minus HF Trainer's, over paired seeds.

    Accuracy does not depend on the threads: as many trainings as there are cores run at a time, with one thread each.
    """

    def train(kind: Callable[[Job], float], seed: int) -> float:
        config = job.config.model_copy(update={"train": job.config.train.model_copy(update={"seed": seed})})
        accuracy = run_ranks(kind, "single", 1, args=(Job(config, None, 1),), timeout_s=LONGEST_S)[0]
        say(f"{kind.__name__}, seed {seed}: {accuracy:.4f}")
        return float(accuracy)

    with ThreadPoolExecutor(job.num_threads) as pool:
        ours = [pool.submit(train, samestep_accuracy, seed) for seed in SEEDS]
        theirs = [pool.submit(train, hf_accuracy, seed) for seed in SEEDS]
    means = [statistics.mean(future.result() for future in futures) for futures in (ours, theirs)]
    return round(means[0] - means[1], 5)


# On every rank: the bare loop


def bare_seconds(job: Job) -> float:
    """One epoch of the shortest loop there is, over the same batches or rank shares; under DDP with samestep's DDP options."""
    accelerator, data = set_up(job)
    model: nn.Module = build_model(job.config, data.label_names, accelerator).train().to(accelerator.device)
    optimizer = build_optimizer(model, job.config, fused=True)
    if accelerator.num_processes > 1:
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    batches = own_batches(job.config, accelerator, data)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(number: int) -> None:
        inputs = dict(batches[number])
        labels = inputs.pop("labels")
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        nn.utils.clip_grad_norm_(trained, job.config.optim.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return time_steps(step, len(batches), accelerator.device)


def own_batches(config: RunConfig, accelerator: Accelerator, data: ClassificationSet) -> list[dict[str, Tensor]]:
    """This rank's share of each global batch of epoch 0, on the device."""
    train, place = config.train, (accelerator.process_index, accelerator.num_processes)
    by_length = config.data.group_by_length
    epoch = epoch_batches(data.train.lengths, train.global_batch_size, train.seed, 0, group_by_length=by_length)
    shares = [micro_batches(ids, *place, None)[0] for ids in epoch]
    batches = [data.collate(data.train, share) for share in shares]
    return [{name: tensor.to(accelerator.device) for name, tensor in batch.items()} for batch in batches]


# Prediction and accuracy


def predictor_speed(job: Job, precision: str) -> float:
    """Sentences per second of samestep's predictor on an adapter that it opens from disk."""
    accelerator, data = set_up(job)
    texts = read_splits(job.config.data).train.texts[:NUM_SENTENCES]
    with tempfile.TemporaryDirectory() as name:
        folder = exported(job, data, Path(name) / "model")
        predictor = load_predictor(folder, accelerator.device, precision=precision)
    predictor.predict(texts[:32])
    started = time.perf_counter()
    predictor.predict(texts)
    return NUM_SENTENCES / (time.perf_counter() - started)


def exported(job: Job, data: ClassificationSet, folder: Path) -> Path:
    """An untrained adapter, exported as a run does it."""
    model = hf_model(job.config, data)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    info = {
        "task": job.config.model.task,
        "method": job.config.method.name,
        "base": job.config.model.source,
        "label_names": list(data.label_names),
        "max_length": job.config.data.max_length,
    }
    export_model(model, state, data.tokenizer, folder, info)
    return folder


def one_at_a_time(job: Job, *, merged: bool) -> float:
    """`loop_speed` in a process of its own."""
    return run_ranks(loop_speed, "single", 1, args=(job, merged), timeout_s=600)[0]


def loop_speed(job: Job, merged: bool) -> float:
    """Sentences per second of transformers and PEFT, one at a time, padded to 128 tokens.

    merged: into its base, as samestep's predictor does it by itself; PeftModel.from_pretrained leaves an adapter beside.
    """
    accelerator, data = set_up(job)
    texts = read_splits(job.config.data).train.texts[:NUM_SENTENCES]
    made, tokenizer = hf_model(job.config, data), data.tokenizer
    model = (made.merge_and_unload() if merged else made).eval().to(accelerator.device)

    def predict(text: str) -> int:
        inputs = tokenizer(text, padding="max_length", max_length=128, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return int(model(**inputs.to(accelerator.device)).logits.softmax(-1).argmax())

    for text in texts[:WARM_UP]:
        predict(text)
    started = time.perf_counter()
    for text in texts:
        predict(text)
    return len(texts) / (time.perf_counter() - started)


def samestep_accuracy(job: Job) -> float:
    """Test accuracy of the recipe: the step chosen on validation, the exported adapter tested."""
    with tempfile.TemporaryDirectory() as folder:
        config = job.config.model_copy(update={"run_dir": Path(folder) / "run"})
        accelerator, data = set_up(replace(job, config=config))
        Trainer(
            config, accelerator, build_model(config, data.label_names, accelerator), ClassificationTask(config, data)
        ).fit()
        last = (config.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["test/accuracy"])


if __name__ == "__main__":
    main()
