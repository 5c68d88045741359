"""Pictures for `samestep data show --plot`: the marked text of a sample, and one figure that explains four objectives on it.

matplotlib is used through its objects, without pyplot. Pure but for the file that is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.objectives.marks import KINDS, Mark
from trainer.errors import DataError

COLORS = {
    "plain": "#ffffff",
    "masked": "#f6c7b6",
    "replaced": "#f2e2a0",
    "kept": "#d7ecc8",
    "gap": "#d9c9ee",
    "target": "#bcd7f2",
    "special": "#e4e4e4",
}
ACROSS = 110
"""Characters of a line of text."""
MOST_LINES = 40


@dataclass(frozen=True)
class Panel:
    """One objective on a short text."""

    title: str
    words: str
    """What is learned, a sentence."""
    given: Sequence[Mark]
    found: Sequence[str]
    """What is to be found, a row of the matrix each."""
    sees: NDArray[np.bool_]
    """(found, given) which given tokens each may use."""


def plot_text(parts: Mapping[str, Sequence[Mark]], title: str, out: Path) -> None:
    """The marked tokens of a sample, in boxes by kind, with a legend. DataError for a file that cannot be written."""
    from matplotlib.figure import Figure

    lines = [(name, laid) for name, marks in parts.items() for laid in laid_out(marks)]
    height = 1.3 + 0.27 * (len(lines) + 1.5 * len(parts))
    figure = Figure(figsize=(13, height), dpi=120)
    panel = figure.add_axes((0.02, 0.02, 0.96, 1 - 0.45 / height))
    panel.axis("off")
    panel.set_xlim(0, ACROSS)
    panel.set_ylim(len(lines) + 1.5 * len(parts) + 1.5, 0)
    figure.suptitle(title, fontsize=12, fontweight="bold", y=1 - 0.12 / height)
    y, last = 0.0, ""
    for name, laid in lines:
        if name != last:
            y, last = y + 1.5, name
            panel.text(0, y - 0.4, name, fontsize=9, fontweight="bold", color="#444444")
        for x, mark, text in laid:
            panel.text(x, y + 0.5, text, fontsize=8.5, family="monospace", va="center", bbox=box(mark.kind))
        y += 1
    shown = {mark.kind for marks in parts.values() for mark in marks}
    for place, kind in enumerate(kind for kind in KINDS if kind in shown):
        panel.text(place * 27, y + 0.8, f" {KINDS[kind]} ", fontsize=8.5, va="center", bbox=box(kind))
    save(figure, out)


def laid_out(marks: Sequence[Mark]) -> list[list[tuple[float, Mark, str]]]:
    """Lines of (x, mark, text): tokens side by side, wrapped at ACROSS characters and at line breaks."""
    lines: list[list[tuple[float, Mark, str]]] = [[]]
    x = 0.0
    for mark in marks:
        text = mark.words.replace("\n", "\u23ce").replace("\t", "\u2192") or " "
        width = len(text) * 0.68 + 0.9
        if x + width > ACROSS:
            lines.append([])
            x = 0.0
        lines[-1].append((x, mark, text))
        x += width
        if "\n" in mark.words:
            lines.append([])
            x = 0.0
    kept = [laid for laid in lines if laid]
    return kept[:MOST_LINES]


def box(kind: str) -> dict[str, Any]:
    """matplotlib's settings of a token's box."""
    edge = "#dddddd" if kind == "plain" else "#999999"
    return {"facecolor": COLORS[kind], "edgecolor": edge, "linewidth": 0.6, "pad": 1.6}


def plot_panels(panels: Sequence[Panel], title: str, out: Path) -> None:
    """Four panels: what is given (columns), what is to be found (rows), and which of the first may be used for which of the second."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 12), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.imshow(panel.sees, cmap=ListedColormap(["#f4f4f4", "#9cc3e8"]), vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(
            range(len(panel.given)), [visible(mark.text) for mark in panel.given], rotation=60, ha="left", fontsize=8
        )
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(panel.found)), [visible(text) for text in panel.found], fontsize=8)
        for label, mark in zip(axes.get_xticklabels(), panel.given, strict=True):
            label.set_bbox(box(mark.kind))
            label.set_family("monospace")
        for label in axes.get_yticklabels():
            label.set_family("monospace")
        axes.set_xticks(np.arange(len(panel.given) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(panel.found) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
        axes.set_ylabel("to be found", fontsize=9, color="#444444")
        axes.set_xlabel(f"{panel.title}: {panel.words}", fontsize=10)
    figure.supxlabel(
        "columns: what the model is given; blue: it may be used for what the row wants", fontsize=9, color="#444444"
    )
    save(figure, out)


def visible(text: str) -> str:
    """A token's text with white space that can be seen."""
    return text.replace("\n", "\u23ce").replace("\t", "\u2192").strip() or "\u2423"


def save(figure: Any, out: Path) -> None:
    """Write the picture."""
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise DataError(f"--plot ({out}): cannot be written ({error}); give a path that ends in .png") from None
