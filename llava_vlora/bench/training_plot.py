"""The figure of a run of the training benchmark."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.plots import GRID, new_figure
from .colors import color
from .summary import Result
from .systems import LLAVA
from .training_summary import by_stage, setting, speed, stage_name

_BAR: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}


def training_plot(result: Result) -> Figure:
    """For each stage samples per second and, where it was counted, peak memory."""
    stages = by_stage(result)
    counted = all(cell["peak"] is not None for cell in result["cells"])
    rows = len(stages)
    systems = len(result["systems"])
    figure, axes = new_figure(
        10.0, (0.6 + 0.5 * systems) * rows + 0.5, rows * (2 if counted else 1), rows
    )
    panels = iter(axes)
    for stage, cells in stages.items():
        name = stage_name(stage).capitalize()
        text = result["options"]["text_tokens"][stage]
        title = f"{name}: samples/s, {text} text tokens"
        _bars(next(panels), title, result, cells, _samples_per_second, _speed_label)
        if counted:
            title = f"{name}: peak MiB (hatched: weights and optimizer)"
            _memory(next(panels), title, result, cells)
    shape = result["shape"]
    heading = f"Training {shape['name']} ({shape['what']}), {result['device']['name']}"
    figure.suptitle(f"{heading}\n{setting(result)}", fontsize=10)
    return figure


_Cells = dict[str, dict[str, Any]]


def _bars(
    axes: Axes,
    title: str,
    result: Result,
    cells: _Cells,
    value: Callable[[dict[str, Any]], float],
    label: Callable[[_Cells, str, float], str],
) -> None:
    names = [
        result["systems"][s] + ("" if cells[s]["trained"] else "\n(forward alone)") for s in cells
    ]
    values = [value(cell) for cell in cells.values()]
    bars = axes.barh(names, values, 0.6, color=[color(s, result["kinds"]) for s in cells], **_BAR)
    labels = [label(cells, s, v) for s, v in zip(cells, values, strict=True)]
    axes.bar_label(bars, labels, fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max(values))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=GRID)
    axes.grid(axis="y", visible=False)
    axes.set_title(title, loc="left", fontsize=9.5)


def _samples_per_second(cell: dict[str, Any]) -> float:
    return float(cell["batch"] / median(cell["seconds"]))


def _speed_label(cells: _Cells, system: str, value: float) -> str:
    if system == LLAVA:
        return f"{value:.3g}"
    number, _, spread = str(speed(cells[system], cells[LLAVA])).partition(" ")
    return f"{value:.3g}:  {number} x LLaVA {spread}"


def _memory(axes: Axes, title: str, result: Result, cells: _Cells) -> None:
    _bars(axes, title, result, cells, lambda c: c["peak"] / 2**20, lambda _, __, v: f"{v:,.0f}")
    kept = [(c["weights"] + c["optimizer"]) / 2**20 for c in cells.values()]
    axes.barh(range(len(kept)), kept, 0.6, color="none", edgecolor="white", hatch="///", lw=0)
