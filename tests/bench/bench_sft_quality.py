"""What 100 steps of recipes/sft_smollm2.py change: held-out loss, how often answers stop, how near they come, and samples.

    python tests/bench/bench_sft_quality.py                        # about 15 minutes on 2 cores
    python tests/bench/bench_sft_quality.py train.max_steps=20     # arguments go to the recipe

The last line is one JSON object: loss, stop_rate, exact_match and rouge_l before and after. Exit code 1 where the loss fell by less than
LEAST_FALL, or fewer than LEAST_STOPPED of the answers stop.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

from transformers import AutoModelForCausalLM

from recipes.sft_smollm2 import DEFAULTS
from trainer.backend import build_accelerator
from trainer.config import RunConfig
from trainer.data.assets import asset_path
from trainer.loop import Trainer
from trainer.model.load import build_model
from trainer.resolve import resolve
from trainer.task import build_task
from trainer.task.instruct import InstructTask

SHOWN = ("loss", "stop_rate", "exact_match", "rouge_l")
LEAST_FALL, LEAST_STOPPED = 0.1, 0.9


def main() -> int:
    """Measure the base model, train, read what the run says of the exported adapter. Returns the exit code."""
    config = resolve(RunConfig, DEFAULTS, [*sys.argv[1:], "train.resume=never"]).config
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    assert isinstance(task, InstructTask)
    trainer = Trainer(config, accelerator, build_model(config, (), accelerator), task)
    base = AutoModelForCausalLM.from_pretrained(asset_path("smollm2")).eval()
    evaluation = task.evaluate(lambda inputs: base(**inputs), trainer.engine, "validation")
    before = evaluation.metrics | task.generation_metrics(base, trainer.engine)
    with tempfile.TemporaryDirectory() as folder:
        task.write_report(Path(folder), base, evaluation)
        print("before:\n" + (Path(folder) / "samples.txt").read_text(), flush=True)
    trainer.fit()
    last = json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[-1])
    print("after:\n" + (config.folder / "samples.txt").read_text())
    print(json.dumps({name: [round(before[name], 4), round(last[f"eval/{name}"], 4)] for name in SHOWN}))
    is_good = last["eval/loss"] <= (1 - LEAST_FALL) * before["loss"] and last["eval/stop_rate"] >= LEAST_STOPPED
    if not is_good:
        print(f"the loss must fall by {LEAST_FALL:.0%} and the stop rate be {LEAST_STOPPED} or more", file=sys.stderr)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
