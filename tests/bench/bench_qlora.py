"""What 60 steps of recipes/qlora_instruct.py give on held-out docstrings, and what QLoRA's memory is beside LoRA's and full training's.

    python tests/bench/bench_qlora.py                   # 60 steps, then two steps of each method: about 10 minutes on 2 cores
    python tests/bench/bench_qlora.py --only quality    # without the memory
    python tests/bench/bench_qlora.py --steps 4         # a try

Held-out loss: of the quantized base without an adapter, of the trained adapter, and of the model merged into the dequantized base,
all by the recipe's own evaluation; adapter and merged model also write the docstrings of the first held-out functions. Memory: peak
resident bytes of a process that takes two steps, one process for each method. Exit code 1 where the loss fell by less than 10 %, the merged
model is more than 1 % away from the adapter, or one of them writes nothing. The last line is one JSON object: {"loss_before", "loss_after",
"reduction", "merged_vs_adapter", "peak_mib": {method: MiB}}.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, `tests` is not importable

from launch.methods_measure import in_process, train
from tests.bench.timing import say

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "qlora_instruct.py"


LEAST_REDUCTION, MOST_DIFFERENCE = 0.10, 0.01


def main() -> None:
    """Train, evaluate three models, measure memory, print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("quality", "memory"))
    options = parser.parse_args()
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="samestep-qlora-") as folder:
        if options.only != "memory":
            facts |= quality(Path(folder) / "run", options.steps)
        if options.only != "quality":
            facts["peak_mib"] = {method: peak_mib(folder, method) for method in ("qlora", "lora", "full")}
    print(json.dumps(facts))
    if facts.get("reduction", 1.0) < LEAST_REDUCTION or abs(facts.get("merged_vs_adapter", 1.0) - 1) > MOST_DIFFERENCE:
        sys.exit(1)


def quality(run: Path, steps: int) -> dict[str, float]:
    """Losses before and after training and after merging; exits where adapter or merged model write nothing."""
    before, _ = in_process(judge, ("base", str(run)))
    say(f"held-out loss before training: {before:.4f}")
    in_process(train, [str(RECIPE), f"run_dir={run}", f"train.max_steps={steps}", f"train.eval_every={steps}"])
    after, written = in_process(judge, ("adapter", str(run)))
    merged, written_merged = in_process(judge, ("merged", str(run)))
    say(f"after {steps} steps: {after:.4f}; merged into the dequantized base: {merged:.4f}")
    for (prompt, answer), (_, answer_merged) in zip(written, written_merged, strict=True):
        say(f"{prompt}\n  adapter: {answer}\n  merged:  {answer_merged}")
    if not all(answer for _, answer in (*written, *written_merged)):
        sys.exit("adapter or merged model wrote nothing to a prompt")
    return {
        "loss_before": round(before, 4),
        "loss_after": round(after, 4),
        "reduction": round(1 - after / before, 4),
        "merged_vs_adapter": round(merged / after, 5),
    }


def peak_mib(folder: str, method: str) -> int:
    """Of two steps."""
    argv = [str(RECIPE), f"run_dir={folder}/{method}", f"method={method}", "train.max_steps=2", "train.eval_every=2"]
    argv += ["train.micro_batch_size=1", "train.eval_batch_size=1", "data.validation_rows=1"]
    peak = round(in_process(train, argv) / 2**20)
    say(f"{method}: {peak:,} MiB")
    return peak


def judge(asked: tuple[str, str]) -> tuple[float, list[tuple[str, str]]]:
    """Nats per held-out target of `base`, `adapter` or `merged`; and held-out prompts, with what it writes to them (not `base`)."""
    kind, run = asked
    import numpy as np
    import torch
    from accelerate import Accelerator

    from launch.preflight import load_recipe
    from trainer.backend import build_engine
    from trainer.config import QloraConfig
    from trainer.model.adapters import find_adapter, merged
    from trainer.model.architecture import load_architecture
    from trainer.model.export import load_exported
    from trainer.model.load import load_weights, quantization_of
    from trainer.task import build_task
    from trainer.task.instruct import PROMPTS

    torch.set_num_threads(2)
    config = load_recipe(RECIPE).DEFAULTS
    accelerator = Accelerator(cpu=True)
    task: Any = build_task(config, accelerator)
    if kind == "base":
        architecture = load_architecture(config.model, ())
        assert isinstance(config.method, QloraConfig)
        quantization = quantization_of(config.model, config.method, architecture, precision="no")
        model: Any = load_weights(config.model, architecture, quantization)[0]
    else:
        folder, info = find_adapter(Path(run))
        model = load_exported(folder)[0] if kind == "adapter" else merged(folder, info, "dequantized")
    model.eval()
    idle = torch.nn.Linear(1, 1)  # an engine only for its sums over ranks, of which there is one
    engine = build_engine(accelerator, idle, torch.optim.AdamW(idle.parameters()))
    loss = float(task.evaluate(lambda inputs: model(**inputs), engine, "validation").metrics["loss"])
    if kind == "base":
        return loss, []
    places = np.arange(PROMPTS)
    samples = [task.data.validation.samples[place] for place in places]
    prompts = [task.text(sample.ids[: sample.prompt_length]) for sample in samples]
    return loss, [(prompt, answer) for prompt, (answer, *_) in zip(prompts, task.answered(model, places), strict=True)]


if __name__ == "__main__":
    main()
