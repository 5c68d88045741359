"""Pictures of a run: curves.png and confusion.png.

Place in the flow: rank 0 draws them once, at the end, from metrics.jsonl and the confusion matrix of the tested split.
matplotlib is used through its objects, without pyplot, so no state is left and no display is needed. Invariant: a
metric that never was recorded leaves out its panel; nothing is invented.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.errors import SamestepError

TRAIN, VALIDATION, MARK = "#4269d0", "#e8710a", "#444444"
OTHER_COLORS = {
    "f1": "#3ca951",
    "precision": "#a463f2",
    "recall": "#b3261e",
    "micro_f1": "#a463f2",
    "pearson": "#3ca951",
    "spearman": "#a463f2",
}

TITLES = {
    "bits_per_byte": "bits per byte",
    "grad_norm": "gradient norm",
    "mae": "mean absolute error",
    "f1": "macro F1",
    "micro_f1": "micro F1",
}

SMOOTHING_FRACTION = 0.02
"""Width of the smoothing of training curves, as a share of the points drawn."""

MOST_NAME_CHARACTERS = 22
"""Longer label names are cut in the middle, so that the matrix keeps its room."""

Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def plot_curves(metrics_jsonl: Path, out: Path) -> None:
    """Draw loss, the task's main metric, learning rate and the other validation metrics over the steps. Rank 0 only.

    metrics_jsonl: as RunLog writes it. The best step is the one that the last line names, else that of the highest
    accuracy or the lowest loss. Without other metrics the last panel shows the gradient norm.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = read_metrics(metrics_jsonl)
    best_step = best_step_of(rows)
    figure = Figure(figsize=(12, 8), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12))
    figure.suptitle(out.absolute().parent.name, fontsize=15, fontweight="bold")
    panels = figure.subplots(2, 2, sharex=True)
    _draw_pair(panels[0, 0], rows, "loss", best_step)
    main = next((metric for metric in ("bits_per_byte", "mae") if is_recorded(rows, metric)), "accuracy")
    _draw_pair(panels[0, 1], rows, main, best_step)
    _draw_rate(panels[1, 0], rows)
    if any(is_recorded(rows, metric) for metric in OTHER_COLORS) or not is_recorded(rows, "grad_norm"):
        _draw_others(panels[1, 1], rows, best_step)
    else:
        _draw_pair(panels[1, 1], rows, "grad_norm", best_step)
    save_figure(figure, out)


def plot_confusion(matrix: ArrayLike, label_names: Sequence[str], out: Path) -> None:
    """Draw counts and row percentages of a (C, C) matrix whose rows are labels and columns predictions. Rank 0 only."""
    from matplotlib.figure import Figure

    counts = np.asarray(matrix, dtype=np.int64)
    assert counts.shape == (len(label_names),) * 2, f"{counts.shape} does not fit {len(label_names)} labels"
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.85 * min(len(label_names), 30)
    figure = Figure(figsize=(max(side, 5.2), max(side * 0.92, 4.6)), dpi=120, layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=panel, shrink=0.8, label="share of the label's examples", format=_percent)
    _label_matrix(panel, [short_name(name) for name in label_names])
    _write_cells(panel, counts, shares)
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    panel.set_title(f"{out.absolute().parent.name}\naccuracy {accuracy:.4f} of {counts.sum():,} examples", fontsize=12)
    save_figure(figure, out)


def plot_bars(values: Mapping[str, float], title: str, label: str, out: Path) -> None:
    """Horizontal bars on a logarithmic axis, each with its value, in the order given from the top. values: name -> above 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.36 * len(values)), dpi=120, layout="constrained")
    panel = figure.subplots()
    bars = panel.barh(list(values), list(values.values()), color="tab:blue")
    panel.bar_label(bars, [f"{value:,.0f}" for value in values.values()], padding=4, fontsize=9)
    panel.set_xscale("log")
    panel.set_xlim(min(values.values()) / 3, max(values.values()) * 12)
    panel.invert_yaxis()
    panel.set_xlabel(label)
    panel.set_title(title, fontsize=12)
    panel.grid(axis="x", alpha=0.3)
    save_figure(figure, out)


def read_metrics(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off by a killed run is left out."""
    lines = metrics_jsonl.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise SamestepError(f"{metrics_jsonl} line {number} is not JSON ({error}); delete the line") from None
    return rows


def series_of(rows: Sequence[dict[str, Any]], name: str) -> Series:
    """(steps, values) of one metric; null is NaN, a gap. The line of the final report is left out."""
    points = [(row["step"], row[name]) for row in rows if name in row and "best_step" not in row]
    values = [math.nan if value is None else float(value) for _, value in points]
    return np.array([step for step, _ in points], dtype=np.float64), np.array(values, dtype=np.float64)


def is_recorded(rows: Sequence[dict[str, Any]], metric: str) -> bool:
    """Whether training or validation noted it."""
    return any(f"{kind}/{metric}" in row for row in rows for kind in ("train", "eval"))


def best_step_of(rows: Sequence[dict[str, Any]]) -> int | None:
    """The step that the final report names, else the first of highest validation accuracy or lowest loss; None without any."""
    for row in reversed(rows):
        if row.get("best_step") is not None:
            return int(row["best_step"])
    for metric, sign in (("accuracy", 1), ("loss", -1)):
        steps, values = series_of(rows, f"eval/{metric}")
        if np.isfinite(values).any():
            return int(steps[np.nanargmax(sign * values)])
    return None


def smooth(values: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Gaussian mean of about `width` points on both sides, NaN left out; the ends lean on what they have."""
    reach = max(int(3 * width), 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-9)) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="full")[reach:-reach]
    weight = np.convolve(known.astype(np.float64), kernel, mode="full")[reach:-reach]
    return np.where(known, total / np.maximum(weight, 1e-12), math.nan)


def short_name(name: str) -> str:
    """A label name that fits beside the matrix."""
    if len(name) <= MOST_NAME_CHARACTERS:
        return name
    half = (MOST_NAME_CHARACTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _draw_pair(panel: Any, rows: Sequence[dict[str, Any]], metric: str, best_step: int | None) -> None:
    """Training and validation of one metric in the same panel."""
    steps, values = series_of(rows, f"train/{metric}")
    if len(steps) >= 20:
        panel.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1)
        panel.plot(
            steps, smooth(values, SMOOTHING_FRACTION * len(steps)), color=TRAIN, linewidth=2, label="train (smoothed)"
        )
    elif len(steps):
        panel.plot(steps, values, color=TRAIN, linewidth=2, marker=".", label="train")
    _draw_validation(panel, rows, metric, VALIDATION, "validation")
    _mark_best(panel, rows, metric, best_step)
    _finish(panel, TITLES.get(metric, metric))


def _draw_others(panel: Any, rows: Sequence[dict[str, Any]], best_step: int | None) -> None:
    """The other metrics of the validation split."""
    for metric, color in OTHER_COLORS.items():
        _draw_validation(panel, rows, metric, color, metric)
    shown = [metric for metric in OTHER_COLORS if is_recorded(rows, metric)]
    _mark_best(panel, rows, shown[0] if shown else "f1", best_step)
    _finish(panel, f"validation: {', '.join(TITLES.get(metric, metric) for metric in shown or ('f1',))}")


def _draw_rate(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    steps, values = series_of(rows, "train/lr")
    panel.plot(steps, values, color=TRAIN, linewidth=2)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    panel.set_ylim(bottom=0)
    _finish(panel, "learning rate")


def _draw_validation(panel: Any, rows: Sequence[dict[str, Any]], metric: str, color: str, label: str) -> None:
    steps, values = series_of(rows, f"eval/{metric}")
    if len(steps):
        marker = "o" if len(steps) <= 40 else None
        panel.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=5, label=label)


def _mark_best(panel: Any, rows: Sequence[dict[str, Any]], metric: str, best_step: int | None) -> None:
    """A line at the best step and its value in the legend."""
    steps, values = series_of(rows, f"eval/{metric}")
    at_best = values[steps == best_step]
    if best_step is not None and len(at_best):
        label = f"best step {best_step}: {metric} {at_best[-1]:.4f}"
        panel.axvline(best_step, color=MARK, linewidth=1.2, linestyle="--", label=label)


def _finish(panel: Any, title: str) -> None:
    panel.set_title(title, fontsize=12)
    panel.set_xlabel("step", fontsize=11)
    panel.grid(visible=True, color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=10, labelbottom=True)
    panel.xaxis.get_major_locator().set_params(integer=True)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=10, framealpha=0.85)


def _label_matrix(panel: Any, names: Sequence[str]) -> None:
    turned = max(map(len, names)) > 9 or len(names) > 6
    panel.set_xticks(range(len(names)), names, rotation=40 if turned else 0, ha="right" if turned else "center")
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(labelsize=10, length=0)
    panel.set_xlabel("prediction", fontsize=12)
    panel.set_ylabel("label", fontsize=12)


def _write_cells(panel: Any, counts: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    """Count over percentage; only as many digits and cells as can be read."""
    num_classes = len(counts)
    if num_classes > 30:
        return
    size = 13 if num_classes <= 3 else 10 if num_classes <= 12 else 7
    for row, column in np.ndindex(counts.shape):
        share = shares[row, column]
        color = "white" if share > 0.55 else "black"
        words = f"{counts[row, column]:,}\n{100 * share:.1f}%"
        panel.text(column, row, words, ha="center", va="center", color=color, fontsize=size)


def _percent(share: float, position: int | None = None) -> str:
    return f"{100 * share:.0f}%"


def save_figure(figure: Any, out: Path) -> None:
    """Write the PNG whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(out)
    except OSError as error:
        with suppress(OSError):  # gone, or the folder is
            unfinished.unlink()
        reason = error.strerror or str(error)
        raise SamestepError(f"{out} cannot be written: {reason}; free space there, or set run_dir=PATH") from error
