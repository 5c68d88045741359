"""`samestep methods MODEL`: what each method trains on a model, as a table and a bar chart; with --measure also what it costs and gives."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from trainer.config import ModelConfig
from trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from launch.methods_measure import Measured
    from trainer.model.estimate import Estimate


def methods_command(
    model: str, *, task: str, rank: int | None, targets: tuple[str, ...] | None, chart: Path, measure_steps: int | None
) -> int:
    """Print the table and write the chart; returns the exit code. measure_steps: optimizer steps of each method on SST, or None."""
    quiet_libraries()
    from trainer.model.estimate import estimate_methods, usual_methods
    from trainer.plots import plot_bars

    source = ModelConfig(source=model, task=task)
    found, refused = estimate_methods(source, rank=rank, targets=targets)
    show(found, refused, model)
    chart.parent.mkdir(parents=True, exist_ok=True)
    plot_bars({row.method: row.trainable for row in found}, model, "trainable parameters", chart)
    print(f"chart: {chart}")
    if measure_steps is not None:
        from launch.methods_measure import measure_methods

        methods = [method for method in usual_methods(rank=rank, targets=targets) if method.name not in refused]
        show_measured(measure_methods(model, methods, measure_steps), measure_steps)
    return 0


def show(found: "list[Estimate]", refused: dict[str, str], model: str) -> None:
    """One row for each method, and below why some do not work."""
    table = Table(box=None, pad_edge=False, title=f"{model}: usual settings", title_justify="left")
    for heading in ("method", "trainable", "of model", "of its matrices", "file", "memory"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in found:
        share = "" if row.share_of_matrices is None else f"{row.share_of_matrices:.2%}"
        sizes = (size_words(row.file_bytes), size_words(row.training_bytes))
        table.add_row(row.method, f"{row.trainable:,}", f"{row.share:.3%}", share, *sizes)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(
        "memory: weights, gradients and AdamW's moments in fp32; activations come on top and depend on the batch"
    )
    for name, reason in refused.items():
        console.print(f"{name}: not here: {reason}")


def show_measured(rows: "list[Measured]", steps: int) -> None:
    """What was measured, one row for each method."""
    table = Table(
        box=None,
        pad_edge=False,
        title=f"measured: {steps} steps on asset:sst, each in its own process",
        title_justify="left",
    )
    headings = ("method", "accuracy", "train/s", "predict/s", "of base", "peak memory", "saved")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        numbers = (
            f"{row.accuracy:.4f}",
            f"{row.train_per_s:,.1f}",
            f"{row.predict_per_s:,.0f}",
            f"{row.predict_per_s / rows[0].base_per_s:.2f} x",
        )
        table.add_row(row.method, *numbers, size_words(row.peak_bytes), size_words(row.saved_bytes))
    Console(soft_wrap=True, highlight=False).print(table)
    print(json.dumps({row.method: asdict(row) for row in rows}))


def size_words(num_bytes: float) -> str:
    """1.2 MB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"
