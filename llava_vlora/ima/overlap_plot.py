"""Heat maps of how much masks overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import new_figure
from .overlap import Agreement, Overlap, Pairs
from .view_plots import grid


def layers_plot(overlap: Overlap, title: str) -> Figure:
    """Overlap of two masks in every linear layer: blocks along, modules down, IoU and normalised IoU."""
    modules = list(dict.fromkeys(name.partition(".")[2] for name in overlap.places))
    blocks = list(overlap.blocks)
    figure, panels = new_figure(10.5, 1.4 + 0.28 * len(modules) * 2, 2, rows=2)
    found = [[overlap.places.get(f"{b}.{m}") for b in blocks] for m in modules]
    names = [module.rpartition(".")[2] for module in modules]
    for axes, kind in zip(panels, ("IoU", "normalised IoU"), strict=True):
        _heat(axes, _values(found, kind), names, [str(b) for b in blocks])
        axes.set_xlabel("Block")
    mean = overlap.mean
    panels[0].set_title(
        f"{title}: IoU, mean {mean.iou:.3f}, chance {mean.chance:.3f}", fontsize=9.5, loc="left"
    )
    panels[1].set_title(
        "normalised IoU, 0 at chance and 1 at best"
        + ("" if mean.normalised is None else f", mean {mean.normalised:.3f}"),
        fontsize=9.5,
        loc="left",
    )
    return figure


def pairs_plot(pairs: Pairs) -> Figure:
    """Mean overlap of each two masks, IoU and normalised IoU, with the numbers written in."""
    names = list(pairs.names)
    cells, written = 0.62 * max(2, len(names)), 0.08 * max(map(len, names))
    figure, panels = grid(cells + written + 1.1, cells + 0.7 * written + 0.5, 2)
    found = [[_pair(pairs, a, b) for b in names] for a in names]
    for axes, kind in zip(panels, ("IoU", "normalised IoU"), strict=True):
        values = _values(found, kind)
        _heat(axes, values, names, names)
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    _write(axes, j, i, value)
        axes.set_title(kind, fontsize=9.5, loc="left")
    return figure


def _write(axes: Axes, x: int, y: int, value: float) -> None:
    shown = round(value, 2) + 0.0  # no -0.00
    color = "white" if value > 0.6 else "black"
    axes.text(x, y, f"{shown:.2f}", ha="center", va="center", fontsize=8, color=color)


def _pair(pairs: Pairs, first: str, second: str) -> Agreement | None:
    return None if first == second else pairs.between(first, second).mean


def _values(found: Sequence[Sequence[Agreement | None]], kind: str) -> list[list[float]]:
    """NaN where there is no value, which stays white."""

    def value(one: Agreement | None) -> float:
        shown = None if one is None else one.iou if kind == "IoU" else one.normalised
        return float("nan") if shown is None else shown

    return [[value(one) for one in row] for row in found]


def _heat(
    axes: Axes, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    every = -(-len(columns) // 16)
    axes.set_xticks(range(0, len(columns), every), list(columns)[::every])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.grid(visible=False)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)
