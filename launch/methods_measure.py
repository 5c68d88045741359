"""What each method costs and gives on real sentences: the recipe lora_sst2 with another method, each in a process of its own."""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainer.config import LowRank, MethodConfig
from trainer.errors import ConfigError
from trainer.quiet import quiet_libraries

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "lora_sst2.py"
PREDICTED = 512  # sentences, in three rounds of which the median counts


@dataclass(frozen=True)
class Measured:
    """One method."""

    method: str
    accuracy: float
    """On the test split."""
    train_per_s: float
    """Samples, median over log lines."""
    predict_per_s: float
    """Sentences with the exported model, as `samestep predict` loads it."""
    base_per_s: float
    """The same with the base model and an untrained head."""
    peak_bytes: int
    """Largest resident memory of the training process."""
    saved_bytes: int
    """Of the exported tensors."""


def measure_methods(model: str, methods: Sequence[MethodConfig], steps: int) -> list[Measured]:
    """Train each method, and a model from random weights as `scratch`, for so many steps, one after the other."""
    with tempfile.TemporaryDirectory(prefix="samestep-methods-") as folder:
        base_per_s = in_process(base_speed, model)
        kinds: dict[str, list[str]] = {
            method.name: [f"method={method.name}", *low_rank_settings(method)] for method in methods
        }
        kinds["scratch"] = ["method=full", "model.init=random"]
        rows = []
        for number, (name, settings) in enumerate(kinds.items(), start=1):
            print(f"measuring {name} ({number} of {len(kinds)})", file=sys.stderr, flush=True)
            common = [
                f"model.source={model}",
                f"train.max_steps={steps}",
                "train.num_epochs=none",
                "optim.peak_lr=none",
            ]
            common += [f"train.eval_every={steps}", f"train.save_every={steps}"]
            rows.append(measure(name, [*common, *settings], Path(folder) / name, base_per_s))
        return rows


def low_rank_settings(method: MethodConfig) -> list[str]:
    """Rank, alpha and targets, which the recipe has of its own for lora."""
    if not isinstance(method, LowRank):
        return []
    targets = method.targets if isinstance(method.targets, str) else ",".join(method.targets)
    return [f"method.rank={method.rank}", f"method.alpha={method.alpha}", f"method.targets={targets}"]


def measure(name: str, settings: list[str], run: Path, base_per_s: float) -> Measured:
    """One training and three rounds of prediction."""
    peak = in_process(train, [str(RECIPE), f"run_dir={run}", *settings])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    saved = sum(file.stat().st_size for file in (run / "model").glob("*.safetensors"))
    speed = in_process(predict_speed, str(run))
    shutil.rmtree(run)
    return Measured(
        method=name,
        accuracy=lines[-1]["test/accuracy"],
        train_per_s=statistics.median(line["samples_per_s"] for line in lines if "samples_per_s" in line),
        predict_per_s=speed,
        base_per_s=base_per_s,
        peak_bytes=peak,
        saved_bytes=saved,
    )


def in_process(body: Any, argument: Any) -> Any:
    """The result of `body(argument)`, run in a fresh process so that memory and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(body, argument).result()


def train(argv: list[str]) -> int:
    """Run the recipe; bytes of its peak memory. ConfigError with its own words where it fails."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    done = subprocess.run(
        [sys.executable, *argv], env=os.environ | threads, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ConfigError(
            f"the training {' '.join(argv[1:])} failed with exit code {done.returncode}:\n{done.stderr[-2000:].strip()}"
        )
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def predict_speed(run: str) -> float:
    """Sentences a second."""
    quiet_libraries()
    from trainer.predict.classify import load_predictor

    return speed_of(load_predictor(Path(run)))


def base_speed(model: str) -> float:
    """Sentences a second of the base model."""
    quiet_libraries()
    from trainer.config import ModelConfig
    from trainer.model.architecture import load_architecture, load_tokenizer
    from trainer.model.load import load_weights
    from trainer.predict.classify import Predictor

    source = ModelConfig(source=model)
    names = ("negative", "positive")
    plain = load_weights(source, load_architecture(source, names))[0]
    return speed_of(Predictor(plain, load_tokenizer(source), label_names=names, max_length=128))


def speed_of(predictor: Any) -> float:
    """Median of three rounds over the same sentences, after one that does not count."""
    from launch.adapter import read_texts

    texts = read_texts(None, "classification", PREDICTED)
    predictor.predict(texts[:64])
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        predictor.predict(texts)
        seconds.append(time.perf_counter() - began)
    return len(texts) / statistics.median(seconds)
