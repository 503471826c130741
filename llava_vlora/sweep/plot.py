"""The figure of a sweep: a panel for each axis and benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import COLORS, new_figure
from .results import Result

_LONG = 8


def sweep_plot(result: Result) -> Figure:
    """Every training as a mark, means as points, joined where the axis is a number; the default in VLoRA's colour."""
    blocks, benchmarks = result["blocks"], result["benchmarks"]
    widths = [max(2.6, 0.75 * len(block["rows"])) for block in blocks]
    count = len(blocks) * len(benchmarks)
    figure, panels = new_figure(
        max(4.5, sum(widths)), 3.0 * len(benchmarks) + 0.4, count, len(benchmarks)
    )
    for i, panel in enumerate(panels):
        name, block = list(benchmarks)[i // len(blocks)], blocks[i % len(blocks)]
        if i % len(blocks):
            panel.sharey(panels[i - i % len(blocks)])
        else:
            stated = benchmarks[name]
            panel.set_ylabel(", ".join(filter(None, (stated["title"], stated["metric"]))))
        _panel(panel, result, block, name)
    handles, labels = [], []
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _panel(axes: Axes, result: Result, block: Mapping[str, Any], benchmark: str) -> None:
    rows = block["rows"]
    cells = [
        result["variants"][row["variant"]]["summary"]["evaluate"].get(benchmark, {"values": []})
        for row in rows
    ]
    drawn = [i for i, cell in enumerate(cells) if cell["values"]]
    means = [cells[i]["mean"] for i in drawn]
    if all(_is_number(row["label"]) for row in rows):
        axes.plot(drawn, means, color="#9aa5b1", lw=1.2, zorder=1)
    several = len(result["settings"]["seeds"]) > 1
    spread = "lowest to highest seed" if several else "95 % over the questions"
    for i in drawn:
        default = rows[i]["variant"] == block["default"]
        color = COLORS["vlora" if default else "llava"]
        label = "default" if default else None
        cell = cells[i]
        if cell["low"] is not None:
            ends = [cell["low"], cell["high"]]
            axes.plot([i, i], ends, color=color, lw=1.4, label=spread, zorder=2)
        axes.plot([i], [cell["mean"]], "o", color=color, ms=6, label=label, zorder=3)
        if len(cell["values"]) > 1:
            axes.plot([i] * len(cell["values"]), cell["values"], "_", color=color, ms=9, zorder=2)
    _levels(axes, result, rows, benchmark)
    long = max(len(row["label"]) for row in rows) > _LONG
    axes.set_xticks(
        range(len(rows)),
        [row["label"] for row in rows],
        rotation=20 if long else 0,
        ha="right" if long else "center",
    )
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_title(block["title"], loc="left", fontsize=9.5)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _levels(axes: Axes, result: Result, rows: list[dict[str, str]], benchmark: str) -> None:
    """Chance, and what the variants reach without the image."""
    chance = result["benchmarks"][benchmark]["chance"]
    if chance is not None:
        axes.axhline(chance, color="#1f2933", lw=1, ls=(0, (3, 2)), label="chance")
    for i, row in enumerate(rows):
        blind = result["variants"][row["variant"]]["summary"].get("blind", {}).get(benchmark)
        if blind and blind["values"]:
            axes.plot(
                [i], [blind["mean"]], "x", color=COLORS["blind"], ms=6, label="without the image"
            )
