"""The look of figures, the same in all reports."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Colours of Okabe and Ito, told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLORS = {"llava": "#0072B2", "vlora": "#D55E00", "blind": "#999999"}
#: Of figures as they are saved.
DPI = 160
INK, GRID = "#1f2933", "#e4e7eb"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=DPI)
    os.replace(partial, path)


def new_figure(
    width: float, height: float, panels: int, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` by ``height`` inches with panels in rows, in the style of all reports."""
    # Without pyplot there is no global state, and no display is looked for.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, -(-panels // rows), squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#9aa5b1")
        panel.grid(axis="y", color=GRID)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9)
    return figure, axes
