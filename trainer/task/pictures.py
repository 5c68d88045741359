"""Pictures of a tested split of several labels or of numbers: labels.png and numbers.png. Rank 0 draws them, once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from trainer.plots import MARK, TRAIN, save_figure, short_name

MOST_BARS = 40
"""Of more labels only the best are drawn."""


def plot_label_scores(scores: ArrayLike, counts: ArrayLike, names: Sequence[str], out: Path) -> None:
    """Bars of each label's F1 from 0 to 1, the best first, with how many examples have it. scores, counts: (C,). Rank 0 only."""
    from matplotlib.figure import Figure

    values, numbers = np.asarray(scores, dtype=np.float64), np.asarray(counts, dtype=np.int64)
    order = np.argsort(-values, kind="stable")[:MOST_BARS]
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(order)), dpi=120, layout="constrained")
    panel = figure.subplots()
    bars = panel.barh(range(len(order)), values[order], color=TRAIN)
    panel.set_yticks(range(len(order)), [short_name(names[label]) for label in order])
    panel.bar_label(bars, [f"{values[label]:.3f} of {numbers[label]:,}" for label in order], padding=4, fontsize=9)
    panel.set_xlim(0, 1.25)
    panel.set_xticks(np.linspace(0, 1, 6))
    panel.invert_yaxis()
    panel.set_xlabel("F1, and how many examples have the label")
    panel.set_title(
        f"{out.absolute().parent.name}\nmacro F1 {values.mean():.4f} of {len(values):,} labels", fontsize=12
    )
    save_figure(figure, out)


def plot_numbers(predicted: ArrayLike, true: ArrayLike, name: str, out: Path) -> None:
    """Points of predicted against true numbers, and the line where they are equal. predicted, true: (N,). Rank 0 only."""
    from matplotlib.figure import Figure

    said, expected = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    figure = Figure(figsize=(6.4, 6.4), dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.scatter(expected, said, s=14, alpha=0.5, color=TRAIN, linewidths=0, label=f"{len(said):,} examples")
    panel.axline((expected.mean(), expected.mean()), slope=1, color=MARK, linewidth=1.2, linestyle="--", label="equal")
    panel.set_title(f"{out.absolute().parent.name}\n{short_name(name)}", fontsize=12)
    panel.set_xlabel("true", fontsize=12)
    panel.set_ylabel("predicted", fontsize=12)
    panel.grid(visible=True, color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.legend(fontsize=10)
    save_figure(figure, out)
