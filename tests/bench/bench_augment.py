"""What augmentation changes when there are 200 training sentences: test accuracy with and without each kind, 3 seeds.

    python tests/bench/bench_augment.py                                # 3 seeds x 7 settings; the kinds that need no model
    python tests/bench/bench_augment.py --seeds 1 --kinds none mixup
    python tests/bench/bench_augment.py --writers runs/writers         # also those that models write; makes the models where they lack

MiniLM with LoRA as in recipes/lora_sst2.py, on 200 sentences of asset:sst; the step with the best validation loss is tested on the recipe's
own test split of 1,511 sentences. A seed draws the 200 sentences, the adapter's weights, the order and the augmentation; within a
seed, everything but the augmentation is the same for all. What the models of --writers are worth stands in tests/bench/writers.py. The
last line is one JSON object: mean accuracy of each setting, and its mean difference to none, over seeds.
"""

import argparse
import contextlib
import csv
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

from accelerate import Accelerator

from tests.bench.timing import LORA_SST2
from tests.bench.writers import likeness, make_writers
from trainer.backend import build_accelerator
from trainer.config import Augmentation, RunConfig
from trainer.config.augment import MODEL_KINDS, WORD_KINDS
from trainer.data.batches import permutation
from trainer.data.classify import read_splits
from trainer.data.samples import Samples
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.task import build_task

SETTINGS: dict[str, dict[str, object]] = {
    "none": {"kinds": ()},
    **{kind: {"kinds": (kind,)} for kind in WORD_KINDS},
    "eda": {"kinds": WORD_KINDS},
    "mixup": {"kinds": ("mixup",)},
}
"""Name of a setting -> data.augment; `eda` is all four changes of words."""
LEARNED_SENTENCES = 1_000
"""Training sentences that the models of --writers learn, the measured ones among them."""


def main() -> None:
    """Train every cell, print a table and the JSON line."""
    asked = parse_arguments()
    settings = {name: SETTINGS[name] for name in asked.kinds}
    if asked.writers is not None:
        settings |= written_settings(asked)
    found: dict[str, list[float]] = {name: [] for name in settings}
    accelerator = build_accelerator(LORA_SST2)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seeds):
            files = write_files(Path(folder), asked.samples, asked.test, seed)
            for name, augment in settings.items():
                began = time.perf_counter()
                config = make_config(files, Augmentation(**augment), seed, asked)  # type: ignore[arg-type]
                found[name].append(accuracy_of(config, accelerator))
                seconds = time.perf_counter() - began
                print(f"seed {seed}, {name}: {found[name][-1]:.4f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    show(found, asked.samples)


def parse_arguments() -> argparse.Namespace:
    """The options; `python tests/bench/bench_augment.py --help` prints them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=200, help="training sentences (default 200)")
    parser.add_argument("--test", type=int, default=None, help="test sentences (default: all 1,511)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over them (default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds (default 3)")
    parser.add_argument("--kinds", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument(
        "--writers", type=Path, help="folder of models that write: measure back_translation and paraphrase"
    )
    return parser.parse_args()


def written_settings(asked: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Those whose texts models write; what the models learn are the sentences that are measured, and more to a round number."""
    train = read_splits(LORA_SST2.data).train  # type: ignore[arg-type]
    drawn = {
        int(place): None for seed in range(asked.seeds) for place in permutation(len(train), seed)[: asked.samples]
    }
    drawn |= {int(place): None for place in permutation(len(train), asked.seeds)}
    count = max(LEARNED_SENTENCES, asked.seeds * asked.samples)
    models = make_writers(asked.writers, [train.texts[place] for place in list(drawn)[:count]])
    for line in likeness(asked.writers, models, asked.samples):
        print(line, file=sys.stderr, flush=True)
    return {kind: {"kinds": (kind,), **{name: models[name] for name in names}} for kind, names in MODEL_KINDS.items()}


def write_files(folder: Path, num_train: int, num_test: int | None, seed: int) -> dict[str, str]:
    """Training, validation and test sentences as files; validation (as many) and test are of the recipe's splits."""
    splits = read_splits(LORA_SST2.data)  # type: ignore[arg-type]
    assert splits.test is not None
    files = {}
    for name, samples, most, key in (
        ("source", splits.train, num_train, seed),
        ("validation", splits.validation, num_train, 0),
        ("test", splits.test, num_test, 0),
    ):
        files[name] = str(folder / f"{seed}-{name}.csv")
        chosen = permutation(len(samples), key)[:most]  # asset:sst has the positive sentences first
        write_file(Path(files[name]), samples.take(chosen), splits.label_names)
    return files


def write_file(file: Path, samples: Samples, names: tuple[str, ...]) -> None:
    """A CSV of the samples."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("text", "label"))
        writer.writerows(zip(samples.texts, (names[label] for label in samples.labels), strict=True))


def make_config(files: dict[str, str], augment: Augmentation, seed: int, asked: argparse.Namespace) -> RunConfig:
    """The recipe on these files; the learning rate and the batch are its own."""
    data = LORA_SST2.data.model_copy(update={**files, "augment": augment})
    train = LORA_SST2.train.model_copy(
        update={"num_epochs": asked.epochs, "seed": seed, "eval_every": None, "metric": "loss"}
    )
    return LORA_SST2.model_copy(update={"data": data, "train": train})


def accuracy_of(config: RunConfig, accelerator: Accelerator) -> float:
    """Train, and test the step that was best on validation."""
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"run_dir": Path(folder) / "run"})
        with contextlib.redirect_stdout(io.StringIO()):
            task = build_task(config, accelerator)
            accelerator.free_memory()
            Trainer(config, accelerator, build_model(config, task.label_names, accelerator), task).fit()
        last = (config.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["test/accuracy"])


def show(found: dict[str, list[float]], num_samples: int) -> None:
    """The table, and the JSON line."""
    print(f"\nTest accuracy after training on {num_samples} sentences, by seed")
    print(f"| augmentation | {' | '.join(f'seed {seed}' for seed in range(len(next(iter(found.values())))))} | mean |")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} | {statistics.mean(values):.4f} |")
    means = {name: round(statistics.mean(values), 5) for name, values in found.items()}
    gains = {name: round(mean - means["none"], 5) for name, mean in means.items() if "none" in means and name != "none"}
    print(json.dumps({"accuracy": means, "minus_none": gains}))


if __name__ == "__main__":
    main()
