"""Accuracy against FLOPs: LLaVA, LLaVA under plans, VLoRA; and measured time against what is skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import INK, PALETTE
from .view_plots import grid, legend

#: Inches of a panel.
_ALONE, _BESIDE = 7.0, 5.0
_UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


@dataclass(frozen=True)
class Tradeoff:
    """One model under one plan or none."""

    series: str
    """Points of a series have one colour and are joined in their order."""
    label: str
    flops: float
    """To the first token."""
    accuracy: float
    interval: tuple[float, float] | None = None
    """Lower and upper end, where known."""


@dataclass(frozen=True)
class Timed:
    """Time and FLOPs under one plan, of the dense model's."""

    series: str
    """Points of a series have one colour and are joined in their order."""
    ratio: float
    """Of the rows that are skipped."""
    time: tuple[float, float, float]
    """Median, lowest and highest round."""
    flops: float


def tradeoff_plot(panels: Mapping[str, Sequence[Tradeoff]]) -> Figure:
    """Accuracy against FLOPs to the first token, a panel for each metric.

    Args:
        panels: Metric -> points in the order in which a series is joined, such as by ratio.
    """
    figure, axes, colors = _panels(panels, 3.6)
    for one, (metric, points) in zip(axes, panels.items(), strict=True):
        most = max(point.flops for point in points)
        size, unit = next((u for u in _UNITS if most >= u[0]), _UNITS[-1])
        for series in dict.fromkeys(point.series for point in points):
            own = [p for p in points if p.series == series]
            x, y, color = [p.flops / size for p in own], [p.accuracy for p in own], colors[series]
            one.plot(x, y, "o-", color=color, label=series, markersize=6)
            for point, at in zip(own, x, strict=True):
                one.annotate(
                    point.label,
                    (at, point.accuracy),
                    (7, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
                if point.interval is not None:
                    one.vlines(at, *point.interval, color=color, lw=1)
        one.set_xlabel(f"{unit} to the first token, computed")
        one.set_ylabel(metric)
        one.set_xlim(0, 1.15 * most / size)
        one.margins(y=0.15)
    legend(figure, axes)
    return figure


def times_plot(panels: Mapping[str, Sequence[Timed]]) -> Figure:
    """Measured time and computed FLOPs against the ratio of rows that are skipped, both of the dense model's.

    Args:
        panels: What was measured, such as a number of visual tokens -> points.
    """
    figure, axes, colors = _panels(panels, 3.0)
    for one, (title, points) in zip(axes, panels.items(), strict=True):
        for series in dict.fromkeys(point.series for point in points):
            own = [p for p in points if p.series == series]
            x, color = [p.ratio for p in own], colors[series]
            one.plot(x, [p.time[0] for p in own], "o-", color=color, label=f"{series}: time")
            one.vlines(x, [p.time[1] for p in own], [p.time[2] for p in own], color=color, lw=1)
            one.plot(
                x, [p.flops for p in own], "s:", color=color, mfc="none", label=f"{series}: FLOPs"
            )
        one.axhline(1, color=INK, lw=1, ls=(0, (3, 2)), label="dense")
        one.set_title(title, loc="left", fontsize=9.5)
        one.set_xlabel("Share of the rows that are skipped")
        one.set_ylim(bottom=0)
    axes[0].set_ylabel("Of the dense model's")
    legend(figure, axes)
    return figure


def _panels(
    panels: Mapping[str, Sequence[Tradeoff]] | Mapping[str, Sequence[Timed]], height: float
) -> tuple[Figure, list[Axes], dict[str, str]]:
    """A panel for each, and a colour for each series."""
    figure, axes = grid(_ALONE if len(panels) == 1 else _BESIDE, height, len(panels))
    names = dict.fromkeys(point.series for points in panels.values() for point in points)
    return figure, axes, dict(zip(names, cycle(PALETTE), strict=False))
