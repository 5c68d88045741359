"""`samestep parity RECIPE`: the same steps on every backend, compared number by number.

Each variant (backend, processes, micro-batch split) is a real `accelerate launch` of the recipe with `probe.folder` set, from the same
weights and samples; see trainer/probe.py for what it records. The reference is `single` in fp32 on the whole global batch.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.command import RunOptions, launch_command, launch_environment
from launch.parity_plan import Variant
from trainer.errors import BackendError

LOSS_TOLERANCE = 1e-5  # relative, of the loss and the gradient norm of every step
GRADIENT_TOLERANCE = 1e-5  # L2 of the difference over L2 of the gradient, step 1
UPDATE_TOLERANCE = 1e-3  # the same for the whole update; see NOTE
BF16_FACTOR = 1.5  # a backend may be this much farther from fp32 than single is
BF16_ROUNDING = (
    2.0**-8
)  # relative; below it chance decides how near two numbers of 8 bits come, so loss and norm may differ by it
BF16_LIMIT = 0.05  # of loss and norm, single's too
NOTE = (
    "Dropout is off and a quarter of the labels is hidden, so that ranks hold unequal numbers of targets. The update's tolerance is wider: "
    "where the true gradient is zero, as in attention key biases, Adam turns rounding noise into full-size updates."
)


@dataclass(frozen=True)
class Record:
    """What one variant did: record.json and tensors.safetensors of its probe."""

    label: str
    facts: dict[str, Any]
    tensors: dict[str, Any]

    def series(self, key: str) -> list[float]:
        """One number per step."""
        return [float(step[key]) for step in self.facts["steps"]]


@dataclass(frozen=True)
class Differences:
    """How far a variant is from the reference, relative; and what differs that must be identical."""

    loss: float
    grad_norm: float
    gradient: float
    update: float
    broken: tuple[str, ...]


def parity_command(options: RunOptions, variants: Sequence[Variant], *, steps: int) -> int:
    """Run and compare all variants, print the table, return 0 where all agree and 1 where one does not."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="samestep-parity-") as folder:
        records = []
        for variant in variants:
            with console.status(f"{variant.label}: {steps} steps"):
                records.append(run_variant(options, variant, Path(folder), steps))
    return report(variants, records, console)


def run_variant(common: RunOptions, variant: Variant, folder: Path, steps: int) -> Record:
    """Launch the recipe as this variant and read its record. Raises BackendError with the end of its output where it fails."""
    target = folder / variant.label.replace(" ", "_")
    options = variant.run_options(common)
    options = replace(options, overrides=(*options.overrides, f"probe.steps={steps}", f"probe.folder={target}"))
    started = time.perf_counter()
    environment = os.environ | launch_environment(options)
    result = subprocess.run(launch_command(options), env=environment, capture_output=True, text=True)
    if result.returncode != 0 or not (target / "record.json").exists():
        words = own_lines(result.stdout + result.stderr)
        raise BackendError(f"{variant.label}: the run ended with code {result.returncode}. Its last lines:\n{words}")
    print(f"{variant.label:<20} {time.perf_counter() - started:6.1f} s", file=sys.stderr)
    return read_record(variant.label, target)


def own_lines(output: str) -> str:
    """The last lines of the recipe itself, without those the launcher prints after a failure."""
    lines = output.strip().splitlines()
    ends = [
        number
        for number, line in enumerate(lines)
        if "torch/distributed/elastic" in line or "launch_command(args)" in line
    ]
    return "\n".join(lines[: ends[0] if ends else None][-30:])


def read_record(label: str, folder: Path) -> Record:
    """Read back what trainer/probe.py wrote."""
    from safetensors.numpy import load_file

    return Record(label, json.loads((folder / "record.json").read_text()), load_file(folder / "tensors.safetensors"))


def report(variants: Sequence[Variant], records: Sequence[Record], console: Console) -> int:
    """Print the table and the verdict; 0 where all agree, else 1."""
    rows = judge(variants, records)
    console.print(build_table(rows, records[0], variants[-1].precision))
    console.print(NOTE, style="dim")
    failed = [record.label for record, _, verdict in rows if verdict != "same"]
    console.print(f"parity: {'FAILED for ' + ', '.join(failed) if failed else 'every variant takes the same steps'}")
    return 1 if failed else 0


def judge(variants: Sequence[Variant], records: Sequence[Record]) -> list[tuple[Record, Differences, str]]:
    """One row per variant but the reference: its differences from fp32 single, and the verdict."""
    reference = records[0]
    rows = [(record, compare(reference, record)) for record in records[1:]]
    yardstick = rows[0][1] if variants[-1].precision != "no" else None
    return [(record, found, verdict(found, yardstick)) for record, found in rows]


def compare(reference: Record, other: Record) -> Differences:
    """Relative differences; `broken` names what must be identical and is not."""
    return Differences(
        loss=largest_relative(reference.series("loss"), other.series("loss")),
        grad_norm=largest_relative(reference.series("grad_norm"), other.series("grad_norm")),
        gradient=relative_distance(reference.tensors, other.tensors, "gradient."),
        update=relative_distance(reference.tensors, other.tensors, "update."),
        broken=tuple(broken_promises(reference.facts, other.facts)),
    )


def broken_promises(reference: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What must be equal to the last bit: starting weights, samples, learning rates; and the data must be a fair test."""
    problems = []
    if reference["weights_before"] != other["weights_before"]:
        problems.append("starting weights differ")
    for key, words in (("samples", "samples differ"), ("lr", "learning rates differ")):
        if [step[key] for step in reference["steps"]] != [step[key] for step in other["steps"]]:
            problems.append(words)
    targets = [step["targets_per_rank"] for step in other["steps"]]
    equal = [number for number, counts in enumerate(targets, start=1) if len(set(counts)) == 1]
    if other["world_size"] > 1 and equal:
        problems.append(f"every rank had the same number of targets in step {equal[0]}: not a test of unequal shares")
    if [sum(counts) for counts in targets] != [sum(step["targets_per_rank"]) for step in reference["steps"]]:
        problems.append("numbers of targets differ")
    return problems


def verdict(found: Differences, yardstick: Differences | None) -> str:
    """`same`, or what disagrees. With a yardstick (bf16) all may be 1.5 x as far from fp32 as single's: promise 2."""
    if found.broken:
        return "; ".join(found.broken)
    if yardstick is None:
        limits = {
            "loss": LOSS_TOLERANCE,
            "grad_norm": LOSS_TOLERANCE,
            "gradient": GRADIENT_TOLERANCE,
            "update": UPDATE_TOLERANCE,
        }
    else:
        limits = {
            "loss": scalar_limit(yardstick.loss),
            "grad_norm": scalar_limit(yardstick.grad_norm),
            "gradient": BF16_FACTOR * yardstick.gradient,
            "update": BF16_FACTOR * yardstick.update,
        }
    wrong = [name for name, limit in limits.items() if not getattr(found, name) <= limit]
    return "differs: " + ", ".join(wrong) if wrong else "same"


def scalar_limit(yardstick: float) -> float:
    """How far from fp32 a loss or norm in bf16 may be, where single's is as far as `yardstick`."""
    return min(max(BF16_FACTOR * yardstick, BF16_ROUNDING), BF16_LIMIT)


def largest_relative(reference: Sequence[float], other: Sequence[float]) -> float:
    """The largest |other - reference| / |reference| over the steps; infinite where the lengths differ or a number is not finite."""
    if len(reference) != len(other) or not all(map(math.isfinite, [*reference, *other])):
        return float("inf")
    return max(abs(b - a) / max(abs(a), 1e-30) for a, b in zip(reference, other, strict=True))


def relative_distance(reference: dict[str, Any], other: dict[str, Any], prefix: str) -> float:
    """L2 of the difference over L2 of the reference, over all tensors whose name starts with `prefix`, in float64."""
    names = {name for name in reference if name.startswith(prefix)}
    if names != {name for name in other if name.startswith(prefix)}:
        return float("inf")
    difference = sum(float(((other[n].astype("f8") - reference[n].astype("f8")) ** 2).sum()) for n in sorted(names))
    size = sum(float((reference[n].astype("f8") ** 2).sum()) for n in sorted(names))
    return float((difference / max(size, 1e-300)) ** 0.5)


def build_table(rows: Sequence[tuple[Record, Differences, str]], reference: Record, precision: str) -> Table:
    """The report: the reference's numbers in the caption, one line per variant."""
    table = Table(title=f"parity against {reference.label} in fp32, {len(reference.facts['steps'])} steps")
    for heading in ("variant", "loss", "grad norm", "gradient", "update", "verdict"):
        table.add_column(
            heading, justify="left" if heading in ("variant", "verdict") else "right", no_wrap=heading != "verdict"
        )
    for record, found, word in rows:
        numbers = [f"{value:.1e}" for value in (found.loss, found.grad_norm, found.gradient, found.update)]
        table.add_row(record.label, *numbers, word, style=None if word == "same" else "bold red")
    losses = " ".join(f"{loss:.6f}" for loss in reference.series("loss"))
    norms = " ".join(f"{norm:.6f}" for norm in reference.series("grad_norm"))
    if precision == "no":
        limits = f"limits {LOSS_TOLERANCE:g} {LOSS_TOLERANCE:g} {GRADIENT_TOLERANCE:g} {UPDATE_TOLERANCE:g}"
    else:
        limits = (
            f"limit {BF16_FACTOR:g} x single {precision}; of loss and gradient norm {BF16_ROUNDING:.1e} if that is more"
        )
    table.caption = f"relative differences; {limits}\nreference loss {losses}\nreference gradient norm {norms}"
    return table
